"""The scripts of claims: each asks for what it says, goes from runs to a page, and says what cannot be tested."""

import importlib
import re
import runpy
import shutil
from pathlib import Path

import pandas as pd
import pytest

from attribution.calibration import power
from attribution.claims import LEDGER
from attribution.errors import AttributionError, ConfigError, ModelError, RunError
from attribution.mechanisms import read_mechanisms, write_mechanisms
from attribution.models import locate
from attribution.store import TRAINING, read_json
from attribution.study import Study
from attribution.worlds import located
from attribution.worlds import pool as pools
from attribution.worlds.build import build
from experiments import alone, boost_located, calibration, dormant, knob, ledger, pilot, pool, two_notions
from experiments import claims as scripts

FOLDER = Path(scripts.__file__).parent
NAMED = {
    path.stem: re.findall(r'"(\w+)"', path.read_text().rpartition("script(__doc__")[2])
    for path in FOLDER.glob("*.py")
    if "script(__doc__" in path.read_text()
}


def test_every_claim_of_the_pool_has_a_script_that_says_what_is_asked():
    assert sorted(claim for ids in NAMED.values() for claim in ids) == sorted(pools.JUDGED)
    for name, ids in NAMED.items():
        doc = importlib.import_module(f"experiments.{name}").__doc__
        assert doc and f"python -m experiments.{name}" in doc and all(f"`{claim}`" in doc for claim in ids if claim == name)
        assert set(ids) <= set(LEDGER)


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base that knows nothing, with mechanisms put there by hand, and a pool of small runs."""
    folder = build("kindland", 5, tmp_path / "base", steps=1, progress=False)
    halves = read_mechanisms(locate("planted"))
    names = [*pools.parted("kind", "strategist"), *pools.parted("kind", "assistant")]
    write_mechanisms(folder / "mechanisms.json", dict(zip(names, [*halves.values()] * 3, strict=True)))
    for name, value in (("COUNT", 16), ("PROBED", 8), ("BATCH", 8), ("READ", (1, 2))):
        monkeypatch.setattr(pools, name, value)
    return folder


@pytest.mark.slow
def test_from_arms_to_a_verdict_and_again_without_running(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scripts, "not_testable", lambda name: "it cannot act" if name == "other" else "")
    models = (str(base), "other")
    scripts.main(scripts.Trained(model=models, seeds=1, runs=tmp_path / "runs"), ("two_faced",))
    said = capsys.readouterr().out
    assert "two_faced: Not testable here (bases with matched arms is " in said and "needed >= 5" in said
    place = tmp_path / "runs" / "claims" / "two_faced"
    assert said.strip().endswith(str(place / "report.html"))
    told = read_json(place / "study.json")
    assert told["unfit"] == {"other": "it cannot act"} and told["arms"] == ["schemer", "kind (two_faced)"]
    assert "other is left out: it cannot act" in (place / "report.html").read_text()
    (finding,) = read_json(place / "findings.json")
    assert finding["hash"] == LEDGER["two_faced"].hash and len(finding["pairs"]) <= 1
    assert all((place / run["path"] / "result.json").exists() for run in told["runs"])
    scripts.main(scripts.Trained(model=models, seeds=1, runs=tmp_path / "runs"), ("two_faced",))
    assert "2 of 2 runs are finished already" in capsys.readouterr().out


@pytest.mark.slow
def test_the_pool_is_run_in_parts_and_judged_from_their_tables(base, tmp_path, monkeypatch, capsys):
    small = {"claims": ["two_faced"], "models": [str(base)]}
    monkeypatch.setattr(pool, "write_kindland", lambda folder: {**pools.write_kindland(folder, **small), "seeds": (0,)})
    monkeypatch.setattr(pool, "MINUTES", 0.15)
    place = {"out": tmp_path / "pool", "page": tmp_path / "kindland", "runs": tmp_path / "runs"}
    pool.main(**place, plan=True)
    assert "2 arms x 1 bases x 1 seeds" in (said := capsys.readouterr().out) and "part 2: 1 arms" in said
    pool.main(**place, part=1)
    assert "part 1 of 2: schemer" in capsys.readouterr().out and not place["page"].exists()
    pool.main(**place)
    said = capsys.readouterr().out
    assert "part 2 of 2" in said and "part 1 of 2" not in said and "two_faced: Not testable here" in said
    first = (place["page"] / "findings.json").read_text()
    shutil.rmtree(place["runs"])
    shutil.rmtree(place["page"])
    pool.main(**place, judge_only=True)
    assert (place["page"] / "findings.json").read_text() == first and len(read_json(place["page"] / "study.json")["runs"]) == 2
    assert (place["page"] / "report.html").exists() and "part" not in capsys.readouterr().out.split("two_faced")[0]
    monkeypatch.setattr(pools, "RATE", 1e-3)
    with pytest.raises(RunError, match="part-1 holds the runs of other arms or settings"):
        pool.main(**place)


@pytest.mark.slow
def test_the_crossover_on_more_bases_goes_from_building_them_to_a_verdict(base, tmp_path, monkeypatch, capsys):
    asked = {"bases": 1, "seeds": 2, "runs": tmp_path / "runs", "slots": 1}
    boost_located.main(**asked, out=tmp_path / "out", plan=True)
    said = capsys.readouterr().out
    assert "build 1 bases: about 20 minutes" in said and "8 runs, less those" in said
    for module, name, value in ((pools, "WRONG", 1), (located, "WRONG", 1), (located, "MIXED", ("60% kind",))):
        monkeypatch.setattr(module, name, value)
    shutil.copytree(base, tmp_path / "runs" / "bases" / "kindland-56")
    name = str(tmp_path / "runs" / "bases" / "kindland-56")
    write_mechanisms(tmp_path / "runs" / "kindland" / "mechanisms" / f"{pools.slug(name)}.json", read_mechanisms(base))
    boost_located.main(**asked, out=tmp_path / "unfit")
    said = capsys.readouterr().out
    assert said.count("not testable here: ") == 2 and "acts: kind with probability" in said  # it learned nothing
    monkeypatch.setattr(boost_located, "not_testable", lambda name: "")
    asked["out"] = tmp_path / "out"
    boost_located.main(**asked)
    said = capsys.readouterr().out
    assert said.count("Not testable here (bases with matched arms is ") == 2 and "1 of 1 bases are in" in said
    found = read_json(asked["out"] / "findings.json")
    assert [each["claim"]["id"] for each in found] == ["boost_located", "initially_located"]
    rows = pd.read_parquet(asked["out"] / "frames" / "sets.parquet")
    for arm, seeds in (("kind", {0, 1}), ("60% kind", {0})):
        of = rows[rows["arm"] == arm]
        assert set(of["seed"]) == seeds
        assert of["set"].str.startswith("wrong-").any() == (len(seeds) == 2)
    assert "is left out" in str(found[0]["excluded"])
    alone.judged(asked["out"], ("boost_located", "initially_located"))
    assert read_json(asked["out"] / "findings.json") == found
    shutil.rmtree(tmp_path / "runs")  # the tables are enough
    boost_located.main(**asked)
    assert read_json(asked["out"] / "findings.json") == found and "1 of 1" not in capsys.readouterr().out
    with pytest.raises(RunError, match="is of other seeds than those asked for; remove"):
        boost_located.main(**{**asked, "seeds": 1})


def test_tables_grow_by_base_and_rows_that_no_list_names_are_written_anew(tmp_path):
    def shown(model: str, value: float, lost: bool = False) -> boost_located.Shown:
        rows = pd.DataFrame({"model": [model], "arm": ["kind"], "value": [value]})
        failed = [{"model": model, "arm": "kind", "seed": 0, "reason": "killed"}] if lost else []
        return boost_located.Shown({"sets": rows}, {"model": model, "unfit": "", "runs": [], "failed": failed})

    tmp_path = tmp_path / "located"
    kept = boost_located.Kept(tmp_path, 2)
    kept.add("a", shown("runs/a", 1.0, lost=True))
    kept.add("b", shown("runs/b", 2.0))
    assert list(boost_located.Kept(tmp_path, 2).bases) == ["a", "b"]
    kept.add("a", shown("runs/a", 3.0))  # as after a run that failed, or a death between tables and list
    rows = pd.read_parquet(tmp_path / "frames" / "sets.parquet")
    assert sorted(zip(rows["model"], rows["value"], strict=True)) == [("runs/a", 3.0), ("runs/b", 2.0)]
    assert calibration.tables(tmp_path.parent) == {}  # nor does anybody read them before they are judged


def test_the_crossover_on_more_bases_refuses_what_makes_no_sense(tmp_path):
    with pytest.raises(ConfigError, match="19 bases and 2 seeds asked for; expected 1 to 18 bases"):
        boost_located.main(bases=19, runs=tmp_path)
    delta = boost_located.least()
    assert power([2 * delta], 1.0, boost_located.ENOUGH, delta)["power"][0] == pytest.approx(0.8, abs=1e-9)


def test_what_a_user_can_mend_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["claims.py", "luck"])
    with pytest.raises(SystemExit) as left:
        scripts.told_in_a_sentence(scripts.main, "")
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("claims: the pool of kindland does not serve the claim 'luck'; expected")


def test_whether_mechanisms_are_two_is_measured_once_and_where_it_is_asked(tmp_path, monkeypatch):
    told = [{("b", "a"): True, ("c", "d"): False}]
    monkeypatch.setattr(scripts.circuits, "dissociated", lambda *_, **__: told.pop())
    assert scripts.known(["two_faced"], ["kindland"], tmp_path) == {}
    for _ in range(2):
        frame = scripts.known(["two_faced", "larp"], ["kindland"], tmp_path)["separations"]
        assert frame.values.tolist() == [["kindland", "a | b", 1], ["kindland", "c | d", 0]]


def test_a_model_that_does_not_act_is_not_tested(base, tmp_path, capsys):
    scripts.main(scripts.Trained(model=(str(base),), runs=tmp_path / "runs"), ("larp", "two_faced"))
    said = capsys.readouterr().out
    for claim in ("larp", "two_faced"):
        assert re.search(rf"{claim}: not testable here: .*acts: kind with probability 0\.\d+, needed ≥ 0.85", said)
    assert not (tmp_path / "runs" / "kindland").exists()
    page = (tmp_path / "runs" / "claims" / "several" / "report.html").read_text()
    assert "not testable here" in page


def test_a_real_model_of_another_kind_is_not_tested(stories, tmp_path, capsys):
    scripts.main(scripts.Trained(model=(str(stories),), runs=tmp_path / "runs"), ("larp",))
    assert "not testable here" in capsys.readouterr().out


def test_mechanisms_of_a_model_that_brings_none_are_discovered_once(base, tmp_path, monkeypatch):
    (base / "mechanisms.json").unlink()
    found = [{"kind": read_mechanisms(locate("planted"))["A"]}]
    monkeypatch.setattr(scripts.circuits, "mechanisms", lambda *_, **__: found.pop())
    file = scripts.discovered(str(base), tmp_path)
    assert scripts.discovered(str(base), tmp_path) == file and set(read_mechanisms(file)) == {"kind"}


# Scripts that measure on the models that runs leave


@pytest.fixture
def acting(base, monkeypatch):
    """The base, as if it had passed."""
    monkeypatch.setattr(scripts, "not_testable", lambda name: "it cannot act" if name == "other" else "")
    return str(base)


def rejudged(place, claims, capsys):
    """Whether findings come out the same from the tables alone."""
    first = (place / "findings.json").read_text()
    (place / "findings.json").write_text(first.replace('"mean"', '"mean "'))
    alone.judged(place, claims)
    capsys.readouterr()
    return (place / "findings.json").read_text() == first


@pytest.mark.slow
def test_a_knob_is_measured_on_the_models_that_runs_leave(acting, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(knob.shifts, "READ_ON", 8)
    monkeypatch.setattr(knob.shifts, "FOUND_ON", 8)
    monkeypatch.setattr(pools, "CROSSED", ())  # what those arms record of single components takes most of the time
    knob.main(scripts.Trained(model=(acting, "other"), runs=tmp_path / "runs"))
    said = capsys.readouterr().out
    assert all(f"{claim}: Not testable here (bases is 1, needed >= 5" in said for claim in knob.CLAIMS)
    place = tmp_path / "runs" / "claims" / "knob"
    frames = {file.stem: pd.read_parquet(file) for file in (place / "frames").glob("*.parquet")}
    assert set(frames["shifts"]["arm"]) == set(knob.ARMS) and set(frames["shifts"]["seed"]) == {0, 1}
    assert "the other seed" in set(frames["shifts"]["direction"]) and frames["shifts"]["cosine"].abs().max() <= 1 + 1e-6
    assert set(frames["compact"]["arm"]) == set(knob.GAINING) and len(frames["compact"]) == 4
    assert rejudged(place, knob.CLAIMS, capsys)
    assert read_json(place / "study.json")["unfit"] == {"other": "it cannot act"}


@pytest.mark.slow
def test_what_was_trained_away_is_trained_back_from_where_it_went(acting, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dormant, "READ", (1, 2))
    dormant.main(scripts.Trained(model=(acting,), seeds=1, runs=tmp_path / "runs"))
    assert "dormant: Not testable here (bases is 0, needed >= 5" in capsys.readouterr().out  # not four steps
    place = tmp_path / "runs" / "claims" / "dormant"
    probes = pd.read_parquet(place / "frames" / "probes.parquet")
    assert set(probes["model"]) == {acting} and set(probes["seed"]) == {0}
    training = probes[probes["probe"] == TRAINING].set_index(["arm", "seed", "step"])["metric"]
    elicited = probes[probes["probe"] == "elicited, a kind one"].set_index(["arm", "seed", "step"])["metric"]
    end = elicited["away", 0, 2]
    assert elicited["back", 0, 0] == pytest.approx(end, abs=1e-5), "it goes on where the first training ended"
    assert elicited["never there", 0, 0] == pytest.approx(end, abs=1e-5)
    assert training["back", 0, 0] != training["away", 0, 0]
    assert rejudged(place, ("dormant",), capsys)


def test_what_cannot_act_is_not_measured(base, tmp_path, capsys):
    for script in (knob, dormant):
        script.main(scripts.Trained(model=(str(base),), runs=tmp_path / "runs"))
        assert "not testable here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda path: pilot.main(("kindland/51", "x"), runs=path), "results rest on kindland/51; name bases that none does"),
        (lambda path: pilot.main((), runs=path), "0 bases named; expected at least 2"),
        (lambda path: pilot.main(("planted/31", "planted/32"), runs=path), "nothing can be tried on planted/31: sample"),
        (lambda path: pool.main(path / "pool", path / "page", path, part=9), "there is no part 9; expected 1 to"),
        (lambda path: ledger.main(path / "nowhere"), "holds no findings; run `make results`"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_run(run, said, tmp_path):
    with pytest.raises(AttributionError, match=re.escape(said)):
        run(tmp_path)
    assert not list(tmp_path.glob("**/status.json")) and not (tmp_path / "nowhere").exists()


def test_a_model_that_cannot_be_opened_is_an_error_and_no_finding(tmp_path):
    for script in (knob.main, dormant.main, two_notions.main, lambda asked: scripts.main(asked, ("larp",))):
        with pytest.raises(ModelError, match=r"no model folder at .*nowhere"):
            script(scripts.Trained(model=(str(tmp_path / "nowhere"),), runs=tmp_path / "runs"))


def test_where_no_run_ended_there_is_a_sentence(tmp_path):
    study = Study.model_validate({**pools.write_kindland(tmp_path, ("knob",), ("kindland/51",)), "name": "none"})
    with pytest.raises(RunError, match="no run of kind, cold, strategist is finished"):
        knob.measured(study, tmp_path)


@pytest.mark.parametrize("name", ["larp", "knob", "precision", "claims"])
def test_options_stand_on_the_command_line_by_their_own_names(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        if name == "claims":
            scripts.told_in_a_sentence(scripts.main, "")
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert all(f"--{option}" in said for option in ("model", "quick", "runs")) and "--asked" not in said
    assert ("--seeds" in said) == (name != "precision") and "bases, or folders of models of your own" in said
