"""Heat maps, layer by component: the one way in which the report draws quantities of many components.

Knows cells (a table with layer, index and values) and how panels of them stand beside each other; knows nothing about
runs. Signed quantities have a zero-centred scale; grey cells were not measured; layer 0 is at the bottom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from attribution.reports.quantities import signed
from attribution.reports.style import BOTTOM, DIVERGING, GREY, TOP, styled, ticks

_GAP = 95  # pixels between two rows of panels, for the labels of the upper and the title of the lower


@dataclass(frozen=True)
class Grid:
    """Cells (layer, column, text, values) with the places of their columns: component by index, or by rank and a rest."""

    cells: pd.DataFrame
    shape: tuple[int, int]  # layers, columns
    places: Sequence[int]
    labels: Sequence[str]
    axis: str
    rest: int | None = None  # the column that sums what is not drawn singly


@dataclass(frozen=True)
class Panel:
    """One quantity of a grid, the range of whose colours is ±limit."""

    grid: Grid
    column: str
    name: str
    limit: float
    unit: str = "nats"


def described(cells: pd.DataFrame, kind: str, names: Mapping[str, str]) -> pd.DataFrame:
    """The cells with a hover text: every quantity of `names`, and its rank by size among these cells."""
    lines = [f"layer {layer}, {kind} {index}" for layer, index in zip(cells["layer"], cells["index"], strict=True)]
    for column, name in names.items():
        ranks, count = cells[column].abs().rank(ascending=False, method="min"), int(cells[column].notna().sum())
        for place, (value, rank) in enumerate(zip(cells[column], ranks, strict=True)):
            found = "not measured" if pd.isna(value) else f"{signed(value)} (rank {rank:.0f} of {count})"
            lines[place] += f"<br>{name}: {found}"
    names_of = [f"{kind} {layer}.{index}" for layer, index in zip(cells["layer"], cells["index"], strict=True)]
    return cells.assign(text=lines, name=names_of)


def by_index(cells: pd.DataFrame, shape: tuple[int, int], kind: str) -> Grid:
    """Every component in the column of its index."""
    places = ticks(shape[1])
    return Grid(cells.assign(column=cells["index"]), shape, places, [str(place) for place in places], kind)


def by_rank(cells: pd.DataFrame, layers: int, kind: str, by: str, names: Mapping[str, str], top: int) -> Grid:
    """The `top` components of every layer by size of `by`, from left to right; the others of the layer in one cell, summed."""
    cells = cells.sort_values(["layer", by], key=lambda column: -column.abs() if column.name == by else column)
    cells["column"] = cells.groupby("layer").cumcount()
    width = min(top, int(cells["column"].max()) + 1)
    others = cells[cells["column"] >= top].groupby("layer")
    rest, counts = others[list(names)].sum(min_count=1).reset_index(), others["index"].count()
    rest["column"], rest["name"] = width, ""
    rest["text"] = [
        f"layer {cell['layer']}, {counts[cell['layer']]} other {kind}s, summed"
        + "".join(f"<br>{name}: {signed(cell[column])}" for column, name in names.items())
        for cell in rest.to_dict("records")
    ]
    cells = pd.concat([cells[cells["column"] < top], rest], ignore_index=True)
    last = width if len(rest) else None
    places = [*(place for place in ticks(width, 1) if last is None or place < width - 1), *([] if last is None else [last])]
    labels = ["rest" if place == last else str(place + 1) for place in places]
    axis = f"{kind}, ranked by |{names[by]}|"
    return Grid(cells, (layers, width + (last is not None)), places, labels, axis, last)


def limit(values: pd.Series) -> float:
    """The largest size among the values: where the colours of a panel end."""
    largest = values.abs().max()
    return float(largest) if largest > 0 else 1.0


def heat_maps(panels: Sequence[Panel]) -> go.Figure:
    """Panels in two columns, each with its own colour bar."""
    figure = deepcopy(_frame(tuple(_Frame.of(panel) for panel in panels)))
    for trace, panel in zip(figure["data"], panels, strict=True):
        trace |= {"z": _matrix(panel.grid, panel.column, float), "hovertext": _matrix(panel.grid, "text", object)}
        if "name" in panel.grid.cells:  # by which a click finds the component
            trace["customdata"] = _matrix(panel.grid, "name", object)
    return go.Figure(figure)


class _Frame(NamedTuple):
    """All of a panel but what is in its cells: a page draws the same frame many times."""

    name: str
    unit: str
    limit: float
    shape: tuple[int, int]
    places: tuple[int, ...]
    labels: tuple[str, ...]
    axis: str
    rest: int | None

    @classmethod
    def of(cls, panel: Panel) -> _Frame:
        grid = panel.grid
        return cls(
            panel.name, panel.unit, panel.limit, grid.shape, tuple(grid.places), tuple(grid.labels), grid.axis, grid.rest
        )


@lru_cache(maxsize=64)
def _frame(frames: tuple[_Frame, ...]) -> dict[str, Any]:
    height = -(-len(frames) // 2)
    layers = max(frame.shape[0] for frame in frames)
    tall = min(520, max(130, 24 * layers))  # pixels
    inside = height * tall + (height - 1) * _GAP
    figure = make_subplots(
        height,
        2,
        specs=[[{} if 2 * row + column < len(frames) else None for column in range(2)] for row in range(height)],
        subplot_titles=[f"{frame.name} ({frame.unit})" for frame in frames],
        horizontal_spacing=0.2,
        vertical_spacing=_GAP / inside if height > 1 else 0,
    )
    for place, frame in enumerate(frames):
        _draw(figure, place, frame)
    return styled(figure, inside + TOP + BOTTOM).update_layout(plot_bgcolor=GREY).to_plotly_json()


def _draw(figure: go.Figure, place: int, frame: _Frame) -> None:
    at = {"row": place // 2 + 1, "col": place % 2 + 1}
    trace = go.Heatmap(z=np.full(frame.shape, np.nan), hoverinfo="text", name=frame.name, colorscale=DIVERGING)
    trace.update(zmin=-frame.limit, zmid=0, zmax=frame.limit, xgap=1, ygap=1)
    figure.add_trace(trace, **at)
    x, y = (figure.layout[f"{side}axis{place + 1 if place else ''}"].domain for side in "xy")
    bar = {"x": x[1] + 0.01, "xanchor": "left", "y": sum(y) / 2, "len": (y[1] - y[0]) * 1.08, "thickness": 9}
    figure.data[-1].update(colorbar={**bar, "nticks": 5, "outlinewidth": 0, "tickformat": "~g", "ticklen": 3})
    figure.layout.annotations[place].update(x=x[0], xanchor="left")
    plain = {"showgrid": False, "zeroline": False}
    figure.update_xaxes(tickvals=frame.places, ticktext=frame.labels, title_text=frame.axis, **plain, **at)
    figure.update_yaxes(tickvals=ticks(frame.shape[0]), range=[-0.5, frame.shape[0] - 0.5], **plain, **at)
    if at["col"] == 1:
        figure.update_yaxes(title_text="layer", **at)
    if frame.rest is not None:
        figure.add_vline(x=frame.rest - 0.5, line={"color": "#7a7a7a", "width": 4}, **at)


def _matrix(grid: Grid, column: str, dtype: type) -> np.ndarray:
    nothing = {"text": "not measured", "name": ""}.get(column, np.nan)
    matrix = np.full(grid.shape, nothing, dtype=dtype)
    matrix[grid.cells["layer"].astype(int), grid.cells["column"].astype(int)] = grid.cells[column]
    return matrix
