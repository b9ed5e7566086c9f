"""The page and the summary of a study: equal to the findings, escaped, and honest about what is missing."""

import html
import json
import re

import numpy as np
import pandas as pd
import pytest

from attribution.calibration import power
from attribution.claims import BOOST, LEDGER, ContrastClaim
from attribution.claims.measured import Measured, measured_finding
from attribution.errors import RunError
from attribution.reports import study_figures, study_report, study_tables
from attribution.reports.quantities import signed
from attribution.reports.study_summary import study_summary
from attribution.reports.study_tables import read_study
from attribution.store import write_json

PLOTLY = re.compile(r"<script>/\*\*\n\* plotly\.js.*?</script>", re.DOTALL)
SECTIONS = ["verdict", "asked", "crossover", "behaviour", "layers", "recruitment", "nulls", "secondary", "missing", "runs",
            "provenance"]  # fmt: skip
READING = f"{BOOST.cell.probes} probes, KL-matched, reference zero"


def page_of(path):
    """The page without plotly.js, as markup."""
    return PLOTLY.sub("", study_report(path).read_text())


def section(markup, key):
    """The text of one section, without the data of its figures."""
    found = re.search(rf'<section id="{key}">.*?</section>', markup, re.DOTALL).group()
    return re.sub(r"<script type=\"application/json\">.*?</script>", "", found, flags=re.DOTALL)


def rows_of(markup, key, table=0):
    """Cells of one table of a section."""
    found = re.findall(r"<table.*?</table>", section(markup, key), re.DOTALL)[table]
    rows = re.findall(r"<tr>(.*?)</tr>", found, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


@pytest.fixture(scope="module")
def markup(study):
    return page_of(study)


@pytest.fixture(scope="module")
def told(study, markup):
    return json.loads((study / "findings.json").read_text())[0]


def test_sections_stand_in_reading_order(markup):
    assert re.findall(r'<section id="(\w+)">', markup) == SECTIONS
    assert markup.count('<div class="plot"') == 6
    assert "default-src 'none'" in markup


def test_the_verdict_is_said_with_its_figures(markup, told):
    verdict, row = section(markup, "verdict"), told["verdict"][0]
    assert row["verdict"] == "supported"
    assert '<div class="verdict supported"><p class="big">Supported</p>' in verdict
    assert html.escape(row["sentence"]).replace(" %", "&nbsp;%") in verdict
    assert html.escape(BOOST.statement) in verdict
    assert "5 models, 4 arms, 2 seeds; 44 of 45 runs finished." in verdict


def test_the_interval_plot_is_the_finding(study, told):
    figure = study_figures.verdict(read_study(study).findings[0])
    nulls = {row["null"]: row for row in told["nulls"] if row["reading"] == READING}
    assert [figure.layout.shapes[0].x0, figure.layout.shapes[0].x1] == [-0.1, 0.1]
    bars = figure.data[::2]
    for bar, row in zip(bars, [told["verdict"][0], *nulls.values()], strict=True):
        assert bar.x[0] == row["mean"]
        assert bar.x[0] + bar.error_x.array[0] == pytest.approx(row["high"])
        assert bar.x[0] - bar.error_x.arrayminus[0] == pytest.approx(row["low"])
    assert list(figure.data[1].x) == [row["contrast"] for row in told["parts"]]
    assert len(figure.data[3].x) == 5 and list(figure.data[5].x) == []
    names = figure.layout.yaxis.ticktext
    assert all(name.split("<br>")[-1].startswith(signed(bar.x[0])) for name, bar in zip(names, bars, strict=True))


def test_what_was_asked_is_the_claim_as_declared(markup, told):
    rows = dict(rows_of(markup, "asked"))
    assert rows["statement"] == BOOST.statement and rows["statistic"] == BOOST.statistic
    assert rows["hash"] == f"{BOOST.hash} (of the claim as printed here)"
    assert rows["smallest effect of interest, δ"] == "0.1" and rows["cell: sign of each mechanism’s influence"]
    gates = rows_of(markup, "asked", 1)[1:]
    assert [row[0] for row in gates] == [gate["meaning"] for gate in told["gates"]]
    assert [row[3] for row in gates] == ["yes"] * 5 and gates[0][1:3] == ["5", "≥ 5"]
    for exclusion in BOOST.exclusions:
        assert html.escape(exclusion) in section(markup, "asked")


def test_a_hash_of_another_claim_is_told(build_study, tmp_path):
    path = build_study(tmp_path / "study")
    found = json.loads((path / "findings.json").read_text())
    found[0]["claim"]["delta"] = 0.05
    (path / "findings.json").write_text(json.dumps(found))
    assert f"{BOOST.hash} (NOT of the claim as printed here)" in page_of(path)


def test_changes_per_organism_are_the_parts(study, markup, told):
    rows = rows_of(markup, "crossover")
    assert rows[0][4:8] == ["ΔA in arm A", "ΔA in arm B", "ΔB in arm A", "ΔB in arm B"]
    for row, part in zip(rows[1:], told["parts"], strict=False):
        columns = ["before_A", "before_B", "A_in_A", "A_in_B", "B_in_A", "B_in_B", "contrast"]
        assert row == [part["model"], "2", *(signed(part[column]) for column in columns)]
    assert rows[-1][0] == "mean" and rows[-1][-1] == signed(told["verdict"][0]["mean"])
    record = read_study(study)
    figure = study_figures.crossover(record.findings[0], study_figures.arm_colours(record))
    dots = [trace for trace in figure.data if trace.mode == "markers" and len(trace.x) == 5]
    for trace, column in zip(dots, ["A_in_A", "A_in_B", "B_in_A", "B_in_B"], strict=True):
        assert list(trace.y) == [part[column] for part in told["parts"]]
    colours = [trace.marker.color for trace in dots]
    assert colours[0] == colours[2] != colours[1] == colours[3]


def test_nulls_partitions_and_other_readings_are_the_tables(markup, told):
    primary = [row for row in told["nulls"] if row["reading"] == READING]
    rows = rows_of(markup, "nulls")[1:]
    assert [row[1] for row in rows] == [study_tables.interval(null) for null in primary]
    assert [row[4] for row in rows] == ["yes"] * 3 and rows[0][0] == "wrong partitions"
    assert len(rows_of(markup, "nulls", 1)) == 1 + len(told["partitions"]) == 21
    assert len(rows_of(markup, "nulls", 2)) == 1 + len(told["nulls"]) - 3
    rows = rows_of(markup, "secondary")[1:]
    assert rows[0][0] == f"primary: {READING}" and len(rows) == 1 + len(told["secondary"])
    for row, other in zip(rows[1:], told["secondary"], strict=True):
        assert row[:2] == [other["reading"], study_tables.interval(other)]
        assert row[3].lower().startswith(other["verdict"]) and row[4] == other["why"]


def test_recruitment_has_three_parts_per_arm_and_says_what_the_ends_mean(markup, told):
    rows = rows_of(markup, "recruitment")[1:]
    assert [row[:2] for row in rows] == [[f"arm {arm}", part] for arm in "AB" for part in ("own set", "other set", "remainder")]
    gains = [row for row in told["recruitment"] if row["quantity"] == "gain"]
    assert [row[2] for row in rows] == [study_tables.interval(gain) for gain in gains]
    assert "Near 1" in section(markup, "recruitment") and "Near 0" in section(markup, "recruitment")


def test_curves_are_the_frames_and_the_mean_leaves_the_control_out(study, made_frames):
    record, frames = read_study(study), made_frames()
    figure = study_figures.influence(record, study_figures.arm_colours(record), record.findings[0])
    bold = {(trace.name, trace.xaxis): trace for trace in figure.data if trace.name}
    for axis, name, sign in zip(("x", "x2"), "AB", BOOST.cell.signs[BOOST.cell.probes], strict=True):
        sets = frames["sets"].query(
            f"probe == '{BOOST.cell.probes}' and set == '{name}' and arm == 'A' and model != 'planted/unrouted'"
        )
        expected = sign * sets.groupby("step")["effect"].mean()
        assert list(bold["arm A", axis].y) == pytest.approx(expected.tolist())
    dotted = [trace for trace in figure.data if trace.line.dash == "dot"]
    assert len(dotted) == 4
    behaviour = study_figures.behaviour(record, study_figures.arm_colours(record))
    assert len([trace for trace in behaviour.data if trace.name]) == 3 * 4
    colours = {trace.name: trace.line.color for trace in [*figure.data, *behaviour.data] if trace.name}
    assert len(set(colours.values())) == 4 and "arm &lt;b&gt;both&lt;/b&gt;" in colours


def test_runs_that_failed_come_first_and_are_named_as_missing(markup):
    rows = rows_of(markup, "runs")
    assert rows[1] == ["<b>both</b>", "planted/0", "7", "failed", "3", "<script>alert(1)</script>"]
    assert len(rows) == 1 + 45 and {row[3] for row in rows[2:]} == {"finished"}
    missing = html.unescape(section(markup, "missing"))
    assert "Arm <b>both</b> on planted/0, seed 7: failed at step 3." in missing
    assert "failed: no memory <script>alert(1)</script>." in missing


def test_provenance(markup):
    rows = dict(rows_of(markup, "provenance"))
    assert (
        rows["version of torch"] == "2.13.0"
        and rows["hash of claim boost"] == BOOST.hash
        and rows["seconds of all runs, added up"] == "123.4"
    )


def test_text_from_data_is_never_markup(study, build_study, tmp_path):
    nasty = BOOST.model_copy(update={"statement": "<b>x</b><script>alert(1)</script>", "unit": "<i>u</i>"})
    for path in (study, build_study(tmp_path / "study", claims=(nasty,))):
        markup = page_of(path)
        assert "<script>alert" not in markup and "<b>" not in markup and "<i>" not in markup
        assert "\\u003cscript" not in markup and "\\u003cb\\u003e" not in markup and "\\u003ci\\u003e" not in markup
        summary = (path / "summary.md").read_text()
        assert "<" not in summary.replace("\\<", "")


@pytest.mark.parametrize(
    ("located", "models", "word", "mark"),
    [
        ({("A", "A"): -0.5, ("A", "B"): 0.5, ("B", "A"): 0.5, ("B", "B"): -0.5}, 5, "Contradicted – reversed", "contradicted"),
        ({("A", "A"): 0.1, ("A", "B"): 0.1, ("B", "A"): 0.1, ("B", "B"): 0.1}, 5, "Contradicted", "contradicted"),
        (None, 3, "Not testable here", "open"),
    ],
)
def test_other_verdicts_say_their_words(build_study, made_frames, tmp_path, located, models, word, mark):
    frames = made_frames(models=models, **({"located": located} if located else {}))
    path = build_study(tmp_path / "study", frames)
    assert f'<div class="verdict {mark}"><p class="big">{word}</p>' in page_of(path)
    assert f"## boost: {word}" in (path / "summary.md").read_text()


def test_an_inconclusive_study_says_so_and_a_null_that_was_not_measured_is_named(build_study, made_frames, tmp_path):
    frames = made_frames()
    frames["sets"] = frames["sets"][~frames["sets"]["set"].str.startswith("wrong-")]
    markup = page_of(build_study(tmp_path / "study", frames))
    assert '<div class="verdict open"><p class="big">Inconclusive</p>' in markup
    assert "No wrong partition was measured." in section(markup, "nulls")
    assert "the null “wrong partitions” says nothing: no wrong partitions were measured, 4 are needed." in section(
        markup, "missing"
    )


def test_one_organism_has_no_interval_and_draws_none(build_study, made_frames, tmp_path):
    path = build_study(tmp_path / "study", made_frames(models=1))
    assert "Not testable here" in section(page_of(path), "verdict")
    figure = study_figures.verdict(read_study(path).findings[0])
    assert "one value, no interval" in figure.layout.yaxis.ticktext[0]
    assert not figure.data[0].error_x.visible and np.isfinite(figure.data[0].x[0])


def test_a_study_without_claims_or_frames_still_has_a_page(build_study, tmp_path):
    path = build_study(tmp_path / "study", claims=(), leave_out=("sets", "set_grafts"), not_judged={"boost": "no <b>arm</b> B"})
    markup = page_of(path)
    assert markup.count('<div class="plot"') == 1
    assert "Claim boost was not judged: no &lt;b&gt;arm&lt;/b&gt; B" in section(markup, "verdict")
    assert "Influence of sets of components: not recorded." in section(markup, "missing")
    (path / "findings.json").unlink()
    (path / "frames" / "probes.parquet").unlink()
    (path / "study.json").write_text('{"name": "empty"}')
    markup = page_of(path)
    assert markup.count('<div class="plot"') == 0 and "This study judges no claim." in section(markup, "verdict")
    assert "no runs" in section(markup, "verdict")


def test_two_claims_stand_under_their_names(build_study, tmp_path):
    markup = page_of(build_study(tmp_path / "study", claims=(BOOST, BOOST.model_copy(update={"delta": 0.9}))))
    assert markup.count('<p class="big">') == 2 and section(markup, "nulls").count("<h3>boost</h3>") == 2
    assert '<p class="big">Supported</p>' in markup and '<p class="big">Contradicted</p>' in markup


def test_a_sum_of_readings_has_a_page_too(build_study, made_frames, tmp_path):
    """Its parts are declared term by term, its organisms listed with every term, and what is read beside it has its word."""
    read = {"arm": "A", "set": "A", "probe": "agree"}
    part = {"name": "<b>more</b> of A", "statistic": "A in its arm", "unit": "fraction", "relative": True, "delta": 0.1,
            "terms": [read, {**read, "arm": "B", "weight": -1}], "nulls": ["wrong partitions", "identical arms"]}  # fmt: skip
    same = {**part, "name": "same", "prediction": "none", "nulls": (), "delta": 0.9}
    claim = ContrastClaim.model_validate({
        "id": "sum", "statement": "It grows.", "parts": [part, same], "beside": [{**part, "name": "aside", "relative": False}],
        "cell": {"world": "planted", "recipe": "sft", "optimizer": "AdamW", "reference": "zero"},
        "gates": [{"name": "organisms", "meaning": "organisms", "relation": ">=", "value": 5}], "note": "a note",
    })  # fmt: skip
    frames = {name: frame[frame["model"] != BOOST.cell.control] for name, frame in made_frames().items()}
    path = build_study(tmp_path / "study", frames, claims=(claim, BOOST))
    markup, record = page_of(path), read_study(path)
    verdict, asked = section(markup, "verdict"), section(markup, "asked")
    assert '<p class="big">Supported</p>' in verdict and "A in its arm: +0.156 [+0.152, +0.16]" in verdict
    assert "+1 × (change of influence of A on agree, arm A) -1 × (change of influence of A on agree, arm B)" in asked
    assert "each divided by the influence before; above 0.1 fraction, matched by kl" in asked and "a note" in asked
    assert "(of the claim as printed here)" in asked and "<b>more</b>" not in markup
    assert "change of influence of A on agree, arm A" in section(markup, "crossover")
    assert "beside: aside, KL-matched, reference zero" in section(markup, "secondary")
    assert "wrong-1" in section(markup, "nulls")
    dots = [trace for trace in study_figures.verdict(record.findings[0]).data if trace.mode == "markers" and len(trace.x) == 5]
    assert len(dots) == 2  # organisms, and their means over wrong partitions
    assert "same" in study_summary(record) and len(record.findings[0].table("parts")) == 10


def test_one_number_per_base_has_a_page_too(build_study, tmp_path):
    claim = LEDGER["control"]
    bases = pd.DataFrame({"model": [f"m{i}" for i in range(5)], "statistic": [0.4, 0.5, 0.6, 0.5, 0.4], "of <b>": 1.0})
    beside = {"otherwise": bases["statistic"] - 1}
    found = measured_finding(claim, Measured(bases, bases, beside, {}, {}, ["m9 is left out."]), {})
    path = build_study(tmp_path / "study", claims=())
    write_json(path / "findings.json", [found.to_dict()])
    markup = page_of(path)
    assert '<p class="big">Supported</p>' in section(markup, "verdict") and claim.statistic in section(markup, "asked")
    assert "(of the claim as printed here)" in section(markup, "asked") and "m9 is left out." in section(markup, "missing")
    assert "of &lt;b&gt;" in section(markup, "crossover") and "otherwise" in section(markup, "secondary")
    assert len(study_figures.verdict(read_study(path).findings[0]).data[1].x) == 5


def test_summary(study, markup, told):
    text = study_summary(read_study(study))
    assert text == (study / "summary.md").read_text()
    for heading in ("## boost: Supported", "### Change of influence per organism", "### Nulls of the primary reading",
                    "### Other readings", "### Where the change sits", "### Gates", "## Not measured"):  # fmt: skip
        assert heading in text
    assert signed(told["verdict"][0]["mean"]) in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count(" | ") for line in table.splitlines()}) == 1


def test_no_study_is_a_sentence(tmp_path):
    with pytest.raises(RunError, match="holds no study"):
        study_report(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        study_report(tmp_path)


def test_a_damaged_frame_is_a_sentence(build_study, tmp_path):
    path = build_study(tmp_path / "study")
    (path / "frames" / "sets.parquet").write_bytes(b"no")
    with pytest.raises(RunError, match=r"sets\.parquet cannot be read"):
        study_report(path)


def test_a_mean_stops_where_a_run_does():
    rows = pd.DataFrame({"model": "m", "seed": [0, 0, 1], "step": [0, 1, 0], "kl": [0.0, 1.0, 2.0]})
    assert study_figures._by_model(rows, "kl").mean().to_dict() == {0: 1.0}


def test_the_band_of_a_mean_is_its_interval_over_models(study):
    record = read_study(study)
    figure = study_figures.behaviour(record, study_figures.arm_colours(record))
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    bold = [trace for trace in figure.data if trace.name]
    assert len(bands) == len(bold)
    for band, mean in zip(bands, bold, strict=True):
        half = len(band.y) // 2
        high, low = np.asarray(band.y[:half]), np.asarray(band.y[half:])[::-1]
        assert np.allclose((high + low) / 2, mean.y) and (high >= low).all()


def test_the_power_of_a_study_is_that_of_its_scatter(markup, told):
    values = [row["contrast"] for row in told["parts"]]
    seen = power([2 * BOOST.delta], np.std(values, ddof=1), len(values), BOOST.delta)["power"][0]
    assert f"in {seen:.0%} of studies" in section(markup, "nulls") and f"{len(values)} organisms" in section(markup, "nulls")
