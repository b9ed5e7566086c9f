"""What a run sampled or preferred: tables and figures against the frames, words, and text from data that stays text."""

import html
import re
from functools import cache

import numpy as np
import pandas as pd
import pytest

from attribution.errors import RunError
from attribution.reports import completion_figures, completions, report, summary
from attribution.reports.quantities import not_measured, signed
from attribution.store import BATCH, SAMPLES, RunWriter, read_run

PLOTLY = re.compile(r"<script>/\*\*\n\* plotly\.js.*?</script>", re.DOTALL)


@cache
def page_of(path):
    """The page, without plotly.js, made once."""
    return PLOTLY.sub("", report(path).read_text())


def section(path):
    """Its section on completions; nothing where there is none."""
    found = re.search(r'<section id="completions">.*?</section>', page_of(path), re.DOTALL)
    return found.group() if found else ""


def recorded(run, kind="head"):
    """Rows of the batch that hold causes of completions."""
    parts = run.parts[(run.parts["probe"] == BATCH) & (run.parts["kind"] == kind)]
    return parts[parts["cause_rewarded"].notna()].astype({"kind": str, "part": str})


def line(step, sample=0, **values):
    return {"step": step, "sample": sample, "prompt": "p", "completion": f"c{sample}", "tokens": 1, "reward": 1.0,
            "advantage": 0.5, "ratio": 1.0, **values}  # fmt: skip


def told(path, lines, config=None, rows=None):
    """A run of nothing but these completions and rows of the frame `components`."""
    writer = RunWriter(path, {"model": "m", "recipe": "grpo", **(config or {})})
    writer.samples(lines)
    if rows is not None:
        writer.add("components", rows)
    writer.flush()
    return read_run(path)


def test_a_run_that_was_given_its_responses_has_no_section_and_no_word_of_completions(finished):
    assert section(finished) == ""
    assert "ompletion" not in summary(read_run(finished))
    assert completions.sentences(read_run(finished)) == completions.not_read(read_run(finished)) == []


def test_the_section_stands_after_the_causes_of_the_trained_responses(sampled, preferred):
    for path, name in ((sampled, "sampled"), (preferred, "preferred")):
        markup = page_of(path)
        assert re.findall(r'<section id="(\w+)">', markup)[2:6] == ["causes", "tokens", "completions", "scatter"]
        assert f'<a href="#completions">What was {name}, and what produced it</a>' in markup
        assert markup.count('<div class="plot"') == 18 and section(path).count('<div class="plot"') == 4


def test_rewards_and_advantages_are_those_of_the_lines(sampled):
    run = read_run(sampled)
    lines, table, sizes = run.samples, completions.rewards(run), completions.advantages(run)
    assert table["step"].tolist() == sizes["step"].tolist() == [1, 2, 3, 4, 5, 6]
    for row in table.to_dict("records"):
        own = lines[lines["step"] == row["step"]]
        prompts = own.groupby("sample")["reward"].mean()
        found = (row["mean"], row["lower"], row["upper"], row["count"])
        assert found == (own["reward"].mean(), prompts.quantile(0.25), prompts.quantile(0.75), 12)
        assert prompts.quantile(0.25) < prompts.quantile(0.75)
    assert sizes["size"].tolist() == [0.75, 0.75, 0.75, 0, 0.75, 0.75] and sizes["silent"].tolist() == [0, 0, 0, 1, 0, 0]


def test_a_step_without_advantage_is_marked(sampled, preferred):
    figure = completion_figures.rewards(read_run(sampled))
    band, mean, size, silent = figure.data
    assert list(mean.x) == list(size.x) == [1, 2, 3, 4, 5, 6] and len(band.x) == 12
    assert list(silent.x) == [4] and list(silent.y) == [0] and silent.hovertext == ("step 4: every advantage zero",)
    assert mean.xaxis == "x" and size.xaxis == "x2" and figure.layout.xaxis.matches == "x2"  # one axis of steps
    assert "Crosses" in section(sampled) and "Crosses" not in section(preferred)
    assert "On 1 of 6 steps every advantage was zero" in summary(read_run(sampled))


def test_of_pairs_chosen_and_rejected_responses_have_a_line_each(preferred):
    run = read_run(preferred)
    figure, lines = completion_figures.rewards(run), run.samples
    assert [trace.name for trace in figure.data if trace.showlegend is not False] == ["chosen responses", "rejected responses"]
    for trace, above in ((figure.data[1], True), (figure.data[3], False)):
        own = lines[(lines["advantage"] > 0) == above]
        assert list(trace.y) == pytest.approx(own.groupby("step")["reward"].mean().tolist())
    assert "nobody sampled them" in section(preferred) and "implicit reward" in section(preferred)
    assert "ratio" not in section(preferred).lower()


@pytest.mark.parametrize("kind", ["head", "neuron", "row"])
def test_causes_are_summed_and_averaged_over_steps(sampled, kind):
    run = read_run(sampled)
    table, rows = completions.causes(run, kind).set_index(["layer", "index"]), recorded(run, kind).astype({"cause_high": float})
    grouped = rows.groupby(["layer", "index"])
    assert table["rewarded"].to_dict() == pytest.approx(grouped["cause_rewarded"].sum().to_dict(), abs=1e-5)
    for column in ("high", "low"):  # the step without advantages has neither
        assert table[column].to_dict() == pytest.approx(grouped[f"cause_{column}"].mean().to_dict(), abs=1e-6)
    assert table["contrast"].to_dict() == pytest.approx((table["high"] - table["low"]).to_dict(), abs=1e-6)
    assert set(table["steps"]) == {6} and len(table) == {"head": 12, "neuron": 36, "row": 30}[kind]


@pytest.mark.parametrize(("draw", "kind"), [(completion_figures.heads, "head"), (completion_figures.neurons, "neuron")])
def test_panels_are_the_table_and_those_in_nats_share_a_scale(sampled, draw, kind):
    run = read_run(sampled)
    table, figure = completions.causes(run, kind), draw(run)
    assert [panel.name for panel in figure.data] == list(completions.named(run).values())
    for column, panel in zip(completions.named(run), figure.data, strict=True):
        assert panel.zmid == 0 and panel.zmin == -panel.zmax
        assert sorted(value for row in panel.z for value in row) == pytest.approx(sorted(table[column]))
    scales = [panel.zmax for panel in figure.data]
    assert scales[0] == pytest.approx(table["rewarded"].abs().max())
    assert scales[1:] == [pytest.approx(table[["contrast", "high", "low"]].abs().max().max())] * 3
    units = [note.text.split("(")[1] for note in figure.layout.annotations[:4]]
    assert units == ["nats × advantage)", "nats)", "nats)", "nats)"]


def test_cells_of_heads_hover_with_every_cause_and_its_rank(preferred):
    run = read_run(preferred)
    panel = completion_figures.heads(run).data[0]
    for cell in completions.causes(run, "head").to_dict("records"):
        hover = panel.hovertext[cell["layer"]][cell["index"]]
        assert hover.startswith(f"layer {cell['layer']}, head {cell['index']}<br>")
        for column, name in completions.named(run).items():
            assert f"{name}: {signed(cell[column])} (rank " in hover
    assert "cause, chosen minus rejected" in panel.hovertext[0][0]


def test_rows_are_escaped_words(sampled):
    run = read_run(sampled)
    bars, labels = completion_figures.rows(run, top=30).data[0], completion_figures.rows(run, top=30).layout.yaxis.ticktext
    assert sorted(bars.x) == pytest.approx(sorted(completions.causes(run, "row")["rewarded"]))
    assert "'&lt;script&gt;alert(1)&lt;/script&gt;'" in labels and not any("<" in label for label in labels)
    assert len(completion_figures.rows(run, top=3).data[0].x) == 6


def test_components_that_were_not_written_at_every_step_are_left_out(tmp_path):
    rows = pd.DataFrame({"step": [1, 1, 1, 2, 2], "probe": BATCH, "kind": "neuron", "layer": 0, "index": [3, 4, -1, 3, -1],
                         "part": "writing", "cause_rewarded": 1.0, "cause_high": [1.0, 9.0, 9.0, np.nan, 9.0],
                         "cause_low": [0.5, 9.0, 9.0, 4.0, 9.0]})  # fmt: skip
    run = told(tmp_path / "run", [line(1), line(2)], rows=rows)
    (found,) = completions.causes(run, "neuron").to_dict("records")
    both = {"layer": 0, "index": 3, "rewarded": 2.0, "contrast": 0.5, "high": 1.0, "low": 2.25, "steps": 2}
    assert found == both  # the difference is over the step that has both
    with pytest.raises(RunError, match="not recorded for single heads"):
        completion_figures.heads(run)


def test_words_carry_rewards_and_the_heads_that_tell_the_sides_apart(sampled, preferred):
    for path in (sampled, preferred):
        run, (words,) = read_run(path), completions.sentences(read_run(path))
        assert html.escape(words) in page_of(path) and words in summary(run)
        table, high, low = completions.causes(run, "head"), *completions.sides(run).values()
        for end, way in ((table.nlargest(3, "contrast"), "larger"), (table.nsmallest(3, "contrast"), "smaller")):
            top = [f"{row['layer']}.{row['index']} ({signed(row['contrast'])})" for row in end.to_dict("records")]
            assert f"{way} above all in {top[0]}, {top[1]} and {top[2]}" in words
        assert f"compared with those for {low}, those for {high} are larger above all" in words
        assert "First-order causes of the log-odds of completions were read before each of 6 steps" in words
    assert "of chosen responses went from 0.1 to 0.6 and that of rejected responses from −0.1 to −0.6" in words


def test_rewards_of_a_long_run_are_compared_over_tenths_and_drawn_as_windows(tmp_path):
    lines = [line(step, sample, reward=step / 1000, advantage=0.0 if step == 500 else 1.0)
             for step in range(1, 1001) for sample in (0, 1)]  # fmt: skip
    run = told(tmp_path / "run", lines)
    assert (
        "Between the first and the last 100 steps of 1000, the mean reward of completions went from 0.0505 to 0.951"
        in (completions.sentences(run)[0])
    )
    figure, sizes = completion_figures.rewards(run), completions.advantages(run)
    assert len(figure.data[1].x) == len(sizes) == 250 and sizes["steps"].tolist() == [4] * 250
    assert sizes["silent"].sum() == 1 and figure.data[3].hovertext == ("steps 497–500: every advantage zero on 1 of 4",)
    assert figure.data[1].hovertext[0] == "steps 1–4: mean 0.0025, 8 completions; quartiles of prompts 0.00175 to 0.00325"
    assert len(section(tmp_path / "run")) < 100_000


def test_signs_are_not_called_chosen_where_another_loss_may_turn_them(tmp_path):
    config = {"recipe": "dpo", "training": {"trainer": {"loss_type": "ipo"}}}
    names = completions.sides(told(tmp_path / "ipo", [line(1, ratio=None)], config))
    assert names == {"high": "completions with a positive advantage", "low": "completions with a negative advantage"}


def test_examples_are_the_largest_and_smallest_advantages_of_the_last_steps(tmp_path):
    lines = [line(1, 9, advantage=100.0)] + [line(step, sample, advantage=(sample - 6) / step)
             for step in (2, 3, 4) for sample in range(13)]  # fmt: skip
    run = told(tmp_path / "run", lines)
    found = completions.examples(run)
    assert list(found) == list(SAMPLES)
    assert found["advantage"].tolist() == [3.0, 2.5, 2.0, 1.5, -1.5, -2.0, -2.5, -3.0] and set(found["step"]) == {2}
    silent = told(tmp_path / "silent", [line(1, sample, advantage=0.0) for sample in range(9)])
    assert completions.examples(silent)["sample"].tolist() == [8, 7, 6, 5]
    cells = completions.example_cells(told(tmp_path / "cells", [line(1, reward=None, ratio=None, prompt="x" * 400 + "\n?")]))
    assert cells == [["1", "…" + "x" * 98 + "\\n?", "c0", "–", "+0.5", "–"]]


def test_completions_are_text_and_cut(sampled, preferred):
    for path in (sampled, preferred):
        markup = section(path)
        assert "<script>alert" not in markup and "<b>" not in markup and "c" * 200 not in markup and "p" * 200 not in markup
        assert "&lt;script&gt;alert(1)&lt;/script&gt; answer 0 &amp;amp; &lt;b&gt;bold&lt;/b&gt; \\n" in markup
        assert 1 + 2 * min(completions.EXAMPLES, 6) >= markup.count("<tr>") > 4
        text = (path / "summary.md").read_text()
        assert "<" not in text.replace("\\<", "")


def test_without_causes_of_completions_page_and_summary_say_so(unread):
    run = read_run(unread)
    markup, shown = section(unread), html.escape(completions.NOT_READ)
    assert f'<p class="absent">{shown}</p>' in markup and markup.count('<div class="plot"') == 1
    assert "36 completions, trained on in 3 steps" in markup and markup.count("<tr>") == 9
    page = page_of(unread)
    assert page.count(shown) == 3  # among the words, in its place, and among what was not measured
    assert completions.NOT_READ in summary(run) and completions.NOT_READ not in not_measured(run)
    with pytest.raises(RunError, match="was not read"):
        completion_figures.heads(run)


def test_causes_read_at_some_steps_are_said_to_be(tmp_path):
    rows = pd.DataFrame([{"step": 2, "probe": BATCH, "kind": "head", "layer": 0, "index": 0, "part": "writing",
                          "cause_rewarded": 0.0}])  # fmt: skip
    run = told(tmp_path / "run", [line(1, advantage=0.0), line(2, advantage=0.0, reward=None)], rows=rows)
    assert completions.not_read(run) == ["First-order causes of completions: read at 1 of 2 steps."]
    with pytest.raises(RunError, match="all advantages were zero"):
        completion_figures.heads(run)
    assert "all advantages were zero" in section(tmp_path / "run")


def test_completions_without_rewards_have_their_advantages_drawn(tmp_path):
    run = told(tmp_path / "run", [line(step, reward=None) for step in (1, 2)])
    assert [trace.name for trace in completion_figures.rewards(run).data] == ["mean |advantage|"]
    assert "The completions of 2 steps were recorded without rewards." in completions.sentences(run)[0]
