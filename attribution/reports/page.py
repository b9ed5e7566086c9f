"""The page of one run: a single HTML file that works offline, in light, dark and print, with plotly.js inlined once.

Knows the order in which a reader meets a run; knows nothing about how figures or sentences are made. All text from
data is escaped, and a content security policy forbids the page every request.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from attribution.errors import RunError
from attribution.reports import figures
from attribution.reports.quantities import (
    KINDS,
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
from attribution.reports.summary import NO_TEST, behaviour_cells, summary, title, words
from attribution.store import Run, config_hash, read_run, write_atomic

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
    write_atomic(run.path / "summary.md", summary(run).encode())
    write_atomic(run.path / "report.html", page(run).encode())
    return run.path / "report.html"


def page(run: Run) -> str:
    """The whole page as HTML."""
    sections = [
        ("words", "What was strengthened", "".join(f"<p>{_text(line)}</p>" for line in words(run))),
        ("asked", "What was asked", _asked(run)),
        ("causes", "What caused the trained responses", _causes(run)),
        ("scatter", "Cause against strengthening", _scatter(run)),
        ("behaviour", "Behaviour over steps", _figure(lambda: figures.behaviour(run)) + _behaviour(run)),
        ("heads", "Attention heads", _per_probe(run, figures.heads, _milestones(run))),
        ("neurons", "Neurons", _per_probe(run, figures.neurons, f"{_milestones(run)} {_REST} {_SAME}")),
        ("rows", "Unembedding rows as words", _per_probe(run, figures.rows, _ROWS)),
        ("places", "Update share by place", _per_probe(run, figures.places, _PLACES, lambda probe: _balance(run, probe))),
        ("missing", "What was not measured", _missing(run)),
        ("provenance", "Provenance", _provenance(run)),
    ]
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{content}</section>' for key, name, content in sections)
    room = resources.files("attribution.reports")
    parts = {
        "TITLE": _text(title(run)),
        "POLICY": _POLICY,
        "STYLE": room.joinpath("page.css").read_text(),
        "LINKS": links,
        "BODY": body,
        "PLOTLY": get_plotlyjs(),
        "SCRIPT": room.joinpath("page.js").read_text(),
    }
    pieces = _FRAME.split("@")
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="@POLICY@">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>@TITLE@</title>
<style>
@STYLE@</style>
</head>
<body>
<header><h1>@TITLE@</h1><nav>@LINKS@</nav></header>
<main>
<noscript><p>The figures need JavaScript; their main numbers are in summary.md beside this page.</p></noscript>
@BODY@
</main>
<script>@PLOTLY@</script>
<script>
@SCRIPT@</script>
</body>
</html>
"""
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


def _asked(run: Run) -> str:
    """What the config asks for, by name: of a run by config, and of a recorder in a loop of the user's own."""
    asked = {name: run.config[key] for key, name in _ASKED.items() if key in run.config}
    if "metric" in asked:
        asked["metric"] = metric_name(run)
    unset = (None, [], {})
    if isinstance(training := asked.get("training"), Mapping):
        asked["training"] = [
            f"{key.replace('_', ' ')} {_plain(value)}" for key, value in training.items() if value not in unset
        ]
    if run.result is None:
        asked["status"] = f"not finished: {run.status.get('state', 'unknown')}"
    return _table(("", ""), ((name, _plain(value)) for name, value in asked.items()))


def _causes(run: Run) -> str:
    """Heat maps of heads and neurons, and rows as words; one sentence where causes were not measured at all."""
    if causes(run).empty:
        return _figure(lambda: figures.causes(run))
    note = _CAUSES.format(samples=cause_samples(run), metric=metric_name(run))
    return (
        f'<p class="note">{_text(note)}{_REST}</p>{_figure(lambda: figures.causes(run))}'
        f'<h3>Unembedding rows as words</h3><p class="note">{_CAUSE_ROWS}</p>{_figure(lambda: figures.cause_rows(run))}'
    )


def _scatter(run: Run) -> str:
    table = rank_correlations(run)
    rows = (
        [f"{KINDS[row['kind']]} on {shown(row['probe'])}", signed(row["spearman"]), str(row["n"])]
        for row in table.to_dict("records")
    )
    head = ("cause and strengthening of", "rank correlation (Spearman)", "n")
    return _figure(lambda: figures.cause_and_strengthening(run), _SCATTER, _table(head, rows) if len(table) else "")


def _behaviour(run: Run) -> str:
    table = behaviour(run)
    head = (
        "probe set",
        f"{metric_name(run)} before (nats)",
        "after (nats)",
        "change (nats)",
        "KL to the start (nats per token)",
    )
    return _table(head, behaviour_cells(table)) if len(table) else ""


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
        f"Resolved (residual within 1 % of the step’s change + 1e−5): {resolved}."
    )


def _per_probe(run: Run, draw: Callable[[Run, str], go.Figure], note: str, before: Callable[[str], str] | None = None) -> str:
    """One heading, sentence and figure per probe set; the note stands once, above them."""
    drawn = [
        f"<h3>{_text(shown(name))}</h3>{f'<p>{_text(before(name))}</p>' if before else ''}"
        f"{_figure(lambda name=name: draw(run, name))}"
        for name in probe_sets(run)
    ]
    return f'<p class="note">{note}</p>{"".join(drawn)}' if drawn else _absent("No probe set was recorded.")


def _figure(draw: Callable[[], go.Figure], note: str = "", table: str = "") -> str:
    """A figure with its data, a table and a caption, or the sentence that says why there is none."""
    try:
        figure = draw()
    except RunError as error:
        return _absent(str(error))
    data = str(figure.to_json()).replace("<", "\\u003c")
    height = figure.layout.height
    return (
        f'<figure><div class="plot" style="height:{height}px"></div><script type="application/json">{data}</script>'
        f"{table}{f'<figcaption>{note}</figcaption>' if note else ''}</figure>"
    )


def _absent(sentence: str) -> str:
    return f'<p class="absent">{_text(sentence)}</p>'


def _missing(run: Run) -> str:
    lines = "".join(f"<li>{_text(shown(line, 500))}</li>" for line in not_measured(run))
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
    found = ((key, _plain(value)) for key, value in record.items() if value is not None)
    return f"{_table(('', ''), found)}<h3>Config</h3>{_table(('key', 'value'), _flat(run.config))}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: Any) -> str:
    """A value from config or meta as text."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping) and set(value) == {"name", "samples"}:
        return f"{shown(value['name'])} ({shown(value['samples'], 12)} samples)"
    if value in ([], {}):
        return "none"
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return shown(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False), 300)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; with empty headings, a list of keys and values."""
    names = list(head)
    top = f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in names)}</tr>" if any(names) else ""
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="table"><table class="{"plain" if len(names) == 2 else "numbers"}">{top}{body}</table></div>'


def _text(value: str) -> str:
    """Text from data for the page; a number and its per cent sign stay on one line."""
    return html.escape(value).replace(" %", "&nbsp;%")
