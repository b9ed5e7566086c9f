"""The page as text: self-contained, escaped, and honest about what is missing."""

import re
import subprocess
import sys

import pytest

from attribution.errors import RunError
from attribution.reports import report
from attribution.store import RunWriter, config_hash, read_run

PLOTLY = re.compile(r"<script>/\*\*\n\* plotly\.js.*?</script>", re.DOTALL)


@pytest.fixture(scope="module")
def text(finished):
    return report(finished).read_text()


@pytest.fixture(scope="module")
def markup(text):
    """The page without its one copy of plotly.js."""
    return PLOTLY.sub("", text)


def test_nothing_is_fetched_and_plotly_is_there_once(text, markup):
    assert len(PLOTLY.findall(text)) == 1
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:)?//", markup)
    assert not re.search(r"<(link|iframe|img|script\s[^>]*src)|@import|url\(", markup)
    assert "default-src 'none'" in markup


def test_sections_stand_in_reading_order(markup):
    order = re.findall(r'<section id="(\w+)">', markup)
    assert order == ["asked", "words", "behaviour", "heads", "neurons", "rows", "places", "scatter", "missing", "provenance"]
    assert markup.count("<h3>conflict</h3>") == 4
    assert markup.count('<div class="plot"') == 10


def test_text_from_data_is_never_markup(text, markup):
    assert "<script>alert" not in text and "<b>" not in markup
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in markup
    assert "\\u003c" not in markup.replace("\\u003cbr\\u003e", "")  # in figures, data is escaped before it is JSON
    assert "w" * 100 not in markup


def test_config_is_escaped_and_cut(tmp_path):
    config = {"model": "<script>alert(1)</script>", "recipe": "<b>x</b>" * 5_000, "training": {"a<i>": ["$y$", "&"]}}
    RunWriter(tmp_path / "run", config)
    markup = PLOTLY.sub("", report(tmp_path / "run").read_text())
    assert "<script>alert" not in markup and "<b>" not in markup and "<i>" not in markup
    assert "training.a&lt;i&gt;" in markup and len(markup) < 30_000


def test_provenance(finished, markup):
    for value in (config_hash(read_run(finished).config), "2.13.0", "12.5", "3.25", "training.max_steps", "20250"):
        assert value in markup


def test_half_a_run_says_what_is_missing(unfinished):
    markup = PLOTLY.sub("", report(unfinished).read_text())
    for sentence in ("The run is not finished", "Training loss: not recorded", "Strengthening of heads: not recorded",
                     "Graft of neurons: not recorded", "needs the start and a later milestone"):  # fmt: skip
        assert sentence in markup
    assert markup.count('<div class="plot"') == 9


def test_a_run_of_nothing_has_a_page_without_figures(tmp_path):
    RunWriter(tmp_path / "run", {"model": "m"})
    markup = PLOTLY.sub("", report(tmp_path / "run").read_text())
    assert markup.count('<div class="plot"') == 0 and markup.count('class="absent"') == 6


def test_no_run_is_a_sentence(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        report(tmp_path)


def test_import_is_cheap():
    code = "import sys, attribution.reports; sys.exit(bool({'plotly', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
