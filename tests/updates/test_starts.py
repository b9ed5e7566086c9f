"""What runs share that begin at the same model: nothing that another model, question or hook would make differ."""

import pandas as pd
import pytest
import torch
from torch.nn.functional import relu

from attribution.components import Components
from attribution.models import load
from attribution.samples import ProbeSet
from attribution.store import COLUMNS, read_run
from attribution.updates import starts
from attribution.updates.probes import ProbeReader
from attribution.updates.recorder import Recorder
from attribution.updates.starts import Start, shared, taken


@pytest.fixture
def made():
    """Calls so far, and a function that makes a table of a call's number."""
    calls = []

    def make() -> pd.DataFrame:
        calls.append(1)
        return pd.DataFrame({"call": [len(calls)]})

    return calls, make


def once(model, make, *asked) -> int:
    return int(Start(Components(model)).once(make, *asked)["call"].iloc[0])


def test_the_same_is_made_once_inside_the_block_alone(tiny, made):
    calls, make = made
    model = tiny("llama")
    assert [once(model, make, "a"), once(model, make, "a")] == [1, 2] and taken() == 0
    with shared():
        assert [once(model, make, "a"), once(model, make, "a"), once(model, make, "b")] == [3, 3, 4]
        assert once(load("planted/31").model, make, "a") == 5 and once(load("planted/31").model, make, "a") == 5
        assert taken() == 2 and len(calls) == 5
    assert once(model, make, "a") == 6 and taken() == 0


def nudged(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 2].add_(1e-6)


def with_other_norms(model):
    model.config.rms_norm_eps *= 2


def in_half_precision(model):
    model.to(torch.bfloat16)


def of_another_module(model):
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()


def of_another_number(model):
    model.model.layers[1].self_attn.scaling *= 2


def of_another_function(model):
    model.model.layers[0].mlp.gate = relu


@pytest.mark.parametrize(
    "change",
    [nudged, with_other_norms, in_half_precision, of_another_module, of_another_number, of_another_function],
)
def test_another_model_is_another_start(tiny, made, change):
    _, make = made
    with shared():
        model = tiny("llama")
        assert once(model, make) == 1
        change(model)
        assert once(model, make) == 2 and once(tiny("llama"), make) == 1


def hooked(model):
    model.model.layers[0].register_forward_hook(lambda _module, _args, out: out)


def hooked_before(model):
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _module, args: args)


def replaced(model):
    model.model.norm.forward = lambda hidden: hidden


@pytest.mark.parametrize("change", [hooked, hooked_before, replaced])
def test_a_model_that_runs_something_else_too_shares_nothing(tiny, made, change):
    _, make = made
    model = tiny("llama")
    with shared():
        assert once(model, make) == 1
        change(model)
        assert [once(model, make), once(model, make)] == [2, 3] and taken() == 0


def test_what_trainers_wrap_around_the_whole_model_is_not_in_the_way(tiny, made):
    _, make = made
    model = tiny("llama")
    with shared():
        assert once(model, make) == 1
        model.forward = model.forward
        assert once(model, make) == 1


def test_what_is_kept_cannot_be_changed_and_is_no_more_than_so_many(tiny, made, monkeypatch):
    calls, make = made
    monkeypatch.setattr(starts, "AT_MOST", 2)
    with shared():
        start = Start(Components(tiny("llama")))
        found = start.once(make, "a")
        found.loc[0, "call"] = 9
        assert start.once(make, "a")["call"].tolist() == [1]
        for asked in "bc":
            start.once(make, asked)
        assert len(calls) == 3 and start.once(make, "c")["call"].tolist() == [3]
        assert start.once(make, "a")["call"].tolist() == [4]


def test_whoever_asks_otherwise_asks_something_else(fresh, training):
    """Each differs in one thing on which the influence of components depends, if only by rounding."""
    tokenizer, index = fresh.tokenizer, Components(fresh.model)
    some, others = tuple(training[:4]), tuple(training[4:8])

    def asked(samples=some, counterfactuals=others, metric="log_odds", **settings):
        probe = ProbeSet(name="p", samples=samples, counterfactuals=counterfactuals)
        return ProbeReader(probe, index, tokenizer, metric, **settings).asked

    different = [
        asked(), asked(some[:3]), asked(counterfactuals=others[::-1]), asked(counterfactuals=()), asked(metric="log_prob"),
        asked(reference="mean"), asked(beside=("mean",)), asked(passes=0),
    ]  # fmt: skip
    assert len(set(different)) == len(different) and asked() == different[0]


def record(path, loop, training, probes, sets, learning_rate) -> dict[str, pd.DataFrame]:
    model, tokenizer = load("planted/unrouted")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    given = {"probes": probes, "tokenizer": tokenizer, "sets": sets, "singles": "heads"}
    given |= {"milestones": "ends", "everything": False, "batch_after": False, "beside": ("norms before training",)}
    with Recorder(path, **given).attach(model, optimizer):
        loop(model, tokenizer, training, optimizer, 2)
    run = read_run(path)
    frames = {name: getattr(run, name) for name in COLUMNS if (path / f"{name}.parquet").exists()}
    frames["steps"] = frames["steps"].drop(columns=["seconds", "recorder_seconds"])
    return frames


def test_a_record_is_what_it_would_be_alone(tmp_path, loop, training, probes, monkeypatch):
    """Of three runs, of which two differ in what they train and one in what it asks, bit by bit; counted on what is ablated."""
    sets = {"A": [("head", 0, 1), ("neuron", 3, 5)], "B": [("head", 2, 2)]}
    runs = {"first": (sets, 1e-3), "second": (sets, 1e-2), "third": ({"A": sets["B"]}, 1e-3)}
    alone = {name: record(tmp_path / f"alone-{name}", loop, training, probes, *given) for name, given in runs.items()}
    read: list[str] = []
    for name in ("influence", "influence_of_sets", "influence_beside"):
        plain = getattr(ProbeReader, name)

        def counted(self, of, name=name, plain=plain):
            read.append(name)
            return plain(self, of)

        counted.__name__ = name
        monkeypatch.setattr(ProbeReader, name, counted)
    with shared():
        found, counts = {}, []
        for name, given in runs.items():
            found[name] = record(tmp_path / f"shared-{name}", loop, training, probes, *given)
            counts.append(len(read))
            read.clear()
    first, second, third = counts
    assert second == first - 6 and third == first - 2, "before training: three tables on two probe sets; single components"
    for name in runs:
        assert set(found[name]) == set(alone[name]) and not alone[name]["sets"].empty
        for frame, table in alone[name].items():
            pd.testing.assert_frame_equal(found[name][frame], table, check_exact=True, obj=f"{name}: {frame}")
