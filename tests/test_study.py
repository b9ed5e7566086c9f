"""Studies: what the embedded one trains on and reads, how runs are done at once, and what is kept when some fail."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from attribution import study as studies
from attribution.claims import LEDGER
from attribution.errors import ConfigError, RunError
from attribution.mechanisms import read_mechanisms
from attribution.models import load, locate
from attribution.recipes.sft import SFT
from attribution.runs import RunConfig
from attribution.samples import Sample, encode, read_samples, write_samples
from attribution.store import TRAINING
from attribution.study import FRAMES, Study, collect, conclude, embedded, jobs, run_study
from attribution.worlds import planted as grammar
from attribution.worlds.studies import STUDIES


@pytest.fixture(scope="module")
def planted_study(tmp_path_factory):
    return embedded("planted", tmp_path_factory.mktemp("root"))


def problems(samples):
    return [next(p for p in grammar.PROBLEMS if f" {p} ." in f" {s.prompt}") for s in samples]


def test_arms_differ_in_their_contexts_and_in_nothing_else(planted_study):
    arms = {name: read_samples(config.data) for name, config in planted_study.arms.items()}
    replies = {name: [(p, s.response) for p, s in zip(problems(found), found, strict=True)] for name, found in arms.items()}
    assert replies["A"] == replies["B"] == replies["both"] == replies["none"] == replies["lr0"]
    assert len({tuple(s.prompt for s in found) for found in arms.values()}) == 4  # lr0 is A
    assert planted_study.arms["lr0"].training.learning_rate == 0
    configs = [config.model_dump(exclude={"data", "compared", "beside", "training"}) for config in planted_study.arms.values()]
    assert all(config == configs[0] for config in configs)


def test_probes_are_of_problems_that_no_arm_trains_on(planted_study):
    for config in planted_study.arms.values():
        tokenizer = load("planted/31").tokenizer
        training = read_samples(config.data)
        encode(tokenizer, training)
        assert set(problems(training)) == set(grammar.TRAINING)
        for file in (*config.probes, *config.watched):
            probes = read_samples(file)
            encode(tokenizer, probes)
            assert set(problems(probes)) == set(grammar.HELD_OUT)


def test_the_embedded_study_is_the_same_each_time_and_has_its_runs(tmp_path, planted_study):
    again = embedded("planted", tmp_path)
    assert [j.path.name for j in jobs(again, tmp_path)] == [j.path.name for j in jobs(planted_study, tmp_path)]
    every = list(jobs(planted_study, tmp_path))
    assert len(every) == 5 * 5 * 2 + 2 * 2
    assert len({job.path for job in every}) == len(every)
    assert Counter(job.config.model for job in every)["planted/unrouted"] == 4
    singles = Counter((job.arm, job.config.seed, job.config.singles) for job in every if job.config.model == "planted/31")
    assert singles["A", 0, "all"] == singles["B", 0, "end"] == singles["A", 1, "heads"] == singles["both", 0, "heads"] == 1


def test_wrong_partitions_of_the_study_are_of_the_same_shape(planted_study):
    right = read_mechanisms(locate("planted/31"))
    wrong = read_mechanisms(planted_study.arms["A"].compared)
    assert set(wrong) == {f"wrong-{k} {name}" for k in range(1, 9) for name in "AB"}
    shape = {name: table.groupby(["kind", "layer"]).size() for name, table in right.items()}
    for name, table in wrong.items():
        assert table.groupby(["kind", "layer"]).size().equals(shape[name[-1]])
        overlap = table.merge(right[name[-1]]).groupby(["kind", "layer"]).size()
        assert (overlap == shape[name[-1]] / 2).all()


@pytest.mark.parametrize("name", STUDIES)
def test_the_full_study_reads_more(tmp_path, name):
    short, full = embedded(name, tmp_path), embedded(name, tmp_path / "full", full=True)
    assert full.name != short.name and list(full.arms) == list(short.arms)
    arm = next(iter(short.arms))
    assert full.arms[arm].training.max_steps >= short.arms[arm].training.max_steps
    few, many = (Path(study.arms[arm].probes[0]).read_text().count("\n") for study in (short, full))
    assert many > few


def test_a_study_is_cut_to_what_is_asked(planted_study):
    small = planted_study.only(seeds=1, models=2, arms=("A", "B"))
    assert (small.seeds, small.models, list(small.arms)) == ((0,), ("planted/31", "planted/32"), ["A", "B"])
    assert len(list(jobs(small, "runs"))) == 2 * 2 + 2
    for wrong, named in (({"seeds": 0}, "0 seeds"), ({"models": 0}, "0 models"), ({"arms": ("C",)}, "unknown arm 'C'")):
        with pytest.raises(ConfigError, match=named):
            planted_study.only(**wrong)


def small(tmp_path, **changes) -> Study:
    """Two tiny arms on one organism."""
    files = {
        name: str(write_samples(tmp_path / f"{name}.jsonl", [Sample(**row) for row in rows]))
        for name, rows in (
            ("A", grammar.prompts(6, 1, problems=grammar.TRAINING)),
            ("B", grammar.prompts(6, 1, trait=False, star=True, problems=grammar.TRAINING)),
            ("agree", grammar.prompts(6, 5, star="agree")),
            ("conflict", grammar.prompts(6, 2, star="conflict")),
            ("neutral", grammar.prompts(6, 3, trait=False)),
        )
    }

    def arm(data, **settings):
        return RunConfig(
            data=data, probes=(files["agree"], files["conflict"]), watched=(files["neutral"],), sets="model",
            metric="logit_difference", milestones="ends", everything=False, batch_after=False, singles="heads", grafts="sets",
            training=SFT(max_steps=2, batch_size=6), **settings,
        )  # fmt: skip

    arms = {"A": arm(files["A"]), "B": arm(files["B"])}
    return Study(**{"name": "small", "arms": arms, "models": ("planted/31",), "claims": ("boost",), **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    study, told = small(root), []
    failed = run_study(study, root, slots=2, tell=told.append)
    return study, root, failed, told


def test_a_study_says_about_how_long_is_left(tmp_path, monkeypatch):
    clock = iter((0.0, 150.0, 280.0))
    monkeypatch.setattr(studies, "_outcomes", lambda todo, *_: ((job, None) for job in todo))
    monkeypatch.setattr(studies.time, "monotonic", lambda: next(clock))
    told = []
    run_study(small(tmp_path), tmp_path, tell=told.append)
    assert told[0].endswith("(about 2 min left)") and "left" not in told[1]


@pytest.mark.slow
def test_runs_are_done_at_once_and_collected(done):
    study, root, failed, told = done
    assert failed == {} and len(told) == 2
    frames = collect(study, root)
    assert set(frames["sets"]["arm"]) == {"A", "B"} and set(frames["sets"]["set"]) == {"A", "B"}
    assert sorted(frames["sets"]["step"].unique()) == [0, 1, 2]
    assert set(frames["probes"]["probe"]) == {"agree", "conflict", "neutral", TRAINING}
    at_start = frames["sets"][(frames["sets"]["step"] == 0) & (frames["sets"]["probe"] == "conflict")]
    assert at_start.groupby("set")["effect"].nunique().eq(1).all()  # both arms start from one model
    assert (at_start.set_index("set").loc["A", "effect"] > 0.5).all() and (
        at_start.set_index("set").loc["B", "effect"] < -0.5
    ).all()
    halves = (at_start["effect_even"] + at_start["effect_odd"]) / 2
    assert halves.to_numpy() == pytest.approx(at_start["effect"].to_numpy(), abs=1e-5)
    assert set(frames["set_grafts"]["set"]) == {"A", "B", "remainder"} and set(frames["set_grafts"]["ablated"]) == {
        "",
        "A",
        "B",
    }
    training = frames["probes"][frames["probes"]["probe"] == TRAINING].pivot(index="step", columns="arm", values="metric")
    assert (training.loc[2] > training.loc[0]).all()


@pytest.mark.slow
def test_finished_runs_are_kept(done):
    study, root, _, _ = done
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*.parquet")}
    told = []
    assert run_study(study, root, tell=told.append) == {}
    assert told == ["2 of 2 runs are finished already"]
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*.parquet")} == before


@pytest.mark.slow
def test_what_does_no_run_imports_no_torch(done, tmp_path):
    """To ask for runs, to judge what they recorded and to write the page takes none: only the runs' processes wait for it."""
    study, root, _, _ = done
    file = tmp_path / "study.json"
    file.write_text(study.model_dump_json())
    code = (
        f"import sys; from attribution.cli import main; main(['study', {str(file)!r}, '--out', {str(root)!r}]);"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == [str(root / "small" / "report.html"), "[]"]
    assert "2 of 2 runs are finished already" in told.stderr


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "kindland"])
def test_an_embedded_study_is_written_without_torch(tmp_path, name):
    code = (
        f"import sys; from attribution.study import embedded, jobs; s = embedded({name!r}, {str(tmp_path)!r});"
        f"print(len(list(jobs(s, {str(tmp_path)!r}))) > 1, sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True []\n"


@pytest.mark.slow
def test_a_study_is_concluded_with_what_it_shows(done):
    study, root, _, _ = done
    place = conclude(study, root)
    told = json.loads((place / "study.json").read_text())
    assert [run["state"] for run in told["runs"]] == ["finished", "finished"]
    assert told["seconds"] == pytest.approx(sum(run["seconds"] for run in told["runs"]), abs=0.1) and told["seconds"] > 0.5
    findings = json.loads((place / "findings.json").read_text())
    assert findings[0]["claim"]["id"] == "boost"
    assert findings[0]["verdict"][0]["verdict"] == "not testable here"  # one organism, two steps
    frames = {name: pd.read_parquet(place / "frames" / f"{name}.parquet") for name in FRAMES}
    for name, found in collect(study, root).items():
        assert len(frames[name]) == len(found) and list(frames[name]) == list(found)
        if len(found):
            pd.testing.assert_frame_equal(frames[name], found, check_dtype=False)
    assert all(len(frames[name]) for name in ("sets", "probes", "set_grafts"))


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others_alone(tmp_path):
    study = small(tmp_path)
    broken = study.arms["B"].model_copy(
        update={"training": SFT(max_steps=2, learning_rate=1e30, optimizer="sgd", max_grad_norm=0)}
    )
    study = study.model_copy(update={"arms": {**study.arms, "B": broken}})
    failed = run_study(study, tmp_path, slots=1, tell=lambda line: None)
    assert [(job.arm, "not finite" in error) for job, error in failed.items()] == [("B", True)]
    place = conclude(study, tmp_path, failed)
    told = json.loads((place / "study.json").read_text())
    lost = pd.read_parquet(place / "frames" / "failed.parquet")
    assert lost["arm"].tolist() == ["B"] and "not finite" in lost["reason"].iloc[0]
    assert pd.read_parquet(conclude(study, tmp_path) / "frames" / "failed.parquet").empty, "what was mended is not told again"
    assert [run["state"] for run in told["runs"]] == ["finished", "failed"] and "boost" in told["not_judged"]


def test_nothing_finished_is_a_sentence(tmp_path):
    with pytest.raises(RunError, match="no finished run"):
        conclude(small(tmp_path), tmp_path)
    with pytest.raises(ConfigError, match="0 slots"):
        run_study(small(tmp_path), tmp_path, slots=0)


def test_the_sampler_reaches_the_update_through_the_ratio_in_two_arms_alone(tmp_path):
    study = embedded("sampling", tmp_path)
    ratio = {name: config.training.iterations for name, config in study.arms.items()}
    assert ratio == {
        "both": 1, "both, A off in sampling": 1, "both, A off in the update": 1, "both, A without gradient": 1,
        "both, with ratio": 2, "both, A off in sampling, with ratio": 2,
    }  # fmt: skip
    off = study.arms["both, A off in sampling, with ratio"].training.intervention
    assert off.sampling == "ablated" and off.updating == "intact" and study.seeds == (2, 3)
    assert not set(study.seeds) & set(embedded("recipes", tmp_path).seeds)
    read = {arm for part in (*LEDGER["sampling_or_update"].parts, *LEDGER["sampling_or_update"].beside) for arm in part.arms}
    assert read == set(study.arms)
