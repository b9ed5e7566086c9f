"""Run and study directories of others: damaged, of another version, or made up; and pages, where no text is markup."""

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import pandas as pd
import pytest
from fuzz.strategies import PLACES, SYNTAX, VALUES, dumped, placed, texts
from fuzz.test_configs import assert_told
from fuzz.tiers import feed, files, refused
from hypothesis import strategies as st

from attribution.errors import RunError
from attribution.reports import diff, report, study_report
from attribution.reports.ledger import ledger
from attribution.reports.listing import listing
from attribution.store import COLUMNS, RunWriter, find_runs, read_run, read_study, write_json

JSONS = ["config.json", "meta.json", "status.json", "result.json", "vocabulary.json", "samples.jsonl"]
KEYS = {
    "config.json": ["model", "recipe", "seed", "probes", "metric", "training", "data", "reference", "inputs"],
    "meta.json": ["format", "versions", "model", "seconds", "not_measured", "started"],
    "status.json": ["state", "step", "steps", "error"],
    "result.json": ["steps", "seconds", "probes", "causes", "linear_graft"],
}
FRAMES = ("steps", "probes", "components", "influence", "sets", "tokens", "grafts")
HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</script><b>", "</title>", "<!--", "]]>", "&lt;b&gt;",
    "' onclick='x", "@SCRIPT@", "<b>bold</b>", "javascript:alert(1)", "</style>", "\u2028</p>", "<svg/onload=alert(1)>",
]  # fmt: skip
UNESCAPED = re.compile(r"(?<!\\)(?:\\\\)*<")  # in Markdown: behind an even number of backslashes
META = {"versions": {"python": "3"}, "model": {"type": "llama", "layers": 2}, "seconds": {"total": 1.0, "recorder": 0.5}}


def written(path, word="word", finished=True):
    """A small run in which every text is made of this word."""
    config: dict = {
        "model": word,
        "recipe": word,
        "training": {word: word},
        "data": word,
        "probes": [f"{word}.jsonl"],
        "seed": 0,
    }
    writer = RunWriter(path, {**config, "metric": "log_odds", "reference": "zero"})
    places = [(kind, layer, index) for kind in ("head", "neuron") for layer in (0, 1) for index in (0, 1)] + [("row", -1, 0)]
    table = pd.DataFrame(places, columns=["kind", "layer", "index"]).assign(probe=word)
    numbers = [(-1) ** number * number / 10 for number in range(len(table))]
    writer.vocabulary([word, f"{word} other"])
    writer.add("influence", table.assign(step=0, probe="training samples", effect=numbers, kl=0.1))
    for step in (0, 1, 2):
        writer.add("influence", table.assign(step=step, effect=[number * (step + 1) for number in numbers], kl=0.1))
        writer.add("sets", {"step": step, "probe": word, "set": word, "reference": "zero", "effect": step, "kl": 0.1})
        sums = {"change": 0.1, "share_sum": 0.1, "residual": 0.0, "resolved": True, "passes": 1} if step else {}
        writer.add("probes", {"step": step, "probe": word, "metric": step / 10, "kl": step / 10, **sums})
        if step:
            writer.add("steps", {"step": step, "loss": 1 / step, "learning_rate": 1e-3, "seconds": 0.1})
            parts = table.assign(step=step, part="writing")
            writer.add("components", parts.assign(share=numbers))
            writer.add(
                "components", parts.assign(probe="batch", update_norm=0.1, grad_norm=0.1, weight_norm=1.0, cause_before=0.1)
            )
            line = {"step": step, "sample": 0, "prompt": word, "completion": word, "tokens": 1, "reward": 1.0, "advantage": 0.5}
            writer.samples([{**line, "ratio": 1.0}])
    for when in ("before", "after"):
        writer.add("tokens", {"when": when, "probe": word, "sample": 0, "position": 0, "token": word, "effect": 0.5})
    writer.add("grafts", table.assign(step=2, graft=0.1, prune=0.1))
    if finished:
        writer.meta({**META, "not_measured": [word], "started": word, "versions": {word: word}})
        writer.finish(
            {"steps": 2, "seconds": 1.0, "probes": {word: {"before": 0.0, "after": 0.2, "kl": 0.2}}, "causes": {"samples": 4}}
        )
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study of one run, as `conclude` leaves one."""
    study = tmp_path_factory.mktemp("runs") / "study"
    written(study / "A-00000000" / "seed-0")
    listed = {
        "arm": "A",
        "model": "word",
        "seed": 0,
        "path": "A-00000000/seed-0",
        "state": "finished",
        "steps": 2,
        "seconds": 1.0,
    }
    write_json(
        study / "study.json", {"name": "study", "arms": ["A"], "models": [], "seeds": [0], "runs": [listed], "not_judged": {}}
    )
    write_json(study / "findings.json", [])
    return study


READERS = {
    "page": lambda study, run: report(run),
    "list": lambda study, run: listing(study, every=True),
    "arms": lambda study, run: listing(study),
    "study": lambda study, run: (read_study(study).runs, read_study(study).claims, read_study(study).probes),
    "study page": lambda study, run: study_report(study),
    "ledger": lambda study, run: ledger(study=str(study)),
    "diff": lambda study, run: diff(run, run, study / "diff.html"),
    "frames": lambda study, run: [getattr(read_run(run), name) for name in (*COLUMNS, "samples", "vocabulary")],
    "run": lambda study, run: (read_run(run).config, read_run(run).status, read_run(run).result, read_run(run).meta),
}
CHANGES = st.one_of(
    st.sampled_from(sorted(KEYS)).flatmap(lambda file: st.tuples(st.just(file), st.sampled_from(KEYS[file]), VALUES)),
    st.tuples(st.sampled_from(JSONS), st.just("bytes"), texts(SYNTAX | VALUES.map(dumped))),
    st.tuples(st.sampled_from(JSONS), st.just("place"), PLACES),
)
OF_STUDY = st.one_of(
    st.tuples(
        st.just("study.json"), st.sampled_from(["name", "arms", "models", "seeds", "runs", "not_judged", "versions"]), VALUES
    ),
    st.tuples(st.sampled_from(["study.json", "findings.json"]), st.just("bytes"), texts(SYNTAX | VALUES.map(dumped))),
)


def change(path, how, what):
    if how == "bytes":
        path.write_bytes(what)
    elif how == "place":
        path.unlink(missing_ok=True)
        placed(path.parent, what, b"{}", path.name)
    else:
        path.write_text(dumped({**json.loads(path.read_text()), how: what}))


def test_a_directory_with_other_json_is_read_or_refused(tier, room, whole):
    def check(of_run, of_study, who):
        study = room() / "study"
        shutil.copytree(whole, study)
        run = study / "A-00000000" / "seed-0"
        for file, how, what in of_run:
            change(run / file, how, what)
        if of_study:
            change(study / of_study[0], *of_study[1:])
        before = files(study)
        if refused(lambda: READERS[who](study, run), RunError):
            assert files(study) - before <= {"A-00000000/seed-0/summary.md", "summary.md", "diff.md"}

    one = st.tuples(CHANGES)
    feed("runs", tier, check, of_run=one, of_study=st.none() | OF_STUDY, who=st.sampled_from(sorted(READERS)))


OTHER = st.one_of(
    st.sampled_from([{"x": [1]}, {"step": ["a"]}, {"step": [1]}, {"probe": [[1]]}, {"kind": [b"x"]}, {}]),
    st.tuples(
        st.sampled_from(["step", "probe", "kind", "index", "effect", "share"]), st.sampled_from([None, "a", 1, -1e300, True])
    ),
)


def test_frames_of_other_columns_are_read_or_refused(tier, room, whole):
    def check(frame, columns, data, who):
        study = room() / "study"
        shutil.copytree(whole, study)
        run = study / "A-00000000" / "seed-0"
        (run / f"{frame}.parquet").mkdir(exist_ok=True)
        part = run / f"{frame}.parquet" / "part-00000.parquet"
        if columns is None:
            part.write_bytes(data)
        elif isinstance(columns, dict):
            pd.DataFrame(columns).to_parquet(part)
        else:
            pd.read_parquet(part).assign(**dict([columns])).to_parquet(part)
        refused(lambda: READERS[who](study, run), RunError)

    who = st.sampled_from(["page", "frames", "diff", "study"])
    feed("frames", tier, check, frame=st.sampled_from(FRAMES), columns=st.none() | OTHER, data=st.binary(max_size=60), who=who)


def test_a_run_of_a_newer_format_is_refused(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "study")
    meta = tmp_path / "study" / "A-00000000" / "seed-0" / "meta.json"
    for version in (99, "2", 1.5, True, None, 1e300, []):
        meta.write_text(dumped({**META, "format": version}))
        said = str(refused(lambda: read_run(meta.parent), RunError))
        assert "format" in said and ("upgrade" in said) == (version == 99), said


@pytest.mark.parametrize("given", [{"inputs": None}, {"inputs": {"a": 1}}, {"reference": []}])
def test_a_config_of_another_shape_is_refused(tmp_path, whole, given):
    shutil.copytree(whole, tmp_path / "study")
    run = tmp_path / "study" / "A-00000000" / "seed-0"
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(dumped({**config, **given}))
    assert f"damaged ({next(iter(given))}" in str(refused(lambda: diff(run, run, tmp_path / "diff.html"), RunError))


def test_half_of_a_surrogate_pair_is_shown_as_its_escape(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "study")
    run = tmp_path / "study" / "A-00000000" / "seed-0"
    (run / "meta.json").write_text(dumped({**META, "versions": {"\ud800": "3"}}))
    assert "<td>version of \\ud800</td><td>3</td>" in report(run).read_text(encoding="utf-8")


def test_directories_that_no_file_system_takes_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for path in ("a\x00b", "x" * 300, "\ud800", "loop", "loop/below"):
        for call in (
            read_run,
            read_study,
            report,
            study_report,
            listing,
            lambda path: RunWriter(path, {}),
            lambda path: diff(path, path),
        ):
            assert refused(lambda call=call, path=path: call(path), RunError), (call, path)
        for verb in ("ls", "report", "diff"):
            assert_told([verb, path, *([path] if verb == "diff" else [])], code=2)
    assert files(tmp_path) == {"loop"} and find_runs(tmp_path) == []


class Tags(HTMLParser):
    """Which elements a page has, with the names of their attributes; and what its scripts hold."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.found, self.scripts = Counter(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found[tag, tuple(name for name, _ in attrs)] += 1
        self.data = dict(attrs).get("type") == "application/json" if tag == "script" else None
        if self.data:
            self.scripts.append("")

    def handle_data(self, data):
        if getattr(self, "data", None):
            self.scripts[-1] += data

    def handle_endtag(self, tag):
        self.data = None


def test_no_text_from_data_is_markup(tier, room, whole):
    bare = Tags(report(whole / "A-00000000" / "seed-0").read_text(encoding="utf-8")).found

    def check(words):
        run = written(room() / "A-00000000" / "seed-0", " ".join(words))
        page = Tags(report(run).read_text(encoding="utf-8"))
        assert page.found == bare
        assert all(json.loads(script) is not None for script in page.scripts)
        assert not UNESCAPED.search((run / "summary.md").read_text(encoding="utf-8"))

    words = st.lists(
        st.sampled_from(HOSTILE) | st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=1, max_size=2
    )
    feed("markup", tier, check, words=words)
