"""The Markdown summary, and the words it shares with the page."""

import html

from attribution.reports import quantities, report, summary
from attribution.reports.summary import CAUTION, words
from attribution.store import RunWriter, read_run


def test_words_stand_in_page_and_summary(finished):
    run = read_run(finished)
    page = report(finished)
    told = words(run)
    assert len(told) == 3 and told[-1] == CAUTION
    for line in told:
        assert html.escape(line) in page.read_text()
    assert (finished / "summary.md").read_text() == summary(run)
    assert CAUTION in summary(run)


def test_words_carry_the_numbers(finished):
    run = read_run(finished)
    table = quantities.per_component(run, "head").query("probe == 'conflict'")
    best = table.loc[table["strengthening"].idxmax()]
    named = f"{int(best['layer'])}.{int(best['index'])} ({quantities.signed(best['strengthening'])}"
    change = quantities.behaviour(run).loc["conflict", "change"]
    assert named in words(run)[0] and quantities.signed(change) in words(run)[0]
    assert "83 % of steps resolved" in words(run)[0]


def test_tables(finished):
    run = read_run(finished)
    text = summary(run)
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
