"""Figures against the frames they draw."""

import numpy as np
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
    largest = quantities.per_component(run, kind)["cause"].abs().max()
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
    assert all("cause before: not measured" in text for text in panel.hovertext[empty])


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


def test_scatter_has_one_point_per_component_and_probe_set(finished):
    figure = figures.cause_and_strengthening(read_run(finished))
    assert [len(points.x) for points in figure.data] == [12, 12, 36, 36]


def test_behaviour_draws_what_was_recorded(finished, unfinished):
    assert [len(line.x) for line in figures.behaviour(read_run(finished)).data] == [7, 7, 7, 7, 6]
    assert [len(line.x) for line in figures.behaviour(read_run(unfinished)).data] == [4, 4, 4, 4]


def test_what_was_not_recorded_is_a_sentence_not_an_empty_axis(tmp_path, unfinished):
    half = read_run(unfinished)
    assert [panel.name for panel in figures.heads(half, "conflict").data] == ["cause before", "update share"]
    with pytest.raises(RunError, match="exact ablation"):
        figures.cause_and_strengthening(half)
    RunWriter(tmp_path / "run", {"model": "m"})
    empty = read_run(tmp_path / "run")
    for draw in (figures.heads, figures.neurons, figures.rows, figures.places):
        with pytest.raises(RunError, match="recorded on p"):
            draw(empty, "p")
    with pytest.raises(RunError, match="No behaviour"):
        figures.behaviour(empty)
