"""The tables of a run against its frames, and what they say where the record is thin."""

import numpy as np
import pandas as pd
import pytest

from attribution.reports import quantities
from attribution.store import BATCH, TRAINING, RunWriter, read_run


def test_four_quantities_are_those_of_the_frames(finished):
    run = read_run(finished)
    probe = quantities.probe_sets(run)[0]
    table = quantities.per_component(run, "head").set_index(["probe", "layer", "index"])
    found = table.loc[(probe, 2, 3)]
    chosen = f"probe == {probe!r} and kind == 'head' and layer == 2 and index == 3"
    frames = {"influence": run.influence, "components": run.components, "grafts": run.grafts}
    at = {name: frame.rename_axis("row").query(chosen) for name, frame in frames.items()}
    effects = at["influence"].set_index("step")["effect"].astype("float64")
    assert found["influence"] == effects[0]
    assert found["strengthening"] == pytest.approx(effects[6] - effects[0], abs=1e-12)
    assert found["share"] == pytest.approx(at["components"]["share"].sum(), abs=1e-6)
    assert found["graft"] == pytest.approx(at["grafts"]["graft"].iloc[0])
    assert found["share_steps"] == 6


def test_what_was_trained_on_is_no_probe_set_and_a_whole_layer_no_component(finished):
    run = read_run(finished)
    assert {BATCH, TRAINING} < {*run.parts["probe"], *run.influence["probe"]}
    assert quantities.probe_sets(run) == ["conflict", "agree <b>held out</b>"]
    table = quantities.per_component(run, "head")
    assert set(table["probe"]) == set(quantities.probe_sets(run))
    assert (table["index"] >= 0).all() and table["graft"].max() < 99


def test_causes_are_the_effects_on_training_samples_before_training(finished):
    run = read_run(finished)
    table = quantities.causes(run)
    recorded = run.influence[(run.influence["probe"] == TRAINING) & (run.influence["step"] == 0)]
    assert table["cause"].tolist() == recorded["effect"].astype("float64").tolist()
    assert table["kl"].tolist() == recorded["kl"].astype("float64").tolist()
    assert table.groupby("kind").size().to_dict() == {"head": 12, "neuron": 36, "row": 30}
    assert quantities.cause_samples(run) == "48 training samples"
    beside = quantities.with_causes(run, "head").set_index(["probe", "layer", "index"])["cause"]
    at = table[table["kind"] == "head"].set_index(["layer", "index"])["cause"]
    assert beside["conflict"].to_dict() == beside["agree <b>held out</b>"].to_dict() == at.to_dict()


def _ranked(tmp_path, causes, after):
    """A run in which heads of one layer have these causes, no influence before, and this influence after."""
    writer = RunWriter(tmp_path, {"model": "m"})
    for step, probe, effects in ((0, TRAINING, causes), (0, "p", [0.0] * len(after)), (4, "p", after)):
        heads = pd.DataFrame({"kind": "head", "layer": 0, "index": range(len(effects)), "effect": effects})
        writer.add("influence", heads.assign(step=step, probe=probe, kl=0.0))
    writer.flush()
    return quantities.rank_correlations(read_run(tmp_path)).to_dict("records")


def test_rank_correlation_is_that_of_ranks(tmp_path):
    found = _ranked(tmp_path / "up", [0.1, -2.0, 30.0, 0.4], [1.0, 0.0, 3.0, 2.0])
    assert found == [{"probe": "p", "kind": "head", "spearman": pytest.approx(1), "n": 4}]
    assert _ranked(tmp_path / "down", [1.0, 2.0, 3.0], [9.0, 1.0, 0.0])[0]["spearman"] == pytest.approx(-1)
    assert _ranked(tmp_path / "by hand", [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0])[0]["spearman"] == pytest.approx(0.8)
    for name, causes in (("two", [1.0, 2.0]), ("equal", [1.0, 1.0, 1.0])):
        assert np.isnan(_ranked(tmp_path / name, causes, range(len(causes)))[0]["spearman"])


def test_a_run_without_causes_says_so(uncaused, finished, build, tmp_path):
    run = read_run(uncaused)
    assert quantities.causes(run).empty and quantities.rank_correlations(run).empty
    assert quantities.with_causes(run, "head")["cause"].isna().all()
    assert quantities.NO_CAUSES in quantities.not_measured(run)
    told = quantities.not_measured(read_run(finished))
    assert told == ["Samples of the batch, because <script>alert(1)</script>."]


def test_kinds_without_causes_are_said(tmp_path):
    _ranked(tmp_path, [1.0, 2.0], [0.0, 0.0, 0.0])
    told = quantities.not_measured(read_run(tmp_path))
    assert "Causes of heads on training samples: recorded for 2 of 3 in this record." in told
    assert "Causes of neurons on training samples: not recorded." in told and quantities.NO_CAUSES not in told


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
    assert table["influence"].notna().sum() == 2 * 3 * 3 and table["share"].notna().all()
    assert (
        "Influence before of neurons: recorded for 9 of 36 in this record; the others are drawn grey."
        in quantities.not_measured(run)
    )


def test_a_run_of_nothing_is_all_missing(tmp_path):
    RunWriter(tmp_path / "run", {"model": "m"})
    run = read_run(tmp_path / "run")
    assert quantities.probe_sets(run) == [] and quantities.behaviour(run).empty
    said = " ".join(quantities.not_measured(run))
    assert quantities.causes(run).empty and quantities.rank_correlations(run).empty
    for part in (
        "not finished",
        "What caused the trained responses was not measured",
        "Training loss",
        "Behaviour",
        "Influence before of heads",
        "Graft of neurons",
        "unembedding rows",
    ):
        assert part in said


def test_text_from_data_is_one_printable_line():
    assert quantities.shown("a\n\x1b[31mb\u202e") == "a\\n\\x1b[31mb\\u202e"
    assert quantities.shown("w" * 10_000, 20) == "w" * 20 + "…"
    assert quantities.signed(np.nan) == "–" and quantities.signed(-0.12345) == "−0.123"


def test_tables_are_made_once_for_a_run_and_nobody_spoils_those_of_others(finished, unfinished):
    run = read_run(finished)
    first, heads = quantities.probe_sets(run), quantities.per_component(run, "head")
    expected = heads.copy(deep=True)
    first.clear()
    heads.loc[:, "share"] = 7.0
    heads.drop(columns="graft", inplace=True)
    pd.testing.assert_frame_equal(quantities.per_component(run, "head"), expected)
    assert len(quantities.probe_sets(run)) == 2 and not quantities.per_component(run, "neuron").equals(expected)
    assert len(run.made) == 2 and not read_run(unfinished).made and not read_run(finished).made
