"""`attribution diff`: the page and the summary of two recipes side by side, and their figures, for notebooks too.

Knows the tables of `compared`, and how the page of a run looks; makes no claim: a difference between two recipes is no test of
why there is one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from attribution.errors import RunError
from attribution.reports.compared import COMPARED, Compared, compared, largest, named
from attribution.reports.quantities import KINDS, shown, signed
from attribution.reports.summary import escape, markdown
from attribution.store import write_page

if TYPE_CHECKING:
    import plotly.graph_objects as go

TOP, MOST = 10, 16  # rows of a table; neurons of a layer in a heat map
_CAUTION = (
    "Both sides are read where each of them ended. Whatever moved a model further, more steps or a larger learning rate, moves "
    "everything further: compare the KL to the start first. Differences are paired, intervals over {unit}."
)
_COMPONENTS = (
    "Left and right of the first row: one and the other, below: the other minus the one, all on one scale, zero in the middle. "
    "Grey cells were not measured on both sides."
)


def diff(one: str | os.PathLike[str], other: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page and the summary of what one recipe strengthened more than another.

    Args:
        one, other: each a run, a directory of one arm's runs, or STUDY:ARM.
        out: the page; its summary stands beside it. By default beside the runs of `other`.

    Returns:
        Path of the page.

    Raises:
        RunError: a side without a finished run, or a place that cannot be written.
        ConfigError: sides that cannot be compared.
    """
    from attribution.reports.document import document

    found = compared(one, other)
    first, second = (shown(name, 40).replace(os.sep, "-") for name in found.names)
    place = Path(out) if out else found.other.runs[0].path.parent / f"diff {first} and {second}.html"
    write_page(place.with_suffix(".md"), summary(found))
    write_page(place, document(title(found), sections(found)))
    return place


def title(found: Compared) -> str:
    first, second = named(found, 60)
    return f"{second} against {first}"


def words(found: Compared) -> list[str]:
    """What the other side strengthened more than the one, in sentences."""
    first, second = named(found)
    runs = f"{len(found.pairs)} pair{'s' if len(found.pairs) != 1 else ''} of runs that share model and seed"
    lines = [f"“{second}” is compared with “{first}” on {shown(', '.join(found.models), 200)}: {runs}."]
    table = found.mechanisms()
    lines += [
        f"{shown(row['set'])} on {shown(row['probe'])}: strengthened by {signed(row['one'])} nats in “{first}” and by "
        f"{signed(row['other'])} in “{second}”, a difference of {_figure(row)} nats."
        for row in largest(table, 4)
    ]
    if table.empty:
        lines.append("No named set of components was ablated on both sides, so nothing is said about mechanisms.")
    return [*lines, _CAUTION.format(unit=found.unit)]


def summary(found: Compared) -> str:
    """The comparison as Markdown."""
    pieces = [f"# {escape(title(found))}", *(escape(line) for line in words(found))]
    for name, head, rows in _tables(found):
        if rows:
            pieces += [f"## {name}", markdown(head, rows)]
    return "\n\n".join(pieces) + "\n"


def sections(found: Compared) -> list[tuple[str, str, str]]:
    """Key, heading and HTML of every part of the page."""
    from attribution.reports.document import absent, plotted, tabulated, text

    worded = {"Settings that differ": (1, 2)}
    tables = {name: tabulated(head, rows, worded.get(name, (1,))) if rows else "" for name, head, rows in _tables(found)}
    nothing = "Not measured on both sides."
    return [
        ("words", "What differs", "".join(f"<p>{text(line)}</p>" for line in words(found))),
        ("settings", "Settings that differ", tables["Settings that differ"] or "<p>None but model and seed.</p>"),
        ("behaviour", "Behaviour", tables["Behaviour"] or absent(nothing)),
        ("mechanisms", "Mechanisms", plotted(lambda: mechanisms(found)) + tables["Mechanisms"]),
        *(
            (kind, KINDS[kind].capitalize(), _drawn(found, kind) + tables[f"{KINDS[kind].capitalize()} that differ most"])
            for kind in ("head", "neuron")
        ),
        ("row", "Unembedding rows", tables["Unembedding rows that differ most"] or absent(nothing)),
        ("runs", "Runs", _runs(found)),
    ]


def mechanisms(found: Compared) -> go.Figure:
    """Strengthening of every named set on both sides, and the difference with its interval."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from attribution.reports.style import LINE, PALETTE, SYMBOLS, label, styled

    table = found.mechanisms()
    if table.empty:
        raise RunError("No named set of components was ablated on both sides.")
    names = [f"{label(shown(row.set, 30))}<br>on {label(shown(row.probe, 34))}" for row in table.itertuples()]
    places = [-place for place in range(len(table))]
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=("strengthening", "difference"), horizontal_spacing=0.05)
    for number, (column, name) in enumerate(zip(("one", "other"), named(found), strict=True)):
        hover = [f"{label(name)}: {signed(value)} nats" for value in table[column]]
        dots = go.Scatter(x=table[column], y=places, mode="markers", name=label(name), hovertext=hover, hoverinfo="text")
        figure.add_trace(dots.update(marker={"color": PALETTE[number], "symbol": SYMBOLS[number], "size": 10}), 1, 1)
    hover = [f"difference: {_figure(row)} nats" for row in table.to_dict("records")]
    ends = {"type": "data", "symmetric": False, "thickness": 2, "width": 5,
            "array": (table["high"] - table["difference"]).fillna(0),
            "arrayminus": (table["difference"] - table["low"]).fillna(0)}  # fmt: skip
    bars = go.Scatter(x=table["difference"], y=places, mode="markers", error_x=ends, hovertext=hover, hoverinfo="text")
    figure.add_trace(bars.update(marker={"color": LINE, "size": 10}, showlegend=False), 1, 2)
    figure.update_yaxes(tickvals=places, ticktext=names, range=[0.5 - len(places), 0.5], zeroline=False, showgrid=False)
    figure.update_xaxes(title_text="nats", zerolinewidth=2, rangemode="tozero")
    figure = styled(figure, 130 + 44 * len(places)).update_layout(margin_t=70, legend_y=1.12)
    for name, axis in zip(figure.layout.annotations, figure.select_xaxes(), strict=True):
        name.update(x=axis.domain[0], xanchor="left")
    return figure


def components(found: Compared, kind: str, probe: str, quantity: str, top: int = MOST) -> go.Figure:
    """Three heat maps of one quantity: on the one side, on the other, and the difference.

    Neurons are the `top` of every layer by the size of the difference, the same in all three; the rest is summed.
    """
    from attribution.reports.figures import shape
    from attribution.reports.heatmaps import Panel, by_index, by_rank, described, heat_maps, limit

    table = found.components(kind)
    every = table[table["quantity"] == quantity]
    cells = every[every["probe"] == probe]
    if cells.empty:
        raise RunError(f"{COMPARED[quantity].capitalize()} of {KINDS[kind]} was not measured on both sides on {shown(probe)}.")
    first, second = named(found)
    names = {"one": first, "other": second, "difference": "difference"}
    cells = described(cells, kind, names)
    if (cells["n"] > 1).any():
        cells["text"] += [f"<br>difference: {_figure(row)}, n = {row['n']}" for row in cells.to_dict("records")]
    size = shape(found.one.runs[0], cells)
    grid = by_index(cells, size, kind) if kind == "head" else by_rank(cells, size[0], kind, "difference", names, top)
    widest = limit(every[["one", "other", "difference"]].stack())
    titles = {"one": first, "other": second, "difference": f"{second} − {first}"}
    return heat_maps([Panel(grid, column, f"{COMPARED[quantity]}, {name}", widest) for column, name in titles.items()])


def _drawn(found: Compared, kind: str) -> str:
    from attribution.reports.document import absent, plotted, text

    if len(found.models) > 1:
        return absent("Components of one model are none of another’s; compare the runs of one model to see them.")
    table = found.components(kind)
    pieces = [
        f"<h3>{text(shown(probe))}: {COMPARED[quantity]}</h3>"
        + plotted(lambda probe=probe, quantity=quantity: components(found, kind, probe, quantity))
        for probe in found.probes
        for quantity in COMPARED
        if ((table["probe"] == probe) & (table["quantity"] == quantity)).any()
    ]
    note = f'<p class="note">{_COMPONENTS}</p>' if pieces else ""
    return note + "".join(pieces) if pieces else absent(f"Of {KINDS[kind]} nothing was measured on both sides.")


def _tables(found: Compared) -> list[tuple[str, list[str], list[list[str]]]]:
    """Every table with its name, heading and cells."""
    first, second = named(found)
    head = [first, second, "difference [95 %]", "n"]
    tables = [
        ("Settings that differ", ["setting", first, second], [list(row) for row in found.settings()]),
        ("Behaviour", ["probe set", "quantity", *head], _rows(found.behaviours(), ["probe", "quantity"])),
        ("Mechanisms", ["set", "probe set", *head], _rows(found.mechanisms(), ["set", "probe"])),
    ]
    for kind in ("head", "neuron", "row"):
        table = found.components(kind)
        quantity = next((name for name in COMPARED if (table["quantity"] == name).any()), "strengthening")
        table = table[table["quantity"] == quantity]
        table = pd.DataFrame(list(largest(table, TOP)), columns=table.columns)
        table = table.assign(name=[_name(found, kind, row) for row in table.to_dict("records")])
        heading = ["component", "probe set", *(f"{COMPARED[quantity]}, {name}" for name in (first, second)), *head[2:]]
        tables.append((f"{KINDS[kind].capitalize()} that differ most", heading, _rows(table, ["name", "probe"])))
    return tables


def _name(found: Compared, kind: str, row: dict) -> str:
    from attribution.reports.quantities import word

    return word(found.one.runs[0], int(row["index"])) if kind == "row" else f"{kind} {row['layer']}.{row['index']}"


def _rows(table: pd.DataFrame, keys: Sequence[str]) -> list[list[str]]:
    told = {"change": "change (nats)", "kl": "KL to the start (nats per token)"}
    return [
        [
            *(shown(told.get(row[key], row[key])) for key in keys),
            *(signed(row[side]).lstrip("+" if row.get("quantity") == "kl" else "") for side in ("one", "other")),
            _figure(row),
            str(row["n"]),
        ]
        for row in table.to_dict("records")
    ]


def _figure(row: dict) -> str:
    """A difference with its interval; of one pair the difference alone."""
    ends = "" if pd.isna(row["low"]) else f" [{signed(row['low'])}, {signed(row['high'])}]"
    return f"{signed(row['difference'])}{ends}"


def _runs(found: Compared) -> str:
    from attribution.reports.document import tabulated

    rows = [
        [name, str(run.config.get("model")), str(run.config.get("seed")), str(run.path)]
        for name, each in zip(found.names, (found.one, found.other), strict=True)
        for run in each.runs
    ]
    return tabulated(("side", "model", "seed", "run"), rows, words=(1, 2, 3))
