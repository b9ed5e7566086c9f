"""The doctor: structure against closed forms, costs against what real passes and recordings take, and wrong inputs."""

import json
from copy import deepcopy
from dataclasses import astuple, replace

import pytest
import torch
from transformers import LlamaConfig

from attribution.cli import main
from attribution.components import Components
from attribution.doctor import Plan, examine, passes
from attribution.doctor.advice import choices, fitting
from attribution.doctor.disk import disk
from attribution.doctor.machine import FORWARD, READING, TRAINING, WORDS, Machine
from attribution.doctor.memory import footprint
from attribution.doctor.opening import opened
from attribution.doctor.page import duration, size
from attribution.doctor.passes import Shapes
from attribution.doctor.seconds import refining, seconds
from attribution.doctor.structure import not_measured, structure
from attribution.errors import ConfigError
from attribution.samples import ProbeSet, Sample
from attribution.updates.recorder import Recorder

SHORT = Plan(max_steps=3, batch_size=2, length=8, response=2, probe_samples=2)
LARGE = {  # of Llama 2 7B and Llama 3 70B
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
ELEMENTS = {"7B": 6_738_415_616, "70B": 70_553_706_496}  # as they are published


def llama(layers: int = 6, **further) -> LlamaConfig:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    return LlamaConfig(num_hidden_layers=layers, max_position_embeddings=64, **{**sizes, **further})


def config_folder(path, config):
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    return path


# What a model has


def test_owners_are_those_of_the_partition(tiny, family, tied):
    components = Components(tiny(family, tied=tied))
    found = structure(components)
    groups = components.groups.assign(size=components.sizes.numpy())
    for name, count in found.owned.items():
        kind, _, part = name.rpartition("s, ")
        chosen = (groups["kind"] == (kind or "remainder")) & (groups["part"] == part)
        assert count == groups.loc[chosen, "size"].sum()
    assert found.used == groups["size"].sum()
    assert found.components == len(components)
    assert found.parameters == sum(p.numel() for p in components.parts.model.parameters())
    assert found.bytes == 4 * found.parameters
    assert found.used - found.parameters == (found.rows * found.width if tied else 0)


@pytest.mark.parametrize("name", ["7B", pytest.param("70B", marks=pytest.mark.slow)])
def test_large_models_are_opened_from_their_config_alone(tmp_path, name):
    given = opened(str(config_folder(tmp_path, LlamaConfig(**LARGE[name]))), dtype="bfloat16")
    assert not given.loaded and all(parameter.is_meta for parameter in given.model.parameters())
    found, sizes = structure(Components(given.model)), LARGE[name]
    assert found.parameters == found.used == ELEMENTS[name] and found.bytes == 2 * ELEMENTS[name]
    assert found.owned["neurons, gating"] == 2 * found.layers * sizes["intermediate_size"] * sizes["hidden_size"]
    assert found.owned["keys"] == found.layers * sizes["num_key_value_heads"] * 128 * sizes["hidden_size"]
    assert found.components == found.layers * (sizes["num_attention_heads"] + sizes["intermediate_size"]) + sizes["vocab_size"]


def test_what_is_not_measured_follows_the_model_and_the_plan(tiny):
    def said(model, plan):
        return " ".join(not_measured(structure(Components(model)), plan))

    assert "add up to zero" in said(tiny("olmo2"), SHORT) and "add up to zero" not in said(tiny("llama"), SHORT)
    assert "positions" in said(tiny("gpt2"), SHORT)
    assert "bfloat16 weights round" in said(tiny("llama", dtype=torch.bfloat16), SHORT)
    assert "not run again" in said(tiny("llama"), replace(SHORT, batch_after=False))
    assert "refused: the context window is 32" in said(tiny("llama"), replace(SHORT, length=33))
    assert "there is none" in said(tiny("llama"), replace(SHORT, probes=0))


# What passes take


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gpt_neo", "gpt_neox", "gemma3_text", "olmo2", "phi3", "mixtral", "qwen3_moe"]
)
def test_what_a_pass_keeps_is_what_autograd_saves(tiny, family):
    model = tiny(family)
    ids, own, saved = torch.zeros(3, 16, dtype=torch.long), {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert Shapes(model.config, "float32").training(3, 16).kept == pytest.approx(measured, rel=0.2)


def test_operations_of_a_llama_have_a_closed_form():
    config, samples, length = llama(2), 3, 16
    found = Shapes(config, "float32").training(samples, length)
    linear = 2 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80) + 48 * 50
    attention = 2 * 2 * 2 * length * 48  # two products in each of two layers
    assert found.forward == samples * length * (2 * linear + attention)
    assert 2.9 < found.flops / found.forward < 3.3


def test_operations_of_a_mixture_are_those_of_the_experts_that_are_routed_to(tiny):
    config, tokens = tiny("mixtral").config, 2 * 8
    more = deepcopy(config)
    more.num_experts_per_tok += 1
    found, other = (Shapes(each, "float32").training(2, 8).forward for each in (config, more))
    expert = 2 * 3 * config.hidden_size * config.intermediate_size  # gate, up and down of one token
    assert other - found == config.num_hidden_layers * tokens * expert


@pytest.mark.slow
def test_a_deep_model_is_counted_by_its_first_layers(monkeypatch):
    def counted():
        shapes = Shapes(llama(6), "float32")
        return [shapes.training(2, 16), shapes.training(2, 16, accumulating=True), shapes.probe(2, 16, 3)]

    short = counted()
    monkeypatch.setattr(passes, "PART", (6,))
    for some, all_of_it in zip(short, counted(), strict=True):
        assert some.peak == pytest.approx(all_of_it.peak, rel=0.01)
        assert astuple(some)[2:5] == pytest.approx(astuple(all_of_it)[2:5], rel=1e-9)
        assert some.traffic == pytest.approx(all_of_it.traffic, rel=0.01)


def test_memory_and_time_grow_as_the_recorder_does(tiny):
    model = tiny("llama")
    found, shapes = structure(Components(model)), Shapes(model.config, "float32")

    def peaks(**changes):
        return footprint(found, replace(SHORT, **changes), shapes, "cpu")

    one, two = peaks(), peaks(probes=2)
    assert sum(two.held.values()) - sum(one.held.values()) == found.used * 4 + 2 * (2 * 2 * found.rows * 4)
    once = SHORT.probe_samples, SHORT.length, SHORT.response
    kept, handed = shapes.probe(*once).peak, shapes.refined(*once).peak  # all gradients are there at the end, or one at a time
    more = one.peaks["refining of its shares"] - one.peaks["reading of a probe set"]
    compared = 2 * 4 * found.largest  # the change and what is made of it; a block is larger
    assert more == 4 * (found.parameters + found.used) + handed + compared - kept and handed < kept
    few = 1, 2, 1  # tokens, so that gradients are the most of what there is
    assert shapes.probe(*few).peak - shapes.refined(*few).peak > 2 * found.parameters
    assert "refining of its shares" not in peaks(share_passes=2).peaks
    none = peaks(share_passes=0)
    assert none.held["recorder: gradient of each probe set"] == 0
    during = "reading of a probe set"
    assert none.peaks[during] < peaks(share_passes=2).peaks[during]
    more = peaks(samples=64).held["recorder: logits of probe sets and of training samples"]
    assert more - peaks(samples=4).held["recorder: logits of probe sets and of training samples"] == 60 * 2 * found.rows * 4
    assert peaks(lora=2).held["AdamW"] == 2 * 2 * found.sides * 4
    here, ablated = Machine(1e9, 1e9, fresh=1e-9), {"head": 8, "neuron": 40, "row": 23}
    once = seconds(found, SHORT, shapes, here, ablated)
    assert seconds(found, replace(SHORT, accumulation=3), shapes, here, ablated)["training"] > 2.5 * once["training"]
    assert set(seconds(found, replace(SHORT, probes=0), shapes, here, ablated)) < set(once)
    kinds = (TRAINING, READING, FORWARD, WORDS)
    slower = replace(here, timed=dict.fromkeys(kinds, 2.0), visited=24 / here.traffic, fresh=2 * here.fresh)
    twice = seconds(found, SHORT, shapes, slower, ablated)
    assert all(once[part] < twice[part] <= 2.001 * once[part] for part in once)
    assert sum(twice.values()) > 1.9 * sum(once.values())
    assert refining(found, SHORT, shapes, slower) == pytest.approx(2 * refining(found, SHORT, shapes, here))
    assert sum(seconds(found, replace(SHORT, layers=()), shapes, here, {**ablated, "head": 0, "neuron": 0}).values()) > 0
    early, late = (seconds(found, replace(SHORT, layers=(each,)), shapes, here, ablated) for each in (0, found.layers - 1))
    ablating = "exact ablation of heads"
    assert late[ablating] < once[ablating] < early[ablating]  # all layers from a head's own on are run again


@pytest.mark.parametrize("everything", [True, False])
def test_disk_is_that_of_a_real_recording(planted, tmp_path, everything):
    model, tokenizer = deepcopy(planted[0]), planted[1]
    words = [tokenizer.decode([token]).strip() for token in range(10, 20)]
    samples = tuple(Sample(prompt=f"{word} {words[0]}", response=f" {words[1]}") for word in words[2:8])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor([tokenizer(f"{word} {words[1]}")["input_ids"] for word in words])
    given = {"milestones": "log", "singles": "heads", "everything": everything, "batch_after": False, "share_passes": 2}
    probes = [ProbeSet(name="held out", samples=samples)]
    with Recorder(tmp_path / "run", probes=probes, tokenizer=tokenizer, **given).attach(model, optimizer):
        for _ in range(6):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
    frames = (tmp_path / "run" / name for name in ("components.parquet", "influence.parquet"))
    written = sum(part.stat().st_size for frame in frames for part in frame.iterdir())
    plan = Plan(max_steps=6, probes=1, singles="heads", everything=everything, batch_after=False)
    found = disk(Components(model), plan, small=True, seconds=1e-3)
    assert found.total == pytest.approx(written, rel=0.2)
    assert found.ablated == {"head": 16, "neuron": 0, "row": 0}


# What to choose


def test_choices_are_made_in_their_order_until_it_fits():
    def peak(plan):
        return plan.batch_size + 10 * plan.probes + 100 * (plan.share_passes > 2)

    plan = Plan(batch_size=32)
    taken, fitted = fitting(plan, True, peak, 12)
    assert [list(choice.changes) for choice in taken] == [["batch_size", "accumulation"], ["share_passes"]]
    assert peak(fitted) == 11 and fitted.tokens == plan.tokens
    assert fitting(plan, True, peak, 1000) == ([], plan)
    assert peak(fitting(plan, True, peak, 0.5)[1]) == 1, "as little as there is, though it does not fit"


def test_choices_are_settings_of_a_run():
    from attribution.recipes.sft import SFT
    from attribution.runs import RunConfig

    known = {name.replace("_", "-") for name in RunConfig.model_fields}
    inside = {name.replace("_", "-") for name in SFT.model_fields}
    for choice in choices(Plan(), small=True):
        for flag in (word.removeprefix("--").removeprefix("no-") for word in choice.words.split() if word.startswith("--")):
            first, _, rest = flag.partition(".")
            assert first in known and (not rest or rest.partition(".")[0] in inside)


# The page


LEAST = [
    "--batch-size",
    "1",
    "--probe-samples",
    "8",
    "--share-passes",
    "2",
    "--lora",
    "2",
    "--checkpointing",
    "--max-steps",
    "3",
    "--length",
    "8",
    "--response",
    "2",
]


@pytest.mark.slow
def test_a_folder_with_only_a_config_is_examined_without_weights(tmp_path, capsys):
    folder = config_folder(tmp_path, llama(1))
    arguments = ["doctor", str(folder), "--device", "cuda", "--tflops", "1", "--bandwidth", "10", *LEAST]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["structure"]["neurons"] == 80 and found["identities"] is None and found["room"] is None
    least = min(choice["peak"] for choice in found["instead"])
    assert least < 0.9 * found["cost"]["peak"]
    assert main([*arguments, "--memory", str(1.001 * least / 2**30)]) == 0
    page = capsys.readouterr().out
    assert "not checked: only the config was read" in page and ": it fits" in page and "not measured" in page
    assert max(map(len, page.splitlines())) <= 100
    assert f"peak {size(found['cost']['peak'])}\n" in page and f"in all {duration(found['cost']['time'])}" in page


def test_the_page_of_a_mixture_counts_the_neurons_of_one_expert(tiny, tmp_path):
    config = deepcopy(tiny("mixtral").config)
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path)
    page = examine(str(tmp_path), SHORT, tflops=1.0).page()
    assert f"{config.num_local_experts} experts of {config.intermediate_size} neurons" in page


@pytest.mark.slow
def test_a_model_with_weights_is_checked_and_timed(folder):
    plan = replace(SHORT, batch_size=1, probes=0)
    found = examine(str(folder), plan)
    assert found.identities is not None and max(found.identities.values()) < 1e-5
    assert min(found.machine.timed.values()) > 0 and set(found.machine.timed) == {TRAINING, READING, FORWARD, WORDS}
    page = " ".join(found.page().split())
    assert (
        (found.machine.visited or 0) > 0 < found.machine.fresh
        and "relative error" in page
        and "timed passes took, as a multiple of that: training" in page
        and f"weights are compared with what they were at {1e-9 / found.machine.visited:.2g} GB/s" in page
    )
    assert opened(str(folder), meta=True).identities is None


def test_sizes_and_durations_in_words():
    assert [size(count) for count in (12, 2048, 5.5 * 2**30, 1500 * 2**30)] == ["12 B", "2 KiB", "5.5 GiB", "1,500 GiB"]
    assert [duration(count) for count in (0.5, 150, 9000, 500_000)] == ["0.5 s", "2.5 min", "2.5 h", "5.79 days"]
    rounded = [duration(99.4), duration(99.7), duration(119), duration(86_400 * 999.7), size(999.7), size(999.7 * 2**30)]
    assert rounded == ["99 s", "100 s", "119 s", "1,000 days", "0.976 KiB", "1,000 GiB"]


# Wrong inputs


def bert(folder):
    folder.joinpath("config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))


def opt(folder):
    folder.joinpath("config.json").write_text(json.dumps({"model_type": "opt"}))


def broken(folder):
    folder.joinpath("config.json").write_text("{")


def impossible(folder):
    folder.joinpath("config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": -4}))


def without(folder):
    folder.joinpath("config.json").unlink(missing_ok=True)


@pytest.mark.parametrize(("damage", "named"), [
    (bert, "not a causal language model"), (opt, "unknown architecture 'opt'"), (broken, "cannot be"),
    (impossible, "cannot be opened"), (without, "holds no config.json"),
])  # fmt: skip
def test_wrong_folders_end_in_one_sentence(tmp_path, capsys, damage, named):
    damage(tmp_path)
    assert main(["doctor", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1


@pytest.mark.parametrize(("arguments", "named"), [
    (["/no/such/folder"], "no model folder"), (["planted", "--dtype", "flot"], "'flot'"),
    (["planted", "--memory", "0"], "memory is 0"), (["planted", "--share-passes", "1"], "share_passes is 1"),
    (["planted", "--samples", "0"], "samples is 0"),
    (["planted", "--response", "64"], "leave some for the prompt"), (["planted", "--max-steps", "0"], "at least 1"),
    (["planted", "--layers", "9"], "no layer 9"), (["planted", "--milestones", "0"], "unknown steps 0"),
])  # fmt: skip
def test_wrong_requests_end_in_one_sentence(capsys, arguments, named):
    assert main(["doctor", *arguments]) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1


def test_numbers_that_cannot_be_are_refused():
    for wrong in ({"tflops": -1.0}, {"bandwidth": float("inf")}, {"memory": float("nan")}):
        with pytest.raises(ConfigError, match="expected a number above 0"):
            examine("planted", **wrong)
