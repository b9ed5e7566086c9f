"""Files of samples, sets, studies and text: whatever their bytes are, and whatever stands where they should."""

import contextlib
import io

from fuzz.strategies import PLACES, SYNTAX, TEXTS, VALUES, changed, dumped, lines, placed, texts
from fuzz.tiers import feed, files, refused
from hypothesis import strategies as st

from attribution import cli
from attribution.errors import ConfigError, DataError, RunError
from attribution.mechanisms import read_mechanisms
from attribution.recipes.files import defined
from attribution.runs import RunConfig
from attribution.samples import ProbeSet, Sample, read_samples, write_samples
from attribution.store import read_json
from attribution.study import Study

SAMPLE = changed({"prompt": "a b", "response": " c"}, list(Sample.model_fields)).map(dumped)
SETS = st.dictionaries(
    TEXTS, st.lists(changed({"kind": "head", "layer": 0, "from": 0, "to": 2}, ["kind", "layer", "from", "to"]), max_size=2)
)
READERS = {  # who opens a file that a user names, and by which error it refuses
    "samples": (read_samples, DataError),
    "probes": (ProbeSet.read, DataError),
    "counterfactuals": (lambda path: ProbeSet.read(path, counterfactuals=path), DataError),
    "config": (RunConfig.read, ConfigError),
    "study": (Study.read, ConfigError),
    "sets": (read_mechanisms, DataError),
    "recipe": (lambda path: defined(f"{path}:x", "recipe"), ConfigError),
    "json of a run": (read_json, RunError),
}


def test_samples_are_read_or_refused(tier, room):
    def check(data):
        path = placed(room(), "file", data)
        found = []
        if not refused(lambda: found.extend(read_samples(path)), DataError):
            assert read_samples(write_samples(room() / "again.jsonl", found)) == found
            assert not any(isinstance(value, bool) for sample in found for value in sample.model_dump().values())

    feed("samples", tier, check, data=texts(lines(SAMPLE)))


def test_every_reader_says_what_it_cannot_read(tier, room):
    def check(who, kind, data):
        read, error = READERS[who]
        refused(lambda: read(placed(room(), kind, data)), error)

    anything = texts(SYNTAX | SAMPLE | VALUES.map(dumped) | SETS.map(dumped))
    feed("readers", tier, check, who=st.sampled_from(sorted(READERS)), kind=PLACES, data=anything)


def test_text_is_cut_or_refused_and_nothing_is_half_written(tier, room):
    def check(kind, out, data, words):
        folder = room()
        text = placed(folder, kind, data)
        (folder / "out").mkdir()
        target = placed(folder / "out", out)
        before = files(folder)
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(["samples", text, "--out", target, "--prompt-words", str(words), "--response-words", "1"])
        assert code in (0, 2) and (code == 0) == (said.getvalue() == "")
        assert code == 0 or (files(folder) == before and said.getvalue().count("\n") == 1)

    kinds = st.sampled_from(["file", "missing", "folder", "long", "nul", "loop"])
    text = texts(st.text(max_size=60) | st.just("one two three four. " * 9))
    feed("text", tier, check, kind=PLACES, out=kinds, data=text, words=st.integers(-1, 4))
