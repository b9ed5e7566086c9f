"""The tables of a run against its frames, and what they say where the record is thin."""

import numpy as np
import pandas as pd
import pytest

from attribution.reports import quantities
from attribution.store import RunWriter, read_run


def test_four_quantities_are_those_of_the_frames(finished):
    run = read_run(finished)
    probe = quantities.probe_sets(run)[0]
    table = quantities.per_component(run, "head").set_index(["probe", "layer", "index"])
    found = table.loc[(probe, 2, 3)]
    chosen = f"probe == {probe!r} and kind == 'head' and layer == 2 and index == 3"
    frames = {"influence": run.influence, "components": run.components, "grafts": run.grafts}
    at = {name: frame.rename_axis("row").query(chosen) for name, frame in frames.items()}
    effects = at["influence"].set_index("step")["effect"].astype("float64")
    assert found["cause"] == effects[0]
    assert found["strengthening"] == pytest.approx(effects[6] - effects[0], abs=1e-12)
    assert found["share"] == pytest.approx(at["components"]["share"].sum(), abs=1e-6)
    assert found["graft"] == pytest.approx(at["grafts"]["graft"].iloc[0])
    assert found["share_steps"] == 6


def test_the_training_batch_and_whole_layers_are_no_components(finished):
    run = read_run(finished)
    assert quantities.probe_sets(run) == ["conflict", "agree <b>held out</b>"]
    table = quantities.per_component(run, "head")
    assert (table["index"] >= 0).all() and table["graft"].max() < 99


def test_places_add_up_to_the_shares(finished):
    run = read_run(finished)
    for probe in quantities.probe_sets(run):
        sums = quantities.balance(run, probe)
        assert quantities.by_place(run, probe)["share"].sum() == pytest.approx(sums.shares, abs=1e-5)
        assert sums.change == pytest.approx(sums.shares + sums.residual, abs=1e-5)
    assert quantities.balance(run, "conflict").resolved == pytest.approx(5 / 6)


def test_whole_layer_rows_stand_in_for_their_neurons(tmp_path):
    writer = RunWriter(tmp_path / "run", {"model": "m"})
    neuron = {"step": 1, "probe": "p", "kind": "neuron", "layer": 0, "part": "writing"}
    writer.add("components", pd.DataFrame([{**neuron, "index": 4, "share": 0.25}, {**neuron, "index": -1, "share": 1.0}]))
    writer.flush()
    run = read_run(tmp_path / "run")
    assert quantities.by_place(run, "p")["share"].tolist() == [1.0]
    assert quantities.per_component(run, "neuron")["share"].tolist() == [0.25]


def test_neurons_without_influence_are_said(build, tmp_path):
    run = read_run(build(tmp_path / "run", neurons=3))
    table = quantities.per_component(run, "neuron")
    assert table["cause"].notna().sum() == 2 * 3 * 3 and table["share"].notna().all()
    assert (
        "Cause before of neurons: recorded for 9 of 36 in this record; the others are drawn grey."
        in quantities.not_measured(run)
    )


def test_a_run_of_nothing_is_all_missing(tmp_path):
    RunWriter(tmp_path / "run", {"model": "m"})
    run = read_run(tmp_path / "run")
    assert quantities.probe_sets(run) == [] and quantities.behaviour(run).empty
    said = " ".join(quantities.not_measured(run))
    for part in ("not finished", "Training loss", "Behaviour", "Cause before of heads", "Graft of neurons", "unembedding rows"):
        assert part in said


def test_text_from_data_is_one_printable_line():
    assert quantities.shown("a\n\x1b[31mb\u202e") == "a\\n\\x1b[31mb\\u202e"
    assert quantities.shown("w" * 10_000, 20) == "w" * 20 + "…"
    assert quantities.signed(np.nan) == "–" and quantities.signed(-0.12345) == "−0.123"
