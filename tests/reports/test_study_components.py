"""Single components of a study: equal to the frames and to scipy, honest about what a seed and a model are."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control, spearmanr, ttest_1samp

from attribution.errors import RunError
from attribution.reports import component_figures as figures
from attribution.reports import study_components as tables
from attribution.reports import study_figures, study_report
from attribution.reports.study_tables import read_study
from attribution.store import quantities as quantities_of
from attribution.store import read_run
from attribution.store.quantities import QUANTITIES, components, drawn, timelines

BOTH, ANGLED = "<b>both</b>", "planted/<b>4</b>"


@pytest.fixture(scope="module")
def record(whole_study):
    return read_study(whole_study)


@pytest.fixture(scope="module")
def run(finished):
    return read_run(finished)


def test_components_of_a_run_are_its_frames(run):
    table = components(run).set_index(["probe", "kind", "layer", "index"]).sort_index()
    share = run.components.query("kind == 'head' and layer == 1 and index == 2 and probe == 'conflict'")["share"].sum()
    row = table.loc["conflict", "head", 1, 2]
    assert row["share"] == pytest.approx(share, rel=1e-5)
    one = run.influence.query("kind == 'head' and layer == 1 and index == 2")
    before, after = one.query("probe == 'conflict'").sort_values("step")["effect"]
    assert row["influence"] == pytest.approx(before) and row["strengthening"] == pytest.approx(after - before, rel=1e-4)
    assert row["cause"] == pytest.approx(one.query("probe == 'training samples'")["effect"].item())
    words = table.loc["conflict", "row"]["word"]
    assert words.tolist() == [run.vocabulary[index] for _, index in words.index]


def test_a_timeline_ends_at_the_sum(run):
    course, table = timelines(run), components(run).set_index(["probe", "kind", "layer", "index"])["share"]
    last = course.dropna(subset="share").groupby(["probe", "kind", "layer", "index"])["share"].last()
    assert len(last) == table.notna().sum() and np.allclose(last, table.loc[last.index])
    head = course.query("kind == 'head' and layer == 0 and index == 1 and probe == 'conflict'")
    assert head["influence"].notna().sum() == 2 and head["step"].tolist() == [*range(int(head["step"].max()) + 1)]


def test_what_is_left_out_is_summed_and_nothing_is_lost(run, monkeypatch):
    monkeypatch.setattr(quantities_of, "TOP", 2)
    who = {"model": "m", "arm": "a", "seed": 0}
    every, course = components(run), timelines(run)
    chosen, courses = drawn([every.assign(**who)], [course.assign(**who)])
    for kind in ("head", "neuron", "row"):
        one = chosen[chosen["kind"] == kind]
        assert one["members"].sum() == (every["kind"] == kind).sum()
        for quantity in QUANTITIES:
            of = every.loc[every["kind"] == kind, quantity].sum()
            assert one[quantity].sum() == pytest.approx(of, rel=1e-4, abs=1e-6), (kind, quantity)
    neurons = chosen.query("kind == 'neuron' and layer == 0 and probe == 'conflict'")
    sizes = every.query("kind == 'neuron' and layer == 0 and probe == 'conflict'").set_index("index")["share"].abs()
    assert {*neurons["index"]} == {-1, *sizes.nlargest(2).index}
    assert set(courses.query("kind == 'neuron'")["index"]) <= set(chosen.query("kind == 'neuron'")["index"])
    assert (chosen["kind"] == "head").sum() == (every["kind"] == "head").sum()  # all heads are kept


def test_intervals_are_those_of_a_t_test_over_seeds_and_q_is_over_components(record):
    rows = tables.cells(record, ANGLED, "A", "conflict", "head")
    table = tables.over_seeds(rows)["strengthening"].set_index(["layer", "index"])
    p = {}
    for key, own in rows.groupby(["layer", "index"]):
        test = ttest_1samp(own["strengthening"], 0)
        ends = test.confidence_interval(0.95)
        assert table.loc[key, ["mean", "low", "high", "n"]].tolist() == pytest.approx(
            [own["strengthening"].mean(), ends.low, ends.high, 3], rel=1e-4
        )
        p[key] = test.pvalue
    assert np.allclose(table.loc[list(p), "q"], false_discovery_control(list(p.values())), rtol=1e-3)
    single = tables.over_seeds(rows[rows["seed"] == 0])["strengthening"]
    assert single[["low", "high", "q"]].isna().all(axis=None) and single["mean"].notna().all()


def test_components_that_were_summed_count_in_the_family(record):
    rows = tables.cells(record, ANGLED, "A", "conflict", "head")
    rest = rows[rows["index"] == 0].assign(index=-1, members=20)
    apart = tables.over_seeds(rows)["strengthening"].set_index(["layer", "index"])
    table = tables.over_seeds(pd.concat([rows, rest]))["strengthening"].set_index(["layer", "index"])
    p = [ttest_1samp(own["strengthening"], 0).pvalue for _, own in rows.groupby(["layer", "index"])]
    expected = false_discovery_control([*p, *[1.0] * 60])[: len(p)]  # 20 in each of three layers
    single = table[table.index.get_level_values("index") >= 0]
    assert np.allclose(single["q"], expected, rtol=1e-3) and (single["q"] > apart["q"]).all()
    hover = figures.layers(record, ANGLED, "A", "conflict", "neuron", top=3).data[1].hovertext.ravel()
    assert any("among 36" in text and "of 36" in text for text in hover)  # not of the nine that have room


def test_maps_are_the_means_and_the_rest_is_not_ranked(record):
    figure = figures.layers(record, ANGLED, "A", "conflict", "neuron", top=3)
    assert [trace.name for trace in figure.data] == ["influence before", "strengthening", "update share", "graft"]
    rows = tables.cells(record, ANGLED, "A", "conflict", "neuron")
    means = rows.groupby(["layer", "index"])["share"].mean()
    share = np.asarray(figure.data[2].z, dtype=float)
    for layer in range(share.shape[0]):
        best = means[layer].drop(-1, errors="ignore").abs().nlargest(3).index
        assert share[layer, :3] == pytest.approx(means[layer][best].to_numpy(), rel=1e-5)
        assert np.nansum(share[layer]) == pytest.approx(means[layer].sum(), rel=1e-4, abs=1e-6)
        assert figure.data[2].customdata[layer, 0] == f"neuron {layer}.{best[0]}" and figure.data[2].customdata[layer, 3] == ""
        assert "other neurons, summed" in figure.data[2].hovertext[layer, 3]
    ends = {(trace.name, trace.zmax) for arm in ("A", BOTH) for trace in
            figures.layers(record, "planted/2", arm, "conflict", "neuron", top=3).data}  # fmt: skip
    assert len(ends) == 4 and all(trace.zmid == 0 and trace.zmin == -trace.zmax for trace in figure.data)


def test_a_component_over_steps_is_its_frame(record):
    colours = study_figures.arm_colours(record)
    figure = figures.timeline(record, "planted/2", "conflict", "head 1.2", colours)
    frame = record.frames["courses"].query("model == 'planted/2' and probe == 'conflict' and kind == 'head' and layer == 1")
    own = frame[(frame["index"] == 2) & (frame["arm"] == "A")].dropna(subset="share")
    lines = [trace for trace in figure.data if trace.legendgroup == "A" and trace.yaxis in (None, "y")]
    assert len(lines) == 4  # three seeds and their mean
    for seed, line in enumerate(lines[:3]):
        assert list(line.y) == pytest.approx([0, *own[own["seed"] == seed]["share"]], rel=1e-3)
    assert list(lines[3].y) == pytest.approx(np.mean([line.y for line in lines[:3]], axis=0), abs=1e-4)
    with pytest.raises(RunError, match=r"head 9\.9 was not kept; there are head 0\.0"):
        figures.timeline(record, "planted/2", "conflict", "head 9.9", colours)


def test_of_many_seeds_the_interval_is_drawn(record):
    frame = record.frames["courses"].query("model == 'planted/2' and probe == 'conflict' and arm == 'A' and seed == 0")
    many = pd.concat([frame.assign(seed=seed, share=frame["share"] + 0.1 * seed) for seed in range(6)])
    _, series = figures.lines_over_steps(many, ["A"], {"A": "#000000"})
    low, high, mean = series["head 0.1"][:3]
    own = frame.query("kind == 'head' and layer == 0 and index == 1")["share"].dropna()
    test = ttest_1samp(own.iloc[0] + 0.1 * np.arange(6), 0).confidence_interval(0.95)
    assert (low[1], high[1]) == pytest.approx((test.low, test.high), rel=1e-3) and mean[1] == pytest.approx(
        own.iloc[0] + 0.25, rel=1e-3
    )


def test_the_scatter_and_its_rivals_correlate_as_scipy_says(record):
    rows = (
        tables.cells(record, "planted/2", "A", "conflict", "head")
        .groupby(["layer", "index"])[["cause", "strengthening"]]
        .mean()
    )
    figure = figures.scatter(record, "planted/2", "A", "cause")
    rho = spearmanr(rows["cause"], rows["strengthening"]).statistic
    assert figure.layout.annotations[0].text == f"heads: Spearman {tables.signed(rho, 2)}, n = {len(rows)}"
    assert sorted(figure.data[0].x) == pytest.approx(sorted(rows["cause"]), rel=1e-3)
    layer = figures.scatter(record, "planted/2", "A", "layer")
    assert set(layer.data[0].x) == {0, 1, 2} and layer.layout.xaxis.title.text == "layer"
    assert figure.layout.xaxis.title.text == "cause on training samples (nats)"  # the frame drawn before is as it was


def test_means_over_models_leave_the_control_out(record):
    rows = {row[0]: row[1:] for row in tables.correlations(record).rows}
    found = []
    for model in ("planted/2", "planted/<script>alert(1)</script>", ANGLED):
        table = tables.against(record, model, "A", "conflict", "head", "cause")
        found.append(tables.spearman(table, "across", "strengthening"))
    assert rows["arm A, heads"][0].startswith(tables.signed(float(np.tanh(np.arctanh(found).mean())), 2) + " [")
    assert "[" not in rows[f"arm {BOTH}, heads"][0]  # two models have it: no interval


def test_seeds_that_agree_are_called_stable(record):
    frame = record.frames["totals"]
    first = frame[frame["seed"] == 0]
    same = pd.concat([first, first.assign(seed=1)], ignore_index=True)
    alike = read_study(record.path)
    alike.frames["totals"] = same
    rows = {row[0]: row[1:] for row in tables.stability(alike).rows}
    assert all(row[0].startswith("+1") for row in rows.values()) and rows["arm A, heads"][1] == "100 %"
    drawn_apart = {row[0]: row[1:] for row in tables.stability(record).rows}
    assert not drawn_apart["arm A, heads"][0].startswith("+1")


def test_words_are_drawn_before_and_after(record):
    figure = figures.words(record, "planted/2", "A")
    assert list(figure.layout.yaxis.ticktext) == ["1 before", "1 after", "2 before", "2 after"]
    assert figure.data[0].z[1].tolist() == [2, 4, 6, 8, 10]
    assert figure.data[0].text[0].tolist()[0] == "tom" and "&lt;b&gt;" in figure.data[0].hovertext[0][3]
    assert all(len(text) < 40 for text in figure.data[0].text.ravel())
    with pytest.raises(RunError, match="was not read in arm lr0"):
        figures.words(record, "planted/2", "lr0")


def test_the_page_holds_every_combination_and_says_what_is_missing(whole_study):
    markup = study_report(whole_study).read_text()
    layers = re.search(r'<figure class="chosen" id="maps".*?</figure>', markup, re.DOTALL).group()
    kept = {key: json.loads(data) for key, data in re.findall(r'data-at="([\d.]+)">(.*?)</script>', layers, re.DOTALL)}
    assert len(kept) == 4 * 2 * 2 * 2
    missing = [told for told in kept.values() if isinstance(told, str)]
    assert len(missing) == 4 and all("Of arm <b>both</b> on planted/<b>4</b>" in told for told in missing)
    assert "<b>" not in re.sub(r"<script.*?</script>", "", layers, flags=re.DOTALL)


def test_without_single_components_a_sentence_stands_there(study):
    markup = study_report(study).read_text()
    assert "Single components were not recorded in this study, or not kept" in markup and 'id="stability"' not in markup
