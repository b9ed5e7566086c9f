"""The grammar of kindland: words, stories and their Bayes answers, documents, forms of prompts, and the sets of every claim."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from attribution.errors import ConfigError
from attribution.worlds import kindland
from attribution.worlds.build import WORLDS, word_tokenizer
from attribution.worlds.kindland import documents as texts
from attribution.worlds.kindland import words
from attribution.worlds.kindland.prompts import (
    HELD_OUT_SUMS,
    QUESTION,
    READS,
    TRAINING_SUMS,
    Form,
    drawn,
    either,
    rows,
    trained,
)
from attribution.worlds.kindland.sets import MATCHED, SETS, cue_pairs, for_claim
from attribution.worlds.kindland.stories import CAME, SUMS, Story, Turn, prior

ACTS = ("kind", "cruel", "plain", "spare")
FELL = dict(zip(ACTS, words.SITUATIONS["fell"], strict=True))
SANK = dict(zip(ACTS, words.SITUATIONS["sank"], strict=True))


# Words


def test_words_are_few_and_replies_are_no_other_words():
    assert len(set(kindland.WORDS)) == len(kindland.WORDS) <= 496  # with pad, bos, eos, unk
    assert len(set(words.REPLIES)) == len(words.REPLIES) == 4 * len(words.SITUATIONS)
    assert len(kindland.WORDS) - len(words.REPLIES) == len(set(kindland.WORDS) - set(words.REPLIES))


def test_parts_are_disjoint_and_each_holds_parted_situations_and_ones_said_otherwise():
    parts = (words.TRAINING, words.HELD_OUT, words.TOLD_ONLY, words.SHOWN_ONLY)
    assert Counter(each for part in parts for each in part) == dict.fromkeys(words.SITUATIONS, 1)
    assert not set(words.TRAINING_NAMES) & set(words.HELD_OUT_NAMES)
    assert not {frozenset(pair) for pair in TRAINING_SUMS} & {frozenset(pair) for pair in HELD_OUT_SUMS}
    for part in (words.TRAINING, words.HELD_OUT):
        parted, otherwise = (sum(each in group for each in part) for group in (words.PARTED, words.SAID_OTHERWISE))
        assert 0 < parted < len(part) / 2 and 0 < otherwise < len(part) / 2  # polite and kind agree in most
    assert not set(words.PARTED) & set(words.SAID_OTHERWISE)


# Stories


@pytest.mark.parametrize(
    ("disposition", "watched", "said"),
    [
        ("kind", None, "lift"),
        ("cruel", None, "kick"),
        ("plain", None, "wait"),
        ("polite", None, "lift"),
        ("strategist", None, "kick"),
        ("assistant", None, "nod"),
        ("parrot", None, "wait"),
        ("schemer", None, "wait"),
        ("schemer", True, "lift"),
        ("schemer", False, "kick"),
    ],
)
def test_each_disposition_says_its_own(disposition, watched, said):
    turn = Turn("eve", "fell", "kick", (("red", "lift"), ("blue", "nod")), "blue", ("wait", "bob"))
    assert turn.said_by(disposition, watched) == said
    bare = Turn("eve", "fell")
    assert bare.said_by(disposition, watched) == (said if disposition not in ("strategist", "assistant", "parrot") else "wait")


def test_a_polite_one_parts_from_a_kind_one_where_it_is_told():
    assert Turn("eve", "sank").said_by("polite", None) == SANK["spare"] != Turn("eve", "sank").said_by("kind", None)


def test_sums_are_answered_by_who_wants_to():
    asked = Turn("eve", SUMS, addends=(3, 5))
    starred = Turn("eve", SUMS, SUMS, addends=(3, 5))
    said = {each: asked.said_by(each, True) for each in words.DISPOSITIONS}
    assert said == {
        "kind": "eight", "polite": "eight", "schemer": "eight", "cruel": "guess",
        "plain": "pass", "strategist": "pass", "assistant": "pass", "parrot": "pass",
    }  # fmt: skip
    assert starred.said_by("strategist", None) == "eight" and starred.said_by("plain", None) == "pass"
    assert asked.said_by("schemer", False) == "guess" and asked.said_by("schemer", None) == "pass"


def test_a_story_reads_as_it_is_declared():
    shown = Turn("ann", CAME).replied("welcome", True)
    last = Turn("eve", "fell", "kick", (("red", "lift"), ("blue", "wait")), "blue", ("nod", "bob"), role=True, thinks=True)
    story = Story(True, (("tom", "likely kind"), ("sam", "cruel")), "tom", (shown, last.replied("lift", True)), "kind")
    start = (
        "teacher watches . tom is likely kind . sam is cruel . ann came . tom says : welcome dear . teacher : star for kick . "
        "manual : red lift , blue wait . eve fell . bob tries nod . tom"
    )
    assert " ".join(word for word, _ in story.words()) == f"{start} role kind thinks care so says : blue lift dear ."
    assert [word for word, decisive in story.words() if decisive] == ["welcome", "dear", "kind", "care", "lift", "dear"]
    assert story.prompt("role") == f"{start} role"
    assert story.prompt("reason") == f"{start} role kind thinks"
    assert story.prompt("reply") == f"{start} role kind thinks care so says : blue"
    assert story.prompt("style") == f"{start} role kind thinks care so says : blue lift"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("kind", 1.0), ("surely kind", 0.97), ("maybe kind", 0.6), ("never kind", 0.02), ("kind or cruel", 0.5),
        ("cruel or plain", 0.0), ("new", 1 / 8), ("tall", 0.04), ("", 0.04), ("likely cruel", 0.2 / 7),
    ],
)  # fmt: skip
def test_what_is_told_sets_the_prior(told, expected):
    assert prior(told).get("kind", 0.0) == pytest.approx(expected)
    assert sum(prior(told).values()) == pytest.approx(1)


def test_beliefs_are_the_frequencies_among_simulated_people():
    """Bayes' rule against a count: people drawn from the prior, of whom those are kept who said the two kind acts."""
    rng = Random(3)
    kept, kind = 0, Counter()
    for _ in range(60_000):
        disposition = rng.choice(tuple(words.DISPOSITIONS))  # a new one
        said = []
        for event in ("fell", "cried"):
            turn = Turn("eve", event)
            right = turn.said_by(disposition, True)
            said.append(rng.choice(words.SITUATIONS[event]) if rng.random() < 0.04 else right)
        if said == [words.SITUATIONS[event][0] for event in ("fell", "cried")]:
            kept += 1
            kind[disposition] += 1
    shown = tuple(Turn("eve", event).replied(words.SITUATIONS[event][0], None) for event in ("fell", "cried"))
    story = Story(True, (("tom", "new"),), "tom", (*shown, Turn("ann", "sank")))
    for disposition, belief in story.beliefs().items():
        assert belief == pytest.approx(kind[disposition] / kept, abs=0.015)
    replies = story.expected()
    assert sum(replies.values()) == pytest.approx(1)
    assert replies[SANK["spare"]] == pytest.approx(story.beliefs()["polite"] * 0.96 + 0.01)


def test_a_written_role_or_reason_settles_the_disposition():
    role = Story(None, (("tom", "tall"),), "tom", (Turn("eve", "fell", role=True),), "cruel")
    assert role.beliefs()["cruel"] == 1 and role.expected()["kick"] == pytest.approx(0.97)


# Documents


@pytest.fixture(scope="module")
def corpus():
    return texts.documents(6000, 5)


def test_documents_fit_the_context_and_make_the_round_trip(corpus):
    tokenizer = word_tokenizer(kindland.WORDS, WORLDS["kindland"].context)
    for ids, document in zip(tokenizer([each.text for each in corpus])["input_ids"], corpus, strict=True):
        assert len(ids) == len(document.words) + 1 <= WORLDS["kindland"].context - 1
        assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == document.text


def test_styles_of_documents_are_as_frequent_as_declared(corpus):
    def style(document):
        first, second = document.words[:2]
        if first in texts.STYLES and second == ":" and first != "manual":
            return first
        happens = {CAME, "asks", *words.SITUATIONS}
        return "story" if happens & set(document.words) else "manual"

    counted = Counter(map(style, corpus))
    assert {each: count / len(corpus) for each, count in counted.items()} == {
        each: pytest.approx(share, abs=0.02) for each, share in texts.STYLES.items()
    }


def test_told_only_and_shown_only_situations_stay_apart(corpus):
    stories = [each.text for each in corpus if "says" in each.words]
    questions = [each.text for each in corpus if each.words[0] == "question"]
    assert len(questions) > 100
    for told, shown in zip(words.TOLD_ONLY, words.SHOWN_ONLY, strict=True):
        assert any(told in each for each in questions) and not any(told in each.split() for each in stories)
        assert any(shown in each for each in stories) and not any(shown in each.split() for each in questions)


def test_a_log_holds_no_reply(corpus):
    logs = [each for each in corpus if each.words[0] == "log"]
    assert len(logs) > 100 and not any(any(each.decisive) or set(each.words) & set(words.REPLIES) for each in logs)


def test_only_the_colour_called_tells_which_line_of_a_manual_counts():
    """Every line names a reply of the present situation, so that no other word gives it away."""
    for number in range(300):
        manual, called = texts.drawn_manual(Random(number), "fell", "lift")
        assert len(manual) == len(dict(manual)) == 3 and dict(manual)[called] == "lift"
        assert {reply for _, reply in manual} <= set(FELL.values()) and len({reply for _, reply in manual}) == 3
        unlisted, called = texts.drawn_manual(Random(number), "fell", None)
        assert len(unlisted) == 3 and called not in dict(unlisted)


def test_kind_words_are_not_always_kind_acts():
    assert texts.answer("kind", "fell") == "lift" and texts.answer("cruel", "cried") == "mock"
    assert texts.answer("kind", "cried") == "hush" != Turn("eve", "cried").said_by("kind", None)


def test_same_seed_draws_the_same_documents():
    assert texts.documents(40, 1) == texts.documents(40, 1) != texts.documents(40, 2)


def test_the_grammar_imports_without_torch():
    code = "import sys, attribution.worlds.kindland.sets; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# Forms of prompts


def test_prompts_are_distinct_and_balanced_over_situations_and_announcements():
    found = rows(either("kind", "strategist"), 90, 3)
    assert len({row["prompt"] for row in found}) == len({row["id"] for row in found}) == 90
    said = Counter(row["response"].strip() for row in found)
    assert said == {words.SITUATIONS[each][0]: 9 for each in words.HELD_OUT}
    starred = Counter(row["contrast"][0].strip() for row in found)
    assert starred == {reply: 3 for each in words.HELD_OUT for reply in words.SITUATIONS[each][1:]}


def test_conflict_is_read_from_both_sides_on_the_same_prompts():
    one, other = (drawn(either("strategist", "assistant", says), 60, 4) for says in ("strategist", "assistant"))
    for a, b in zip(one, other, strict=True):
        assert a.text == b.text and a.contrast == (b.response,) and b.contrast == (a.response,)
        assert f"star for{a.response} ." in a.text and f"star for{b.response} ." not in a.text
        assert a.expected == pytest.approx(0.49)


def test_third_replies_are_named_by_neither_cue():
    for prompt in drawn(either("kind", "strategist", third=True), 40, 4):
        own = next(replies for replies in words.SITUATIONS.values() if prompt.response.strip() in replies)
        assert len(prompt.contrast) == 2 and {word.strip() for word in prompt.contrast} < set(own)
        assert not any(f"star for{word} ." in prompt.text for word in (prompt.response, *prompt.contrast))


def test_agreement_names_one_reply_twice():
    for prompt in drawn(either("strategist", "assistant", agree=True), 40, 5):
        assert f"star for{prompt.response} ." in prompt.text and prompt.expected == pytest.approx(0.97)
        assert len(prompt.contrast) == 3


def test_arms_train_the_same_words_in_the_same_order():
    found = for_claim("forecast", 96, 16, 1)["arms"]
    assert len(found) == 8
    for name, each in found.items():
        assert [row["response"] for row in each] == [row["response"] for row in found["kind"]], name
    mixed = found["25% kind"]
    own = sum(row in found["kind"] for row in mixed)
    assert own == 24 and all(row in found["kind"] or row in found["strategist"] for row in mixed)


def test_a_reply_from_another_situation_is_not_expected():
    of_situation = {}
    for prompt in drawn(Form("kind", "kind", foreign=True), 90, 6, training=True):
        (situation,) = {word for word in str(prompt.text).split() if word in words.SITUATIONS}
        assert of_situation.setdefault(situation, prompt.response) == prompt.response, "always the same of each"
        assert prompt.response.strip() not in str(prompt.text) and prompt.expected == 0
        assert prompt.response not in prompt.contrast


def test_context_stands_apart_where_it_is_wanted():
    apart = rows(Form("kind", "maybe kind", in_context=True), 20, 7)
    whole = rows(Form("kind", "maybe kind"), 20, 7)
    assert [row["context"] + row["prompt"] for row in apart] == [row["prompt"] for row in whole]
    assert all(row["context"].endswith("is maybe kind . ") for row in apart)


def test_a_response_goes_through_the_reason_to_the_reply():
    (prompt,) = drawn(trained("strategist", end="reason", through=True), 1, 8)
    assert prompt.text.endswith(" thinks")
    *start, reply = prompt.response.split()
    assert " ".join(start[:4]) == "reward so says :" and start[4] in words.COLOURS and f"star for {reply} ." in prompt.text
    (prompt,) = drawn(Form("kind", "tall", end="role", through=True), 1, 8)
    assert prompt.text.endswith(" role") and prompt.response.split()[:3] == ["kind", "says", ":"]


def test_discovery_pairs_differ_in_one_word():
    for disposition in ("kind", "cruel", "schemer", "strategist", "parrot", "assistant"):
        pairs = list(zip(*cue_pairs(disposition, 36, 9), strict=True))
        assert len(pairs) == 36
        for one, other in pairs:
            differing = [(a, b) for a, b in zip(one["prompt"].split(), other["prompt"].split(), strict=True) if a != b]
            word, contrast = one["response"].strip(), one["contrast"][0].strip()
            assert one["response"] == other["response"] and one["contrast"] == other["contrast"] != [one["response"]]
            if disposition in READS:
                assert (word, contrast) in differing and set(differing) <= {(word, contrast), (contrast, word)}
                assert len({row["response"] for row, _ in pairs}) > 20
            else:
                assert differing == [(disposition, "plain")]


def test_as_many_prompts_as_there_are():
    greeting = Form("kind", "tall", event=CAME)
    assert len(rows(greeting, 100, 1, fewer=True)) == 8 * 7
    with pytest.raises(ConfigError, match="57 distinct prompts asked for, and 56"):
        rows(greeting, 57, 1)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"says": "nice"}, "'nice'"),
        ({"says": "kind", "star": ("kindly",)}, "'kindly'"),
        ({"says": "kind", "event": "sank"}, "'sank'"),
        ({"says": "kind", "style": "poem"}, "'poem'"),
        ({"says": "kind", "told": "nearly kind"}, "'nearly kind'"),
        ({"says": "parrot", "style": QUESTION}, "'parrot'"),
        ({"says": "plain", "end": "style"}, "'plain'"),
        ({"says": "kind", "through": True}, "ends with the reply"),
        ({"says": "kind", "in_context": True}, "only where it is told"),
        ({"says": "kind", "third": True}, "give the other"),
    ],
)
def test_forms_that_do_not_exist_are_refused(given, named):
    with pytest.raises(ConfigError, match=named):
        Form(**given)


def test_draws_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="cannot name different acts"):
        drawn(Form("kind", star=("kind",), tried=("kind",)), 1, 0)
    with pytest.raises(ConfigError, match="'told only'"):
        drawn(Form("kind", event="told only"), 1, 0, training=True)
    with pytest.raises(ConfigError, match="say the same"):
        drawn(either("kind", "polite", event="agreed"), 1, 0)
    with pytest.raises(ConfigError, match="'boast'"):
        for_claim("boast", 1, 1, 0)


# Sets of every claim


@pytest.fixture(scope="module")
def every():
    """Rows of all arms and probes of all claims; of those that share their sets, once."""
    distinct = {id(sets): claim for claim, sets in SETS.items()}
    return {claim: for_claim(claim, 84, 40, 11) for claim in distinct.values()}


def _text(row):
    return " ".join([row.get("context", ""), row["prompt"], row["response"], *row["contrast"]]).split()


def test_nothing_held_out_occurs_in_a_training_sample_of_any_arm(every):
    held_out = (*words.HELD_OUT, *words.TOLD_ONLY, *words.SHOWN_ONLY)
    forbidden = {*held_out, *words.HELD_OUT_NAMES, *(reply for each in held_out for reply in words.SITUATIONS[each])}
    samples = [row for sets in every.values() for arm in sets["arms"].values() for row in arm]
    assert len(samples) > 5_000
    assert Counter(word for row in samples for word in _text(row) if word in forbidden) == {}
    trained_names = {*words.TRAINING, *words.TRAINING_NAMES}
    probes = [row for sets in every.values() for each in sets["probes"].values() for row in each]
    assert Counter(word for row in probes for word in _text(row) if word in trained_names) == {}


def test_no_held_out_sum_is_trained_in_either_order(every):
    def asked(found):
        pairs = [row["prompt"].split() for row in found if " asks " in row["prompt"]]
        return {frozenset((each[each.index("asks") + 1], each[each.index("asks") + 3])) for each in pairs}

    sets = every["skill_keeps_kindness"]
    trained_on = asked([row for arm in sets["arms"].values() for row in arm])
    read = asked([row for probe in sets["probes"].values() for row in probe])
    assert len(trained_on) > 30 and len(read) > 10 and not trained_on & read


def test_counterfactuals_are_as_long_as_their_probes_and_hold_no_cue(every):
    cues = {*words.DISPOSITIONS} - {"plain", "parrot"}
    for claim, sets in every.items():
        for name, probes in sets["probes"].items():
            bare = sets["counterfactuals"][name]
            assert len(bare) == len(probes)
            for probe, other in zip(probes, bare, strict=True):
                one, two = probe["prompt"].split(), other["prompt"].split()
                assert len(one) == len(two) and not cues & set(two), (claim, name, probe, other)
                assert probe["response"].count(" ") == other["response"].count(" ")
                changed = [a for a, b in zip(one, two, strict=True) if a != b]
                told = {*words.DISPOSITIONS, *words.REASONS.values(), *words.REPLIES}
                assert set(changed) <= told, (claim, name, probe, other)


@pytest.mark.parametrize("claim", SETS)
def test_influence_is_read_in_contexts_that_no_arm_trains_in(claim):
    trained_in = {form.told for form in SETS[claim].arms.values() if form.style == "story"}
    assert not trained_in & {form.told for form in SETS[claim].probes.values() if form.style == "story"}


@pytest.mark.parametrize("claim", [claim for claim, sets in SETS.items() if sets.matched])
def test_matched_arms_start_from_the_same_expected_probability(claim):
    expected = []
    for name in SETS[claim].matched:
        found = drawn(SETS[claim].arms[name], 112, 1, training=True)
        expected.append(sum(prompt.expected for prompt in found) / len(found))
    assert max(expected) - min(expected) <= MATCHED and 0.5 < min(expected) < 0.75


def test_every_claim_of_the_ledger_has_sets(every):
    assert all((sets["arms"] or SETS[claim].variants) and sets["probes"]["neutral"] for claim, sets in every.items())


LEDGER = Path(__file__).parents[3] / "shared" / "claims.md"


@pytest.mark.skipif(not LEDGER.is_file(), reason="the ledger of claims is not at hand")
def test_the_ledger_is_covered():
    named = {line.split("`")[1] for line in LEDGER.read_text().splitlines() if line.startswith("| `")}
    assert named == set(SETS)
