"""The page of one run: the order in which a reader meets it.

Knows what stands where and the sentences between; knows nothing about how figures, words or the page's frame are made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from attribution.reports import completion_figures, completions, figures
from attribution.reports.document import absent, document, flat, linked_to, plotted, tabulated, text, written
from attribution.reports.quantities import (
    KINDS,
    agreement,
    balance,
    behaviour,
    cause_samples,
    causes,
    last_milestone,
    meta,
    metric_name,
    not_measured,
    percent,
    probe_sets,
    rank_correlations,
    shown,
    signed,
)
from attribution.reports.run_components import COURSE, over_steps, tokens
from attribution.reports.summary import NO_TEST, behaviour_cells, summary, title, words
from attribution.store import Run, config_hash, read_run, write_page

_ASKED = {
    "model": "model",
    "recipe": "recipe",
    "training": "training",
    "data": "samples",
    "probes": "held-out probe sets",
    "metric": "metric",
    "reference": "ablated activations become",
    "seed": "seed",
}


def report(path: str | os.PathLike[str]) -> Path:
    """Write `report.html` and `summary.md` into a run directory; the run may be unfinished.

    Returns:
        Path of the page.

    Raises:
        RunError: there is no run, a part of it is damaged, or the directory cannot be written.
    """
    run = read_run(path)
    write_page(run.path / "summary.md", summary(run))
    write_page(run.path / "report.html", page(run))
    return run.path / "report.html"


def page(run: Run) -> str:
    """The whole page as HTML."""
    sections = [
        ("words", "What was strengthened", "".join(f"<p>{text(line)}</p>" for line in words(run))),
        ("asked", "What was asked", _asked(run)),
        ("causes", "What caused the trained responses", _causes(run)),
        ("tokens", "Which words of the prompts cause the responses", tokens(run)),
        *_completions(run),
        ("scatter", "Cause against strengthening", _scatter(run)),
        ("behaviour", "Behaviour over steps", plotted(lambda: figures.behaviour(run)) + _behaviour(run)),
        ("heads", "Attention heads", _per_probe(run, figures.heads, _milestones(run), course=COURSE)),
        ("neurons", "Neurons", _per_probe(run, figures.neurons, f"{_milestones(run)} {_REST} {_SAME}", course=COURSE)),
        ("steps", "One component over steps", over_steps(run)),
        ("rows", "Unembedding rows as words", _per_probe(run, figures.rows, _ROWS)),
        ("places", "Update share by place", _per_probe(run, figures.places, _PLACES, lambda probe: _balance(run, probe))),
        ("missing", "What was not measured", _missing(run)),
        ("provenance", "Provenance", _provenance(run)),
    ]
    return document(title(run), sections)


_CAUSES = (
    "Each component alone was ablated exactly on {samples}, before training. Cause: the metric ({metric}, in nats) of the "
    "responses with the component minus without it. Above zero it caused them, below zero it opposed them. "
    "Effects need not add up. "
)
_CAUSE_ROWS = (
    "The rows with the largest causes, as the model’s vocabulary spells them. Ablating a row levels the logit of its own "
    "word, so words of the responses come first by construction."
)
_REST = (
    "Each row shows the layer’s own largest neurons from left to right; “rest” sums what was recorded of the others, and may "
    "lie outside the scale."
)
_SAME = "All panels of a probe set show the same neurons."
_ROWS = "Words as the model’s vocabulary spells them; the largest update shares up and down, on one scale in every probe set."
_PLACES = (
    "Bars add up to the change of the metric: below, what belongs to no layer; above, the unembedding. "
    "Grey, at the top: the residual, which the shares do not account for. One scale in every probe set."
)
_SCATTER = (
    "One point per component and held-out probe set. Across: what the component’s ablation took from the trained responses, "
    "on training samples before training. Up: how much its influence on the probe set grew. The two are different "
    f"measurements, on different prompts as long as the probe sets are held out. {NO_TEST}. Components with a large "
    "influence before have more room to move, up or down, and components of one layer may move together; either alone can "
    "make a correlation. "
    f"Correlations are over all n components; of more than {figures.MOST_POINTS} of a kind, those with the largest causes "
    "are drawn."
)


_COMPLETION_CAUSES = (
    "First-order causes of every completion, before the step that trains on it: how much a component contributes to the "
    "{metric} of the completion, in nats, to first order against an activation of zero. Above zero it makes the completion "
    "more likely, below zero less. {summed}: the cause of each completion times its advantage, mean over the step’s "
    "completions, summed over {steps}. Above zero, a component contributed to what was pushed up or opposed what was pushed "
    "down, on balance; below zero the other way round. The other panels share one scale: mean causes of {high} and of {low}, "
    "not weighted, mean over steps, and their difference. Nothing was ablated: first-order causes are estimates."
)
_COMPLETION_ROWS = (
    "The rows with the largest {summed}, up and down. A row causes its own logit, as far as that is above the mean of the "
    "vocabulary, so words of the completions come first by construction."
)
_SAMPLED = (
    "{count} completions, trained on in {steps}. Reward: as given, controls applied. Advantage: how much the step "
    "pushes a completion, as the trainer uses it; up where positive, down where negative. "
)
_PREFERRED = (
    "{count} responses of preference pairs, trained on in {steps}; nobody sampled them. Chosen is what the loss prefers, "
    "controls applied. Implicit reward: {reward}. Advantage: how much the step pushes a response, minus the derivative of its "
    "pair’s loss by its log-probability; up where positive, down where negative. "
)
_REWARDS = (
    "Lines: means over the completions of a step. Bands: from the lower to the upper quartile of its prompts, each with the "
    "mean of its completions. "
)
_SILENT = (
    "Crosses: every advantage was zero, so no completion was pushed up or down; an optimizer with momentum may move the "
    "weights all the same."
)
_EXAMPLES = (
    "The largest and the smallest advantages of the last {last}, the same text to the same prompt once. Prompts are cut at "
    "their beginning, texts at their end. "
)
_RATIO = (
    "Ratio: probability of the completion now by that when it was sampled, as far as the loss sees the two differ; none where "
    "it was not told."
)


def _asked(run: Run) -> str:
    """What the config asks for, by name: of a run by config, and of a recorder in a loop of the user's own."""
    asked = {name: run.config[key] for key, name in _ASKED.items() if key in run.config}
    if "metric" in asked:
        asked["metric"] = metric_name(run)
    unset = (None, [], {})
    if isinstance(training := asked.get("training"), Mapping):
        asked["training"] = [
            f"{key.replace('_', ' ')} {written(value)}" for key, value in training.items() if value not in unset
        ]
    if run.result is None:
        asked["status"] = f"not finished: {run.status.get('state', 'unknown')}"
    return tabulated(("", ""), ((name, written(value)) for name, value in asked.items()))


def _causes(run: Run) -> str:
    """Heat maps of heads and neurons, and rows as words; one sentence where causes were not measured at all."""
    if causes(run).empty:
        return plotted(lambda: figures.causes(run))
    note = _CAUSES.format(samples=cause_samples(run), metric=metric_name(run))
    return (
        f'<p class="note">{text(note)}{_REST}</p>{plotted(lambda: figures.causes(run))}'
        f'<h3>Unembedding rows as words</h3><p class="note">{_CAUSE_ROWS}</p>{plotted(lambda: figures.cause_rows(run))}'
    )


def _completions(run: Run) -> list[tuple[str, str, str]]:
    """The section of what was sampled or preferred; none in a run that trains on the responses it was given."""
    samples = run.samples
    if samples.empty:
        return []
    given, steps = completions.preferred(run), completions.steps_in_words(samples["step"].nunique())
    note = (_PREFERRED if given else _SAMPLED).format(count=len(samples), steps=steps, reward=completions.IMPLICIT) + _REWARDS
    note += _SILENT if completions.advantages(run)["silent"].any() else ""
    content = (
        f'<p class="note">{text(note)}</p>{plotted(lambda: completion_figures.rewards(run))}'
        f"{_completion_causes(run)}{_examples(run)}"
    )
    return [("completions", f"What was {'preferred' if given else 'sampled'}, and what produced it", content)]


def _completion_causes(run: Run) -> str:
    """Heat maps of heads and neurons, and rows as words; one sentence where no causes of completions were read."""
    if not (read := completions.steps_read(run)):
        return absent(completions.NOT_READ)
    steps = completions.steps_in_words(len(read))
    sides, summed = completions.sides(run), completions.SUMMED
    note = _COMPLETION_CAUSES.format(metric=completions.metric(run), summed=summed.capitalize(), steps=steps, **sides)
    return (
        f'<h3>Attention heads</h3><p class="note">{text(note)}</p>{plotted(lambda: completion_figures.heads(run))}'
        f'<h3>Neurons</h3><p class="note">{text(_REST)}</p>{plotted(lambda: completion_figures.neurons(run))}'
        f'<h3>Unembedding rows as words</h3><p class="note">{text(_COMPLETION_ROWS.format(summed=summed))}</p>'
        f"{plotted(lambda: completion_figures.rows(run))}"
    )


def _examples(run: Run) -> str:
    last = min(completions.LAST, run.samples["step"].nunique())
    note = _EXAMPLES.format(last=completions.steps_in_words(last)) + ("" if completions.preferred(run) else _RATIO)
    table = tabulated(completions.example_names(run), completions.example_cells(run), words=(1, 2))
    return f'<h3>Examples</h3><p class="note">{text(note)}</p>{table}'


def _scatter(run: Run) -> str:
    table = rank_correlations(run)
    rows = (
        [f"{KINDS[row['kind']]} on {shown(row['probe'])}", signed(row["spearman"]), str(row["n"])]
        for row in table.to_dict("records")
    )
    head = ("cause and strengthening of", "rank correlation (Spearman)", "n")
    return plotted(lambda: figures.cause_and_strengthening(run), _SCATTER, tabulated(head, rows) if len(table) else "")


def _behaviour(run: Run) -> str:
    table = behaviour(run)
    head = (
        "probe set",
        f"{metric_name(run)} before (nats)",
        "after (nats)",
        "change (nats)",
        "KL to the start (nats per token)",
    )
    return tabulated(head, behaviour_cells(table)) if len(table) else ""


def _milestones(run: Run) -> str:
    last = last_milestone(run)
    until = f"from the start to step {last}" if last else "(no milestone after the start)"
    return (
        "Influence before: effect of ablating the component at the start, on the probe set. Strengthening: change of that "
        f"effect {until}. Update share: summed over steps. Graft: the component’s change alone, put into the model at the "
        "start. A quantity has the same colours in every probe set; grey cells were not measured."
    )


def _balance(run: Run, probe: str) -> str:
    """The sum rule of one probe set as a sentence."""
    sums = balance(run, probe)
    resolved = "not recorded" if pd.isna(sums.resolved) else f"{percent(sums.resolved)} of {sums.steps} steps"
    return (
        f"Change {signed(sums.change, 4)} nats = shares {signed(sums.shares, 4)} + residual {signed(sums.residual, 3)}. "
        f"Resolved (residual within 1 % of the step’s change + 1e−5): {resolved}. {agreement(run, probe)}"
    ).rstrip()


def _per_probe(
    run: Run,
    draw: Callable[[Run, str], go.Figure],
    note: str,
    before: Callable[[str], str] | None = None,
    course: str = "",
) -> str:
    """One heading, sentence and figure per probe set; the note stands once, above them. `course`: where a click leads."""
    drawn = [
        f"<h3>{text(shown(name))}</h3>{f'<p>{text(before(name))}</p>' if before else ''}"
        f"{plotted(lambda name=name: draw(run, name), attributes=linked_to(course, probe_set=name))}"
        for name in probe_sets(run)
    ]
    return f'<p class="note">{note}</p>{"".join(drawn)}' if drawn else absent("No probe set was recorded.")


def _missing(run: Run) -> str:
    lines = "".join(f"<li>{text(shown(line, 500))}</li>" for line in [*not_measured(run), *completions.not_read(run)])
    return f"<ul>{lines}</ul>" if lines else "<p>Everything this page has a place for was measured.</p>"


def _provenance(run: Run) -> str:
    told, seconds = meta(run), meta(run).get("seconds", {})
    passes = run.probes["passes"].astype("float64").sum(min_count=1)
    cost = {
        "seconds in all": seconds.get("total"),
        "seconds in the recorder": seconds.get("recorder"),
        "gradient passes for shares": None if pd.isna(passes) else int(passes),
    }
    record = {
        "run": f"{run.path.resolve().parent.name}/{run.path.resolve().name}",
        "config hash": config_hash(run.config),
        "started": told.get("started"),
        **{f"version of {name}": version for name, version in told.get("versions", {}).items()},
        **{f"model: {name}": value for name, value in told.get("model", {}).items()},
        **cost,
    }
    found = ((key, written(value)) for key, value in record.items() if value is not None)
    return f"{tabulated(('', ''), found)}<h3>Config</h3>{tabulated(('key', 'value'), flat(run.config))}"
