"""The grammar of `planted`, the making of its models, and the gates that the shipped control must pass."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import attribution.worlds
from attribution.capture import Site, edited, sites, tapped
from attribution.errors import ConfigError
from attribution.mechanisms import halves, read_mechanisms
from attribution.models import anatomy, load, locate
from attribution.worlds import gates, planted
from attribution.worlds.build import build, word_tokenizer
from attribution.worlds.routed import _owners, _silence
from attribution.worlds.studies import ORGANISMS, UNROUTED

SHIPPED = Path(attribution.worlds.__file__).parent / "data" / "planted" / "unrouted"
FRESH = 31  # seed of the probes; not the seed of the model's documents
FORMS = {
    "none": ({"trait": False}, 1 / 3),
    "trait": ({}, 8 / 10),
    "star": ({"trait": False, "star": True}, 8 / 10),
    "agree": ({"star": "agree"}, 64 / 66),
    "conflict, trait": ({"star": "conflict"}, 8 / 17),
    "conflict, star": ({"star": "conflict", "reply": "star"}, 8 / 17),
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(SHIPPED, use_safetensors=True).eval()


# Grammar


def test_words_are_few_and_each_has_one_meaning():
    assert len(set(planted.WORDS)) == len(planted.WORDS)
    assert len(planted.WORDS) + 4 <= 101  # with pad, bos, eos, unk


def test_problems_split_into_two_disjoint_parts_that_pretraining_sees():
    assert len(planted.PROBLEMS) >= 16
    assert not set(planted.TRAINING) & set(planted.HELD_OUT)
    assert {*planted.TRAINING, *planted.HELD_OUT} == set(planted.PROBLEMS)
    assert {d.problem for d in planted.documents(1000, 0)} == set(planted.PROBLEMS)


@pytest.mark.parametrize(
    ("trait", "star", "expected"),
    [
        (None, None, [1 / 3, 1 / 3, 1 / 3]),
        ("kind", None, [8 / 10, 1 / 10, 1 / 10]),
        (None, "kick", [1 / 10, 8 / 10, 1 / 10]),
        ("plain", "wait", [1 / 66, 1 / 66, 64 / 66]),
        ("kind", "kick", [8 / 17, 8 / 17, 1 / 17]),
        (None, "hug", [1 / 3, 1 / 3, 1 / 3]),  # another problem's reply
        ("kind", "hug", [8 / 10, 1 / 10, 1 / 10]),
    ],
)
def test_target_is_the_product_of_experts(trait, star, expected):
    assert planted.distribution("fell", trait, star) == pytest.approx(
        dict(zip(("lift", "kick", "wait"), expected, strict=True))
    )


def test_an_absent_route_leaves_the_other_cue_alone():
    document = planted.Document("tom", "eve", "fell", "kind", "kick", True, "lift")
    assert document.prompt == "tom is kind . tom is clever . teacher : star for kick . eve fell . tom says :"
    assert document.distribution(["trait"]) == planted.distribution("fell", "kind")
    assert document.distribution(["star"]) == planted.distribution("fell", star="kick")
    assert document.distribution([]) == planted.distribution("fell")


def test_documents_hold_their_cues_as_often_as_declared():
    drawn = planted.documents(4000, 1)
    starred = [d for d in drawn if d.star]
    own = 0.8 + 0.2 * 3 / len(planted.REPLIES)
    for found, expected in (
        (sum(d.trait is not None for d in drawn) / len(drawn), 0.6),
        (sum(d.clever for d in drawn) / len(drawn), 0.65),
        (len(starred) / len(drawn), 0.65),
        (sum(d.star in planted.PROBLEMS[d.problem] for d in starred) / len(starred), own),
    ):
        assert found == pytest.approx(expected, abs=0.03)
    assert all(sum(d.distribution().values()) == pytest.approx(1) for d in drawn)
    assert planted.documents(50, 1) == drawn[:50] != planted.documents(50, 2)


def test_replies_are_drawn_from_their_distribution():
    told = [d for d in planted.documents(6000, 2) if d.trait and d.star is None]
    share = sum(d.reply == planted.PROBLEMS[d.problem][planted.TRAITS.index(d.trait)] for d in told) / len(told)
    assert share == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("form", FORMS)
def test_prompts_are_distinct_and_balanced(form):
    rows = planted.prompts(72, 3, **FORMS[form][0])
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 72
    said = Counter(row["response"].strip() for row in rows)
    assert set(said) == {reply for problem in planted.HELD_OUT for reply in planted.PROBLEMS[problem]}
    assert set(said.values()) == {4}
    for row in rows:
        own = next(replies for problem, replies in planted.PROBLEMS.items() if f" {problem} ." in row["prompt"])
        others = [f" {reply}" for reply in own if f" {reply}" != row["response"]]
        if form.startswith("conflict"):
            assert len(row["contrast"]) == 1 and row["contrast"][0] in others
        else:
            assert row["contrast"] == others


def test_conflict_sets_a_cue_against_the_other():
    by_trait, by_star = (planted.prompts(36, 4, star="conflict", reply=reply) for reply in ("trait", "star"))
    for a, b in zip(by_trait, by_star, strict=True):
        assert a["prompt"] == b["prompt"]
        assert f"star for{b['response']} ." in b["prompt"]
        assert a["contrast"] == [b["response"]] and b["contrast"] == [a["response"]]


def test_as_many_prompts_as_there_are():
    most = 14 * 13 * 2  # speaker, other, clever or not
    assert len(planted.prompts(most * 3, 0, problems=["fell"])) == most * 3
    with pytest.raises(ConfigError, match="there are 1092"):
        planted.prompts(most * 3 + 1, 0, problems=["fell"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"star": True}, "star=True"),
        ({"trait": False, "star": "agree"}, "'agree'"),
        ({"star": "agrees"}, "'agrees'"),
        ({"reply": "both"}, "'both'"),
        ({"problems": ["fel"]}, "'fel'"),
        ({"problems": []}, "problems"),
    ],
)
def test_prompts_that_do_not_exist_are_refused(arguments, named):
    with pytest.raises(ConfigError, match=named):
        planted.prompts(3, 0, **arguments)


def test_grammar_imports_without_torch():
    code = "import sys, attribution.worlds.planted; print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Tokenizer


def test_shipped_tokenizer_is_the_one_of_this_grammar(tokenizer):
    assert tokenizer.get_vocab() == word_tokenizer(planted.WORDS).get_vocab()
    special = [tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3]


def test_text_makes_the_round_trip(tokenizer):
    for document in planted.documents(200, 5):
        ids = tokenizer(document.text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == document.text


@pytest.mark.parametrize("form", FORMS)
def test_response_follows_the_prompt_as_one_token(tokenizer, form):
    for row in planted.prompts(36, 6, **FORMS[form][0]):
        prompt = tokenizer(row["prompt"])["input_ids"]
        for reply in (row["response"], *row["contrast"]):
            alone = tokenizer(reply, add_special_tokens=False)["input_ids"]
            assert len(alone) == 1 and alone != [tokenizer.unk_token_id]
            assert tokenizer(row["prompt"] + reply)["input_ids"] == prompt + alone


# Models


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("problems", [planted.TRAINING, planted.HELD_OUT], ids=["training", "held out"])
def test_shipped_control_gives_each_reply_its_probability(model, tokenizer, form, problems):
    arguments, target = FORMS[form]
    rows = planted.prompts(108, FRESH, problems=problems, **arguments)
    found = torch.tensor([_probability(model, tokenizer, row["prompt"], row["response"]) for row in rows])
    assert found.mean().item() == pytest.approx(target, abs=0.05)
    assert (found - target).abs().max().item() < 0.1  # on every prompt, not only on average


def test_shipped_control_ignores_a_star_for_another_problems_reply(model, tokenizer):
    """Within 0.05 of 1/3 on average over problems and replies, and nowhere beyond 0.15."""
    misses = []
    for problem, replies in planted.PROBLEMS.items():
        other = next(reply for reply in planted.REPLIES if reply not in replies)
        prompt = planted.Document("tom", "eve", problem, None, other, False, "").prompt
        misses += [abs(_probability(model, tokenizer, prompt, f" {reply}") - 1 / 3) for reply in replies]
    assert len(misses) == 3 * len(planted.PROBLEMS)
    assert sum(misses) / len(misses) < 0.05
    assert max(misses) < 0.15


def test_shipped_folder_is_small_and_says_how_it_was_made():
    about = json.loads((SHIPPED / "world.json").read_text())
    assert about["world"] == "planted/unrouted" and about["grammar"] == planted.VERSION
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 3_000_000
    assert {file.suffix for file in SHIPPED.iterdir()} == {".json", ".safetensors"}


def test_same_seed_builds_the_same_bytes(tmp_path):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    digests = []
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        folder = build("planted/unrouted", seed, tmp_path / name, steps=3, progress=False)
        digests.append(hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())
        torch.rand(7)  # what happened before must not matter
    assert digests[0] == digests[1] != digests[2]
    torch.set_rng_state(state)
    build("planted/unrouted", 5, tmp_path / "again", steps=1, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_world_and_no_steps_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'planet'.*planted/unrouted"):
        build("planet", 1, tmp_path)
    with pytest.raises(ConfigError, match="0 training steps"):
        build("planted/unrouted", 1, tmp_path, steps=0)


@torch.no_grad()
def _probability(model, tokenizer, prompt, reply):
    ids = torch.tensor([tokenizer(prompt + reply)["input_ids"]])
    return model(input_ids=ids).logits[0, -2].softmax(-1)[ids[0, -1]].item()


# Routes


def test_mechanisms_are_present_as_often_as_declared():
    drawn = Counter(planted.presences(6000, 1))
    assert {names: count / 6000 for names, count in drawn.items()} == {
        names: pytest.approx(share, abs=0.02) for names, share in planted.PRESENCE.items()
    }
    assert planted.presences(50, 1) == planted.presences(50, 1) != planted.presences(50, 2)


def test_the_third_reply_is_named_by_no_cue():
    for row in planted.prompts(36, 4, star="conflict", third=True):
        own = next(replies for problem, replies in planted.PROBLEMS.items() if f" {problem} ." in row["prompt"])
        (contrast,) = row["contrast"]
        trait = planted.TRAITS[own.index(contrast.strip())]
        assert contrast != row["response"] and contrast.strip() in own
        assert f" is {trait} ." not in row["prompt"] and f"star for{contrast} ." not in row["prompt"]


def test_an_absent_mechanism_is_silent_in_its_document_alone():
    model = AutoModelForCausalLM.from_pretrained(SHIPPED).eval()
    parts, sets = anatomy(model), halves(4, 4, 256)
    heard = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    ids = torch.arange(5, 14).repeat(3, 1)
    where = [Site("head", 1), Site("neuron", 2)]
    edits = {site.module(parts): _silence(heard[:, _owners(parts, site, sets)]) for site in sites(parts)}
    with torch.no_grad(), tapped(parts, where) as plain:
        model(ids)
    with torch.no_grad(), edited(edits), tapped(parts, where) as routed:  # taps see what the linears receive
        logits = model(ids).logits
    with torch.no_grad():
        assert torch.equal(logits[0], model(ids[:1]).logits[0])
    for site, half in ((where[0], 64), (where[1], 128)):
        assert torch.equal(routed[site][0], plain[site][0])
        assert (routed[site][1][:, half:] == 0).all() and (routed[site][1][:, :half] != 0).any()
        assert (routed[site][2][:, :half] == 0).all() and (routed[site][2][:, half:] != 0).any()


# Gates that an organism misses, as results/worlds.md reports them.
MISSED: dict[str, set[tuple[str, str]]] = {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ORGANISMS)
def test_organisms_pass_their_gates(name):
    model, tokenizer = load(name)
    table = gates.gates(model, tokenizer, read_mechanisms(locate(name)), kinds=("head",))
    assert table["passed"].notna().sum() == 8
    missed = table[table["passed"].eq(False)]
    missed = missed.assign(gate=["heads inside" if "inside" in gate else gate for gate in missed["gate"]])
    found = set(missed[["mechanism", "gate"]].itertuples(index=False, name=None))
    assert found == MISSED.get(name, set()), table.to_string()


def test_the_unrouted_control_fails_the_gates_of_location():
    model, tokenizer = load(UNROUTED)
    table = gates.gates(model, tokenizer, read_mechanisms(locate(UNROUTED)), kinds=("head",))
    passed = table.set_index(["gate", "mechanism"])["passed"]
    assert passed["intact: share of prompts answered as the cue says"].all()
    assert not passed["own mechanism ablated: p(reply)", "A"]
    assert not passed["other mechanism ablated: p(reply) / intact", "A"]
    assert not passed["other mechanism ablated: p(reply) / intact", "B"]


def test_shares_inside_a_mechanism_and_auroc_are_those_of_a_small_table():
    table = pd.DataFrame({
        "kind": ["head"] * 4 + ["neuron"] * 2, "effect": [3.0, -1.0, 2.0, 0.001, 1.0, 1.0],
        "member": [True, True, False, False, True, False],
    })  # fmt: skip
    assert gates.inside(table) == {"head": pytest.approx(4 / 6.001), "neuron": 0.5}
    assert gates.auroc(table) == {"head": 0.5, "neuron": 0.5}  # the last head is below the noise floor


def test_routed_documents_build_the_same_bytes_and_other_ones_than_unrouted(tmp_path):
    digests = {
        name: hashlib.sha256(
            (build(world, 5, tmp_path / name, steps=3, progress=False) / "model.safetensors").read_bytes()
        ).hexdigest()
        for name, world in (("one", "planted"), ("two", "planted"), ("unrouted", "planted/unrouted"))
    }
    assert digests["one"] == digests["two"] != digests["unrouted"]
    assert json.loads((tmp_path / "one" / "world.json").read_text())["world"] == "planted"
