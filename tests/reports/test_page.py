"""The page as text: self-contained, escaped, and honest about what is missing."""

import html
import re
import subprocess
import sys

import pytest

from attribution.errors import RunError
from attribution.reports import report
from attribution.reports.quantities import KINDS, rank_correlations, signed
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
    assert order == [
        "words", "asked", "causes", "tokens", "scatter", "behaviour", "heads", "neurons", "steps", "rows", "places", "missing",
        "provenance",
    ]  # fmt: skip
    assert markup.count("<h3>conflict</h3>") == 4
    assert markup.count('<div class="plot"') == 14


def test_text_from_data_is_never_markup(text, markup):
    assert "<script>alert" not in text and "<b>" not in markup
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in markup
    ours = ("\\u003cbr\\u003e", "\\u003cextra\\u003e\\u003c\\u002fextra\\u003e")
    assert "\\u003c" not in markup.replace(ours[0], "").replace(ours[1], "")  # in figures, data is escaped before it is JSON
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
                     "Graft of neurons: not recorded", "needs exact ablation at the start and"):  # fmt: skip
        assert sentence in markup
    assert markup.count('<div class="plot"') == 12


def test_a_run_of_nothing_has_a_page_without_figures(tmp_path):
    RunWriter(tmp_path / "run", {"model": "m"})
    markup = PLOTLY.sub("", report(tmp_path / "run").read_text())
    assert markup.count('<div class="plot"') == 0 and markup.count('class="absent"') == 9


def _section(markup, key):
    return re.search(rf'<section id="{key}">.*?</section>', markup, re.DOTALL).group()


def test_causes_are_told_with_their_samples_and_the_scatter_with_its_limits(finished, markup):
    causes, scatter = _section(markup, "causes"), _section(markup, "scatter")
    assert "on 48 training samples, before training" in causes and "Effects need not add up" in causes
    assert causes.count('<div class="plot"') == 2
    assert "no test of the claim" in scatter and "more room to move" in scatter
    for row in rank_correlations(read_run(finished)).to_dict("records"):
        cells = f"{KINDS[row['kind']]} on {html.escape(row['probe'])}</td><td>{signed(row['spearman'])}</td><td>{row['n']}</td>"
        assert cells in scatter


def test_a_loop_of_ones_own_without_causes(uncaused):
    markup = PLOTLY.sub("", report(uncaused).read_text())
    asked = _section(markup, "asked")
    assert "conflict (24 samples), agree &lt;b&gt;held out&lt;/b&gt; (8 samples)" in asked and "{" not in asked
    assert "<td>log-odds</td>" in asked and "log_odds" not in asked
    for key in ("words", "causes", "missing"):
        assert "no component was ablated on the training samples" in _section(markup, key)
    assert "Causes on training samples were not measured" in _section(markup, "scatter")
    assert 'class="plot"' not in _section(markup, "causes") + _section(markup, "scatter")
    assert markup.count('<div class="plot"') == 11


def test_no_run_is_a_sentence(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        report(tmp_path)


def test_import_is_cheap():
    code = "import sys, attribution.reports; sys.exit(bool({'plotly', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
