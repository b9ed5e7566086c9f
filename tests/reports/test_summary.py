"""The Markdown summary, and the words it shares with the page."""

import html
import json

from attribution.reports import quantities, report, summary
from attribution.reports.summary import CAUTION, NO_TEST, _strengthened, words
from attribution.store import RunWriter, read_run


def test_words_stand_in_page_and_summary(finished):
    run = read_run(finished)
    page = report(finished)
    told = words(run)
    assert len(told) == 5 and told[-1] == CAUTION
    shown = page.read_text().replace("&nbsp;", " ")
    for line in told:
        assert html.escape(line) in shown
    assert (finished / "summary.md").read_text() == summary(run)
    assert CAUTION in summary(run)


def test_words_carry_the_numbers(finished):
    run = read_run(finished)
    table = quantities.per_component(run, "head").query("probe == 'conflict'")
    best = table.loc[table["strengthening"].idxmax()]
    named = f"{int(best['layer'])}.{int(best['index'])} ({quantities.signed(best['strengthening'])}"
    change = quantities.behaviour(run).loc["conflict", "change"]
    assert named in words(run)[1] and quantities.signed(change) in words(run)[1]
    assert "83 % of steps resolved" in words(run)[1] and "log-odds went from" in words(run)[1]


def test_words_say_where_no_head_rose_and_where_none_fell(finished):
    run = read_run(finished)
    heads = quantities.per_component(run, "head")
    for sign, there, absent in (
        (-1.0, "By exact ablation, the influence of no head rose. It fell most in", "rose most in heads"),
        (1.0, "influence rose most in heads (layer.head)", "It fell most in"),
    ):
        told = _strengthened(run, heads.assign(strengthening=sign * (1 + heads["strengthening"].abs())), "conflict")
        assert there in told and absent not in told
        assert ("rose most together" in told) == (sign > 0)


def test_words_name_the_largest_causes_and_their_rank_correlation(finished):
    run = read_run(finished)
    table, first, compared = quantities.causes(run), words(run)[0], words(run)[3]
    assert "48 training samples" in first
    for kind in ("head", "neuron"):
        top = table[table["kind"] == kind].nlargest(3, "cause").to_dict("records")
        names = [f"{row['layer']}.{row['index']} ({quantities.signed(row['cause'])})" for row in top]
        assert f"{names[0]}, {names[1]} and {names[2]}" in first
    worst = table[table["kind"] == "head"].nsmallest(1, "cause").iloc[0]
    assert f"opposed them most is {worst['layer']}.{worst['index']} ({quantities.signed(worst['cause'])})" in first
    for row in quantities.rank_correlations(run).query("kind == 'head'").to_dict("records"):
        assert f"{quantities.signed(row['spearman'], 2)} on {row['probe']} (n = 12)" in compared
    assert NO_TEST in compared


def test_without_causes_the_words_say_so(uncaused):
    told = words(read_run(uncaused))
    assert told[0] == quantities.NO_CAUSES and len(told) == 4 and "Spearman" not in " ".join(told)
    assert "caused the trained responses most" not in summary(read_run(uncaused))


def test_tables(finished):
    run = read_run(finished)
    text = summary(run)
    assert "## Heads that caused the trained responses most, on 48 training samples" in text
    for head in ("## Behaviour", "## Update share by kind", "## Heads strengthened most on conflict", "## Not measured"):
        assert head in text
    table = text.split("## Heads strengthened most on conflict (nats)")[1].split("##")[0].strip().splitlines()
    positive = quantities.per_component(run, "head").query("probe == 'conflict' and strengthening > 0")
    assert len(table) - 2 == min(10, len(positive))
    assert len({line.count(" | ") for line in table}) == 1


def test_data_is_no_markup(finished):
    text = summary(read_run(finished))
    assert "<" not in text.replace("\\<", "")
    assert "\\<script\\>" in text


def test_a_run_of_nothing(tmp_path):
    RunWriter(tmp_path / "run", {"model": "m"})
    assert "No probe set was recorded" in summary(read_run(tmp_path / "run"))


def test_how_far_shares_add_up_is_said_where_it_was_measured(build, tmp_path):
    path = build(tmp_path / "run")
    assert "random sets" not in summary(read_run(path))
    result = json.loads((path / "result.json").read_text())
    result["linear_graft"] = {"conflict": {"spearman": 0.943, "pearson": 0.9, "spearman_both_ends": 0.991, "n": 200}}
    (path / "result.json").write_text(json.dumps(result))
    text = summary(read_run(path))
    assert text.count("Over 200 random sets") == 1 and "0.94 with the measured graft, and 0.99 with the mean" in text
    assert "Over 200 random sets" in report(path).read_text()
