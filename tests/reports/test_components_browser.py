"""Choosing and clicking on the pages: what is shown is what was chosen, with the mouse and with the keyboard."""

import shutil

import numpy as np
import pytest

from attribution.reports import component_figures as figures
from attribution.reports.study_tables import read_study
from attribution.store import read_json, write_json

pytestmark = [pytest.mark.browser, pytest.mark.slow]
ANGLED = "planted/<b>4</b>"
CELL = """(plot, [layer, column]) => {
    const {xaxis, yaxis} = plot._fullLayout, box = plot.getBoundingClientRect();
    return [box.left + xaxis._offset + xaxis.d2p(column), box.top + yaxis._offset + yaxis.d2p(layer)];
}"""


def drawn(plot):
    return plot.evaluate("plot => plot._fullData.map(panel => Array.from(panel.z, row => Array.from(row)))")


def click(page, plot, layer, column):
    plot.scroll_into_view_if_needed()
    page.mouse.click(*plot.evaluate(CELL, [layer, column]))


def test_choices_change_the_map_and_a_click_shows_the_course(visit, expect, whole_study):
    page, record = visit(whole_study), read_study(whole_study)
    maps = page.locator("#maps")
    maps.locator("select[name=model]").select_option(ANGLED)
    maps.locator("select[name='probe set']").select_option("agree <b>held out</b>")
    figure = figures.layers(record, ANGLED, "A", "agree <b>held out</b>", "head")
    for got, trace in zip(drawn(maps.locator(".plot")), figure.data, strict=True):
        assert np.allclose(np.array(got, dtype=float), np.asarray(trace.z, dtype=float), equal_nan=True)
    click(page, maps.locator(".plot"), 2, 1)
    course = page.locator("#timeline")
    expect(course.locator("select[name=component]")).to_have_value("head 2.1")
    expect(course.locator("select[name=model]")).to_have_value(ANGLED)
    expect(course.locator("select[name='probe set']")).to_have_value("agree <b>held out</b>")
    lines = figures.course(record, ANGLED, "agree <b>held out</b>", dict.fromkeys(record.arms, "#000000"))[1]["head 2.1"]
    got = course.locator(".plot").evaluate("plot => plot._fullData.map(line => Array.from(line.y))")
    assert len(got) == len(lines) > 0
    for one, other in zip(got, lines, strict=True):
        assert one == pytest.approx(other)


def test_what_is_missing_is_a_sentence_and_comes_back(visit, expect, whole_study):
    maps = visit(whole_study).locator("#maps")
    maps.locator("select[name=model]").select_option(ANGLED)
    maps.locator("select[name=arm]").select_option("<b>both</b>")
    expect(maps.locator(".absent")).to_have_text("Of arm <b>both</b> on planted/<b>4</b>, heads were not recorded on conflict.")
    expect(maps.locator(".plot")).to_be_hidden()
    maps.locator("select[name=arm]").select_option("A")
    expect(maps.locator(".plot")).to_be_visible()
    expect(maps.locator(".absent")).to_be_hidden()


def test_a_click_works_where_the_first_combination_is_missing(visit, expect, whole_study, tmp_path):
    place = tmp_path / "study"
    shutil.copytree(whole_study, place, ignore=shutil.ignore_patterns("*.html"))
    told = read_json(place / "study.json")
    write_json(place / "study.json", {**told, "models": [ANGLED, *told["models"]], "arms": ["<b>both</b>", *told["arms"]]})
    page = visit(place)
    maps = page.locator("#maps")
    expect(maps.locator(".plot")).to_be_hidden()
    maps.locator("select[name=arm]").select_option("A")
    click(page, maps.locator(".plot"), 1, 2)
    expect(page.locator("#timeline select[name=component]")).to_have_value("head 1.2")


def test_choices_are_used_with_the_keyboard(visit, expect, whole_study):
    page = visit(whole_study)
    choice = page.locator("#against select[name=against]")
    choice.focus()
    page.keyboard.press("ArrowDown")
    expect(choice).to_have_value("opportunity")
    expect(page.locator("#against .absent")).to_contain_text("Strengthening and opportunity were not both measured")


@pytest.mark.parametrize("width", [1280, 800])
def test_sections_of_components_fit_and_hold_text_as_text(visit, whole_study, width):
    page = visit(whole_study, width)
    assert page.locator(".js-plotly-plot").count() == 11
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    edges = page.locator(".main-svg").evaluate_all("all => all.map(svg => svg.getBoundingClientRect().right)")
    assert max(edges) <= width
    assert page.locator("#tokens .heatmaplayer").count() == 1
    texts = page.locator("#tokens text").all_text_contents()
    assert "<script…" in texts or any(text.startswith("<scrip") for text in texts)
    names = page.locator("#maps select[name=model] option").all_text_contents()
    assert "planted/<script>alert(1)</script>" in names


def test_the_page_prints_whole(visit, whole_study):
    page = visit(whole_study)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    widths = page.locator(".plot .main-svg").evaluate_all("all => all.map(svg => svg.getBoundingClientRect().width)")
    assert widths and max(widths) <= 690
    assert page.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill") == "rgb(0, 0, 0)"


def test_on_the_page_of_a_run_a_click_shows_the_course_too(visit, expect, finished):
    page = visit(finished)
    click(page, page.locator("#heads .plot").nth(1), 0, 1)
    expect(page.locator("#course select[name=component]")).to_have_value("head 0.1")
    expect(page.locator("#course select[name='probe set']")).to_have_value("agree <b>held out</b>")
    texts = page.locator("#tokens text").all_text_contents()
    assert "tom" in texts and max(map(len, texts)) < 60
