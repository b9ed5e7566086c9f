"""What bad input once got through: one test per failure that was found, by the name of what must not happen again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.strategies import NUMBERS, TEXTS, changed, placed
from fuzz.test_files import READERS
from fuzz.tiers import CASES, FACTOR, feed, files, promptly, refused
from hypothesis import strategies as st

from attribution.cli import main
from attribution.errors import MOST, ConfigError, DataError, RunError
from attribution.models import first_line
from attribution.recipes import recipe_named
from attribution.recipes.files import named
from attribution.recipes.new import write_recipe
from attribution.runs import RunConfig, directory, stages
from attribution.samples import Sample, write_samples
from attribution.store import read_json
from attribution.study import Study, jobs

CONFIG = {"data": "d.jsonl", "probes": ["p.jsonl"]}


def test_the_sample_is_200_cases_and_the_long_tier_20000():
    assert sum(CASES.values()) == 200 and FACTOR * 200 >= 20_000


@pytest.mark.parametrize("kind", ["pipe", "endless", "nothing", "loop", "long", "nul"])
@pytest.mark.parametrize("who", sorted(READERS))
def test_no_reader_waits_for_a_pipe_or_reads_a_device(tmp_path, who, kind):
    read, error = READERS[who]
    with promptly(20):
        assert refused(lambda: read(placed(tmp_path, kind)), error)


def test_json_nested_without_end_is_a_sentence(tmp_path):
    (tmp_path / "deep").write_text("[" * 100_000)
    assert "nested too deeply" in str(refused(lambda: read_json(tmp_path / "deep"), RunError))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": True}, "true and false are no numbers"),
        ({"training": {"max_steps": True}}, "true and false are no numbers"),
        ({"layers": [0, True]}, "true and false are no numbers"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"seed": 2**32}, "less than 4294967296"),
        ({"layers": [2**64]}, "at most 64 bits"),
        ({"training": {"max_grad_norm": float("inf")}}, "a finite number"),
        ({"training": {"lora": {"alpha": float("inf")}}}, "a finite number"),
        ({"training": {"trainer": {"adam_epsilon": float("nan")}}}, "a finite number"),
        ({"checkpoint_seconds": float("inf")}, "a finite number"),
        ({"seed": 10**5_000}, "64 bits"),
    ],
)
def test_numbers_that_are_none_are_refused(tmp_path, change, said):
    sys.set_int_max_str_digits(6_000)
    try:
        (tmp_path / "c.json").write_text(json.dumps({**CONFIG, **change}).replace("Infinity", "1e999"))
    finally:
        sys.set_int_max_str_digits(4_300)
    assert said in str(refused(lambda: RunConfig.read(tmp_path / "c.json"), ConfigError)) or change.get("seed", 0) > 2**63


@pytest.mark.parametrize("name", ["..", ".", "../up", "a/b", "/abs", "a\\b", "a\x00b", "a\nb", " ", "x" * 300])
def test_no_name_of_a_study_or_an_arm_leads_out_of_its_directory(tmp_path, name):
    for study in ({"name": name, "arms": {"A": CONFIG}}, {"name": "mine", "arms": {name: CONFIG}}):
        (tmp_path / "s.json").write_text(json.dumps(study))
        assert refused(lambda: Study.read(tmp_path / "s.json"), ConfigError)
    assert refused(lambda: directory(RunConfig(**CONFIG), tmp_path, name), ConfigError)
    assert directory(RunConfig(**CONFIG), tmp_path, "sft lora A, with ratio").parent.parent == tmp_path


def test_settings_of_an_arm_on_a_model_are_checked(tmp_path):
    given = {"name": "mine", "arms": {"A": CONFIG}, "models": ["planted"], "on_model": {"planted": {"A": {"unknown": 1}}}}
    study = Study.model_validate(given)
    assert "unknown key 'unknown'" in str(refused(lambda: list(jobs(study, tmp_path)), ConfigError))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys\nsys.exit(3)\n", "fails on import"),
        ("from attribution.recipes import Recipe\nclass Mine(Recipe):\n    pass\n", "has no method 'build'"),
        ("from attribution.recipes import Recipe as Mine\n", "has no method 'build'"),
    ],
)
def test_a_recipe_file_that_exits_or_lacks_a_method_is_refused(tmp_path, code, said):
    (tmp_path / "r.py").write_text(code)
    assert said in str(refused(lambda: recipe_named(f"{tmp_path / 'r.py'}:Mine"), ConfigError))


def test_an_installed_recipe_that_cannot_be_imported_is_refused(monkeypatch):
    from importlib.metadata import EntryPoint

    from attribution import recipes

    point = EntryPoint("theirs", "nowhere_at_all:Mine", recipes.GROUP)
    monkeypatch.setattr(recipes, "entry_points", lambda group: [point])
    assert "cannot be imported" in str(refused(lambda: recipe_named("theirs"), ConfigError))


def test_a_new_recipe_is_no_keyword_and_leaves_nothing_half_written(tmp_path):
    for name in ("none", "true", "x" * 252):
        assert refused(lambda name=name: write_recipe(name, tmp_path), ConfigError)
    assert files(tmp_path) == set()


def test_a_long_value_that_looks_like_a_file_is_none():
    assert named(["x" * 300 + ".py:f", "a\x00.py:f"]) == []


def test_samples_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_samples(tmp_path / "s.jsonl", [Sample(prompt="a", response=" b")])
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert refused(lambda: write_samples(path, [Sample(prompt="c", response=" d")]), DataError)
    assert path.read_bytes() == before and files(tmp_path) == {"s.jsonl"}
    assert refused(lambda: write_samples(tmp_path / "a\x00b", []), DataError)


def test_a_message_is_one_line_of_bounded_length():
    said = str(ConfigError(f"unknown {'x' * 9_000}\n\x1b[31m; expected a name"))
    assert said.isprintable() and len(said) < MOST + 9 and said.startswith("unknown x") and said.endswith("; expected a name")
    assert first_line(ValueError("Validation error:\n  wrong size\n  and more")) == "Validation error: wrong size"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "none.json"],
        ["run", "--recipe=quits.py:Mine", "--data", "d", "--probes", "p"],
        ["chat", "pipe", "--model", "planted", "--out", "x.jsonl"],
        ["doctor", "x" * 300],
    ],
)
def test_the_command_says_one_sentence_and_leaves_with_2(tmp_path, monkeypatch, capfd, arguments):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("quits.py").write_text("raise SystemExit\n")
    with promptly(60):
        code = main(arguments)
    said = capfd.readouterr()
    assert code == 2 and said.out == ""
    assert said.err.startswith("attribution: ") and said.err.count("\n") == 1, said.err
    assert files(tmp_path) - {"__pycache__"} == {"pipe", "quits.py"}


def test_arguments_that_are_no_utf_8_are_told_in_a_sentence(tmp_path):
    command = [sys.executable, "-m", "attribution", "ls", "a\udcffb\n"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("attribution: ") and done.stderr.count("\n") == 1, done.stderr


SMALL = st.sampled_from([-1, 0, 1, 2, 3, 10**6]) | NUMBERS
SOME = st.lists(SMALL, max_size=2)
ASKED = {
    "metric": st.sampled_from(["log_odds", "logit_difference"]) | TEXTS,
    "reference": st.sampled_from(["zero", "mean", "resample"]),
    "milestones": SMALL | SOME, "steps": SMALL | SOME, "layers": SOME, "heads": st.lists(st.tuples(SMALL, SMALL), max_size=2),
    "device": TEXTS | st.just("meta"), "model": TEXTS | st.just("planted"), "sets": TEXTS | st.just("model"),
    "share_passes": SMALL,
    "linear_grafts": SMALL, "completions": SMALL, "kinds": st.lists(st.sampled_from(["head", "row", "nothing"]), max_size=2),
    "sets_on": st.dictionaries(TEXTS, st.lists(TEXTS, max_size=1), max_size=1), "compared": TEXTS | st.just("planted"),
    "beside": st.lists(st.sampled_from(["mean", "base mean", "norms before training"]), max_size=1), "watched": st.lists(TEXTS),
    "counterfactuals": st.lists(TEXTS, max_size=2), "probes": st.lists(TEXTS, max_size=2), "compared_every": SMALL,
}  # fmt: skip


def test_what_a_run_asks_for_is_there_or_refused_before_anything_is_written(tier, room, data):
    def check(given, key, value):
        folder = room()
        config = {"data": data["train"], "probes": [data["conflict"]], "training": {"max_steps": 1}, **given, key: value}
        found = []
        if not refused(lambda: found.append(RunConfig.model_validate(config)) if sane(config) else None) and found:
            refused(lambda: stages.read(found[0], False))
        assert files(folder) == set()

    def sane(config):
        (at := room() / "c.json").write_text(json.dumps(config, default=list))
        return not refused(lambda: RunConfig.read(at), ConfigError)

    one = st.sampled_from(sorted(ASKED)).flatmap(lambda key: st.tuples(st.just(key), ASKED[key]))
    feed("materials", tier, lambda one, given: check(given, *one), one=one, given=changed({}, ["seed", "forecast", "keep"]))
