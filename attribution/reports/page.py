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
    balance,
    behaviour,
    last_milestone,
    meta,
    metric_name,
    not_measured,
    probe_sets,
    shown,
    signed,
)
from attribution.reports.summary import behaviour_cells, summary, title, words
from attribution.store import Run, config_hash, read_run, write_atomic

_ASKED = ("model", "recipe", "data", "probes", "metric", "ablation", "seed")


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
        ("asked", "What was asked", _asked(run)),
        ("words", "What was strengthened", "".join(f"<p>{_text(line)}</p>" for line in words(run))),
        ("behaviour", "Behaviour over steps", _figure(lambda: figures.behaviour(run)) + _behaviour(run)),
        ("heads", "Attention heads", _per_probe(run, figures.heads, _milestones(run))),
        ("neurons", "Neurons", _per_probe(run, figures.neurons, f"{_milestones(run)} {_REST}")),
        ("rows", "Unembedding rows as words", _per_probe(run, figures.rows, _ROWS)),
        ("places", "Update share by place", _per_probe(run, figures.places, _PLACES, lambda probe: _balance(run, probe))),
        ("scatter", "Cause against strengthening", _figure(lambda: figures.cause_and_strengthening(run), _SCATTER)),
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
_REST = (
    "Each row shows the layer’s own largest neurons from left to right; all panels show the same neurons. "
    "“Rest” sums what was recorded of the others, and may lie outside the scale."
)
_ROWS = "Words as the model’s vocabulary spells them; the largest update shares up and down."
_PLACES = (
    "Bars add up to the change of the metric: below, what belongs to no layer; above, the unembedding. "
    "Grey, at the top: the residual, which the shares do not account for."
)
_SCATTER = (
    "One point per component and probe set. Both axes contain the same measurement at the start, with opposite signs, "
    "so noise alone slopes the cloud downwards. "
    f"Where a probe set has more than {figures.MOST_POINTS} components of a kind, those with the largest causes are drawn."
)


def _asked(run: Run) -> str:
    asked = {key: run.config[key] for key in _ASKED if key in run.config}
    named = {"data": "samples", "probes": "probe sets"}
    state = {} if run.result is not None else {"status": f"not finished: {run.status.get('state', 'unknown')}"}
    return _table(("", ""), ((named.get(key, key), _plain(value)) for key, value in {**asked, **state}.items()))


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
        "Cause before: effect of ablating the component at the start. Strengthening: change of that effect "
        f"{until}. Update share: summed over steps. Graft: the component’s change alone, put into the model at the start. "
        "A quantity has the same colours in every probe set; grey cells were not measured."
    )


def _balance(run: Run, probe: str) -> str:
    sums = balance(run, probe)
    resolved = "not recorded" if pd.isna(sums.resolved) else f"{100 * sums.resolved:.0f} % of {sums.steps} steps"
    return (
        f"<p>Change {signed(sums.change, 4)} nats = shares {signed(sums.shares, 4)} + residual {signed(sums.residual, 3)}. "
        f"Resolved (residual within 1 % of the step’s change + 1e−5): {resolved}.</p>"
    )


def _per_probe(
    run: Run, draw: Callable[[Run, str], go.Figure], note: str, before: Callable[[str], str] = lambda probe: ""
) -> str:
    """One heading and figure per probe set; the note stands once, above them."""
    drawn = [
        f"<h3>{_text(shown(name))}</h3>{before(name)}{_figure(lambda name=name: draw(run, name))}" for name in probe_sets(run)
    ]
    return f'<p class="note">{note}</p>{"".join(drawn)}' if drawn else _absent("No probe set was recorded.")


def _figure(draw: Callable[[], go.Figure], note: str = "") -> str:
    """A figure with its data beside it, or the sentence that says why there is none."""
    try:
        figure = draw()
    except RunError as error:
        return _absent(str(error))
    data = str(figure.to_json()).replace("<", "\\u003c")
    height = figure.layout.height
    return (
        f'<figure><div class="plot" style="height:{height}px"></div><script type="application/json">{data}</script>'
        f"{f'<figcaption>{note}</figcaption>' if note else ''}</figure>"
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
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(shown(item, 200) for item in value)
    return shown(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False), 300)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; with empty headings, a list of keys and values."""
    names = list(head)
    top = f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in names)}</tr>" if any(names) else ""
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="table"><table class="{"plain" if len(names) == 2 else "numbers"}">{top}{body}</table></div>'


def _text(value: str) -> str:
    return html.escape(value)
