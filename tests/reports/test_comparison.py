"""Two recipes side by side: numbers that were planted, who can be compared with whom, and a page without markup of data."""

import numpy as np
import pandas as pd
import pytest

from attribution.cli import main
from attribution.errors import ConfigError, RunError
from attribution.reports import diff
from attribution.reports.compared import compared, side
from attribution.reports.comparison import components, mechanisms, summary
from attribution.store import RunWriter, write_json

SCRIPT = "<script>alert(1)</script>"
PROBES = ("agree", SCRIPT)
GROWN = {"A": {"A": 0.5, "B": 0.1}, "B": {"A": -0.2, "B": 0.4}}  # strengthening of each set in each arm


def write(path, arm, model="m", seed=0, grown=GROWN, finished=True, **config):
    """A run of two probe sets, two sets and four heads; seeds and models shift all by a little."""
    shift = 0.01 * seed + (0.1 * int(model[1:]) if model[1:] else 0)
    given = {"model": model, "recipe": "sft", "metric": "log_odds", "reference": "zero", "seed": seed,
             "training": {"learning_rate": 1e-4 if arm == "A" else 2e-4}, "inputs": {"agree.jsonl": "1"}, **config}  # fmt: skip
    writer = RunWriter(path, given)
    writer.meta({"versions": {}, "model": {"layers": 1, "heads": 4}})
    for probe in PROBES:
        for step, kl in ((0, 0.0), (3, 0.02)):
            writer.add("probes", pd.DataFrame([{"step": step, "probe": probe, "metric": step / 3 + shift * (step > 0), "kl": kl,
                                                "change": step / 3 if step else None}]))  # fmt: skip
            for name in ("A", "B", "wrong-1 A"):
                effect = 1.0 + (step > 0) * (grown[arm].get(name, 9.0) + shift)
                row = {"step": step, "probe": probe, "set": name, "reference": "zero", "effect": effect}
                writer.add("sets", pd.DataFrame([row, {**row, "reference": "mean", "effect": 7.0 * step}]))
            heads = pd.DataFrame({"kind": "head", "layer": 0, "index": range(4), "probe": probe, "kl": 0.0})
            moved = np.arange(4) * (0.1 if arm == "A" else -0.1) * (step > 0)
            writer.add("influence", heads.assign(step=step, effect=1.0 + moved))
            writer.flush()
    if finished:
        writer.finish({"steps": 3, "seconds": 1.0})
    writer.close()
    return path


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """Two arms of one model, three seeds each; the last of B is not finished."""
    folder = tmp_path_factory.mktemp("study")
    for arm in "AB":
        for seed in range(3):
            write(folder / f"{arm}-0123abcd" / f"seed-{seed}", arm, seed=seed, finished=(arm, seed) != ("B", 2))
    return folder


def test_differences_are_those_that_were_planted_and_pairs_share_a_seed(arms):
    found = compared(arms / "A-0123abcd", arms / "B-0123abcd")
    assert (
        found.names == ("A", "B")
        and found.pairs == [("m", 0), ("m", 1)]
        and found.unit == "training seeds, and hold for this model only"
    )
    table = found.mechanisms().set_index(["probe", "set"])
    assert set(table.index) == {(probe, name) for probe in PROBES for name in "AB"}  # no wrong partition
    for (_, name), row in table.iterrows():
        assert row["one"] == pytest.approx(GROWN["A"][name] + 0.005) and row["other"] == pytest.approx(GROWN["B"][name] + 0.005)
        assert row["difference"] == pytest.approx(GROWN["B"][name] - GROWN["A"][name]) and row["n"] == 2
        assert row["low"] == pytest.approx(row["difference"]) == row["high"]  # the shift of a seed is in both
    heads = found.components("head").query("quantity == 'strengthening' and probe == 'agree'")
    assert heads["difference"].tolist() == pytest.approx([0, -0.2, -0.4, -0.6])
    changes = found.behaviours().query("probe == 'agree'").set_index("quantity")
    assert changes.loc["kl", "one"] == pytest.approx(0.02) and changes.loc["change", "difference"] == pytest.approx(0)
    assert found.settings() == [("training.learning_rate", "0.0001", "0.0002")]


def test_of_one_pair_there_is_no_interval(arms):
    row = compared(arms / "A-0123abcd" / "seed-0", arms / "B-0123abcd" / "seed-0").mechanisms().iloc[0]
    assert row["n"] == 1 and np.isnan(row["low"]) and row["difference"] == pytest.approx(-0.7)


def test_models_are_the_unit_where_there_are_several_and_their_components_are_not_mixed(tmp_path):
    for arm in "AB":
        for model in ("m1", "m2", "m3"):
            for seed in (0, 1):
                write(tmp_path / f"{arm}-{model}" / f"seed-{seed}", arm, model, seed)
    done = {"arm": "A", "seed": 0, "state": "finished", "steps": 3, "seconds": 1}
    listed = [{"path": f"A-{model}/seed-0", "model": model, **done} for model in ("m1", "m2", "m3")]
    write_json(tmp_path / "study.json", {"name": "s", "models": ["m1", "m2"], "runs": listed + [
        {**run, "path": run["path"].replace("A-", "B-"), "arm": "B"} for run in listed]})  # fmt: skip
    found = compared(f"{tmp_path}:A", f"{tmp_path}:B")
    assert found.models == ["m1", "m2"] and found.unit.startswith("models")  # not the one that is only compared with
    assert found.mechanisms()["n"].eq(2).all() and found.components("head").empty
    assert "Components of one model are none of another" in diff(f"{tmp_path}:A", f"{tmp_path}:B").read_text()


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"model": "n"}, ConfigError, "A was run on m, B on n; compare runs that begin from the same model"),
        ({"metric": "log_prob"}, ConfigError, r"differ in metric \(log_odds and log_prob\)"),
        ({"reference": "mean"}, ConfigError, "differ in reference"),
        ({"finished": False}, RunError, "no run of .* is finished"),
    ],
)
def test_who_cannot_be_compared(arms, tmp_path, changes, error, named):
    write(tmp_path / "B-89abcdef" / "seed-0", "B", **changes)
    with pytest.raises(error, match=named):
        compared(arms / "A-0123abcd", tmp_path / "B-89abcdef")


def test_a_side_is_one_arm(arms, tmp_path, capsys):
    with pytest.raises(ConfigError, match="holds runs of 2 arms; name one of them, or STUDY:ARM"):
        side(arms)
    with pytest.raises(RunError, match="has no arm 'C'; it has A, B"):
        side(f"{arms}:C")
    assert main(["diff", str(tmp_path), str(arms / "A-0123abcd")]) == 2
    assert "there is no run at or below" in capsys.readouterr().err


def test_probe_sets_of_other_content_are_left_out(arms, tmp_path):
    write(tmp_path / "B-89abcdef" / "seed-0", "B", inputs={"agree.jsonl": "2"})
    assert compared(arms / "A-0123abcd", tmp_path / "B-89abcdef").probes == [SCRIPT]


def test_the_page_says_it_in_words_and_numbers(arms, capsys):
    assert main(["diff", str(arms / "A-0123abcd"), str(arms / "B-0123abcd"), "--out", str(arms / "d.html")]) == 0
    assert capsys.readouterr().out.strip() == str(arms / "d.html")
    page, told = (arms / "d.html").read_text(), (arms / "d.md").read_text()
    assert told == summary(compared(arms / "A-0123abcd", arms / "B-0123abcd"))
    assert "2 pairs of runs that share model and seed" in told and "“A” and by −0.195 in “B”" in told and "−0.7" in told
    assert "compare the KL to the start first" in told and "hold for this model only" in told
    assert SCRIPT not in page and SCRIPT not in told and "learning_rate" in page


def test_figures_hold_the_tables(arms):
    found = compared(arms / "A-0123abcd", arms / "B-0123abcd")
    one, other, difference = (list(trace.x) for trace in mechanisms(found).data)
    table = found.mechanisms()
    assert one == table["one"].tolist() and other == table["other"].tolist() and difference == table["difference"].tolist()
    figure = components(found, "head", "agree", "strengthening")
    assert [list(trace.z[0]) for trace in figure.data] == [pytest.approx(values) for values in
            ([0, 0.1, 0.2, 0.3], [0, -0.1, -0.2, -0.3], [0, -0.2, -0.4, -0.6])]  # fmt: skip
    assert [(trace.zmin, trace.zmax) for trace in figure.data] == [(pytest.approx(-0.6), pytest.approx(0.6))] * 3
    assert "difference: −0.6 [−0.6, −0.6], n = 2" in figure.data[0].hovertext[0][3]
    with pytest.raises(RunError, match="Graft of heads was not measured on both sides"):
        components(found, "head", "agree", "graft")


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_in_a_browser(visit, arms, tmp_path):
    """Every figure is drawn from the frame, hovers with the interval, and fits; names from data are text."""
    one, other = arms / "A-0123abcd", arms / "B-0123abcd"
    place, heads = diff(one, other, tmp_path / "d.html"), compared(one, other).components("head")
    for width in (1280, 800):
        page = visit(place, width)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator(".js-plotly-plot").count() == 1 + len(PROBES)
        outside = page.locator(".infolayer text, .xtick text, .ytick text").evaluate_all(
            "all => all.map(text => text.getBoundingClientRect()).filter(box => box.left < 0 || box.right > innerWidth).length"
        )
        assert outside == 0
    assert SCRIPT in page.locator("#mechanisms").inner_text() and page.locator("script:has-text('alert')").count() == 0
    plot = page.locator("#head .plot").first
    drawn = plot.evaluate("plot => plot._fullData.map(panel => Array.from(panel.z[0]))")
    cells = heads[heads["probe"] == PROBES[0]].sort_values("index")
    assert drawn == [pytest.approx(cells[side].tolist()) for side in ("one", "other", "difference")]
    plot.scroll_into_view_if_needed()
    plot.locator(".draglayer .nsewdrag").last.hover(position={"x": 5, "y": 5})
    plot.locator(".hoverlayer .hovertext", has_text="layer 0, head 0").wait_for()
    page.emulate_media(media="print")
    assert page.locator("#mechanisms .plot").is_visible() and page.locator("#runs table").is_visible()
