"""The table of budgets: its arithmetic and its form, and that a tiny run fills every row. Nothing here is timed."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attribution.causes import attribute
from attribution.components import Components
from attribution.metrics import METRICS
from attribution.samples import Sample
from attribution.worlds.build import word_tokenizer
from experiments import costs, growth, per_sample, speed, subjects, timing
from experiments.peers import conductance_by_captum
from experiments.subjects import METRIC, RANDOM, Subject, subject_named
from experiments.timing import Row

TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = [*"abcdefghijklmnopqrs"]  # with the four special tokens, as many as the tiny models know


@pytest.fixture
def subject(tiny, monkeypatch):
    """A tiny model to measure on, in as few turns and steps as there can be."""
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(costs, "MEMORY_STEPS", (1, 2))
    monkeypatch.setattr(costs, "BY_PEERS", 2)
    samples = tuple(Sample(prompt=f"{a} {b}", response=f" {c} {d}") for a, b, c, d in zip(*[iter(WORDS)] * 4, strict=False))
    return Subject(tiny("llama"), word_tokenizer(WORDS), samples[:2], samples[2:], few=2, fewer=2)


# The table


@pytest.mark.parametrize(
    ("budget", "ratios", "cells"),
    [
        ("≤ 1.05", [1.0, 1.02, 1.04, 1.06, 9.0], "| ≤ 1.05 | 1.04 [1.02, 1.06] | met |  |"),
        ("≤ 1.05", [1.0, 1.05, 1.06, 1.07, 1.08], "| ≤ 1.05 | 1.06 [1.05, 1.07] | ✗ missed |  |"),
        ("≥ 4", [3.0, 4.0, 5.0], "| ≥ 4 | 4.00 [3.50, 4.50] | met |  |"),
        ("≥ 4", [3.99], "| ≥ 4 | 3.99 [3.99, 3.99] | ✗ missed |  |"),
        ("none", [2.0, 2.0], "| none | 2.00 [2.00, 2.00] |  |  |"),
        ("≤ 2.1", [], "| ≤ 2.1 | not measured |  |  |"),
    ],
)
def test_a_row_holds_median_quartiles_and_verdict(budget, ratios, cells):
    rows = {"planted": [timing.ratio_row("step", ratios, budget, "3 of 7 refined")], "": []}
    assert timing.table(rows).splitlines()[2:] == [f"| planted | step {cells} 3 of 7 refined |"]


def test_turns_alternate_each_in_its_own_order_and_the_first_is_not_counted(monkeypatch):
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    seen = []
    seconds = timing.interleaved({name: lambda name=name: seen.append(name) for name in "ABC"}, repeats=20)
    turns = ["".join(seen[at : at + 3]) for at in range(0, len(seen), 3)]
    assert len(turns) == 21 and {"".join(sorted(turn)) for turn in turns} == {"ABC"} and len(set(turns)) == 6
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("ABC", 20)


@pytest.mark.slow
def test_the_study_is_timed_by_the_clock():
    row = speed.study_row("--seeds", "1", "--organisms", "1", "--arms", "lr0")
    assert row.met and 2 < float(row.measured) < 300 and "; 1 run," in row.notes


# Memory


def test_living_bytes_are_those_of_storages_until_they_die():
    with timing.LiveBytes() as live:
        whole = torch.zeros(1000)
        part = whole.view(10, 100)[2:5]
        assert (live.now, live.peak) == (4000, 4000)
        whole.add_(1)
        more = whole * 2
        assert (live.now, live.peak) == (8000, 8000)
        del whole, more
        assert (live.now, live.peak) == (4000, 8000)
        del part
        assert live.now == 0


def test_living_bytes_see_what_a_backward_pass_keeps():
    weight = torch.nn.Parameter(torch.ones(100))
    with timing.LiveBytes() as live:
        (weight.exp() * 2).sum().backward()
        assert live.now == weight.grad.nbytes == 400 < live.peak  # type: ignore[union-attr]


# A run


@pytest.fixture
def small_growth(monkeypatch):
    """As few and small sizes as can be fitted."""
    monkeypatch.setattr(growth, "BASE", {"samples": 2, "length": 8, "layers": 1, "neurons": 16})
    monkeypatch.setattr(
        growth, "SIZES", {"samples": (2, 3, 4), "length": (8, 10, 12), "layers": (1, 2, 3), "neurons": (16, 32, 48)}
    )
    monkeypatch.setattr(growth, "TURNS", 1)
    monkeypatch.setattr(growth, "_LLAMA", {**growth._LLAMA, "hidden_size": 8})


def test_a_tiny_run_fills_every_row_and_goes_on_from_what_is_finished(subject, small_growth, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "subject_named", lambda name, device: subject)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    out = tmp_path / "results" / "speed.md"
    monkeypatch.setattr(speed, "study_row", lambda: Row("default study", "≤ 300", "277", True, "by the clock"))
    speed.main(model=("random",), repeats=1, out=out)
    text = out.read_text()
    for what in (
        "bare training step", "recorder without probes", "one probe set as large", "batch run again", "by taps", "⟨W, ∇W⟩",
        "then forward and backward of the probe set", "bergson's callback |", "forward and backward of the metric",
        "captum LayerGradientXActivation", "nnsight, all sites", "conductance of all layers", "captum LayerConductance",
        "all 48: ", "one forward per component, by a hook", "captum LayerFeatureAblation", "the same by nnsight |",
        "memory held, no probes", "memory at the peak, one probe set", "`attribution --help`", "| default study |",
        "| recorded step | layers | 1, 2, 3 |", "| exact ablation | neurons |", "(`--device cuda`): not run",
    ):  # fmt: skip
        assert text.count(what) == 1, what
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    assert all(parameter.grad is None for parameter in subject.model.parameters())

    measured = []
    monkeypatch.setattr(speed, "help_row", lambda: Row("`attribution --help`", "", "", None, ""))
    monkeypatch.setattr(speed, "measure", lambda subject, repeats: measured.append(repeats) or [])
    speed.main(model=("random",), repeats=1, out=out, resume=True)
    assert not measured
    lines = set(out.read_text().splitlines()) ^ set(text.splitlines())
    assert all("--help" in line for line in lines)  # which was timed once
    speed.main(model=("random-large",), repeats=1, out=out, growth=False, study=False)
    assert measured == [1] and "recorded step | layers" in out.read_text() and "| 277 |" in out.read_text()


def test_the_study_is_not_measured_beside_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "help_row", lambda: Row("`attribution --help`", "", "", None, ""))
    monkeypatch.setattr(speed, "study_row", lambda: pytest.fail("it was run"))
    speed.main(model=(), device="cuda", growth=False, out=tmp_path / "speed.md")
    assert "seconds | ≤ 300 | not measured |" in (tmp_path / "speed.md").read_text()


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_an_exponent_is_that_of_the_power_law(exponent):
    sizes = (2, 4, 8, 16)
    found, error = growth.fitted(sizes, [3 * size**exponent for size in sizes])
    assert found == pytest.approx(exponent) and error == pytest.approx(0, abs=1e-6)
    noisy, error = growth.fitted(sizes, [3 * size**exponent * off for size, off in zip(sizes, (1, 1.2, 0.8, 1), strict=True)])
    assert error > 0.05 and abs(noisy - exponent) < 3 * error


def test_sizes_of_growth_are_those_of_the_model():
    found = growth.subject("cpu", samples=3, length=12, layers=2, neurons=24)
    config, batch = found.model.config, found.batch(found.trained)
    assert (config.num_hidden_layers, config.intermediate_size, *batch.ids.shape) == (2, 24, 3, 12)


def test_a_step_with_the_callback_of_bergson_collects_every_sample(subject, tmp_path):
    if not per_sample.installed():
        pytest.skip(per_sample.WITHOUT)
    with ExitStack() as recording:
        step = costs.step_of(subject, subject.trained, costs.collected(recording, subject, tmp_path / "found"))
        step()
    stored = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 100]
    assert any(np.fromfile(path, dtype=np.float16).any() for path in stored)


def test_a_library_that_finds_other_causes_stops_the_run(subject, monkeypatch):
    true = costs.first_order_by
    off = lambda *args: {name: lambda found, one=one: 1.001 * one(found) for name, one in true(*args).items()}  # noqa: E731
    monkeypatch.setattr(costs, "first_order_by", off)
    with pytest.raises(AssertionError, match="captum LayerGradientXActivation finds other causes"):
        costs.first_order_rows(subject, repeats=1)


def test_captum_comes_close_where_its_steps_are_many(subject):
    samples, index = subject.probed, Components(subject.model)
    ours = attribute(subject.model, subject.tokenizer, samples, method="conductance", metric=METRIC).per_sample
    start, metric = subject.model.get_input_embeddings().weight.detach().mean(0), METRICS[METRIC]
    off = {}
    for steps in (10, 160):
        theirs = conductance_by_captum(index, subject.batch(samples), start, metric, steps)
        off[steps] = ((theirs - ours[: len(theirs)]).abs().max() / theirs.abs().max()).item()
    assert off[160] < off[10] / 8 < 0.1  # its steps are first order


def test_of_a_large_model_some_are_timed_and_the_row_says_so(subject, monkeypatch):
    monkeypatch.setattr(costs, "LOOPED_UP_TO", 0)
    monkeypatch.setattr(costs, "LOOPED", 5)
    monkeypatch.setattr(costs, "ablation_by_peers", lambda *_: [])
    row, *_ = costs.ablation_rows(subject, repeats=1)
    assert row.notes.startswith("5 random ones of 48 timed, extrapolated: ") and "nats apart" in row.notes


def test_a_loop_that_finds_other_numbers_stops_the_run(subject, monkeypatch):
    true = costs.one_by_one
    monkeypatch.setattr(costs, "one_by_one", lambda *args: true(*args) + 2e-5)
    with pytest.raises(AssertionError, match="nats off the loop"):
        costs.ablation_rows(subject, repeats=1)
    monkeypatch.setattr(costs, "one_by_one", lambda *args: torch.zeros_like(true(*args)))
    with pytest.raises(AssertionError, match="nats off the loop"):
        costs.ablation_rows(subject, repeats=1)


def test_a_library_that_finds_other_effects_stops_the_run(subject, monkeypatch):
    true = costs.ablation_by
    off = lambda *args: {name: lambda *given, one=one: one(*given) + 2e-5 for name, one in true(*args).items()}  # noqa: E731
    monkeypatch.setattr(costs, "ablation_by", off)
    with pytest.raises(AssertionError, match="three forwards each finds other effects"):
        costs.ablation_by_peers(subject, repeats=1)


def test_what_is_measured_on_is_as_large_as_the_budgets_ask(monkeypatch):
    tiny = {name: size._replace(config={**size.config, **TINY}) for name, size in RANDOM.items()}
    monkeypatch.setattr(subjects, "RANDOM", tiny)
    for name in ("planted/unrouted", "kindland", "random", "random-large"):
        found = subject_named(name, "cpu")
        trained, probed = found.batch(found.trained), found.batch(found.probed)
        assert trained.mask.sum() >= 2048 and len(trained) == len(probed)
        assert abs(probed.mask.sum() / trained.mask.sum() - 1) < 0.05
    assert subject_named("random-large", "cpu").repeats == 3


@pytest.mark.parametrize(("name", "millions"), [("random", 25), ("random-large", 125)])
def test_random_models_are_as_large_as_they_are_called(name, millions):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**RANDOM[name].config))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.02)
