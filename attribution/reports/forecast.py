"""A forecast as tables in the terminal: named sets, the top components, where the gain would sit, and how it turned out.

Knows frames and words; knows nothing about how they came about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import floor, isnan, log10
from typing import TYPE_CHECKING

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attribution.reports.quantities import KINDS

if TYPE_CHECKING:
    from attribution.runs import RunConfig
    from attribution.updates.forecast import Forecast

RISES, FALLS = "▲", "▼"
_STYLES = {RISES: "cyan", FALLS: "yellow"}
_SMALL = 1e-3  # metric units; of a smaller influence no percentages are given


def show(found: Forecast, config: RunConfig, run: str | None = None, compared: pd.DataFrame | None = None) -> None:
    """Print a forecast.

    Args:
        found: the forecast.
        config: of the run that it is of.
        run, compared: a recorded run, and what `compare` says of it.
    """
    console = Console(highlight=False, markup=False)
    lines = [
        f"Forecast of the first step of {config.recipe} on {config.model}, to first order; nothing was trained.",
        f"planned step   changes the weights by a norm of {found.planned_norm:.3g}",
        f"influence      fall of the metric, {found.metric}, when ablated (reference: {found.reference})",
        "strengthening  change of the influence by the planned step, also in percent of its size",
    ]
    if not found.planned_norm:
        lines.append("The planned step is 0, as the first one is where the learning rate warms up from 0.")
    if (pd.concat([found.sets["influence"], found.components["influence"]]) < 0).any():
        lines.append("Where influence is negative, something works against the response: with ▲ less so, with ▼ more.")
    own = [(str(probe), each) for probe, each in found.components.groupby("probe", sort=False)]
    tables = [_sets(found.sets), *(_top(*each) for each in own), *(_places(found, *each) for each in own)]
    if compared is not None:
        tables.append(_outcome(str(run), compared))
    console.print("\n".join(lines), soft_wrap=True)
    for title, table in tables:
        if table.row_count:
            console.print()
            console.print(Text(_printable(title), style="bold"), soft_wrap=True)
            console.print(table)


def _sets(table: pd.DataFrame) -> tuple[str, Table]:
    rows = zip(table["probe"], table["set"], *_effects(table), strict=True)
    heads = ["probe set", "set", "influence now", "strengthening", "in percent"]
    return "Named sets: what would be strengthened", _table(heads, rows, left=2)


def _top(probe: str, own: pd.DataFrame) -> tuple[str, Table]:
    top = own[own["influence"].notna()].sort_values("strengthening", ascending=False, kind="stable")
    names = [
        f"row {word!r}" if kind == "row" else f"{kind} {layer}.{index}"
        for kind, layer, index, word in top[["kind", "layer", "index", "name"]].itertuples(index=False)
    ]
    heads = ["component", "influence now", "strengthening", "in percent", "update share"]
    title = f"Components on {probe}: the {len(top)} with the largest first-order causes"
    return title, _table(heads, zip(names, *_effects(top), _numbers(top["share"]), strict=True), left=1)


def _places(found: Forecast, probe: str, own: pd.DataFrame) -> tuple[str, Table]:
    """Shares summed within layer and kind."""
    kinds = [kind for kind in KINDS if (own["kind"] == kind).any()]
    summed = own.pivot_table(index="layer", columns="kind", values="share", aggfunc="sum")[kinds]
    summed = pd.concat(
        [summed.drop(-1, errors="ignore"), summed.loc[summed.index == -1]]
    )  # what belongs to no layer comes last
    summed["all"] = summed.sum(axis=1)
    summed.loc["all"] = summed.sum()
    cells, width = _numbers(summed.to_numpy().ravel()), summed.shape[1]
    layers = ["none" if layer == -1 else str(layer) for layer in summed.index]
    rows = [(layer, *cells[i * width : (i + 1) * width]) for i, layer in enumerate(layers)]
    level = found.probes.set_index("probe").loc[probe]
    title = f"Where the change on {probe} would sit: update shares (metric now {level['metric']:+.3g}, {level['change']:+.3g})"
    return title, _table(["layer", *(KINDS.get(kind, kind) for kind in summed)], rows)


def _outcome(run: str, compared: pd.DataFrame) -> tuple[str, Table]:
    """A column for each step; what could be ranked at none of them is left out."""
    rows = []
    ordered = compared.sort_values("quantity", key=lambda names: pd.factorize(names)[0], kind="stable")
    for (quantity, probe), own in ordered.groupby(["quantity", "probe"], sort=False):
        if own["rho"].notna().any():
            cells = ["–" if isnan(rho) else f"{rho:+.2f}" for rho in own["rho"]]
            rows.append((str(quantity), str(probe), *cells, str(own["n"].max())))
    heads = ["rank correlation of", "probe set", *(f"step {step}" for step in compared["step"].unique()), "pairs"]
    return f"How this forecast turned out in {run}", _table(heads, rows, left=2)


def _effects(table: pd.DataFrame) -> list[list[str]]:
    """Cells of influence, of strengthening, with an arrow that shows its sign, and of the one in percent of the other."""
    marks = [RISES if value > 0 else FALLS if value < 0 else " " for value in table["strengthening"]]
    numbers = [f"{number} {mark}" for number, mark in zip(_numbers(table["strengthening"]), marks, strict=True)]
    pairs = zip(table["strengthening"], table["influence"], strict=True)
    percents = [f"{100 * change / abs(before):+.2f} %" if abs(before) > _SMALL else "–" for change, before in pairs]
    return [_numbers(table["influence"]), numbers, percents]


def _numbers(values: Iterable[float]) -> list[str]:
    """Signed, all with as many decimals as give the largest three digits; nothing where there is no number."""
    found = [float(value) for value in values]
    largest = max((abs(value) for value in found if not isnan(value)), default=0.0)
    decimals = min(12, max(0, 2 - floor(log10(largest)))) if largest else 1
    return ["" if isnan(value) else f"{value:+.{decimals}f}" for value in found]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    """A table whose first columns, `left` of them, are words and the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place < left else "right")
    for row in rows:
        table.add_row(*(Text(_printable(cell), style=_STYLES.get(cell[-1:], "")) for cell in row))
    return table


def _printable(cell: str) -> str:
    """Names come from files: what would move the cursor is spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cell)
