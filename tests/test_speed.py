"""The table of budgets: its arithmetic and its form, and that a tiny run fills every row. Nothing here is timed."""

import pytest
import torch

from attribution.causes import attribute
from attribution.components import Components
from attribution.metrics import METRICS
from attribution.samples import Sample
from attribution.worlds.build import word_tokenizer
from experiments import speed
from experiments.peers import conductance_by_captum

WORDS = [*"abcdefghijklmnopqrs"]  # with the four special tokens, as many as the tiny models know


@pytest.fixture
def subject(tiny, monkeypatch):
    """A tiny model to measure on, in as few turns and steps as there can be."""
    monkeypatch.setattr(speed, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(speed, "MEMORY_STEPS", (1, 2))
    samples = tuple(Sample(prompt=f"{a} {b}", response=f" {c} {d}") for a, b, c, d in zip(*[iter(WORDS)] * 4, strict=False))
    return speed.Subject(tiny("llama"), word_tokenizer(WORDS), samples[:2], samples[2:], few=2, fewer=2)


# The table


@pytest.mark.parametrize(
    ("budget", "ratios", "cells"),
    [
        ("≤ 1.05", [1.0, 1.02, 1.04, 1.06, 9.0], "| ≤ 1.05 | 1.04 [1.02, 1.06] | met |"),
        ("≤ 1.05", [1.0, 1.05, 1.06, 1.07, 1.08], "| ≤ 1.05 | 1.06 [1.05, 1.07] | ✗ missed |"),
        ("≥ 4", [3.0, 4.0, 5.0], "| ≥ 4 | 4.00 [3.50, 4.50] | met |"),
        ("≥ 4", [3.99], "| ≥ 4 | 3.99 [3.99, 3.99] | ✗ missed |"),
        ("none", [2.0, 2.0], "| none | 2.00 [2.00, 2.00] |  |"),
        ("≤ 2.1", [], "| ≤ 2.1 | not measured |  |"),
    ],
)
def test_a_row_holds_median_quartiles_and_verdict(budget, ratios, cells):
    rows = {"planted": [speed.ratio_row("step", ratios, budget, "3 of 7 refined")], "": []}
    assert speed.table(rows).splitlines()[2:] == [f"| planted | step {cells} 3 of 7 refined |"]


def test_turns_alternate_and_the_first_is_not_counted(monkeypatch):
    monkeypatch.setattr(speed, "LEAST_SECONDS", 0.0)
    seen = []
    seconds = speed.interleaved({name: lambda name=name: seen.append(name) for name in "ABC"}, repeats=2)
    assert "".join(seen) == "ABC" * 3
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("ABC", 2)


def test_a_study_is_judged_only_where_its_runs_decide(tmp_path):
    path = tmp_path / "study.json"
    assert speed.study_row(path).measured == "not measured"
    for told, measured, met in ((590, "≥ 295", None), (610, "≥ 305", False)):
        path.write_text(f'{{"seconds": {told}, "runs": [{{}}, {{}}]}}')
        assert speed.study_row(path)[2:4] == (measured, met)


# Memory


def test_living_bytes_are_those_of_storages_until_they_die():
    with speed.LiveBytes() as live:
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
    with speed.LiveBytes() as live:
        (weight.exp() * 2).sum().backward()
        assert live.now == weight.grad.nbytes == 400 < live.peak  # type: ignore[union-attr]


# A run


def test_a_tiny_run_fills_every_row(subject, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "random_llama", lambda device: subject)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    speed.main(model=("random",), repeats=1, out=tmp_path / "results" / "speed.md")
    text = (tmp_path / "results" / "speed.md").read_text()
    for what in (
        "bare training step", "recorder without probes", "one probe set as large", "batch run again", "by taps", "⟨W, ∇W⟩",
        "captum LayerGradientXActivation", "nnsight, all sites", "conductance of all layers", "captum LayerConductance",
        "all 48: ", "memory held, no probes", "memory at the peak, one probe set", "`attribution --help`", "default study",
    ):  # fmt: skip
        assert text.count(what) == 1, what
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    assert all(parameter.grad is None for parameter in subject.model.parameters())


def test_a_library_that_finds_other_causes_stops_the_run(subject, monkeypatch):
    true = speed.first_order_by
    off = lambda *args: {name: lambda found, one=one: 1.001 * one(found) for name, one in true(*args).items()}  # noqa: E731
    monkeypatch.setattr(speed, "first_order_by", off)
    with pytest.raises(AssertionError, match="captum LayerGradientXActivation finds other causes"):
        speed.first_order_rows(subject, repeats=1)


def test_captum_comes_close_where_its_steps_are_many(subject):
    samples, index = subject.probed, Components(subject.model)
    ours = attribute(subject.model, subject.tokenizer, samples, method="conductance", metric=speed.METRIC).per_sample
    start, metric = subject.model.get_input_embeddings().weight.detach().mean(0), METRICS[speed.METRIC]
    off = {}
    for steps in (10, 160):
        theirs = conductance_by_captum(index, subject.batch(samples), start, metric, steps)
        off[steps] = ((theirs - ours[: len(theirs)]).abs().max() / theirs.abs().max()).item()
    assert off[160] < off[10] / 8 < 0.1  # its steps are first order


def test_of_a_large_model_some_are_timed_and_the_row_says_so(subject, monkeypatch):
    monkeypatch.setattr(speed, "LOOPED_UP_TO", 0)
    monkeypatch.setattr(speed, "LOOPED", 5)
    (row,) = speed.ablation_rows(subject, repeats=1)
    assert row.notes.startswith("5 random ones of 48 timed, extrapolated: ") and "nats apart" in row.notes


def test_a_loop_that_finds_other_numbers_stops_the_run(subject, monkeypatch):
    true = speed.one_by_one
    monkeypatch.setattr(speed, "one_by_one", lambda *args: true(*args) + 2e-5)
    with pytest.raises(AssertionError, match="nats off the loop"):
        speed.ablation_rows(subject, repeats=1)
    monkeypatch.setattr(speed, "one_by_one", lambda *args: torch.zeros_like(true(*args)))
    with pytest.raises(AssertionError, match="nats off the loop"):
        speed.ablation_rows(subject, repeats=1)


def test_what_is_measured_on_is_as_large_as_the_budgets_ask(monkeypatch):
    monkeypatch.setattr(speed, "LLAMA", {**speed.LLAMA, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1})
    for found in (speed.embedded("planted/unrouted", "cpu"), speed.random_llama("cpu")):
        trained, probed = found.batch(found.trained), found.batch(found.probed)
        assert trained.mask.sum() >= 2048 and len(trained) == len(probed)
        assert abs(probed.mask.sum() / trained.mask.sum() - 1) < 0.05
