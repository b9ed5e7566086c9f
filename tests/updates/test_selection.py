"""What is recorded, and that what is left out is still in the sums."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from attribution.causes import attribute
from attribution.components import Components
from attribution.errors import ConfigError
from attribution.models import load
from attribution.store import BATCH, read_run
from attribution.updates import sizes, update_shares
from attribution.updates.adapters import EffectiveGradients
from attribution.updates.recorder import Recorder
from attribution.updates.selection import Schedule, Selection


@pytest.mark.parametrize(
    ("of", "due"),
    [("all", [1, 2, 3, 4, 5, 6, 7, 8, 9]), ("log", [1, 2, 4, 8]), ("ends", []), (3, [3, 6, 9]), ((2, 7), [2, 7])],
)
def test_schedules(of, due):
    assert [step for step in range(1, 10) if Schedule(of).due(step)] == due


@pytest.mark.parametrize("of", ["often", 0, -2, (1, 0), (1, True), (1.5,)])
def test_schedules_that_are_none(of):
    with pytest.raises(ConfigError, match="unknown steps"):
        Schedule(of)


def test_selections(tiny):
    components = Components(tiny("llama"))
    table = components.table

    def chosen(**settings):
        return table[Selection(**settings).mask(components)]

    assert len(chosen()) == len(table)
    assert set(chosen(kinds=("head",))["kind"]) == {"head"} and len(chosen(kinds=("head",))) == 8
    some = chosen(layers=[1])
    assert set(some.loc[some["kind"] != "row", "layer"]) == {1} and (some["kind"] == "row").sum() == 23
    some = chosen(heads=[(0, 2), (1, 3)], kinds=("head", "neuron"))
    assert some.loc[some["kind"] == "head", ["layer", "index"]].values.tolist() == [[0, 2], [1, 3]] and len(some) == 2 + 40
    for wrong, message in (
        ({"kinds": ("haed",)}, "'haed'"),
        ({"layers": [2]}, "no layer 2"),
        ({"heads": [(0, 4)]}, r"\(0, 4\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            chosen(**wrong)


def test_what_is_left_out_is_in_the_sums_of_its_layer(tmp_path, fresh, loop, training, probes):
    """The same training recorded whole and in part: the part's rows are those of the whole, and so is every sum."""
    runs = {}
    for name, settings in (("whole", {}), ("part", {"kinds": ("head", "neuron"), "layers": [1, 2], "heads": [(1, 0), (2, 3)]})):
        model, tokenizer = load("planted/unrouted")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        recorder = Recorder(tmp_path / name, probes=probes[:1], tokenizer=tokenizer, everything=True, **settings)
        with recorder.attach(model, optimizer):
            loop(model, tokenizer, training, optimizer, 2)
        runs[name] = read_run(tmp_path / name)
    whole, part = runs["whole"], runs["part"]
    keys = ["step", "probe", "kind", "layer", "index", "part"]
    rows = part.parts[(part.parts["index"] >= 0) & (part.parts["kind"] != "remainder")].astype({"kind": str})
    assert set(zip(rows.loc[rows["kind"] == "head", "layer"], rows.loc[rows["kind"] == "head", "index"], strict=True)) == {
        (1, 0),
        (2, 3),
    }
    assert set(rows.loc[rows["kind"] == "neuron", "layer"]) == {1, 2} and "row" not in set(rows["kind"])
    both = rows.astype(object).merge(whole.parts.astype(object), on=keys, suffixes=("", "_whole"))
    assert len(both) == len(rows) > 0
    for column in ("share", "cause_before", "update_norm", "activation_before", "gradient_after", "changed"):
        np.testing.assert_array_equal(both[column].astype(float), both[f"{column}_whole"].astype(float))
    groups = ["step", "probe", "kind", "layer", "part"]
    given = part.parts[part.parts["index"] == -1].astype({"kind": str, "probe": str, "part": str})
    added = given[given["kind"] != "remainder"].set_index(groups)
    expected = (
        whole.parts.astype({"kind": str, "probe": str, "part": str}).groupby(groups)[["share", "cause_before"]].sum(min_count=1)
    )
    assert len(added) == 2 * 2 * (4 * 2 * 2 + 1)
    for column in ("share", "cause_before"):
        np.testing.assert_allclose(added[column], expected.loc[added.index, column], rtol=1e-4, atol=1e-6)
    assert added["activation_before"].isna().all()
    ablated = part.influence[["kind", "layer", "index"]].drop_duplicates()
    assert len(ablated) == 2 + 2 * 256
    assert any("2 of 16 were selected" in line for line in part.meta["not_measured"])


def test_shares_between_recorded_steps_run_along_the_chord(tmp_path, fresh, loop, training, probes):
    model, tokenizer = fresh
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    with Recorder(tmp_path / "run", probes=probes, tokenizer=tokenizer, steps=2, milestones="ends").attach(model, optimizer):
        loop(model, tokenizer, training, optimizer, 5)
    run = read_run(tmp_path / "run")
    assert run.steps["step"].tolist() == [1, 2, 3, 4, 5]
    assert run.steps["update_norm"].isna().tolist() == [True, False, True, False, True]
    assert (run.steps["grad_norm"] > 0).all() and run.steps["loss"].notna().all()
    for probe in probes:
        rows = run.probes[run.probes["probe"] == probe.name].set_index("step")
        assert rows.index.tolist() == [0, 2, 4, 5] and rows.loc[[2, 4, 5], "resolved"].all()  # the end is read anyway
        total = update_shares(tmp_path / "run").query("probe == @probe.name")["share"].sum()
        change = rows.loc[5, "metric"] - rows.loc[0, "metric"]
        assert abs(change) > 1e-3 and total == pytest.approx(change, rel=0.02)
    assert set(run.parts.loc[run.parts["probe"] == BATCH, "step"]) == {2, 4}
    assert set(run.influence["step"]) == {0, 5}
    assert run.result["probes"][probes[0].name]["after"] == pytest.approx(run.probes["metric"].iloc[-2], abs=1e-6)


@pytest.mark.parametrize("steps", ["ends", 10, (100,)])
def test_the_end_is_read_whatever_steps_are_recorded(tmp_path, fresh, loop, training, probes, steps):
    model, tokenizer = fresh
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    recorder = Recorder(tmp_path / "run", probes=probes[:1], tokenizer=tokenizer, steps=steps, milestones=(2,), kinds=("head",))
    with recorder.attach(model, optimizer):
        loop(model, tokenizer, training, optimizer, 3)
    run = read_run(tmp_path / "run")
    assert run.probes["step"].tolist() == [0, 2, 3] and set(run.influence["step"]) == {0, 2, 3}  # a milestone is recorded too
    end = attribute(model, tokenizer, probes[0].samples, components=[("head", 1, 0)]).table["effect"][0]
    row = run.influence.query("step == 3 and layer == 1 and index == 0")
    assert row["effect"].item() == pytest.approx(end, abs=1e-5)
    assert run.probes["share_sum"].sum() == pytest.approx(run.probes["change"].sum(), rel=0.02)


@pytest.mark.parametrize("adapters", [False, True])
def test_of_steps_left_out_nothing_is_measured_that_takes_long(monkeypatch, tmp_path, fresh, loop, training, adapters):
    model, tokenizer = fresh
    if adapters:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    recorder = Recorder(tmp_path / "run", tokenizer=tokenizer, steps=3, milestones=(2,), batch_after=False)
    measured, squares, add = {"squares": set(), "gradients": set()}, sizes.squares, EffectiveGradients._add

    def squared(*args):
        measured["squares"].add(recorder.steps + 1)
        return squares(*args)

    def added(*args):
        measured["gradients"].add(recorder.steps + 1)
        add(*args)

    monkeypatch.setattr(sizes, "squares", squared)
    monkeypatch.setattr(EffectiveGradients, "_add", added)
    with recorder.attach(model, optimizer):
        loop(model, tokenizer, training, optimizer, 5)
    assert measured == {"squares": {2, 3}, "gradients": {2, 3} if adapters else set()}
    rows = read_run(tmp_path / "run").components.query("kind == 'head' and layer == 1")  # before adapters there is no gradient
    assert set(rows["step"]) == {2, 3} and rows[["activation_before", "gradient_before", "cause_before"]].notna().all(axis=None)


def test_under_adapters_steps_left_out_leave_the_others_as_they_are(tmp_path, fresh, loop, training, probes):
    """The plain twin follows the adapters at every recorded step, whatever came between."""
    found = {}
    for steps in ("all", 2):
        torch.manual_seed(0)
        model, tokenizer = load("planted/unrouted")
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        path = tmp_path / str(steps)
        recorder = Recorder(path, probes=probes[:1], tokenizer=tokenizer, steps=steps, milestones="ends", everything=True)
        with recorder.attach(adapted, optimizer):
            loop(adapted, tokenizer, training, optimizer, 5)
        found[steps] = read_run(path)
    batches = [found[steps].parts.query("probe == 'batch' and step in (2, 4)").reset_index(drop=True) for steps in ("all", 2)]
    for column in ("update_norm", "weight_norm", "cause_before", "grad_dot_update"):
        np.testing.assert_allclose(batches[0][column], batches[1][column], rtol=1e-5, atol=1e-8)
    ends = [found[steps].influence.query("step == 5")["effect"].to_numpy() for steps in ("all", 2)]
    np.testing.assert_allclose(*ends, atol=1e-6)
