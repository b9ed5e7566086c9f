"""Figures of one run: behaviour over steps, heat maps per layer, words, shares by place, cause against strengthening.

Each function takes a `store.Run` and returns a plotly figure for a notebook or the page; where what it would draw was
not recorded it raises RunError with a sentence that says so. Knows the tables of `quantities`; knows nothing about HTML.

Signed quantities have a zero-centred scale with one range per quantity in every probe set (update share and graft, two
measures of the same thing, have one together). Grey cells were not measured. Layer 0 is at the bottom.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from attribution.errors import RunError
from attribution.reports.quantities import (
    KINDS,
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
    word,
)
from attribution.store import Run

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito, safe for colour blindness
DIVERGING = "PuOr_r"  # orange above zero, purple below
GREY, LINE = "rgba(128,128,128,.28)", "rgba(128,128,128,.75)"
MOST_POINTS = 2000  # per probe set in a scatter; the largest causes are kept
_TOP, _BOTTOM = 30, 50  # margins, pixels
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross")


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
            trace = go.Scatter(x=steps, y=values, name=_text(shown(name, 40)), mode=style, legendgroup=str(number))
            trace.update(line={"color": colour}, marker={"symbol": _SYMBOLS[number % len(_SYMBOLS)], "size": 7})
            trace.update(showlegend=bool(name) and place == 1, hovertemplate="step %{x}: %{y:+.4g}")
            figure.add_trace(trace, place, 1)
        figure.update_yaxes(title_text=_text(title).replace(" (", "<br>("), row=place, col=1)
    figure.update_xaxes(title_text="optimizer steps", row=len(panels), col=1)
    return _styled(figure, 60 + 190 * len(panels))


def heads(run: Run, probe: str) -> go.Figure:
    """Four heat maps, layer by head: cause before, strengthening, update share and graft on one probe set."""
    table = per_component(run, "head")
    shape = meta(run).get("model", {})
    layers = max([int(shape.get("layers") or 0), *(table["layer"] + 1)], default=0)
    columns = max([int(shape.get("heads") or 0), *(table["index"] + 1)], default=0)
    cells = _described(table, probe, "head").assign(column=lambda cell: cell["index"])
    ticks = _ticks(columns)
    return _heat_maps(table, cells, (layers, columns), (ticks, [str(tick) for tick in ticks]), "head", probe)


def neurons(run: Run, probe: str, top: int = 16) -> go.Figure:
    """The same for the `top` neurons of every layer by |update share| (or |cause|, or |graft|), the rest in one cell.

    The cell `rest` sums what was recorded of the layer's other neurons; it does not enter the range of the colours.
    """
    table = per_component(run, "neuron")
    cells = _described(table, probe, "neuron")
    if cells.empty:
        raise RunError(_nothing("neuron", probe))
    by = next((name for name in ("share", "cause", "graft") if cells[name].notna().any()), "strengthening")
    cells = cells.sort_values(["layer", by], key=lambda column: -column.abs() if column.name == by else column)
    cells["column"] = cells.groupby("layer").cumcount()
    width = min(top, int(cells["column"].max()) + 1)
    rest = cells[cells["column"] >= top].groupby("layer")[list(QUANTITIES)].sum(min_count=1).reset_index()
    others = cells[cells["column"] >= top].groupby("layer")["index"].count()
    rest["column"] = width
    rest["text"] = [
        f"layer {cell.layer}, {others[cell.layer]} other neurons, summed"
        + "".join(f"<br>{name}: {signed(getattr(cell, key))}" for key, name in QUANTITIES.items())
        for cell in rest.itertuples()
    ]
    cells = pd.concat([cells[cells["column"] < top], rest], ignore_index=True)
    layers = max([int(meta(run).get("model", {}).get("layers") or 0), *(table["layer"] + 1)])
    ticks = [*_ticks(width, 1), *([width] if len(rest) else [])]
    labels = [str(tick + 1) if tick < width else "rest" for tick in ticks]
    title = f"neuron, ranked by |{QUANTITIES[by]}|"
    figure = _heat_maps(table, cells, (layers, width + bool(len(rest))), (ticks, labels), title, probe)
    return figure.add_vline(x=width - 0.5, line={"color": "#7a7a7a", "width": 4}) if len(rest) else figure


def rows(run: Run, probe: str, top: int = 12) -> go.Figure:
    """The unembedding rows with the largest update shares, up and down, as words."""
    table = per_component(run, "row")
    table = table[(table["probe"] == probe) & table["share"].notna() & (table["share"] != 0)]
    if table.empty:
        raise RunError(f"Update shares of unembedding rows were not recorded on {shown(probe)}.")
    up, down = table[table["share"] > 0].nlargest(top, "share"), table[table["share"] < 0].nsmallest(top, "share")
    bars = pd.concat([up, down.iloc[::-1]]).iloc[::-1]  # the largest at the top
    words = [_text(word(run, token)) for token in bars["index"]]
    place = list(range(len(bars)))
    hover = [f"{word_}, token {token}<br>update share: {signed(share)}"
             for word_, token, share in zip(words, bars["index"], bars["share"], strict=True)]  # fmt: skip
    colours = [PALETTE[5] if share > 0 else PALETTE[0] for share in bars["share"]]
    figure = go.Figure(go.Bar(x=bars["share"], y=place, orientation="h", marker_color=colours))
    figure.update_traces(hovertext=hover, hoverinfo="text")
    figure.update_yaxes(tickvals=place, ticktext=words, showgrid=False, zeroline=False, tickfont_family="monospace")
    figure.update_xaxes(title_text=f"update share of {metric_name(run)} on {_text(shown(probe, 40))} (nats)")
    return _styled(figure, 90 + 20 * len(bars))


def places(run: Run, probe: str) -> go.Figure:
    """Update share per layer, stacked by what was changed, with the residual: the bars add up to the change."""
    table = by_place(run, probe)
    if table.empty:
        raise RunError(f"Update shares were not recorded on {shown(probe)}.")
    sums, layered = balance(run, probe), table["layer"] >= 0
    table["name"] = [place_name(kind, part) for kind, part in zip(table["kind"], table["part"], strict=True)]
    table["bar"] = np.where(layered, "layer " + table["layer"].astype(str), np.where(
        table["kind"] == "remainder", table["part"], table["name"]))  # fmt: skip
    outside = table[~layered]
    order = [*outside.loc[outside["kind"] == "remainder", "bar"].unique(),
             *table[layered].sort_values("layer")["bar"].unique(),
             *outside.loc[outside["kind"] != "remainder", "bar"].unique()]  # fmt: skip
    extra = {"not kept by place": sums.shares - table["share"].sum(), "residual": sums.residual}
    if not abs(extra["not kept by place"]) > 0.01 * abs(sums.change) + 1e-5:
        del extra["not kept by place"]
    at = {bar: place for place, bar in enumerate([*order, *extra])}
    figure = go.Figure()
    names = sorted(table["name"].unique(), key=lambda name: (name == KINDS["remainder"], name))
    for number, name in enumerate(names):
        bars = table[table["name"] == name].groupby("bar", sort=False).agg(share=("share", "sum"), hover=("part", list))
        colour = LINE if name == KINDS["remainder"] else PALETTE[number % len(PALETTE)]
        hover = [_place_hover(bar, name, table) for bar in bars.index]
        figure.add_bar(x=bars["share"], y=[at[bar] for bar in bars.index], name=_text(name), hovertext=hover,
                       orientation="h", marker_color=colour, hoverinfo="text")  # fmt: skip
    figure.add_bar(x=list(extra.values()), y=[at[bar] for bar in extra], orientation="h", name="not attributed",
                   marker={"color": GREY, "line": {"color": LINE, "width": 1}}, hoverinfo="text",
                   hovertext=[f"{bar}: {signed(value)}" for bar, value in extra.items()])  # fmt: skip
    figure.update_layout(barmode="relative")
    figure.update_yaxes(
        tickvals=list(at.values()), ticktext=[_text(shown(bar, 28)) for bar in at], showgrid=False, zeroline=False
    )
    figure.update_xaxes(title_text=f"update share of {metric_name(run)} on {_text(shown(probe, 40))} (nats)")
    return _styled(figure, 120 + 24 * len(at))


def cause_and_strengthening(run: Run) -> go.Figure:
    """Strengthening against the cause before, one point per component; heads and neurons apart."""
    tables = {kind: per_component(run, kind).dropna(subset=["cause", "strengthening"]) for kind in ("head", "neuron")}
    tables = {kind: table for kind, table in tables.items() if len(table)}
    if not tables:
        raise RunError("Cause against strengthening was not measured: exact ablation needs the start and a later milestone.")
    figure = make_subplots(1, len(tables), subplot_titles=[KINDS[kind] for kind in tables], horizontal_spacing=0.12)
    for place, kind in enumerate(tables, 1):
        for number, probe in enumerate(probe_sets(run)):
            points = _described(per_component(run, kind), probe, kind).dropna(subset=["cause", "strengthening"])
            points = points.loc[points["cause"].abs().nlargest(MOST_POINTS).index]
            marker = {"color": PALETTE[number % len(PALETTE)], "symbol": _SYMBOLS[number % len(_SYMBOLS)], "opacity": 0.9}
            trace = go.Scatter(x=points["cause"], y=points["strengthening"], mode="markers", marker=marker)
            trace.update(name=_text(shown(probe, 40)), legendgroup=str(number), showlegend=place == 1)
            figure.add_trace(trace.update(hovertext=points["text"], hoverinfo="text"), 1, place)
        figure.update_xaxes(title_text="cause before (nats)", row=1, col=place)
    figure.update_yaxes(title_text="strengthening (nats)", col=1)
    figure = _styled(figure, 440).update_layout(margin_t=70, legend_y=1.09)
    for name, axis in zip(figure.layout.annotations, figure.select_xaxes(), strict=True):
        name.update(x=axis.domain[0], xanchor="left")
    return figure


def _heat_maps(
    table: pd.DataFrame,
    cells: pd.DataFrame,
    shape: tuple[int, int],
    ticks: tuple[Sequence[int], Sequence[str]],
    axis: str,
    probe: str,
) -> go.Figure:
    """One panel per measured quantity; `table` (all probe sets) sets the range of the colours, `cells` are drawn."""
    measured = [name for name in QUANTITIES if cells[name].notna().any()]
    if not measured:
        raise RunError(_nothing(axis.split(",")[0], probe))
    height, columns = -(-len(measured) // 2), min(2, len(measured))
    titles = [f"{QUANTITIES[name]} (nats)" for name in measured]
    gap, panel = 95, min(520, max(130, 24 * shape[0]))  # pixels
    inside = height * panel + (height - 1) * gap
    figure = make_subplots(height, columns, subplot_titles=titles, horizontal_spacing=0.2, vertical_spacing=gap / inside)
    text = _grid(cells, "text", shape, object)
    for place, name in enumerate(measured):
        row, column = divmod(place, columns)
        limit = _limit(table, name)
        trace = go.Heatmap(z=_grid(cells, name, shape, float), hovertext=text, hoverinfo="text")
        trace.update(colorscale=DIVERGING, zmin=-limit, zmid=0, zmax=limit, xgap=1, ygap=1, name=QUANTITIES[name])
        figure.add_trace(trace, row + 1, column + 1)
        x, y = (figure.layout[f"{side}axis{place + 1 if place else ''}"].domain for side in "xy")
        bar = {"x": x[1] + 0.01, "xanchor": "left", "y": sum(y) / 2, "len": (y[1] - y[0]) * 1.08, "thickness": 9}
        figure.data[-1].update(colorbar={**bar, "nticks": 5, "outlinewidth": 0, "tickformat": "~g", "ticklen": 3})
        figure.layout.annotations[place].update(x=x[0], xanchor="left")
    figure.update_xaxes(tickvals=ticks[0], ticktext=ticks[1], showgrid=False, zeroline=False, title_text=axis)
    levels = _ticks(shape[0])
    figure.update_yaxes(tickvals=levels, showgrid=False, zeroline=False, range=[-0.5, shape[0] - 0.5])
    figure.update_yaxes(title_text="layer", col=1)
    return _styled(figure, inside + _TOP + _BOTTOM).update_layout(plot_bgcolor=GREY)


def _described(table: pd.DataFrame, probe: str, kind: str) -> pd.DataFrame:
    """The components of one probe set with a hover text: all four quantities, and the rank of each by size."""
    cells = table[table["probe"] == probe].copy()
    ranks = {name: cells[name].abs().rank(ascending=False, method="min") for name in QUANTITIES}
    lines = [f"layer {layer}, {kind} {index}" for layer, index in zip(cells["layer"], cells["index"], strict=True)]
    for name, label in QUANTITIES.items():
        count = int(cells[name].notna().sum())
        for place, (value, rank) in enumerate(zip(cells[name], ranks[name], strict=True)):
            found = "not measured" if pd.isna(value) else f"{signed(value)} (rank {rank:.0f} of {count})"
            lines[place] += f"<br>{label}: {found}"
    return cells.assign(text=lines)


def _grid(cells: pd.DataFrame, name: str, shape: tuple[int, int], dtype: type) -> np.ndarray:
    grid = np.full(shape, "not measured" if dtype is object else np.nan, dtype=dtype)
    grid[cells["layer"].astype(int), cells["column"].astype(int)] = cells[name]
    return grid


def _limit(table: pd.DataFrame, name: str) -> float:
    """The largest size of a quantity over all probe sets; update share and graft share one."""
    together = ["share", "graft"] if name in ("share", "graft") else [name]
    largest = table[together].abs().max().max()
    return float(largest) if largest > 0 else 1.0


def _place_hover(bar: str, name: str, table: pd.DataFrame) -> str:
    found = table[(table["bar"] == bar) & (table["name"] == name)]
    lines = [f"{_text(shown(bar))}, {_text(name)}: {signed(found['share'].sum())}"]
    if name == KINDS["remainder"]:
        lines += [f"{_text(shown(part))}: {signed(share)}" for part, share in zip(found["part"], found["share"], strict=True)]
    return "<br>".join(lines)


def _curve(frame: pd.DataFrame, column: str) -> tuple[pd.Series, pd.Series]:
    found = frame[frame[column].notna()]
    return found["step"].astype(int), found[column].astype("float64")


def _ticks(count: int, shift: int = 0) -> list[int]:
    """At most about twelve places, evenly spaced; with `shift`, such that place + shift is round."""
    step = -(-count // 12)
    return [place for place in range(count) if (place + shift) % step == 0 or (shift and place == 0)]


def _nothing(kind: str, probe: str) -> str:
    return f"Of {kind}s, neither cause, strengthening, update share nor graft was recorded on {shown(probe)}."


def _text(value: str) -> str:
    """Text from data for a figure: plotly reads `<b>`, `<a>`, entities and `$TeX$` in every label."""
    return html.escape(value, quote=False).replace("$", "&#36;")


def _styled(figure: go.Figure, height: int) -> go.Figure:
    """Transparent, with grey lines and a mid-grey font: readable on a light and on a dark page."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 20, "t": _TOP, "b": _BOTTOM},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#7a7a7a", "size": 12, "family": "system-ui, sans-serif"},
        hoverlabel={"bgcolor": "#222", "bordercolor": "#222", "font": {"color": "#fff"}, "align": "left"},
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )
    figure.update_annotations(font_size=13)
    figure.update_xaxes(gridcolor=GREY, zerolinecolor=LINE, automargin=True, title_standoff=8)
    figure.update_yaxes(gridcolor=GREY, zerolinecolor=LINE, automargin=True, title_standoff=14)
    return figure
