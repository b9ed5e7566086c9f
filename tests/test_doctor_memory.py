"""The doctor's memory: against real runs, against closed forms of models that are never loaded, and advice that is followed."""

import resource
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from attribution.capture import logits_alone
from attribution.causes.ablation import ablate_each
from attribution.causes.gradient import first_order
from attribution.causes.reference import zeros
from attribution.cli import main
from attribution.components import Components
from attribution.doctor import Plan
from attribution.doctor.advice import fitting
from attribution.doctor.memory import PLANNED, footprint, replayed
from attribution.doctor.opening import opened
from attribution.doctor.passes import Shapes
from attribution.doctor.seconds import FRESH
from attribution.doctor.shards import NUMBERS, UNASKED, per_gpu, spread
from attribution.doctor.structure import structure
from attribution.metrics import log_odds
from attribution.samples import Encoded, collate
from attribution.updates.share import read
from experiments import memory
from experiments.timing import LiveBytes

GIB = 2**30
LARGE = {  # as they are published: Llama 2 7B, Qwen2.5 7B and Llama 3 70B
    "llama-7b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "qwen-7b": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
    "llama-70b": {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                  "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
ELEMENTS = {"llama-7b": 6_738_415_616, "qwen-7b": 7_615_616_512, "llama-70b": 70_553_706_496}


def folder_of(path, name):
    config = AutoConfig.for_model(**LARGE[name], tie_word_embeddings=False)
    config.architectures = [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[config.model_type]]
    config.save_pretrained(path)
    return str(path)


def peak_resident():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Against a real run


TOY = {**memory.SMALL, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "vocab_size": 400}
ONCE = replace(memory._PLAN, max_steps=2, probes=1, probe_samples=4, samples=8, batch_size=4, singles="heads")


@pytest.mark.long
@pytest.mark.parametrize("changes", [
    {"probe_samples": 66}, pytest.param({"lora": 2, "everything": False, "batch_after": False}),
])  # fmt: skip
def test_every_part_of_a_run_takes_what_was_predicted(changes, tmp_path):
    subject = memory.Subject(TOY, replace(ONCE, **changes), "depth")
    found, config = memory.measured(subject, counted=True), memory.written(subject, tmp_path)
    predicted = memory.doctored(subject, config.model)["peaks"]
    assert set(predicted) == set(found["bytes"]) - {memory.REST}
    if max(found["passes"]) == 1:  # no step was refined
        predicted.pop("refining of its shares")
    for part, told in predicted.items():
        assert told == pytest.approx(found["bytes"][part], rel=memory.CLOSE), part
    assert max(predicted.values()) == pytest.approx(max(found["bytes"].values()), rel=memory.CLOSE)


def test_parts_are_told_apart():
    peaks = iter([1.0, 5.0, 7.0, 2.0])
    parts = memory.Parts(lambda: next(peaks))
    with parts.part("outer"), parts.part("inner"):
        pass
    assert parts.bytes == {memory.REST: 1.0, "outer": 5.0, "inner": 7.0} and set(parts.seconds) == set(parts.bytes)


def test_a_page_shows_what_is_off_and_leaves_out_grafts_that_were_fewer():
    seconds = {"grafts": 4.0, "reading of a probe set": 2.0, "forward and backward": 0.0, "step of the optimizer": 0.0}
    seconds["refining of its shares"] = 2.0  # two readings
    told = {"peaks": {"grafts": 2.0 * memory.MIB}, "refining": 0.5}
    told["seconds"] = {"grafts": 2.0, "readings of probe sets": 1.0, FRESH: 1.0}
    run = {"predicted": told, "bytes": {"grafts": 1.0 * memory.MIB}, "passes": [1, 3], "seconds": seconds}
    text = memory.page({name: {"counted": run, "plain": run} for name in ("0.7 M", "25 M")})
    nothing = {"counted": run, "plain": {**run, "bytes": {"grafts": 0.0}}}  # beyond what the process had
    assert "| 2.0 | 1.0 | 2.00 ✗ | none | – |" in memory.page({"0.7 M": nothing})
    assert "| 0.7 M | grafts | 2.0 | 1.0 | 2.00 ✗ |" in text and "| 0.7 M | grafts | 2.00 | 4.00 | 0.50 |" in text
    assert "| 25 M | reading of a probe set | 1.00 | 2.00 | 0.50 |" in text and "| 25 M | grafts | 2.00 |" not in text
    assert "| 0.7 M | refining of its shares | 1.00 | 2.00 | 0.50 |" in text and "is 0.50 [0.50, 0.50]" in text
    assert "| 5.00 | 8.00 | 0.62 ✗ |" in text and "| 3.00 | 4.00 | 0.75 ✗ |" in text and "from\n0.62 to 0.75." in text


def test_a_reading_holds_two_gradients_at_most_however_many_batches(tiny):
    components = Components(tiny("llama"))
    batch = collate([Encoded(ids=(1, 2, 3), start=1, weight=1.0, contrasts=())])
    weights = sum(parameter.nbytes for parameter in components.stored.values())

    def most(batches):
        with LiveBytes() as live:
            read(components, [batch] * batches, log_odds)
        return live.peak

    assert most(2) - most(1) > 0.9 * weights > 0.1 * weights > most(4) - most(2)


@pytest.mark.parametrize("samples", [8, 64])
def test_exact_ablation_takes_what_is_said(planted, samples):
    components = Components(planted[0])
    row = Encoded(ids=tuple(range(1, 23)), start=20, weight=1.0, contrasts=())
    weights, batch = sum(parameter.nbytes for parameter in components.stored.values()), collate([row] * samples)
    said = replayed(structure(components), Plan(length=21, response=2), samples, "cpu")
    first = components.table.query("kind == 'neuron' and layer == 0").index.to_numpy(copy=True)
    with LiveBytes() as live:
        ablate_each(components, first, batch, zeros(components.parts), log_odds)
    assert said == pytest.approx(live.peak - weights, rel=0.1)


def test_passes_are_counted_as_they_are_run():
    """Products of matrices, by torch's own counter: of causes at every position, of readings where logits depend on them."""
    size = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 100}
    model = LlamaForCausalLM(LlamaConfig(**size, attn_implementation="eager")).eval()  # the counter knows its products
    asked = samples, length, response = 4, 16, 3
    row = Encoded(ids=tuple(range(1, length + 1)), start=length - response, weight=1.0, contrasts=())
    components, batch, shapes = Components(model), collate([row] * samples), Shapes(model.config, "float32")

    def flops(run, *given, **how):
        with FlopCounterMode(display=False) as counter:
            run(*given, **how)
        return counter.get_total_flops()

    causes = flops(first_order, components, batch, zeros(components.parts), log_odds)
    assert shapes.causes(*asked).flops == pytest.approx(causes, rel=0.01)
    sized, plain = (flops(read, components, [batch], log_odds, sized=sized) for sized in (True, False))
    assert (shapes.probe(*asked).flops, shapes.refined(*asked).flops) == (sized, plain) and plain < 0.95 * sized
    with torch.no_grad():
        assert shapes.quiet(*asked).flops == flops(logits_alone, components.parts, batch)


# Of models that are never loaded


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["llama-7b", *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen-7b", "llama-70b"))]
)
def test_a_large_model_is_counted_by_closed_forms_and_never_allocated(tmp_path, name):
    before = peak_resident()
    given = opened(folder_of(tmp_path, name), dtype="bfloat16")
    assert all(parameter.is_meta for parameter in given.model.parameters())
    found, shapes = structure(Components(given.model)), Shapes(given.model.config, "bfloat16")
    plan = Plan(batch_size=4, length=128, response=16, probes=2, probe_samples=16)
    counted = footprint(found, plan, shapes, "cuda")
    weights, logit = 2 * ELEMENTS[name], 4 * LARGE[name]["vocab_size"]
    assert found.parameters == ELEMENTS[name]
    assert counted.held == {
        "weights": weights, "gradients": weights, "AdamW": 2 * weights, "recorder: weights before the step": weights,
        "recorder: gradient of each probe set": 2 * weights,
        "recorder: logits of probe sets and of training samples": (2 * 2 * 16 + 64) * 16 * logit,
    }  # fmt: skip
    whole = sum(counted.held.values())
    assert counted.peaks["step of the optimizer"] == whole + weights
    refining, step = counted.peaks["refining of its shares"], counted.peaks["recorder around a step"]
    assert counted.peak == refining
    assert PLANNED * 4 * 2**24 <= step - whole - weights < PLANNED * 4 * found.largest  # one that rounds is planned in blocks
    activations = refining - whole - weights  # beside the weights at the other end; gradients are not kept
    sites = 2 * 16 * 128 * LARGE[name]["num_hidden_layers"] * (LARGE[name]["intermediate_size"] + LARGE[name]["hidden_size"])
    assert sites < activations < 20 * sites
    assert peak_resident() - before < weights / 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "room", "several"), [
    ("llama-7b", 80, False), pytest.param("llama-70b", 80, True, marks=pytest.mark.long),
])  # fmt: skip
def test_advice_that_is_followed_fits(tmp_path, name, room, several):
    given = opened(folder_of(tmp_path, name), dtype="bfloat16")
    found, shapes = structure(Components(given.model)), Shapes(given.model.config, "bfloat16")

    def peak(plan):
        return footprint(found, plan, shapes, "cuda").peak

    asked = Plan(batch_size=16, length=64, probes=2, probe_samples=64)
    chosen, fitted = fitting(asked, found.small, peak, room * GIB)
    followed = asked
    for choice in chosen:
        followed = replace(followed, **choice.changes)
    assert followed == fitted and peak(asked) > peak(followed)
    assert (peak(followed) > room * GIB) == several
    if several:  # then GPUs are told, over which it fits if the advice is followed: readings are as large on each

        def fits(plan):
            whole = footprint(found, plan, shapes, "cuda")
            on_each = spread(lambda shards: per_gpu(found, plan, shapes, "cuda", whole, shards), room * GIB)
            return [count <= room * GIB for count in on_each.values()]

        assert fits(asked) == [False] * len(NUMBERS)
        assert fits(followed) == [False] * (len(fits(followed)) - 1) + [True]
    else:
        assert fitting(followed, found.small, peak, room * GIB) == ([], followed)


def test_shards_share_what_is_held_and_say_that_nothing_was_measured(tiny, capsys):
    model = tiny("llama")
    found, shapes, plan = (
        structure(Components(model)),
        Shapes(model.config, "float32"),
        Plan(batch_size=2, length=16, response=4),
    )
    whole = footprint(found, plan, shapes, "cpu")
    two, many = (per_gpu(found, plan, shapes, "cpu", whole, number) for number in (2, 10**9))
    logits = whole.held["recorder: logits of probe sets and of training samples"]
    assert many < two and many > logits, "what is run and gathered stays"
    assert two - many == pytest.approx((sum(whole.held.values()) - logits) / 2, rel=0.5)
    assert spread(lambda shards: 100 / shards, 30.0) == {2: 50.0, 4: 25.0}
    assert list(spread(lambda shards: 1.0, None)) == [*UNASKED] and list(spread(lambda shards: 2.0, 1.0)) == [*NUMBERS]


# Of what is odd


@pytest.mark.parametrize(("family", "tied"), [
    ("qwen2", True), pytest.param("mixtral", False, marks=pytest.mark.long),
    pytest.param("gemma2", True, marks=pytest.mark.long), pytest.param("gpt2", True, marks=pytest.mark.long),
])  # fmt: skip
def test_odd_models_are_counted_too(tiny, family, tied):
    config = tiny(family, tied=tied).config
    with torch.device("meta"):
        model = tiny(family, tied=tied)
    found, plan = structure(Components(model)), Plan(max_steps=3, batch_size=2, length=8, response=2, probe_samples=2)
    counted = footprint(found, plan, Shapes(config, "float32"), "cpu")
    assert found.tied is tied
    assert counted.held["recorder: gradient of each probe set"] == counted.held["weights"] + tied * 4 * found.rows * found.width
    assert all(value > found.bytes for value in counted.peaks.values())


@pytest.mark.parametrize("room", ["-1", "0", "inf"])
def test_memory_that_cannot_be_is_refused(capsys, room):
    assert main(["doctor", "planted", "--meta", "--memory", room]) == 2
    assert f"memory is {float(room)}; expected a number above 0" in capsys.readouterr().err
