"""Figures against the frames they draw."""

import numpy as np
import pandas as pd
import pytest

from attribution.errors import RunError
from attribution.reports import figures, quantities
from attribution.store import RunWriter, read_run


@pytest.mark.parametrize(("draw", "kind"), [(figures.heads, "head"), (figures.neurons, "neuron")])
def test_heat_maps_are_zero_centred_with_layer_0_at_the_bottom(finished, draw, kind):
    run = read_run(finished)
    ranges = []
    for probe in quantities.probe_sets(run):
        figure = draw(run, probe)
        assert [panel.name for panel in figure.data] == list(quantities.QUANTITIES.values())
        for panel, axis in zip(figure.data, figure.select_yaxes(), strict=True):
            assert panel.zmid == 0 and panel.zmin == -panel.zmax and panel.zmax > 0
            assert axis.range[0] < axis.range[1]  # upwards
            assert np.nanmax(np.abs(np.asarray(panel.z, dtype=float))) <= panel.zmax
        ranges.append([panel.zmax for panel in figure.data])
    assert ranges[0] == ranges[1] and ranges[0][2] == ranges[0][3]
    largest = quantities.per_component(run, kind)["influence"].abs().max()
    assert ranges[0][0] == pytest.approx(largest)


def test_cells_of_heads_are_the_values_of_the_frame(finished):
    run = read_run(finished)
    table = quantities.per_component(run, "head")
    figure = figures.heads(run, "conflict")
    for name, panel in zip(quantities.QUANTITIES, figure.data, strict=True):
        for cell in table[table["probe"] == "conflict"].to_dict("records"):
            assert panel.z[cell["layer"]][cell["index"]] == cell[name]
            hover = panel.hovertext[cell["layer"]][cell["index"]]
            assert hover.startswith(f"layer {cell['layer']}, head {cell['index']}<br>")
            for quantity, label in quantities.QUANTITIES.items():
                assert f"{label}: {quantities.signed(cell[quantity])} (rank " in hover


def test_neurons_are_ranked_and_the_rest_is_summed(finished):
    run = read_run(finished)
    table = quantities.per_component(run, "neuron")
    layer = table[(table["probe"] == "conflict") & (table["layer"] == 1)]
    shares = figures.neurons(run, "conflict", top=4).data[2].z[1]
    ordered = layer["share"].iloc[np.argsort(-layer["share"].abs())]
    assert shares.shape == (5,)
    assert shares[:4].tolist() == ordered.iloc[:4].tolist()
    assert shares[4] == pytest.approx(ordered.iloc[4:].sum())


def test_neurons_without_influence_are_empty_cells_that_say_so(build, tmp_path):
    run = read_run(build(tmp_path / "run", neurons=3))
    panel = figures.neurons(run, "conflict").data[0]
    empty = np.isnan(np.asarray(panel.z, dtype=float))
    assert (~empty).sum(axis=1).tolist() == [3, 3, 3]
    assert all("influence before: not measured" in text for text in panel.hovertext[empty])


def test_rows_are_escaped_words_with_their_shares(finished):
    run = read_run(finished)
    bars = figures.rows(run, "conflict", top=30).data[0]
    labels = figures.rows(run, "conflict", top=30).layout.yaxis.ticktext
    shares = quantities.per_component(run, "row").query("probe == 'conflict'")["share"]
    assert sorted(bars.x) == sorted(shares)
    assert "'&lt;script&gt;alert(1)&lt;/script&gt;'" in labels and "'\\n'" in labels and "' the'" in labels
    assert "'&#36;x&#36;'" in labels and "'&amp;amp;'" in labels and "'\\u202eright'" in labels
    assert max(map(len, labels)) < 80 and not any("<" in label for label in labels)


def test_bars_by_place_add_up_to_the_change(finished):
    run = read_run(finished)
    for probe in quantities.probe_sets(run):
        figure = figures.places(run, probe)
        assert sum(sum(bars.x) for bars in figure.data) == pytest.approx(quantities.balance(run, probe).change, abs=1e-5)
        labels = list(figure.layout.yaxis.ticktext)
        assert labels == ["embedding", "final norm", "layer 0", "layer 1", "layer 2", "unembedding rows", "residual"]


@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_causes_of_components_are_the_frame_zero_centred_and_ranked(finished, kind):
    run = read_run(finished)
    table = quantities.causes(run).query(f"kind == '{kind}'")
    panel = figures.causes(run, top=12).data[0 if kind == "head" else 1]
    assert panel.zmid == 0 and panel.zmin == -panel.zmax == pytest.approx(-table["cause"].abs().max())
    for layer in range(3):
        cells = table[table["layer"] == layer]
        if kind == "neuron":
            cells = cells.loc[cells["cause"].abs().sort_values(ascending=False).index]
        assert panel.z[layer].tolist() == cells["cause"].tolist()
        for index, cause, hover in zip(cells["index"], cells["cause"], panel.hovertext[layer], strict=True):
            rank = int((table["cause"].abs() > abs(cause)).sum()) + 1
            assert hover == f"layer {layer}, {kind} {index}<br>cause: {quantities.signed(cause)} (rank {rank} of {len(table)})"


def test_the_rest_of_the_neurons_causes_is_summed_beside_the_largest(finished):
    run = read_run(finished)
    panels = figures.causes(run, top=3).data
    layer = quantities.causes(run).query("kind == 'neuron' and layer == 2")["cause"]
    ordered = layer.loc[layer.abs().sort_values(ascending=False).index]
    assert panels[1].z[2].tolist() == pytest.approx([*ordered[:3], ordered[3:].sum()])
    assert "9 other neurons, summed" in panels[1].hovertext[2][3]
    axes = list(figures.causes(run, top=3).select_xaxes())
    assert axes[1].ticktext[-1] == "rest" and "rest" not in axes[0].ticktext
    assert all(axis.range[0] < axis.range[1] for axis in figures.causes(run).select_yaxes())  # layer 0 at the bottom


def test_rows_with_the_largest_causes_are_words(finished):
    run = read_run(finished)
    figure, table = figures.cause_rows(run, top=5), quantities.causes(run).query("kind == 'row'")
    largest = table.loc[table["cause"].abs().nlargest(5).index].sort_values("cause")
    assert list(figure.data[0].x) == largest["cause"].tolist()
    for index, text in zip(largest["index"], figure.data[0].hovertext, strict=True):
        assert f", token {index}<br>cause: " in text


def test_scatter_sets_strengthening_on_held_out_probes_against_the_cause_on_training_samples(finished):
    run = read_run(finished)
    figure = figures.cause_and_strengthening(run)
    assert [len(points.x) for points in figure.data] == [12, 12, 36, 36]
    causes, held = quantities.causes(run), quantities.per_component(run, "head")
    for points, probe in zip(figure.data, quantities.probe_sets(run), strict=False):
        assert sorted(points.x) == sorted(causes.query("kind == 'head'")["cause"])
        strengthening = held[held["probe"] == probe].set_index(["layer", "index"])["strengthening"]
        at = causes.query("kind == 'head'").set_index(["layer", "index"])["cause"]
        pairs = {(at[key], strengthening[key]) for key in at.index}
        assert set(zip(points.x, points.y, strict=True)) == pairs
        assert all("cause on training samples: " in text and "influence before: " in text for text in points.hovertext)


def test_without_causes_the_scatter_does_not_take_influence_instead(uncaused):
    run = read_run(uncaused)
    assert len(figures.heads(run, "conflict").data) == 4
    with pytest.raises(RunError, match="no component was ablated on the training samples"):
        figures.causes(run)
    with pytest.raises(RunError, match="Causes on training samples were not measured"):
        figures.cause_and_strengthening(run)
    with pytest.raises(RunError, match="Causes of unembedding rows"):
        figures.cause_rows(run)


@pytest.mark.parametrize("draw", [figures.rows, figures.places])
def test_bars_have_one_range_in_every_probe_set_that_holds_them_all(finished, draw):
    run = read_run(finished)
    drawn = [draw(run, probe) for probe in quantities.probe_sets(run)]
    low, high = drawn[0].layout.xaxis.range
    assert list(drawn[1].layout.xaxis.range) == [low, high] and low < 0 < high
    for figure in drawn:
        stacks = {}
        for bars in figure.data:
            for value, place in zip(bars.x, bars.y, strict=True):
                stacks[place, value > 0] = stacks.get((place, value > 0), 0) + value
        assert low <= min(stacks.values()) and max(stacks.values()) <= high


def test_a_probe_set_without_shares_does_not_spoil_the_range(tmp_path):
    writer = RunWriter(tmp_path / "run", {"model": "m"})
    share = {"step": 1, "probe": "p", "kind": "row", "layer": -1, "index": 4, "part": "writing", "share": 0.5}
    writer.add("components", pd.DataFrame([share]))
    writer.add("probes", pd.DataFrame([{"step": 0, "probe": "other", "metric": 1.0}]))
    writer.flush()
    run = read_run(tmp_path / "run")
    assert figures.places(run, "p").layout.xaxis.range[1] > 0.5 and figures.rows(run, "p").layout.xaxis.range[1] > 0.5
    with pytest.raises(RunError, match="not recorded on other"):
        figures.places(run, "other")


def test_behaviour_draws_what_was_recorded(finished, unfinished):
    assert [len(line.x) for line in figures.behaviour(read_run(finished)).data] == [7, 7, 7, 7, 6]
    assert [len(line.x) for line in figures.behaviour(read_run(unfinished)).data] == [4, 4, 4, 4]


def test_what_was_not_recorded_is_a_sentence_not_an_empty_axis(tmp_path, unfinished):
    half = read_run(unfinished)
    assert [panel.name for panel in figures.heads(half, "conflict").data] == ["influence before", "update share"]
    with pytest.raises(RunError, match="needs exact ablation at the start"):
        figures.cause_and_strengthening(half)
    RunWriter(tmp_path / "run", {"model": "m"})
    empty = read_run(tmp_path / "run")
    for draw in (figures.heads, figures.neurons, figures.rows, figures.places):
        with pytest.raises(RunError, match="recorded on p"):
            draw(empty, "p")
    for draw in (figures.causes, figures.cause_and_strengthening):
        with pytest.raises(RunError, match="not measured"):
            draw(empty)
    with pytest.raises(RunError, match="No behaviour"):
        figures.behaviour(empty)
