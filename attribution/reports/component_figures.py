"""Figures of single components of a study: maps of layers, rows, words of prompts, a component over steps, the scatter.

Each function returns a plotly figure, or raises RunError with the sentence that stands in its place. Knows the tables of
`study_components`, and how `heatmaps` and `style` draw; knows nothing about HTML. Signed quantities have a zero-centred scale,
one for each quantity on the whole page (update share and graft have one together). Grey cells were not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy.stats import t

from attribution.errors import RunError
from attribution.reports import study_components as tables
from attribution.reports.heatmaps import Grid, Panel, heat_maps
from attribution.reports.quantities import KINDS, QUANTITIES, shown, signed
from attribution.reports.study_components import ACROSS, REST, SINGLE
from attribution.reports.study_tables import Record, interval
from attribution.reports.style import DIVERGING, PALETTE, SYMBOLS, label, styled, ticks

TOP, ROWS = 16, 12  # neurons of a layer; words up and down
TOKENS = (
    "Integrated gradients of the tokens: how much each brings about the response, in the model before and after training, from "
    "a prompt of end-of-sequence tokens. Of long prompts the end."
)
MOST_SEEDS = 4  # that are drawn one by one
MOST_TOKENS, MOST_WORDS = 40, 24  # of a prompt, from its end; that have room for their text


def layers(record: Record, model: str, arm: str, probe: str, kind: str, top: int = TOP) -> go.Figure:
    """Up to four heat maps, layer by component: influence before, strengthening, update share and graft, means over seeds.

    Heads stand at their index; of neurons the `top` of every layer by size, the same in all maps, and the rest summed.
    """
    every = tables.cells(record, model, arm, probe, kind)
    rows = every.assign(place=every["index"]) if kind == "head" else tables.summed(every, top)
    places = rows.groupby(["layer", "index"])["place"].first()
    depth, width = int(rows["layer"].max()) + 1, int(rows["place"].max()) + 1
    rest = top if (rows["index"] == REST).any() else None
    at = [*(place for place in ticks(width, 0 if kind == "head" else 1) if rest is None or place < rest - 1)]
    at += [] if rest is None else [rest]
    names = [str(place) if kind == "head" else "rest" if place == rest else str(place + 1) for place in at]
    axis = kind if kind == "head" else f"{kind}, ranked by |{QUANTITIES[tables.measure(rows)]}|"
    single = tables.over_seeds(every)  # q and rank are over all that were kept, not over what has room
    panels, drawn = [], single if kind == "head" else tables.over_seeds(rows)
    family = int(every.groupby(["layer", "index"])["members"].first().sum())
    for quantity, table in drawn.items():
        name, ranked = QUANTITIES[quantity], single[quantity]
        told = ranked.set_index(["layer", "index"])[["q", "rank"]]
        table = table.drop(columns=["q", "rank"]).join(told, on=["layer", "index"])
        found = table.to_dict("records")
        found_at = {"column": [places[row["layer"], row["index"]] for row in found]}
        text = [tables.hover(row, kind, name, family, int(ranked["rank"].notna().sum())) for row in found]
        found_at["name"] = ["" if row["index"] == REST else f"{kind} {row['layer']}.{row['index']}" for row in found]
        cells = table.assign(**found_at, text=text).rename(columns={"mean": quantity})
        grid = Grid(cells, (depth, width), at, names, axis, rest)
        panels.append(Panel(grid, quantity, name, tables.largest(record, kind, quantity)))
    return heat_maps(panels)


def rows(record: Record, model: str, arm: str, probe: str, top: int = ROWS) -> go.Figure:
    """The unembedding rows with the largest update shares, up and down, as words, with intervals over seeds."""
    every = tables.cells(record, model, arm, probe, "row")
    quantity = tables.measure(every)
    table = tables.over_seeds(every)[quantity]
    table = table[(table["index"] != REST) & (table["mean"] != 0)]
    if table.empty:
        raise RunError(f"No row of the unembedding moved the metric on {shown(probe)}.")
    ends = [table[table["mean"] > 0].nlargest(top, "mean"), table[table["mean"] < 0].nsmallest(top, "mean")]
    bars = pd.concat(ends).sort_values("mean")
    words = [label(shown(row["word"] or f"token {row['index']}", 24)) for row in bars.to_dict("records")]
    text = [f"{word}, token {row['index']}<br>{QUANTITIES[quantity]}: {interval(row)}, {row['n']:.0f} seeds"
            for word, row in zip(words, bars.to_dict("records"), strict=True)]  # fmt: skip
    colours = [PALETTE[5] if value > 0 else PALETTE[0] for value in bars["mean"]]
    error = {"array": (bars["high"] - bars["mean"]).fillna(0), "thickness": 1.5, "width": 3, "color": "#7a7a7a"}
    bar = go.Bar(x=bars["mean"], y=list(range(len(bars))), orientation="h", marker_color=colours, error_x=error)
    figure = go.Figure(bar.update(hovertext=text, hoverinfo="text"))
    figure.update_yaxes(tickvals=list(range(len(bars))), ticktext=words, showgrid=False, zeroline=False,
                        tickfont_family="monospace")  # fmt: skip
    figure.update_xaxes(title_text=f"{QUANTITIES[quantity]} of the row on {label(shown(probe, 40))} (nats)")
    return styled(figure, 70 + 20 * len(bars)).update_layout(margin_t=8)


def scatter(record: Record, model: str, arm: str, across: str) -> go.Figure:
    """Strengthening on the first probe set against the cause or a rival of it: one point per component, seeds averaged."""
    probe, found = tables.first(record, "probe"), {}
    for kind in SINGLE:
        try:
            found[kind] = tables.against(record, model, arm, probe[0], kind, across)
        except RunError:
            continue  # this kind was not recorded; the other may have been
    found = {kind: table for kind, table in found.items() if len(table)}
    if not found:
        raise RunError(f"Strengthening and {ACROSS[across][0]} were not both measured of arm {shown(arm)} on {shown(model)}.")
    names = []
    for kind, table in found.items():
        rho = tables.spearman(table, "across", "strengthening")
        names.append(f"{KINDS[kind]}: Spearman {'–' if np.isnan(rho) else signed(rho, 2)}, n = {len(table)}")
    figure = deepcopy(_scatter(len(found)))
    for place, (kind, table) in enumerate(found.items()):
        text = [f"{kind} {layer}.{index}" for layer, index in zip(table["layer"], table["index"], strict=True)]
        heights = _rounded(table["strengthening"])
        figure["data"][place] |= {"x": _rounded(table["across"]), "y": heights, "text": text}
        figure["layout"]["annotations"][place]["text"] = names[place]
        figure["layout"][f"xaxis{place + 1 if place else ''}"]["title"]["text"] = ACROSS[across][1]
    return go.Figure(figure)


@cache
def _scatter(panels: int) -> dict[str, Any]:
    """The frame of `scatter`, without points."""
    figure = make_subplots(1, panels, subplot_titles=[" "] * panels, horizontal_spacing=0.12)
    for place in range(panels):
        points = go.Scatter(x=[0], y=[0], mode="markers", showlegend=False)
        points.update(marker={"size": 7, "color": PALETTE[place], "opacity": 0.8})
        points.update(hovertemplate="%{text}<br>across %{x:.3g}<br>strengthening %{y:+.3g}<extra></extra>")
        figure.add_trace(points, 1, place + 1)
    figure.update_xaxes(title_text=" ").update_yaxes(title_text="strengthening (nats)", col=1).update_yaxes(zerolinewidth=2)
    figure = styled(figure, 400).update_layout(margin_t=40)
    for name, axis in zip(figure.layout.annotations, figure.select_xaxes(), strict=True):
        name.update(x=axis.domain[0], xanchor="left")
    return figure.to_plotly_json()


def words(record: Record, model: str, arm: str) -> go.Figure:
    """Prompts, before and after training, coloured by how much each token brings about the response; means over seeds."""
    frame = record.frames["tokens"]
    frame = frame[(frame["model"] == model) & (frame["arm"] == arm)]
    if frame.empty:
        raise RunError(f"Which words cause the responses was not read in arm {shown(arm)} on {shown(model)}.")
    return token_map(frame)


def token_map(frame: pd.DataFrame) -> go.Figure:
    """Rows of the frame `tokens` as two lines per prompt, before and after; the last `MOST_TOKENS` of a long one."""
    means = frame.groupby(["sample", "when", "position"]).agg(effect=("effect", "mean"), token=("token", "first")).reset_index()
    kept = means.groupby("sample")["position"].transform("max") - means["position"] < MOST_TOKENS
    means = means[kept]
    lines = [(sample, when) for sample in sorted(means["sample"].unique()) for when in ("before", "after")
             if ((means["sample"] == sample) & (means["when"] == when)).any()]  # fmt: skip
    width = int(means.groupby(["sample", "when"])["position"].size().max())
    z, text = np.full((len(lines), width), np.nan), np.full((len(lines), width), "", dtype=object)
    said = np.full((len(lines), width), "", dtype=object)
    for place, (sample, when) in enumerate(lines):
        line = means[(means["sample"] == sample) & (means["when"] == when)].sort_values("position")
        count = len(line)
        z[place, :count] = line["effect"]
        text[place, :count] = [label(shown(token.strip() or "␣", 8)) for token in line["token"]]
        said[place, :count] = [
            f"{label(shown(token, 60))}<br>prompt {sample + 1}, {when} training<br>effect {signed(effect)} nats"
            for token, effect in zip(line["token"], line["effect"], strict=True)
        ]
    end = float(np.nanmax(np.abs(z))) or 1.0
    grid = go.Heatmap(z=z, text=text, hovertext=said, hoverinfo="text", xgap=1, ygap=2, colorscale=DIVERGING, zmid=0)
    grid.update(zmin=-end, zmax=end, texttemplate="%{text}" if width <= MOST_WORDS else "", textfont={"size": 9})
    grid.update(colorbar={"title": "nats", "thickness": 9, "outlinewidth": 0, "tickformat": "~g"})
    figure = go.Figure(grid)
    names = [f"{sample + 1} {when}" for sample, when in lines]
    figure.update_yaxes(tickvals=list(range(len(lines))), ticktext=names, autorange="reversed", showgrid=False, zeroline=False)
    figure.update_xaxes(title_text="token of the prompt", showgrid=False, zeroline=False, showticklabels=False)
    return styled(figure, 80 + 30 * len(lines)).update_layout(margin_t=8)


def course(record: Record, model: str, probe: str, colours: Mapping[str, str]) -> tuple[go.Figure, dict[str, list[Any]]]:
    """`lines_over_steps` of one model and probe set of a study."""
    frame = record.frames["courses"]
    frame = frame[(frame["model"] == model) & (frame["probe"] == probe)]
    if frame.empty:
        raise RunError(f"The course of single components over steps was not kept for {shown(model)} on {shown(probe)}.")
    return lines_over_steps(frame, record.arms, colours)


def lines_over_steps(
    frame: pd.DataFrame, arms: Sequence[str], colours: Mapping[str, str]
) -> tuple[go.Figure, dict[str, list[Any]]]:
    """The frame of a figure of one component over steps, and what each component's lines are, by its name.

    Args:
        frame: rows of the frame `courses` of one model and probe set.
        arms: in order.
        colours: of arms.

    Returns:
        The figure without heights, and by the name of a component ("head 0.1") the heights of every line of it.
    """
    frame = frame.assign(name=frame["kind"] + " " + frame["layer"].astype(str) + "." + frame["index"].astype(str))
    panels = [(column, title) for column, title in (("share", "update share, summed"), ("influence", "influence"))
              if frame[column].notna().any()]  # fmt: skip
    figure = make_subplots(len(panels), 1, shared_xaxes=True, vertical_spacing=0.08)
    series: dict[str, list[Any]] = {name: [] for name in frame["name"].unique()}
    for place, (column, title) in enumerate(panels, 1):
        told = frame.dropna(subset=column)
        wide = told.pivot_table(index=["name", "arm", "seed"], columns="step", values=column)
        if column == "share":
            wide.insert(0, 0, 0.0)
        for number, arm in enumerate(arm for arm in arms if arm in set(told["arm"])):
            own = wide.xs(arm, level="arm")
            for who, thin in _thin(own):
                _line(figure, place, wide.columns, arm, colours[arm], who)
                _fill(series, thin)
            _line(figure, place, wide.columns, arm, colours[arm], "mean", SYMBOLS[number % len(SYMBOLS)], legend=place == 1)
            _fill(series, own.groupby(level="name").mean())
        figure.update_yaxes(title_text=f"{title} (nats)", rangemode="tozero", row=place, col=1)
    figure.update_xaxes(title_text="optimizer steps", row=len(panels), col=1)
    return styled(figure, 70 + 200 * len(panels)).update_layout(margin_t=30), series


def timeline(record: Record, model: str, probe: str, name: str, colours: Mapping[str, str]) -> go.Figure:
    """One component over steps, by arm: its summed update share, and its influence at milestones. `name`: as "head 0.1"."""
    figure, series = course(record, model, probe, colours)
    if name not in series:
        raise RunError(f"{shown(name)} was not kept; there are {', '.join(list(series)[:8])} …")
    for trace, heights in zip(figure.data, series[name], strict=True):
        trace.update(y=heights or [])
    return figure


def _thin(own: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The lines beside a mean: every seed, or of many the ends of the interval over them."""
    seeds = sorted(own.index.get_level_values("seed").unique())
    if len(seeds) == 1:
        return  # it is the mean
    if len(seeds) <= MOST_SEEDS:
        yield from ((f"seed {seed}", own.xs(seed, level="seed")) for seed in seeds)
        return
    groups = own.groupby(level="name")
    half = t.ppf(0.975, len(seeds) - 1) * groups.std() / len(seeds) ** 0.5
    yield "lower end of the 95 % interval over seeds", groups.mean() - half
    yield "upper end of the 95 % interval over seeds", groups.mean() + half


def _line(
    figure: go.Figure, place: int, steps: Sequence[int], arm: str, colour: str, who: str, symbol: str = "", legend: bool = False
) -> None:
    line = go.Scatter(x=[int(step) for step in steps], mode="lines+markers" if symbol else "lines", legendgroup=arm)
    line.update(name=f"arm {label(shown(arm, 30))}", showlegend=legend, connectgaps=True, opacity=1 if symbol else 0.55)
    line.update(line={"color": colour, "width": 3 if symbol else 1}, marker={"symbol": symbol or "circle", "size": 6})
    line.update(hovertemplate=f"arm {label(shown(arm, 30))}, {who}<br>step %{{x}}: %{{y:+.3g}}<extra></extra>")
    figure.add_trace(line, place, 1)


def _fill(series: dict[str, list[Any]], own: pd.DataFrame) -> None:
    """Append the heights of one line to every component, None where it has no such line."""
    found = {name: _rounded(row) for name, row in zip(own.index, own.to_numpy(dtype="float64"), strict=True)}
    for name, lines in series.items():
        lines.append(found.get(name))


def _rounded(values: Any) -> list[float | None]:
    """Four digits are more than a figure shows."""
    return [None if np.isnan(value) else float(f"{value:.4g}") for value in np.asarray(values, dtype="float64")]
