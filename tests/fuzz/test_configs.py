"""Configs of runs and studies: any value of any key is taken, or refused in a sentence; no name leads out."""

import contextlib
import io
import json
import math
import os
from pathlib import Path

from fuzz.strategies import NAMES, NUMBERS, VALUES, changed, dumped, placed
from fuzz.tiers import assert_one_sentence, feed, files, refused
from hypothesis import strategies as st

from attribution import cli
from attribution.errors import ConfigError, RunError
from attribution.recipes import recipe_named
from attribution.recipes.new import write_recipe
from attribution.runs import RunConfig, directory
from attribution.study import Study, jobs

CONFIG = {"data": "d.jsonl", "probes": ["p.jsonl"]}
RECIPES = ("sft", "dpo", "grpo", "context_distillation")
TRAINING = {name: changed({"max_steps": 2}, list(recipe_named(name).model_fields)) for name in RECIPES}
TRAINED = st.sampled_from(RECIPES).flatmap(lambda name: TRAINING[name].map(lambda training: {
    **CONFIG, "recipe": name, "training": training
}))  # fmt: skip
CONFIGS = changed(CONFIG, list(RunConfig.model_fields)) | TRAINED
STUDY = {"name": "mine", "arms": {"A": CONFIG}}
BY_MODEL = st.dictionaries(NAMES, st.dictionaries(st.just("A") | NAMES, changed({}, list(RunConfig.model_fields)) | VALUES))
STUDIES = st.one_of(
    changed(STUDY, list(Study.model_fields)),
    st.fixed_dictionaries({"name": NAMES | st.just("mine"), "arms": st.dictionaries(NAMES, st.just(CONFIG), min_size=1)}),
    CONFIGS.map(lambda config: {**STUDY, "arms": {"A": config}}),
    st.lists(NUMBERS, min_size=1, max_size=3).map(lambda seeds: {**STUDY, "seeds": seeds}),
    BY_MODEL.map(lambda named: {**STUDY, "models": [*named], "on_model": named}),
)


def numbers(value):
    """Every number and truth value of plain data."""
    if isinstance(value, dict | list | tuple):
        return [found for each in (value.values() if isinstance(value, dict) else value) for found in numbers(each)]
    return [value] if isinstance(value, int | float) else []


def assert_inside(path, root):
    """Three directories below the root, whose names every file system takes."""
    below = Path(os.path.normpath(path)).relative_to(root)
    assert len(below.parts) == 3 and all(len(part.encode()) <= 255 and part.isprintable() for part in below.parts), below


def test_a_config_is_taken_or_refused(tier, room):
    def check(given):
        folder, found = room(), []
        if refused(lambda: found.append(RunConfig.read(placed(folder, "file", dumped(given).encode()))), ConfigError):
            return
        config = found[0]
        (folder / "again.json").write_text(config.model_dump_json())
        assert RunConfig.read(folder / "again.json") == config
        assert all(math.isfinite(number) and abs(number) < 2**63 for number in numbers(config.model_dump()))
        assert not isinstance(config.seed, bool) and not isinstance(getattr(config.training, "max_steps", 1), bool)
        if not refused(lambda: found.append(directory(config, folder / "study", "arm")), ConfigError):
            assert_inside(found[1], folder)

    feed("configs", tier, check, given=CONFIGS | VALUES)


def test_a_study_is_taken_or_refused_and_stays_in_its_directory(tier, room):
    def check(given):
        folder, found = room(), []
        path = placed(folder, "file", dumped(given).encode())
        if refused(lambda: found.append(Study.read(path)), ConfigError):
            return
        runs = []
        refused(lambda: runs.extend(jobs(found[0], folder / "runs")), ConfigError)
        for run in runs:
            assert_inside(run.path, folder / "runs")

    feed("studies", tier, check, given=STUDIES)


FILES = {  # what a recipe file may hold
    "right": "from attribution.recipes.sft import SFT\nclass Mine(SFT):\n    pass\n",
    "syntax": "class Mine(:\n", "raises": "raise RuntimeError('a\\nb')\n", "leaves": "exit()\n",
    "exits": "import sys\nsys.exit(3)\n",
    "other": "Mine = 3\n", "a class": "class Mine:\n    pass\n", "nothing": "", "odd": "class Mine(dict):\n    pass\n",
    "abstract": "from attribution.recipes import Recipe\nclass Mine(Recipe):\n    pass\n",
    "base": "from attribution.recipes import Recipe as Mine\n",
    "an object": "from attribution.recipes.sft import SFT\nMine = SFT()\n",
    "needs": "from attribution.recipes.sft import SFT\nclass Mine(SFT):\n    most: int\n",
    "deep": "def f(): return f()\nf()\n", "missing import": "import nowhere_at_all\n", "asserts": "assert False\n",
    "stops": "raise StopIteration\n",
    "unprintable": "class E(Exception):\n    def __str__(self): return '\\x1b[31m\\n'\nraise E\n",
    "untyped": "from attribution.recipes.sft import SFT\nclass Mine(SFT):\n    more = 3\n",
    "typed": "from attribution.recipes.sft import SFT\nclass Mine(SFT):\n    more: 'Nowhere' = 3\n",
}  # fmt: skip
LEGAL = NAMES.filter(lambda name: 0 < len(name.encode("utf-8", "replace")) < 200 and not set(name) & set("/\x00\ud800"))


def test_a_recipe_file_gives_a_recipe_or_a_reason(tier, room):
    def check(what, kind, name, attribute, absolute, verb):
        folder = room()
        try:
            placed(folder, kind, FILES[what].encode() if what in FILES else what.encode("utf-16"), f"{name}.py")
        except (OSError, UnicodeError):
            return  # no such name here
        (folder / "d.jsonl").write_text('{"prompt": "a", "response": " b"}\n')
        with contextlib.chdir(folder):
            given = f"{folder / name}.py:{attribute}" if absolute else f"{name}.py:{attribute}"
            if verb:
                arguments = (
                    ["run", "none.json"] if given.startswith("-") else ["run", "--data", "d.jsonl", "--probes", "no.jsonl"]
                )
                assert_told([*arguments, f"--recipe={given}"], code=2)
                return
            found = []
            if not refused(lambda: found.append(recipe_named(given)), ConfigError):
                refused(lambda: RunConfig.model_validate({**CONFIG, "recipe": given}), ConfigError)

    kinds = st.sampled_from(["file", "file", "file", "missing", "folder", "pipe", "endless", "loop", "link"])
    feed(
        "recipes", tier, check, what=st.sampled_from([*FILES, "utf-16"]), kind=kinds, name=LEGAL,
        attribute=st.just("Mine") | NAMES, absolute=st.booleans(), verb=st.booleans(),
    )  # fmt: skip


def test_a_new_recipe_is_written_whole_or_not_at_all(tier, room):
    def check(name, into):
        folder = room()
        before = files(folder)
        if refused(lambda: write_recipe(name, folder / into), ConfigError):
            assert files(folder) == before
            return
        (file,) = [path for path in (folder / into).glob("*.py") if not path.name.startswith("test_")]
        compile(file.read_text(), str(file), "exec")

    words = st.sampled_from(["none", "true", "class", "import", "my_recipe", "MyRecipe", "x" * 248, "x" * 252, "recipe"])
    feed("names", tier, check, name=words | NAMES, into=st.sampled_from(["", "new", "a/b", "x" * 300, "nul\x00"]))


def assert_told(arguments, code=None):
    """The command line ends with 0, or with 2 and one sentence to stderr; a wrong flag is told by the parser, with 2 too."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            ended = cli.main(arguments)
        except SystemExit as left:  # the parser of flags
            ended = left.code
            assert ended == 2 or (ended == 0 and {"-h", "--help"} & {*arguments}), err.getvalue()
            return
    assert ended in ((0, 2) if code is None else (code,)), (ended, err.getvalue())
    if ended == 2:
        said = err.getvalue()
        assert said.startswith("attribution: ") and said.count("\n") == 1 and said.endswith("\n"), said
        assert_one_sentence(said.removeprefix("attribution: ").rstrip("\n"))


VERBS = [
    ["ls"], ["report"], ["claims"], ["claims", "--study"], ["study", "--out"], ["study"], ["run", "--recipe", "sft", "--data"],
    ["diff", "planted"], ["samples", "--out", "x.jsonl"], ["doctor", "--meta"],
    ["chat", "--model", "planted", "--out", "x.jsonl"],
    ["build-world", "--seed", "1"], ["new-recipe"], ["recipes"], ["forecast", "--data"], ["discover", "--cue"],
]  # fmt: skip


def test_words_on_the_command_line_are_taken_or_refused(tier, room, monkeypatch):
    def none_is_run(*_, **__):
        raise RunError("a study would be run; name none")

    monkeypatch.setattr("attribution.verbs.study.run_study", none_is_run)

    def check(verb, word, more):
        folder = room()
        with contextlib.chdir(folder):
            assert_told([*verb, word, *more])

    more = st.lists(NAMES, max_size=2) | st.sampled_from(
        [["--seeds", "-1"], ["--seed", "1e999"], ["--limit", "-5"], ["--slots", "0"]]
    )
    feed("words", tier, check, verb=st.sampled_from(VERBS) | NAMES.map(lambda name: [name]), word=NAMES, more=more)


def test_a_flag_of_any_value_is_taken_or_refused(tmp_path):
    """Not counted among the cases: every number of `NUMBERS` by name, under the flags that are numbers."""
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "response": " b"}\n')
    data = str(tmp_path / "d.jsonl")
    for flag in ("seed", "training.max-steps", "training.learning-rate", "training.lora.alpha", "share-passes"):
        for number in ("nan", "inf", "-inf", "1e999", "-1", str(10**400), "True", "", "x", json.dumps({})):
            assert_told(
                ["run", "--recipe", "sft", "--data", data, "--probes", str(tmp_path / "no"), f"--{flag}={number}"], code=2
            )
