"""A recording that stopped goes on from a checkpoint, and ends as one that never stopped."""

import pandas as pd
import pytest
import torch

from attribution.errors import RunError
from attribution.models import load
from attribution.samples import ProbeSet, Sample
from attribution.store import BESIDE, COLUMNS, read_run
from attribution.updates.recorder import Recorder
from attribution.worlds import planted as grammar

CLOCKS = ["seconds", "recorder_seconds"]


def frames(run) -> dict[str, pd.DataFrame]:
    found = {name: getattr(run, "parts" if name == "components" else name) for name in COLUMNS}
    return {name: frame.drop(columns=CLOCKS, errors="ignore") for name, frame in found.items()}


def same(one, other) -> None:
    """Every row and every bit, clocks apart."""
    one, other = frames(one), frames(other)
    for name, frame in one.items():
        pd.testing.assert_frame_equal(frame, other[name], check_exact=True, check_categorical=False, obj=name)
    assert len(one["steps"]) and len(one["components"]) and len(one["probes"]) and len(one["influence"]) and len(one["sets"])


@pytest.fixture
def settings(probes):
    neutral = [Sample(**row) for row in grammar.prompts(4, 44, trait=False)]
    given = [ProbeSet(name=probe.name, samples=probe.samples, counterfactuals=neutral) for probe in probes]
    return {
        "probes": given, "watched": [ProbeSet(name="neutral", samples=neutral)], "sets": {"mine": [("head", 1, 0)]},
        "beside": BESIDE, "everything": False, "singles": "heads", "batch_after": True,
    }  # fmt: skip


@pytest.mark.parametrize("steps", ["all", pytest.param(2, marks=pytest.mark.long), 3])
def test_a_loop_of_ones_own_goes_on_from_its_checkpoint(tmp_path, training, settings, loop, steps):
    torch.manual_seed(3)

    def begin(state=None):
        model, tokenizer = load("planted/unrouted")
        model.train()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
        return model, tokenizer, optimizer

    def train(model, tokenizer, optimizer, first, last):
        for step in range(first, last):
            loop(model, tokenizer, training[step % 3 * 8 :], optimizer, 1)

    torch.manual_seed(3)
    model, tokenizer, optimizer = begin()
    with Recorder(tmp_path / "whole", tokenizer=tokenizer, steps=steps, **settings).attach(model, optimizer):
        train(model, tokenizer, optimizer, 0, 6)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}

    torch.manual_seed(3)
    model, tokenizer, optimizer = begin()
    recorder = Recorder(tmp_path / "stopped", tokenizer=tokenizer, steps=steps, **settings)
    recorder.begin(model, optimizer)
    train(model, tokenizer, optimizer, 0, 4)
    state = {"model": {k: v.clone() for k, v in model.state_dict().items()}, "random": torch.get_rng_state()}
    torch.save(optimizer.state_dict(), tmp_path / "optimizer")
    recorder.save(tmp_path / "checkpoint")
    with pytest.raises(KeyboardInterrupt):
        try:
            train(model, tokenizer, optimizer, 4, 5)
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            recorder.end(error)
            raise
    stopped = read_run(tmp_path / "stopped")
    assert stopped.status["state"] == "interrupted" and len(stopped.steps) == 5  # readable, and past the checkpoint

    model, tokenizer, optimizer = begin({**state, "optimizer": torch.load(tmp_path / "optimizer", weights_only=True)})
    resumed = Recorder(tmp_path / "stopped", tokenizer=tokenizer, steps=steps, resume=tmp_path / "checkpoint", **settings)
    with resumed.attach(model, optimizer):
        assert resumed.steps == 4
        train(model, tokenizer, optimizer, 4, 6)
    same(read_run(tmp_path / "whole"), read_run(tmp_path / "stopped"))
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    assert read_run(tmp_path / "stopped").result["probes"] == read_run(tmp_path / "whole").result["probes"]


def test_without_what_the_checkpoint_needs_it_says_so(tmp_path, settings):
    with pytest.raises(RunError, match=r"recorder\.json is missing"):
        Recorder(tmp_path / "run", resume=tmp_path, **settings)
