"""The command line: instant help, verbs that say what they do, and errors in one sentence."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from attribution.cli import VERBS, main
from attribution.samples import read_samples
from attribution.store import RunWriter, write_json


def python(*code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "said", "heavy"),
    [
        (["--help"], "usage", []),
        ([], "usage", []),
        (["recipes"], "sft", []),
        (["ls", "--help"], "usage", []),
        (["claims"], "larp  (kindland", ["pandas"]),
    ],
)
def test_help_and_lists_import_no_torch(arguments, said, heavy):
    code = f"""
import sys
from attribution.cli import main
try:
    main({arguments!r})
finally:
    print("heavy:", sorted({{"torch", "transformers", "trl", "pandas", "plotly"}} & set(sys.modules)))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and f"heavy: {heavy}" in done.stdout


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    assert f"usage: attribution {verb}" in capsys.readouterr().out


def test_module_and_version():
    done = python("-m", "attribution", "--version")
    assert done.stdout.startswith("attribution ") and done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["stduy"], "unknown command 'stduy'; expected study"),
        (["study", "plantd"], "unknown study 'plantd'; expected planted"),
        (["study", "none.json"], "cannot read the study none.json"),
        (["study", "--seeds", "0"], "0 seeds"),
        (["ls", "nowhere"], "no runs below nowhere"),
        (["report", "nowhere"], "holds no run"),
        (["samples", "none.txt", "--out", "x.jsonl"], "cannot read none.txt"),
        (["build-world", "planet", "--seed", "1", "--out", "x"], "unknown world 'planet'"),
        (["run", "none.json"], "cannot read the config none.json"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert named in shown.err and len(shown.err.strip().splitlines()) == 1 and shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_unknown_flags_leave_with_2(capsys):
    with pytest.raises(SystemExit) as left:
        main(["run", "--data", "d", "--probes", "p", "--learning-rate", "3"])
    assert left.value.code == 2


def test_samples_are_cut_from_text(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("one two three four five six\n\nseven eight nine ten")
    out = tmp_path / "d.jsonl"
    assert main(["samples", str(tmp_path / "text.txt"), "--out", str(out), "--prompt-words", "2", "--response-words", "1"]) == 0
    assert capsys.readouterr().out == f"3 samples in {out}\n"
    assert [(s.prompt, s.response) for s in read_samples(out)] == [
        ("one two", " three"),
        ("four five", " six"),
        ("seven eight", " nine"),
    ]


def test_a_setting_out_of_range_is_told_without_an_address(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a", "response": " b"}\n')
    given = ("--model", "planted", "--data", str(data), "--probes", str(data), "--training.max-steps", "0")
    found = python("-m", "attribution", "run", "--recipe", "sft", *given)
    assert found.returncode == 2
    told = " ".join((found.stdout + found.stderr).split())
    assert "max_steps" in told and "greater than or equal to 1" in told and "pydantic.dev" not in told


def test_ls_lists_studies_arms_and_runs(tmp_path, capsys):
    study = tmp_path / "mine"
    RunWriter(study / "a-0" / "seed-0", {"model": "m\x1b[31m", "recipe": "sft", "seed": 0}).finish({"steps": 3})
    RunWriter(study / "a-0" / "seed-2", {"model": "m", "recipe": "sft", "seed": 2}).finish({"steps": 3})
    writer = RunWriter(study / "a-0" / "seed-1", {"model": "m", "recipe": "sft", "seed": 1})
    writer.add("steps", pd.DataFrame([{"step": 1}]))
    writer.status("failed", step=1)
    RunWriter(tmp_path / "other" / "b-0" / "seed-0", {"model": "n", "recipe": "dpo", "seed": 0})
    RunWriter(tmp_path / "persona", {"model": "n", "recipe": "sft", "seed": 0})
    RunWriter(tmp_path / "reward", {"model": "n", "recipe": "sft", "seed": 0})
    assert main(["ls", str(tmp_path)]) == 0
    first, second, *alone = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in alone] == [str(tmp_path / "persona"), str(tmp_path / "reward")]
    assert first == f"{study / 'a-0'}  failed: seed 1 at step 1; finished: seeds 0, 2  sft  m"
    assert second == f"{tmp_path / 'other' / 'b-0'}  running: seed 0 at step 0  dpo  n"
    row = {"verdict": "supported", "note": "relatively spared"}
    write_json(study / "findings.json", [{"claim": {"id": "boost"}, "hash": "0", "verdict": [row]}])
    write_json(study / "study.json", {"not_judged": {"larp": "no\x07 arm"}})
    assert main(["ls", str(tmp_path), "--every"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"{study}: 2 of 3 runs finished",
        "  boost: supported (relatively spared)",
        "  larp: not judged, no\\x07 arm",
    ]
    assert lines[3].endswith("finished  3 steps  sft  m\\x1b[31m") and lines[4].endswith("failed  1 steps  sft  m")
    assert len(lines) == 9 and "\x1b" not in "".join(lines)


def test_a_study_file_runs_every_arm_with_every_seed_and_ends_with_the_page(tmp_path, monkeypatch, capsys):
    from attribution.study import jobs
    from attribution.verbs import study as verb

    done = []
    monkeypatch.setattr(verb, "run_study", lambda found, out, **_: done.extend(jobs(found, out)) or {})
    monkeypatch.setattr(verb, "conclude", lambda found, out, failed: tmp_path / found.name)
    monkeypatch.setattr(verb, "study_report", lambda place: place / "report.html")
    arm = {"data": "d.jsonl", "probes": ["p.jsonl"]}
    arms = {"A": arm, "B": {**arm, "metric": "log_prob"}}
    (tmp_path / "s.json").write_text(json.dumps({"name": "mine", "arms": arms, "seeds": [4, 7]}))
    command = ["study", str(tmp_path / "s.json"), "--out", str(tmp_path)]
    assert main(command) == 0
    assert [(job.config.seed, job.arm) for job in done] == [(4, "A"), (4, "B"), (7, "A"), (7, "B")]
    assert all(job.path.parent.parent == tmp_path / "mine" for job in done)
    assert capsys.readouterr().out == f"{tmp_path / 'mine' / 'report.html'}\n"
    lost = done[1].path
    lost.mkdir(parents=True)
    (lost / "log.txt").write_text("it broke")
    monkeypatch.setattr(verb, "run_study", lambda found, out, **_: {list(jobs(found, out))[1]: "it broke"})
    assert main(command) == 2
    assert "report.html" in (shown := capsys.readouterr()).out
    assert "1 run failed" in shown.err and f"{lost}: it broke (log: {lost / 'log.txt'})" in shown.err
    monkeypatch.setattr(verb, "run_study", lambda found, out, **_: dict.fromkeys(jobs(found, out), "it broke"))
    assert main(command) == 2
    assert "4 runs failed" in (shown := capsys.readouterr()).err and not shown.out, "nothing to conclude"


@pytest.mark.parametrize(
    ("change", "named"),
    [({"arms": {}}, "arms"), ({"name": "../x"}, "name"), ({"seed": 1}, "unknown key 'seed'; expected name, arms, models")],
)
def test_a_wrong_study_names_the_key(tmp_path, capsys, change, named):
    study = {"name": "mine", "arms": {"A": {"data": "d", "probes": ["p"]}}}
    (tmp_path / "s.json").write_text(json.dumps({**study, **change}))
    assert main(["study", str(tmp_path / "s.json")]) == 2
    assert named in capsys.readouterr().err
