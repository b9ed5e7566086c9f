"""Figures of one run: causes, cause against strengthening, behaviour over steps, heat maps per layer, words, shares by place.

Each function takes a `store.Run` and returns a plotly figure for a notebook or the page; where what it would draw was
not recorded it raises RunError with a sentence that says so. Knows the tables of `quantities`, and `heatmaps` and `style`;
knows nothing about HTML.

Signed quantities have a zero-centred scale, or an axis with its zero, with one range per quantity in every probe set (update
share and graft, two measures of the same thing, have one together). Grey cells were not measured. Layer 0 is at the bottom.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from attribution.errors import RunError
from attribution.reports import quantities
from attribution.reports.heatmaps import Grid, Panel, by_index, by_rank, described, heat_maps, limit
from attribution.reports.quantities import (
    KINDS,
    NO_CAUSES,
    QUANTITIES,
    balance,
    by_place,
    meta,
    metric_name,
    per_component,
    place_name,
    probe_sets,
    shown,
    signed,
    with_causes,
    word,
)
from attribution.reports.style import BOTTOM, GREY, LINE, PALETTE, SYMBOLS, label, styled
from attribution.store import Run

MOST_POINTS = 2000  # per probe set in a scatter; the largest causes are kept


def behaviour(run: Run) -> go.Figure:
    """Metric and KL per probe set, and the training loss, over optimizer steps; what was not recorded is left out."""
    probes = run.probes.sort_values("step")
    titles = {"metric": f"{metric_name(run)} (nats, mean)", "kl": "KL to the start (nats per token)"}
    curves = [
        (titles[column], [(name, *_curve(probes[probes["probe"] == name], column)) for name in probe_sets(run)])
        for column in titles
    ]
    curves.append(("training loss", [("", *_curve(run.steps.sort_values("step"), "loss"))]))
    panels = [(title, drawn) for title, lines in curves if (drawn := [line for line in lines if len(line[1])])]
    if not panels:
        raise RunError("No behaviour over steps was recorded: neither probe sets nor the training loss.")
    figure = make_subplots(len(panels), 1, shared_xaxes=True, vertical_spacing=0.07)
    order = {name: number for number, name in enumerate(probe_sets(run))}
    for place, (title, lines) in enumerate(panels, 1):
        for name, steps, values in lines:
            number, style = order.get(name, 0), "lines+markers" if len(steps) <= 60 else "lines"
            colour = PALETTE[number % len(PALETTE)] if name else LINE
            trace = go.Scatter(x=steps, y=values, name=label(shown(name, 40)), mode=style, legendgroup=str(number))
            trace.update(line={"color": colour}, marker={"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 7})
            trace.update(showlegend=bool(name) and place == 1, hovertemplate="step %{x}: %{y:+.4g}")
            figure.add_trace(trace, place, 1)
        figure.update_yaxes(title_text=label(title).replace(" (", "<br>("), row=place, col=1)
    figure.update_xaxes(title_text="optimizer steps", row=len(panels), col=1)
    return styled(figure, 60 + 190 * len(panels))


def heads(run: Run, probe: str) -> go.Figure:
    """Four heat maps, layer by head: influence before, strengthening, update share and graft on one probe set."""
    table = per_component(run, "head")
    cells = described(table[table["probe"] == probe], "head", QUANTITIES)
    return heat_maps(_panels(by_index(cells, shape(run, table), "head"), table, _nothing("head", probe)))


def neurons(run: Run, probe: str, top: int = 16) -> go.Figure:
    """The same for the `top` neurons of every layer by |update share| (or |influence|, or |graft|), the rest in one cell.

    The cell `rest` sums what was recorded of the layer's other neurons; it does not enter the range of the colours.
    """
    table = per_component(run, "neuron")
    cells = described(table[table["probe"] == probe], "neuron", QUANTITIES)
    if cells.empty:
        raise RunError(_nothing("neuron", probe))
    by = next((name for name in ("share", "influence", "graft") if cells[name].notna().any()), "strengthening")
    grid = by_rank(cells, shape(run, table)[0], "neuron", by, QUANTITIES, top)
    return heat_maps(_panels(grid, table, _nothing("neuron", probe)))


def causes(run: Run, top: int = 16) -> go.Figure:
    """Two heat maps of causes on training samples: layer by head, and the `top` neurons of every layer, the rest summed."""
    table, names, panels = quantities.causes(run), {"cause": "cause"}, []
    for kind in ("head", "neuron"):
        cells = described(table[table["kind"] == kind], kind, names)
        if cells.empty:
            continue
        size = shape(run, cells)
        grid = by_index(cells, size, kind) if kind == "head" else by_rank(cells, size[0], kind, "cause", names, top)
        panels.append(Panel(grid, "cause", f"cause, {KINDS[kind]}", limit(cells["cause"])))
    if not panels:
        raise RunError(NO_CAUSES if table.empty else "Causes of heads and neurons were not recorded.")
    return heat_maps(panels)


def rows(run: Run, probe: str, top: int = 12) -> go.Figure:
    """The unembedding rows with the largest update shares, up and down, as words."""
    every = per_component(run, "row")
    table = every[(every["probe"] == probe) & every["share"].notna() & (every["share"] != 0)]
    if table.empty:
        raise RunError(f"Update shares of unembedding rows were not recorded on {shown(probe)}.")
    ends = [table[table["share"] > 0].nlargest(top, "share"), table[table["share"] < 0].nsmallest(top, "share")]
    axis = f"update share of {label(metric_name(run))} on {label(shown(probe, 40))} (nats)"
    return rows_as_words(run, pd.concat(ends), "share", "update share", axis).update_xaxes(range=_range([every["share"]]))


def cause_rows(run: Run, top: int = 16) -> go.Figure:
    """The unembedding rows with the largest causes on training samples, as words."""
    table = quantities.causes(run)
    table = table[(table["kind"] == "row") & (table["cause"] != 0)]
    if table.empty:
        raise RunError("Causes of unembedding rows were not recorded.")
    largest = table.loc[table["cause"].abs().nlargest(top).index]
    return rows_as_words(run, largest, "cause", "cause", f"cause: {label(metric_name(run))} of training samples (nats)")


def places(run: Run, probe: str) -> go.Figure:
    """Update share per layer, stacked by what was changed, with the residual: the bars add up to the change."""
    table, extra = _placed(run, probe)
    if table.empty:
        raise RunError(f"Update shares were not recorded on {shown(probe)}.")
    layered = table["layer"] >= 0
    outside = table[~layered]
    order = [*outside.loc[outside["kind"] == "remainder", "bar"].unique(),
             *table[layered].sort_values("layer")["bar"].unique(),
             *outside.loc[outside["kind"] != "remainder", "bar"].unique()]  # fmt: skip
    at = {bar: place for place, bar in enumerate([*order, *extra])}
    figure = go.Figure()
    names = sorted(table["name"].unique(), key=lambda name: (name == KINDS["remainder"], name))
    for number, name in enumerate(names):
        bars = table[table["name"] == name].groupby("bar", sort=False).agg(share=("share", "sum"), hover=("part", list))
        colour = LINE if name == KINDS["remainder"] else PALETTE[number % len(PALETTE)]
        hover = [_place_hover(bar, name, table) for bar in bars.index]
        figure.add_bar(x=bars["share"], y=[at[bar] for bar in bars.index], name=label(name), hovertext=hover,
                       orientation="h", marker_color=colour, hoverinfo="text")  # fmt: skip
    figure.add_bar(x=list(extra.values()), y=[at[bar] for bar in extra], orientation="h", name="not attributed",
                   marker={"color": GREY, "line": {"color": LINE, "width": 1}}, hoverinfo="text",
                   hovertext=[f"{bar}: {signed(value)}" for bar, value in extra.items()])  # fmt: skip
    figure.update_layout(barmode="relative")
    figure.update_yaxes(
        tickvals=list(at.values()), ticktext=[label(shown(bar, 28)) for bar in at], showgrid=False, zeroline=False
    )
    figure.update_xaxes(title_text=f"update share of {label(metric_name(run))} on {label(shown(probe, 40))} (nats)")
    figure.update_xaxes(range=_range([ends for name in probe_sets(run) for ends in _ends(*_placed(run, name))]))
    return styled(figure, 120 + 24 * len(at))


def cause_and_strengthening(run: Run) -> go.Figure:
    """Strengthening on held-out probe sets against the cause on training samples, one point per component and probe set."""
    if quantities.causes(run).empty:
        raise RunError(
            "Causes on training samples were not measured, so this run cannot say whether the components that caused the "
            "trained responses are those that were strengthened."
        )
    both = ["cause", "strengthening"]
    tables = {kind: with_causes(run, kind) for kind in ("head", "neuron")}
    tables = {kind: table for kind, table in tables.items() if len(table.dropna(subset=both))}
    if not tables:
        raise RunError("Strengthening was not measured: it needs exact ablation at the start and at a later milestone.")
    figure = make_subplots(1, len(tables), subplot_titles=[KINDS[kind] for kind in tables], horizontal_spacing=0.12)
    for place, (kind, table) in enumerate(tables.items(), 1):
        for number, probe in enumerate(probe_sets(run)):
            cells = described(table[table["probe"] == probe], kind, {"cause": "cause on training samples", **QUANTITIES})
            points = cells.dropna(subset=both)
            points = points.loc[points["cause"].abs().nlargest(MOST_POINTS).index]
            marker = {"color": PALETTE[number % len(PALETTE)], "symbol": SYMBOLS[number % len(SYMBOLS)]}
            marker |= {"size": 7, "opacity": 0.9} if len(points) <= 200 else {"size": 5, "opacity": 0.75}
            trace = go.Scatter(x=points["cause"], y=points["strengthening"], mode="markers", marker=marker)
            trace.update(name=label(shown(probe, 40)), legendgroup=str(number), showlegend=place == 1)
            figure.add_trace(trace.update(hovertext=points["text"], hoverinfo="text"), 1, place)
    figure.update_xaxes(title_text="cause on training samples, before (nats)")
    figure.update_yaxes(title_text="strengthening on the probe set (nats)", col=1)
    figure = styled(figure, 440).update_layout(margin_t=70, legend_y=1.09)
    for name, axis in zip(figure.layout.annotations, figure.select_xaxes(), strict=True):
        name.update(x=axis.domain[0], xanchor="left")
    return figure


def shape(run: Run, table: pd.DataFrame) -> tuple[int, int]:
    """Layers and heads of the model, at least as many as there are in the table."""
    told = meta(run).get("model", {})
    layers = max([int(told.get("layers") or 0), *(table["layer"] + 1)], default=0)
    return layers, max([int(told.get("heads") or 0), *(table["index"] + 1)], default=0)


def rows_as_words(run: Run, table: pd.DataFrame, column: str, name: str, axis: str) -> go.Figure:
    """Rows of the unembedding as bars, the largest value at the top."""
    bars = table.sort_values(column)
    words = [label(word(run, token)) for token in bars["index"]]
    place = list(range(len(bars)))
    hover = [f"{word_}, token {token}<br>{name}: {signed(value)}"
             for word_, token, value in zip(words, bars["index"], bars[column], strict=True)]  # fmt: skip
    colours = [PALETTE[5] if value > 0 else PALETTE[0] for value in bars[column]]
    figure = go.Figure(go.Bar(x=bars[column], y=place, orientation="h", marker_color=colours))
    figure.update_traces(hovertext=hover, hoverinfo="text")
    figure.update_yaxes(tickvals=place, ticktext=words, showgrid=False, zeroline=False, tickfont_family="monospace")
    figure.update_xaxes(title_text=axis)
    return styled(figure, 8 + BOTTOM + 20 * len(bars)).update_layout(margin_t=8)


def _panels(grid: Grid, table: pd.DataFrame, nothing: str) -> list[Panel]:
    """One panel per measured quantity; `table`, of all probe sets, sets the range of the colours."""
    measured = [name for name in QUANTITIES if grid.cells[name].notna().any()]
    if not measured:
        raise RunError(nothing)
    together = {"share": ["share", "graft"], "graft": ["share", "graft"]}
    return [Panel(grid, name, QUANTITIES[name], limit(table[together.get(name, [name])].stack())) for name in measured]


def _placed(run: Run, probe: str) -> tuple[pd.DataFrame, dict[str, float]]:
    """Update shares of one probe set with their bar and the name of what was changed; and what no place accounts for."""
    table, sums = by_place(run, probe), balance(run, probe)
    table["name"] = [place_name(kind, part) for kind, part in zip(table["kind"], table["part"], strict=True)]
    outside = np.where(table["kind"] == "remainder", table["part"], table["name"])
    table["bar"] = np.where(table["layer"] >= 0, "layer " + table["layer"].astype(str), outside)
    extra = {"not kept by place": sums.shares - table["share"].sum(), "residual": sums.residual}
    if not abs(extra["not kept by place"]) > 0.01 * abs(sums.change) + 1e-5:
        del extra["not kept by place"]
    return table, extra


def _ends(table: pd.DataFrame, extra: dict[str, float]) -> list[pd.Series]:
    """How far the stacked bars reach to either side."""
    pieces = table.astype({"share": "float64"}).groupby(["bar", "name"])["share"].sum()
    stacks = [side.groupby("bar").sum() for side in (pieces.clip(lower=0), pieces.clip(upper=0))]
    return [*stacks, pd.Series(extra, dtype="float64")]


def _range(values: Sequence[pd.Series]) -> list[float]:
    """One range for a quantity in every probe set: from zero to the largest on either side, and a little more."""
    found = pd.concat([value for value in values if len(value)]).dropna()
    low, high = min(0.0, found.min()), max(0.0, found.max())
    return [low - 0.03 * (high - low), high + 0.03 * (high - low)]


def _place_hover(bar: str, name: str, table: pd.DataFrame) -> str:
    found = table[(table["bar"] == bar) & (table["name"] == name)]
    lines = [f"{label(shown(bar))}, {label(name)}: {signed(found['share'].sum())}"]
    if name == KINDS["remainder"]:
        lines += [f"{label(shown(part))}: {signed(share)}" for part, share in zip(found["part"], found["share"], strict=True)]
    return "<br>".join(lines)


def _curve(frame: pd.DataFrame, column: str) -> tuple[pd.Series, pd.Series]:
    found = frame[frame[column].notna()]
    return found["step"].astype(int), found[column].astype("float64")


def _nothing(kind: str, probe: str) -> str:
    return f"Of {kind}s, neither influence, strengthening, update share nor graft was recorded on {shown(probe)}."
