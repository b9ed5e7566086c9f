"""Figures of what a run sampled, or was given as preferred: rewards and advantages over steps, and causes of completions.

Each function takes a `store.Run` and returns a plotly figure; where what it would draw was not recorded it raises RunError
with a sentence that says so. Knows the tables of `completions`, and how `heatmaps`, `figures` and `style` draw; knows nothing
about HTML. Causes on either side and their difference have one zero-centred scale, their sum weighted by advantage has its own,
as it has another unit.
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from attribution.errors import RunError
from attribution.reports import completions
from attribution.reports.completions import NOT_READ, SUMMED, UNIT, causes, named, sides
from attribution.reports.figures import rows_as_words, shape
from attribution.reports.heatmaps import Grid, Panel, by_index, by_rank, described, heat_maps, limit
from attribution.reports.style import LINE, PALETTE, SYMBOLS, styled
from attribution.store import Run

_COLOURS = {"all": (0, 114, 178), "high": (213, 94, 0), "low": (0, 114, 178)}  # of `PALETTE`; orange above, blue below
_DASHES = {"all": "solid", "high": "solid", "low": "dash"}


def rewards(run: Run) -> go.Figure:
    """Mean reward in a band between the quartiles of prompts, and mean |advantage| below it, over optimizer steps.

    Steps on which every advantage is zero are marked; rewards are left out where there are none.
    """
    table, sizes = completions.rewards(run), completions.advantages(run)
    count = 1 + (len(table) > 0)
    figure = make_subplots(count, 1, shared_xaxes=True, vertical_spacing=0.09)
    when = {step: f"step {first}" if first == last else f"steps {first}–{last}"
            for step, first, last in zip(sizes["step"], sizes["first"], sizes["last"], strict=True)}  # fmt: skip
    for side, own in table.groupby("side", sort=False):
        _reward(figure, str(side), own, when, sides(run).get(str(side), "all completions"))
    line = go.Scatter(x=sizes["step"], y=sizes["size"], name="mean |advantage|", line_color=LINE, showlegend=False)
    line.update(mode=_mode(sizes), hovertext=_hover(sizes, when, "size"), hoverinfo="text")
    figure.add_trace(line, count, 1)
    silent = sizes[sizes["silent"] > 0]
    if len(silent):
        marks = go.Scatter(x=silent["step"], y=[0] * len(silent), mode="markers", name="every advantage zero", hoverinfo="text")
        marks.update(marker={"symbol": "x", "size": 8, "color": PALETTE[5]}, cliponaxis=False)
        marks.hovertext = [
            f"{when[step]}: every advantage zero{f' on {some} of {steps}' if steps > 1 else ''}"
            for step, some, steps in zip(silent["step"], silent["silent"], silent["steps"], strict=True)
        ]
        figure.add_trace(marks, count, 1)
    if count == 2:
        figure.update_yaxes(title_text=completions.reward_name(run).replace(" ", "<br>"), row=1, col=1)
    figure.update_yaxes(title_text="mean<br>|advantage|", rangemode="tozero", row=count, col=1)
    figure.update_xaxes(title_text="optimizer steps", row=count, col=1)
    if sizes["step"].max() - sizes["step"].min() <= 12:
        figure.update_xaxes(dtick=1)
    return styled(figure, 60 + 190 * count)


def heads(run: Run) -> go.Figure:
    """Heat maps, layer by head: cause times advantage, the difference of the sides, and either side."""
    table = _table(run, "head")
    cells = described(table, "head", named(run))
    return heat_maps(_panels(run, table, by_index(cells, shape(run, table), "head")))


def neurons(run: Run, top: int = 16) -> go.Figure:
    """The same for the `top` neurons of every layer by |cause times advantage|, the rest in one cell."""
    table = _table(run, "neuron")
    cells = described(table, "neuron", named(run))
    return heat_maps(_panels(run, table, by_rank(cells, shape(run, table)[0], "neuron", "rewarded", named(run), top)))


def rows(run: Run, top: int = 10) -> go.Figure:
    """The unembedding rows with the largest cause times advantage, up and down, as words."""
    table = _table(run, "row")
    ends = [table[table["rewarded"] > 0].nlargest(top, "rewarded"), table[table["rewarded"] < 0].nsmallest(top, "rewarded")]
    return rows_as_words(run, pd.concat(ends), "rewarded", SUMMED, f"{SUMMED} ({UNIT})")


def _reward(figure: go.Figure, side: str, own: pd.DataFrame, when: dict[int, str], name: str) -> None:
    """One line with its band."""
    colour = ",".join(str(part) for part in _COLOURS[side])
    ends = {"x": [*own["step"], *own["step"][::-1]], "y": [*own["upper"], *own["lower"][::-1]]}
    band = go.Scatter(**ends, fill="toself", mode="lines", line_width=0, fillcolor=f"rgba({colour},.18)", legendgroup=side)
    figure.add_trace(band.update(name=f"{name}, quartiles of prompts", hoverinfo="skip", showlegend=False), 1, 1)
    line = go.Scatter(x=own["step"], y=own["mean"], name=name, mode=_mode(own), legendgroup=side)
    line.update(line={"color": f"rgb({colour})", "dash": _DASHES[side]}, hoverinfo="text")
    line.update(marker={"symbol": SYMBOLS[side == "low"], "size": 7})
    line.hovertext = [
        f"{when[step]}: mean {mean:.4g}, {count} completions; quartiles of prompts {lower:.4g} to {upper:.4g}"
        for step, mean, lower, upper, count in zip(
            *(own[name] for name in ("step", "mean", "lower", "upper", "count")), strict=True
        )
    ]
    figure.add_trace(line, 1, 1)


def _mode(table: pd.DataFrame) -> str:
    return "lines+markers" if len(table) <= 60 else "lines"


def _hover(table: pd.DataFrame, when: dict[int, str], column: str) -> list[str]:
    return [f"{when[step]}: {value:.4g}" for step, value in zip(table["step"], table[column], strict=True)]


def _table(run: Run, kind: str) -> pd.DataFrame:
    table = causes(run, kind)
    if table.empty:
        raise RunError(
            f"Causes of completions were not recorded for single {kind}s." if completions.steps_read(run) else NOT_READ
        )
    if not table["rewarded"].any():
        raise RunError("At every step read, all advantages were zero: no completion was pushed up or down.")
    return table


def _panels(run: Run, table: pd.DataFrame, grid: Grid) -> list[Panel]:
    both, names = limit(table[["contrast", "high", "low"]].stack()), named(run)
    units = {"rewarded": UNIT}
    return [
        Panel(grid, column, name, both if column != "rewarded" else limit(table["rewarded"]), units.get(column, "nats"))
        for column, name in names.items()
        if table[column].notna().any()
    ]
