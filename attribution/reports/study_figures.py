"""Figures of a study: the estimate among its nulls, the four changes per organism, grafts, behaviour and influence over steps.

Each function returns a plotly figure, or raises RunError with the sentence that stands in its place. Knows the record of
`study_tables`, and `style`; knows nothing about HTML. An arm has one colour in every figure; zero is drawn on every axis of a
signed quantity; an interval is drawn whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from attribution.claims.claim import WRONG_PARTITIONS
from attribution.claims.frames import NEUTRAL
from attribution.claims.statistics import t_interval
from attribution.errors import RunError
from attribution.reports.quantities import shown, signed
from attribution.reports.study_tables import (
    FOUR,
    Finding,
    Record,
    graft_name,
    interval,
    number,
    partition_means,
    watched,
)
from attribution.reports.style import GREY, LINE, PALETTE, SYMBOLS, label, styled

_ROW = 54  # pixels per interval


@dataclass(frozen=True)
class Line:
    """An interval by name: its row (mean, low, high, n), the values behind it by organism, and how it is drawn."""

    name: str
    row: Mapping
    dots: Mapping[str, float] = field(default_factory=dict)
    colour: str = LINE
    hollow: bool = False


def verdict(finding: Finding) -> go.Figure:
    """The estimate and every null of the same statistic on one axis, with the band of ± delta."""
    table = finding.table("parts")
    if "part" in table:  # of several, the primary one
        table = table[table["part"] == finding.declared["name"]]
    values = [] if table.empty else table[finding.statistic].astype(float)
    organisms = dict(zip(table.get("model", []), values, strict=True))
    lines = [Line(f"the {finding.statistic}", finding.verdict, organisms, PALETTE[0])]
    for null in finding.rows.get("nulls") or []:
        if null["reading"] == finding.reading:
            dots = partition_means(finding) if null["null"] == WRONG_PARTITIONS else {}
            void = bool(null["void"])
            lines.append(Line(f"null: {null['null']}{' (void)' if void else ''}", null, dots, LINE, void))
    return _intervals(finding, lines, "No estimate was possible, so there is nothing to draw.")


def readings(finding: Finding) -> go.Figure:
    """The primary reading above every other one, with the band of ± delta."""
    others = finding.rows.get("secondary") or []
    lines = [Line(f"primary: {finding.reading}", finding.verdict, {}, PALETTE[0])]
    lines += [Line(f"{row['reading']}: {row['verdict']}", row) for row in others]
    return _intervals(finding, lines if others else [], "The statistic was read in no other way.")


def crossover(finding: Finding, colours: Mapping[str, str]) -> go.Figure:
    """Strengthening of each mechanism in each arm: one dot per organism, its two arms joined, with mean and interval."""
    if not finding.crossed:
        raise RunError("The claim is a sum of readings; its terms stand in the table.")
    table = finding.table("parts")
    if table.empty or not set(FOUR) <= set(table):
        raise RunError("Changes of influence per organism were not measured: no pair of arms could be matched.")
    mechanisms = [str(name) for name in finding.cell["mechanisms"]]
    titles = [f"influence of {label(shown(name, 40))}" for name in mechanisms]
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    for place, mechanism in enumerate("AB", 1):
        columns = [f"{mechanism}_in_A", f"{mechanism}_in_B"]
        arms = [finding.placed(column)[1] for column in columns]
        for row in table.to_dict("records"):
            trace = go.Scatter(x=[0, 1], y=[row[column] for column in columns], mode="lines", hoverinfo="skip")
            figure.add_trace(trace.update(line={"color": GREY, "width": 1}, showlegend=False), 1, place)
        for x, (column, arm) in enumerate(zip(columns, arms, strict=True)):
            values = table[column].astype("float64")
            hover = [f"{label(shown(model))}<br>{titles[place - 1]} in arm {label(shown(arm))}: {signed(value)} nats"
                     for model, value in zip(table["model"], values, strict=True)]  # fmt: skip
            dots = go.Scatter(x=[x] * len(values), y=values, mode="markers", hovertext=hover, hoverinfo="text")
            dots.update(marker={"color": colours.get(arm, LINE), "size": 7, "opacity": 0.8}, showlegend=False)
            figure.add_trace(dots, 1, place)
            mean = t_interval(values)
            bar = _bar(mean.to_dict(), colours.get(arm, LINE), f"mean: {interval(mean.to_dict())} nats")
            bar.update(x=[x + (0.22 if x else -0.22)], y=[mean.mean], error_x=None)
            bar.update(error_y=_error(mean.to_dict()))
            figure.add_trace(bar, 1, place)
        ticks = [f"in arm {label(shown(arm, 30))}" for arm in arms]
        figure.update_xaxes(tickvals=[0, 1], ticktext=ticks, range=[-0.6, 1.6], showgrid=False, zeroline=False, col=place)
    figure.update_yaxes(title_text="change of influence<br>(nats)", col=1)
    figure.update_yaxes(zeroline=True, zerolinewidth=2, rangemode="tozero")
    return _headed(styled(figure, 380))


def recruitment(finding: Finding, colours: Mapping[str, str]) -> go.Figure:
    """Gain of every graft, and how much of it needs the arm's own mechanism."""
    table = finding.table("recruitment")
    if table.empty:
        raise RunError("Cross-grafts were not recorded, so the page cannot say where the change sits.")
    keys = list(dict.fromkeys(zip(table["arm"].astype(str), table["graft"].astype(str), strict=True)))
    at = {key: len(keys) - place for place, key in enumerate(keys)}
    titles = {"gain": "gain in the direction of training", "interaction": "interaction with the arm’s own set"}
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=list(titles.values()), horizontal_spacing=0.06)
    for place, quantity in enumerate(titles, 1):
        for row in table[table["quantity"] == quantity].to_dict("records"):
            arm, graft = str(row["arm"]), str(row["graft"])
            hover = f"arm {label(shown(arm))}, {label(graft_name(graft))}<br>{quantity}: {interval(row)}"
            bar = _bar(row, colours.get(arm, LINE), hover).update(y=[at[arm, graft]])
            figure.add_trace(bar, 1, place)
    figure.add_vline(x=1, line={"color": LINE, "dash": "dot", "width": 1}, col=2)  # pyright: ignore[reportArgumentType]
    names = [f"arm {label(shown(arm, 20))}: {label(graft_name(graft))}" for arm, graft in keys]
    figure.update_yaxes(tickvals=list(at.values()), ticktext=names, range=[0.4, len(keys) + 0.6], zeroline=False)
    figure.update_xaxes(title_text="gain (nats)", rangemode="tozero", col=1)
    figure.update_xaxes(title_text="fraction of the gain", rangemode="tozero", col=2)
    return _headed(styled(figure, 130 + 34 * len(keys)))


def behaviour(record: Record, colours: Mapping[str, str]) -> go.Figure:
    """The metric on every probe set and KL on the neutral one, over steps: a line per run, a bold mean per arm."""
    probes = record.frames["probes"]
    panels = [
        (f"metric on<br>{label(shown(probe, 30))} (nats)", probes[probes["probe"] == probe], "metric")
        for probe in watched(record)
    ]
    panels.append(("KL to the start on<br>neutral (nats per token)", probes[probes["probe"] == NEUTRAL], "kl"))
    panels = [(title, rows, column) for title, rows, column in panels if rows[column].notna().any()]
    if not panels:
        raise RunError("Behaviour over steps was not recorded.")
    figure = make_subplots(len(panels), 1, shared_xaxes=True, vertical_spacing=min(0.05, 0.3 / len(panels)))
    for place, (title, rows, column) in enumerate(panels, 1):
        _curves(figure, record, rows, column, colours, place, 1)
        figure.update_yaxes(title_text=title, row=place, col=1)
    figure.update_xaxes(title_text="optimizer steps", row=len(panels), col=1)
    return styled(figure, 70 + 190 * len(panels))


def influence(record: Record, colours: Mapping[str, str], finding: Finding | None = None) -> go.Figure:
    """Influence of each mechanism over steps, on the claim's probe set: joint ablation, signed as the claim says.

    Without a claim: the effect of ablating each set, on the first probe set recorded.
    """
    sets = record.frames["sets"]
    if sets.empty:
        raise RunError("Influence of sets of components was not recorded.")
    cell = finding.cell if finding else {}
    probe = cell.get("probes") or sets["probe"].iloc[0]
    names = list(cell.get("mechanisms") or [name for name in sets["set"].unique() if not str(name).startswith("wrong-")][:4])
    signs = dict(zip(names, cell.get("signs", {}).get(probe, [1] * len(names)), strict=False))
    read_on = dict(zip(names, cell.get("readings", {}).get(probe, [probe] * len(names)), strict=False))
    rows = sets[(sets["probe"] == sets["set"].map(read_on)) & sets["set"].isin(names)]
    if "reference" in rows and len(rows):
        rows = rows[rows["reference"] == (cell.get("reference") or rows["reference"].iloc[0])]
    if rows.empty:
        raise RunError(f"Influence on {shown(probe)} was not recorded.")
    titles = [f"influence of {label(shown(name, 40))} on {label(shown(probe, 40))}" for name in names]
    figure = make_subplots(1, len(names), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    signed_rows = rows.assign(influence=rows["effect"].astype("float64") * rows["set"].map(signs).astype("float64"))
    for place, name in enumerate(names, 1):
        _curves(figure, record, signed_rows[signed_rows["set"] == name], "influence", colours, 1, place)
    figure.update_xaxes(title_text="optimizer steps")
    figure.update_yaxes(title_text="influence (nats)", col=1).update_yaxes(rangemode="tozero")
    return _headed(styled(figure, 420)).update_layout(legend_y=1.1)


def arm_colours(record: Record) -> dict[str, str]:
    """The colour that an arm has in every figure."""
    return {arm: PALETTE[place % len(PALETTE)] for place, arm in enumerate(record.arms)}


def _intervals(finding: Finding, lines: Sequence[Line], nothing: str) -> go.Figure:
    """Intervals under each other against the band of ± delta; the values behind an interval are dots under it."""
    found = [line.row.get("mean") for line in lines]
    if not any(mean is not None and np.isfinite(mean) for mean in found):
        raise RunError(nothing)
    figure, delta, names = go.Figure(), finding.delta, []
    figure.add_vrect(x0=-delta, x1=delta, fillcolor=GREY, line_width=0, layer="below")
    for edge in (-delta, delta):
        figure.add_vline(x=edge, line={"color": LINE, "width": 1, "dash": "dot"})
        figure.add_annotation(x=edge, y=1, yref="paper", yanchor="bottom", showarrow=False,
                              text="+δ" if edge > 0 else "−δ")  # fmt: skip
    for place, line in enumerate(lines):
        names.append(f"{'<br>'.join(_wrapped(line.name))}<br>{interval(line.row)}")
        hover = f"{label(shown(line.name, 200))}<br>{interval(line.row)}, n = {number(line.row.get('n'))}"
        bar = _bar(line.row, line.colour, hover).update(y=[-place])
        if line.hollow:
            bar.update(marker={"symbol": "circle-open", "line": {"width": 2}})
        figure.add_trace(bar)
        dots = {model: value for model, value in line.dots.items() if np.isfinite(value)}
        hover = [f"{label(shown(model))}: {signed(value)}" for model, value in dots.items()]
        small = go.Scatter(x=list(dots.values()), y=[-place - 0.25] * len(dots), mode="markers", hovertext=hover)
        figure.add_trace(small.update(hoverinfo="text", marker={"size": 5, "color": line.colour, "opacity": 0.8}))
    figure.update_layout(showlegend=False)
    figure.update_xaxes(
        title_text=f"{finding.statistic} ({label(shown(finding.declared.get('unit', ''), 60))})", zerolinewidth=2
    )
    ticks = [-place for place in range(len(lines))]
    figure.update_yaxes(tickvals=ticks, ticktext=names, range=[0.5 - len(lines), 0.5], showgrid=False, zeroline=False)
    return styled(figure, 90 + _ROW * len(lines))


def _bar(row: Mapping, colour: str, hover: str) -> go.Scatter:
    """A mean with its interval along x; `row` may lack either."""
    mark = {"color": colour, "size": 11}
    bar = go.Scatter(x=[row.get("mean")], mode="markers", marker=mark, hovertext=[hover], hoverinfo="text", showlegend=False)
    return bar.update(error_x={**_error(row), "color": colour})


def _error(row: Mapping) -> dict:
    ends = [row.get(key) for key in ("mean", "low", "high")]
    if any(value is None or not np.isfinite(value) for value in ends):
        return {"type": "data", "array": [], "visible": False}
    mean, low, high = map(float, ends)  # pyright: ignore[reportArgumentType]
    return {"type": "data", "symmetric": False, "array": [high - mean], "arrayminus": [mean - low], "thickness": 2, "width": 5}


def _curves(
    figure: go.Figure, record: Record, rows: pd.DataFrame, column: str, colours: Mapping[str, str], place: int, col: int
) -> None:
    """Thin lines of runs, dashed on control models, and the mean of every arm at the steps that all its runs recorded."""
    first = (place, col) == (1, 1)
    for number_, arm in enumerate(record.arms):
        here = rows[rows["arm"] == arm].dropna(subset=column).sort_values("step", kind="stable")
        colour, title = colours[arm], f"arm {label(shown(arm, 30))}"
        for control in (False, True):
            lines = here[here["model"].map(record.is_control).astype(bool) == control]
            if lines.empty:
                continue
            xs, ys, hover = _broken(lines, column)
            thin = go.Scatter(
                x=xs, y=ys, mode="lines", hovertext=hover, hoverinfo="text", legendgroup=str(number_), opacity=0.55
            )
            thin.update(showlegend=False, line={"color": colour, "width": 1, "dash": "dot" if control else "solid"})
            figure.add_trace(thin, place, col)
        by_model = _by_model(here[~here["model"].map(record.is_control).astype(bool)], column)
        if by_model.empty:
            continue
        mean = by_model.mean()
        figure.add_trace(_band(by_model, colour, str(number_)), place, col)
        bold = go.Scatter(x=mean.index, y=mean, mode="lines+markers", name=title, legendgroup=str(number_), showlegend=first)
        bold.update(
            line={"color": colour, "width": 3}, hovertemplate=f"{title}, mean<br>step %{{x}}: %{{y:+.3g}}<extra></extra>"
        )
        bold.update(marker={"symbol": SYMBOLS[number_ % len(SYMBOLS)], "size": 7})
        figure.add_trace(bold, place, col)


def _broken(lines: pd.DataFrame, column: str) -> tuple[list, list, list]:
    """The lines of several runs as one trace, with a gap between runs."""
    xs, ys, hover = [], [], []
    for (model, seed), run in lines.groupby(["model", "seed"], sort=False):
        name = f"{label(shown(model))}, seed {label(shown(seed))}"
        xs += [*run["step"].astype(int), None]
        ys += [*run[column].astype(float), None]
        hover += [*(f"{name}<br>step {step}: {signed(y)}" for step, y in zip(run["step"], run[column], strict=True)), ""]
    return xs, ys, hover


def _by_model(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Models by steps, seeds averaged, at the steps that every run recorded."""
    if rows.empty:
        return pd.DataFrame()
    wide = rows.astype({column: "float64"}).pivot_table(index="step", columns=["model", "seed"], values=column).dropna()
    return wide.T.groupby(level="model").mean()


def _band(by_model: pd.DataFrame, colour: str, group: str) -> go.Scatter:
    """The 95 % interval of the mean over models, of which a single one has none."""
    ends = [t_interval(by_model[step]) for step in by_model]
    told = [(step, end) for step, end in zip(by_model, ends, strict=True) if np.isfinite([end.low, end.high]).all()]
    steps = [step for step, _ in told]
    heights = [*(end.high for _, end in told), *(end.low for _, end in reversed(told))]
    band = go.Scatter(x=[*steps, *reversed(steps)], y=heights, mode="lines", fill="toself", legendgroup=group, hoverinfo="skip")
    return band.update(line={"width": 0, "color": colour}, fillcolor=_faint(colour), showlegend=False)


def _faint(colour: str) -> str:
    """A colour of the palette, mostly transparent."""
    return f"rgba({', '.join(str(int(colour[place : place + 2], 16)) for place in (1, 3, 5))}, 0.15)"


def _headed(figure: go.Figure) -> go.Figure:
    """Titles of panels at their left, above what else stands there."""
    for name, axis in zip(figure.layout.annotations, figure.select_xaxes(), strict=False):
        name.update(x=axis.domain[0], xanchor="left")
    return figure.update_layout(margin_t=64)


def _wrapped(name: str) -> list[str]:
    """A long name as lines of at most some forty characters, broken at its commas and colons."""
    lines = [""]
    for piece in shown(name, 120).replace(", ", ",\n").replace(": ", ":\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(piece) > 34:
            lines.append(piece)
        else:
            lines[-1] = f"{lines[-1]} {piece}".strip()
    return [label(line) for line in lines]
