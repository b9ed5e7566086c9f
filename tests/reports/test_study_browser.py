"""The page of a study in a browser: every figure drawn, nothing cut off, nothing requested."""

import pytest

from attribution.reports.study_tables import read_study

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.mark.parametrize("width", [1280, 800])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_drawn_and_fits(visit, study, width, scheme):
    page = visit(study, width, scheme)
    assert page.locator(".js-plotly-plot").count() == 6
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    rights = page.evaluate("[...document.querySelectorAll('.main-svg')].map(svg => svg.getBoundingClientRect().right)")
    assert max(rights) <= width
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert page.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill") == ink


def test_drawn_intervals_are_the_finding(visit, study):
    verdict = read_study(study).findings[0].verdict
    plot = visit(study).locator("#verdict .plot")
    x, ends = plot.evaluate("p => [p._fullData[0].x[0], [p.calcdata[0][0].xh, p.calcdata[0][0].xs]]")
    assert plot.locator(".xerror").count() == 4
    assert x == verdict["mean"]
    assert sorted(ends) == pytest.approx([verdict["low"], verdict["high"]])


def test_names_of_intervals_are_inside_the_figure(visit, study):
    page = visit(study, 800)
    lefts = page.evaluate(
        "[...document.querySelectorAll('.ytick text')].map(text => text.getBoundingClientRect().left"
        " - text.closest('.plot').getBoundingClientRect().left)"
    )
    assert min(lefts) >= 0


def test_text_from_data_is_text_in_figures(visit, study):
    page = visit(study)
    assert page.locator("#behaviour .legendtext", has_text="arm <b>both</b>").count() > 0
