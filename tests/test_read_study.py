"""A study read back as frames: all rows with model, arm and seed, of runs or of tables alone, and no more than asked."""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

import attribution as at
from attribution.errors import RunError
from attribution.store import BATCH, COLUMNS, STUDY_COLUMNS, RunWriter, read_run, read_study

ARMS = {"kind": "kind-0123abcd", "cold, fitting": "cold, fitting-89abcdef"}


def record(path, model, seed, share, finished=True):
    writer = RunWriter(path, {"model": model, "recipe": "sft", "seed": seed})
    writer.meta({"versions": {}})
    rows = pd.DataFrame({"kind": ["head", "neuron"] * 2, "layer": [0, 1] * 2, "index": [3, 5] * 2, "part": "writing",
                         "probe": ["p", "p", BATCH, BATCH], "share": [share, -share, None, None]})  # fmt: skip
    for step in (1, 2):
        writer.add("components", rows.assign(step=step))
        writer.add("steps", pd.DataFrame({"step": [step], "loss": [share]}))
        writer.flush()
    if finished:
        writer.finish({"steps": 2, "seconds": 1.5})
    writer.close()


@pytest.fixture
def study(tmp_path):
    for place, (arm, folder) in enumerate(ARMS.items()):
        for seed in (0, 1):
            done = seed == 0 or arm == "kind"
            record(tmp_path / folder / f"seed-{seed}", "kindland/51", seed, place + 0.25 * seed, finished=done)
    return tmp_path


def test_runs_have_their_names_and_states(study):
    found = at.read_study(study).runs.set_index(["arm", "seed"]).sort_index()
    assert set(found.reset_index()) == set(STUDY_COLUMNS["runs"])
    assert found.index.tolist() == [("cold, fitting", 0), ("cold, fitting", 1), ("kind", 0), ("kind", 1)]
    assert found["state"].tolist() == ["finished", "running", "finished", "finished"]
    assert found["hash"].tolist() == ["89abcdef"] * 2 + ["0123abcd"] * 2 and found["seconds"].isna().tolist()[1]
    assert at.read_run(found.loc[("kind", 0), "path"]).steps["loss"].tolist() == [0.0, 0.0]


def test_rows_of_all_runs_stand_in_one_frame(study):
    whole = read_study(study)
    assert len(whole.components) == 4 * 2 * 4 and len(whole.steps) == 8
    assert list(whole.steps)[:3] == ["model", "arm", "seed"] and whole.samples.empty
    loss = whole.steps.groupby(["arm", "seed"])["loss"].first()
    assert loss.to_dict() == {("kind", 0): 0.0, ("kind", 1): 0.25, ("cold, fitting", 0): 1.0, ("cold, fitting", 1): 1.25}
    some = whole.read("components", ["step", "share"], arm="cold, fitting", kind="head", probe="p", step=[2])
    assert list(some) == ["model", "arm", "seed", "step", "share"] and some["share"].tolist() == [1.0, 1.25]
    assert whole.read("components", ["share"], seed=(0, 1), arm=["kind"], kind="neuron", probe="p")["share"].tolist() == [
        0, 0, -0.25, -0.25,
    ]  # fmt: skip
    assert whole.read("steps", model="another").empty and whole.claims.empty


def test_a_study_that_lists_its_runs_leaves_others_alone(study):
    listed = [{"arm": "kind", "model": "m", "seed": 0, "path": f"{ARMS['kind']}/seed-0"}]
    (study / "study.json").write_text(json.dumps({"name": "mine", "runs": listed}))
    assert read_study(study).runs[["arm", "seed"]].to_numpy().tolist() == [["kind", 0]]


def test_tables_alone_are_a_study_too(tmp_path):
    run = {"arm": "A", "model": "m", "seed": 0, "path": "A-0123abcd/seed-0", "state": "finished", "steps": 3, "seconds": 2.0}
    verdict = {"claim": "boost", "verdict": "supported", "note": "", "mean": 0.2, "low": 0.1, "high": 0.3, "n": 5,
               "unit": "organism", "level": 0.95, "delta": 0.1, "sentence": "Supported."}  # fmt: skip
    (tmp_path / "study.json").write_text(json.dumps({"name": "mine", "runs": [run]}))
    (tmp_path / "findings.json").write_text(json.dumps([{"claim": {"id": "boost"}, "hash": "112a14a8", "verdict": [verdict]}]))
    frame = pd.DataFrame({"model": "m", "arm": ["A", "B"], "seed": 0, "step": [0, 1], "probe": "p", "metric": [1.0, 2.0]})
    (tmp_path / "frames").mkdir()
    frame.to_parquet(tmp_path / "frames" / "probes.parquet")
    found = read_study(tmp_path)
    assert found.runs[["arm", "hash", "seconds"]].to_numpy().tolist() == [["A", "0123abcd", 2.0]]
    assert found.claims.iloc[0].to_dict() == {**verdict, "hash": "112a14a8"}
    assert list(found.claims) == list(STUDY_COLUMNS["claims"])
    assert found.read("probes", ["metric"], arm="B").to_numpy().tolist() == [["m", "B", 0, 2.0]]
    assert len(found.probes) == 2
    with pytest.raises(RunError, match=r"no table 'steps'; it has probes: read the study where it was run"):
        found.steps  # noqa: B018
    with pytest.raises(RunError, match="'probes' has no column 'layer'; expected model, arm, seed, step"):
        found.read("probes", layer=0)


def test_what_is_no_study_or_no_column_is_named(study, tmp_path_factory):
    with pytest.raises(RunError, match=r"holds no study: neither runs nor study\.json"):
        read_study(tmp_path_factory.mktemp("empty"))
    run = read_run(study / ARMS["kind"] / "seed-0")
    with pytest.raises(RunError, match="there is no frame 'component'; expected steps, probes"):
        run.read("component")
    with pytest.raises(RunError, match="'steps' has no column 'los'; expected step, loss"):
        run.read("steps", ["los"])
    with pytest.raises(RunError, match="'steps' has no column 'probe'"):
        read_study(study).read("steps", probe="p")


def test_what_is_read_is_what_the_whole_frame_holds(study):
    run = read_run(study / ARMS["kind"] / "seed-1")
    some = run.read("components", ["step", "index", "share"], kind=["head"], step=2)
    whole = run.parts[(run.parts["kind"] == "head") & (run.parts["step"] == 2)]
    pd.testing.assert_frame_equal(some, whole[["step", "index", "share"]].reset_index(drop=True))
    assert list(run.read("grafts", ["graft"])) == ["graft"] and set(run.read("steps")) == set(COLUMNS["steps"])


def test_a_part_of_a_large_record_is_read_in_a_part_of_its_memory(tmp_path):
    """Forty parts of 50,000 rows: one step's heads in two columns take no more memory than two whole parts."""
    writer = RunWriter(tmp_path / "run", {"model": "planted", "seed": 0})
    rows = pd.DataFrame({"kind": ["head"] * 100 + ["neuron"] * 49_900, "layer": 0, "index": range(50_000), "part": "writing",
                         "probe": "p"})  # fmt: skip
    for step in range(1, 41):
        writer.add("components", rows.assign(step=step, share=rows["index"] * 1e-6, weight_norm=float(step)))
        writer.flush()
    pool = pa.default_memory_pool()
    before = pool.max_memory()
    found = read_run(tmp_path / "run").read("components", ["index", "share"], kind="head", step=7)
    taken = pool.max_memory() - before
    assert len(found) == 100 and found["share"].iloc[-1] == pytest.approx(99e-6)
    whole = read_run(tmp_path / "run").parts
    assert len(whole) == 2_000_000 and taken < whole.memory_usage(deep=True).sum() / 20


def test_what_a_study_keeps_for_its_page_is_read_alike():
    study = at.read_study(Path(__file__).parents[1] / "results" / "boost")
    found = study.read("totals", ["kind", "layer", "index", "share"], arm="A", kind="head", probe="agree")
    assert set(found["arm"]) == {"A"} and set(found["kind"]) == {"head"} and len(found) == 16 * 12
    with pytest.raises(RunError, match="no runs and no table 'components'; it has courses, failed"):
        study.read("components", ["step", "share"], arm="A")
    with pytest.raises(RunError, match="'totals' has no column 'step'; expected model, arm, seed, probe"):
        study.read("totals", ["step"])
