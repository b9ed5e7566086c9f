"""The frame of every page: a single HTML file that works offline, in light, dark and print, with plotly.js inlined once.

Knows how sections, figures, tables and absent things look; knows nothing about runs or studies. All text from data is
escaped, and a content security policy forbids the page every request.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import product
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from attribution.errors import RunError
from attribution.reports.quantities import shown

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


def document(title: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """The whole page as HTML.

    Args:
        title: text, not escaped.
        sections: key, heading and content of each; the content is HTML.
    """
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{content}</section>' for key, name, content in sections)
    room = resources.files("attribution.reports")
    parts = {
        "TITLE": text(title),
        "POLICY": _POLICY,
        "STYLE": room.joinpath("page.css").read_text(),
        "LINKS": links,
        "BODY": body,
        "PLOTLY": get_plotlyjs(),
        "SCRIPT": room.joinpath("page.js").read_text(),
    }
    pieces = _FRAME.split("@")
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def plotted(draw: Callable[[], go.Figure], note: str = "", table: str = "", attributes: str = "") -> str:
    """A figure with its data, a table and a caption, or the sentence that says why there is none; `attributes`: `linked_to`."""
    try:
        figure = draw()
    except RunError as error:
        return absent(str(error))
    data = _quoted(str(figure.to_json()))
    height = figure.layout.height
    return (
        f'<figure{attributes}><div class="plot" style="height:{height}px"></div><script type="application/json">{data}</script>'
        f"{table}{f'<figcaption>{note}</figcaption>' if note else ''}</figure>"
    )


@dataclass(frozen=True)
class Choice:
    """What a reader may choose among for one figure: its name, the values, and how they are called if not by themselves."""

    name: str
    values: Sequence[str]
    labels: Sequence[str] | None = None

    def select(self) -> str:
        """As a control of the page."""
        options = "".join(
            f'<option value="{html.escape(value)}">{text(shown(name, 60))}</option>'
            for value, name in zip(self.values, self.labels or self.values, strict=True)
        )
        return f'<label>{text(self.name)} <select name="{html.escape(self.name)}">{options}</select></label>'


def chosen(key: str, choices: Sequence[Choice], draw: Callable[..., go.Figure], *, course: str = "") -> str:
    """One figure for every combination of choices, of which the page shows one.

    Args:
        key: of the figure in the page.
        choices: in the order of `draw`'s arguments.
        draw: the figure of one combination; RunError where there is none.
        course: key of the figure that shows a component over steps, on which a click on it here leads.
    """

    def content(*values: str) -> str:
        return str(draw(*values).to_json())

    return _choosable("chosen", key, choices, content, linked_to(course))


def courses(key: str, choices: Sequence[Choice], draw: Callable[..., tuple[go.Figure, Mapping[str, Any]]]) -> str:
    """One component over steps, to be chosen by a control or by a click on a map; `draw` gives a figure and lines by name."""

    def content(*values: str) -> str:
        figure, series = draw(*values)
        return f'{{"figure":{figure.to_json()},"series":{json.dumps(series, separators=(",", ":"))}}}'

    return _choosable("course", key, choices, content)


def linked_to(course: str, **values: str) -> str:
    """The attribute of a figure whose cells lead to a figure of `courses`, with what is chosen there."""
    told = json.dumps({"figure": course, **{name.replace("_", " "): value for name, value in values.items()}})
    return f' data-course="{html.escape(told)}"' if course else ""


def _choosable(kind: str, key: str, choices: Sequence[Choice], content: Callable[..., str], attributes: str = "") -> str:
    scripts = []
    for places in product(*(range(len(choice.values)) for choice in choices)):
        try:
            data = content(*(choice.values[place] for choice, place in zip(choices, places, strict=True)))
        except RunError as error:
            data = json.dumps(str(error))
        at = ".".join(map(str, places))
        scripts.append(f'<script type="application/json" data-at="{at}">{_quoted(data)}</script>')
    controls = "".join(choice.select() for choice in choices)
    return (
        f'<figure class="{kind}" id="{key}"{attributes}><div class="choices">{controls}</div><div class="plot"></div>'
        f'<p class="absent" hidden></p>{"".join(scripts)}</figure>'
    )


def _quoted(data: str) -> str:
    """JSON that no text in it can end."""
    return data.replace("<", "\\u003c")


def absent(sentence: str) -> str:
    """The sentence that stands where something was not measured."""
    return f'<p class="absent">{text(sentence)}</p>'


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested keys and values as dotted keys and text."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", written(value)


def written(value: Any) -> str:
    """A value from config or meta as text."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping) and set(value) == {"name", "samples"}:
        return f"{shown(value['name'])} ({shown(value['samples'], 12)} samples)"
    if value in ([], {}):
        return "none"
    if isinstance(value, list):
        return ", ".join(written(item) for item in value)
    return shown(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False), 300)


def tabulated(head: Iterable[str], rows: Iterable[Iterable[str]], words: Collection[int] = ()) -> str:
    """A table; with empty headings, a list of keys and values.

    Columns after the first hold numbers, but for those whose places are in `words`.
    """
    names = list(head)
    kinds = [' class="word"' if place in words else "" for place in range(len(names))]
    top = f"<tr>{''.join(f'<th{kind}>{text(name)}</th>' for kind, name in zip(kinds, names, strict=True))}</tr>"
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{text(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>" for row in rows
    )
    top = top if any(names) else ""
    return f'<div class="table"><table class="{"plain" if len(names) == 2 else "numbers"}">{top}{body}</table></div>'


def text(value: str) -> str:
    """Text from data for the page; a number and its per cent sign stay on one line."""
    return html.escape(value).replace(" %", "&nbsp;%")
