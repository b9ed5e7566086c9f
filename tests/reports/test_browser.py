"""The page in a browser: drawn, readable, silent, and equal to the frames."""

import itertools

import numpy as np
import pandas as pd
import pytest

from attribution.reports import completions, quantities
from attribution.store import TRAINING, RunWriter, read_run

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def hover_at(page, plot, column, row):
    """Move the mouse to a cell of a figure's first panel."""
    plot.scroll_into_view_if_needed()
    place = """(plot, [column, row]) => {
        const {xaxis, yaxis} = plot._fullLayout, box = plot.getBoundingClientRect();
        return [box.left + xaxis._offset + xaxis.d2p(column), box.top + yaxis._offset + yaxis.d2p(row)];
    }"""
    page.mouse.move(*plot.evaluate(place, [int(column), int(row)]))


def test_every_figure_is_drawn(visit, finished, unfinished):
    assert visit(finished).locator(".js-plotly-plot").count() == 14
    page = visit(unfinished)
    assert page.locator(".js-plotly-plot").count() == 12
    assert page.locator("#scatter .absent").is_visible()


def test_heat_map_cells_and_hover_are_the_frame(visit, finished):
    page, table = visit(finished), quantities.per_component(read_run(finished), "head")
    cells = table[table["probe"] == "conflict"].set_index(["layer", "index"])
    plot = page.locator("#heads .plot").first
    drawn = plot.evaluate("plot => plot._fullData.map(panel => Array.from(panel.z, row => Array.from(row)))")
    for name, grid in zip(quantities.QUANTITIES, drawn, strict=True):
        assert [value for row in grid for value in row] == pytest.approx(cells[name].tolist(), abs=1e-12)
    for layer, head in ((0, 0), (2, 3)):
        hover_at(page, plot, head, layer)
        hover = plot.locator(".hoverlayer .hovertext", has_text=f"layer {layer}, head {head}")
        hover.wait_for()
        for name, label in quantities.QUANTITIES.items():
            assert f"{label}: {quantities.signed(cells.loc[(layer, head), name])} (rank" in hover.text_content()


def test_causes_are_drawn_from_the_frame_and_hover_with_their_rank(visit, finished):
    page, table = visit(finished), quantities.causes(read_run(finished)).query("kind == 'head'")
    cells = table.set_index(["layer", "index"])["cause"]
    plot = page.locator("#causes .plot").first
    drawn = plot.evaluate("plot => Array.from(plot._fullData[0].z, row => Array.from(row))")
    assert [value for row in drawn for value in row] == pytest.approx(cells.tolist(), abs=1e-12)
    layer, head = cells.abs().idxmax()
    hover_at(page, plot, head, layer)
    hover = plot.locator(".hoverlayer .hovertext", has_text=f"layer {layer}, head {head}")
    hover.wait_for()
    assert f"cause: {quantities.signed(cells[layer, head])} (rank 1 of 12)" in hover.text_content()
    assert plot.evaluate("p => p._fullLayout.yaxis.d2p(0) > p._fullLayout.yaxis.d2p(2)")  # layer 0 at the bottom


def test_without_causes_two_sentences_stand_for_two_sections(visit, uncaused):
    page = visit(uncaused)
    assert page.locator(".js-plotly-plot").count() == 11
    for key in ("causes", "scatter"):
        assert page.locator(f"#{key} .absent").is_visible() and page.locator(f"#{key} .plot").count() == 0


def test_labels_of_neurons_are_level_and_do_not_overlap(visit, tmp_path):
    writer = RunWriter(tmp_path / "run", {"model": "m"})
    for kind, count in (("head", 4), ("neuron", 40)):
        rows = pd.DataFrame({"kind": kind, "layer": 0, "index": range(count), "effect": 0.5 + np.arange(count), "kl": 0.0})
        writer.add("influence", rows.assign(step=0, probe=TRAINING))
    writer.flush()
    page = visit(tmp_path / "run", 800)
    boxes = page.evaluate(
        "[...document.querySelectorAll('#causes .x2tick text')].map(text => text.getBoundingClientRect())"
        ".map(box => [box.left, box.right])"
    )
    assert len(boxes) > 3
    assert page.locator("#causes .x2tick text", has_text="rest").count() == 1
    turned = page.evaluate("[...document.querySelectorAll('#causes .x2tick text')].map(text => text.getAttribute('transform'))")
    assert all("rotate" not in turn or "rotate(0" in turn for turn in turned)
    assert all(left > right for (_, right), (left, _) in itertools.pairwise(sorted(boxes)))


def test_completions_are_drawn_hovered_and_fit(visit, sampled):
    page, table = visit(sampled, 800), completions.causes(read_run(sampled), "head").set_index(["layer", "index"])
    assert page.locator("#completions .js-plotly-plot").count() == 4
    plot = page.locator("#completions .plot").nth(1)
    layer, head = table["rewarded"].abs().idxmax()
    hover_at(page, plot, head, layer)
    hover = plot.locator(".hoverlayer .hovertext", has_text=f"layer {layer}, head {head}")
    hover.wait_for()
    for column, name in completions.named(read_run(sampled)).items():
        assert f"{name}: {quantities.signed(table.loc[(layer, head), column])} (rank" in hover.text_content()
    box = page.locator("#completions .table").evaluate("table => [table.scrollWidth, table.clientWidth]")
    assert box[0] <= box[1]  # long words of a completion break, so that its numbers are seen
    titles = page.locator("#completions .infolayer text").evaluate_all(
        "all => all.map(text => text.getBoundingClientRect().right)"
    )
    assert max(titles) <= 800


def test_no_button_sends_a_figure_away(visit, finished):
    buttons = visit(finished).locator(".modebar-btn").evaluate_all("all => all.map(one => one.dataset.title)")
    assert len(buttons) == 14
    assert {title.split()[0] for title in buttons} == {"Download"}


def test_layer_0_is_drawn_below_layer_2(visit, finished):
    axis = visit(finished).locator("#heads .plot").first.evaluate("p => [0, 2].map(l => p._fullLayout.yaxis.d2p(l))")
    assert axis[0] > axis[1]


def test_words_of_rows_are_text(visit, finished):
    labels = visit(finished).locator("#rows .ytick text").all_text_contents()
    assert any(label.startswith("'<script>alert(1)</script>'") for label in labels)
    assert all(len(label) < 60 for label in labels)


@pytest.mark.parametrize("width", [1280, 800])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_its_figures_have_the_colour_of_its_text(visit, finished, width, scheme):
    page = visit(finished, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    widths = page.evaluate("[...document.querySelectorAll('.main-svg')].map(svg => svg.getBoundingClientRect().right)")
    assert max(widths) <= width
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert page.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill") == ink


def test_a_change_of_scheme_recolours_the_figures(visit, expect, finished):
    page = visit(finished)
    before = page.evaluate("getComputedStyle(document.body).color")
    page.emulate_media(color_scheme="dark")
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert ink != before
    expect(page.locator(".xtick text").first).to_have_css("fill", ink)
