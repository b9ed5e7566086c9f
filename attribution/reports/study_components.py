"""Single components of a study as tables: over seeds of one model, against causes and their rivals, and how stable they are.

Knows the frames `totals` and `courses` of a study, as `store.quantities` makes them; knows nothing about figures or HTML.
Indices of components mean nothing across models, so that intervals and q-values here are over training seeds of one model, and
hold for that model only.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, spearmanr, t

from attribution.claims.statistics import t_interval
from attribution.errors import RunError
from attribution.reports.quantities import KINDS, QUANTITIES, percent, shown, signed
from attribution.reports.study_tables import Record, Table, interval, number

SINGLE = ("head", "neuron")
ACROSS = {  # what strengthening is held against: the cause, and what else it might follow; name and axis
    "cause": ("cause", "cause on training samples (nats)"),
    "opportunity": ("opportunity", "norm of the gradient on the first batch"),
    "activity": ("activity", "root mean square of the activation on the first batch"),
    "weight_norm": ("weight norm", "norm of the weights before training"),
    "influence": ("influence before", "influence before, on the same probe set (nats)"),
    "layer": ("layer", "layer"),
}
REST = -1  # the index of all others of a layer, summed
FIRST = 10  # components compared as "the largest"
_PLACE = ["layer", "index"]
_NONE = (
    "Single components were not recorded in this study, or not kept with its tables: `attribution report RUN` shows those of a "
    "run, `attribution study` keeps what was recorded."
)


def cells(record: Record, model: str, arm: str, probe: str, kind: str) -> pd.DataFrame:
    """The rows of one model, arm, probe set and kind: one per component and seed.

    Raises:
        RunError: there is none.
    """
    frame = record.frames["totals"]
    if frame.empty:
        raise RunError(_NONE)
    found = record.singles.get((model, arm, probe, kind), frame[:0])
    if not found[list(QUANTITIES)].notna().any(axis=None):
        raise RunError(f"Of arm {shown(arm)} on {shown(model)}, {KINDS[kind]} were not recorded on {shown(probe)}.")
    return found


def first(record: Record, name: str) -> list[str]:
    """The values of a column of the frame of totals: model, arm or probe, as the study orders them."""
    frame = record.frames["totals"]
    there = [str(value) for value in frame[name].unique()] if name in frame else []
    if name == "probe":
        known = [str(probe) for probe in record.frames["probes"]["probe"].unique()]
    else:
        known = [str(value) for value in record.told.get(f"{name}s") or []]
    return sorted(there, key=lambda value: known.index(value) if value in known else len(known))


def measure(rows: pd.DataFrame) -> str:
    """The quantity by whose size components are ordered: the first that was measured."""
    return next((name for name in ("share", "strengthening", "influence", "graft") if rows[name].notna().any()), "share")


def summed(rows: pd.DataFrame, top: int) -> pd.DataFrame:
    """The `top` components of every layer by mean size over seeds, in order (column `place`); the others of a layer as one."""
    size = rows[rows["index"] != REST].groupby(_PLACE)[measure(rows)].mean().abs().rename("size").reset_index()
    size["place"] = size.groupby("layer")["size"].rank(ascending=False, method="first", na_option="bottom").astype(int) - 1
    placed = rows.merge(size[[*_PLACE, "place"]], on=_PLACE, how="left")
    inside = placed["place"] < top
    others = placed[~inside].groupby(["seed", "layer"])
    rest = others[list(QUANTITIES)].sum(min_count=1).assign(members=others["members"].sum(), index=REST, place=top, word="")
    return pd.concat([placed[inside], rest.reset_index()], ignore_index=True)


def over_seeds(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By quantity that was measured, one row per component: layer, index, members, word, mean, low, high (95 %, over seeds),
    q (Benjamini–Hochberg over all components of the kind), n (seeds) and rank by size. No interval and no q of a single seed,
    or where seeds are all alike.
    """
    groups, found = rows.groupby(_PLACE), {}
    told = groups[["members", "word"]].first().reset_index()
    values = groups[list(QUANTITIES)]
    means, spreads, counts = (table.to_numpy(dtype="float64") for table in (values.mean(), values.std(), values.count()))
    for place, quantity in enumerate(QUANTITIES):
        there = counts[:, place] > 0
        if there.any():
            table = told[there].reset_index(drop=True).assign(mean=means[there, place], n=counts[there, place].astype(int))
            found[quantity] = _tested(table, spreads[there, place], int(told["members"].sum()))
    return found


def _tested(table: pd.DataFrame, spread: np.ndarray, family: int) -> pd.DataFrame:
    """With interval, q and rank. Components that were summed were chosen by their size: they count as if their p were 1."""
    mean, n, single = table["mean"].to_numpy(), table["n"].to_numpy(), table["index"].to_numpy() != REST
    free = np.maximum(n - 1, 1)
    error = np.where(spread > 0, spread, np.nan) / n**0.5
    half = t.ppf(0.975, free) * error
    p = 2 * t.sf(np.abs(mean / error), free)
    q, tested = np.full(len(table), np.nan), single & ~np.isnan(p)
    if tested.any():
        every = np.concatenate([p[tested], np.ones(family - int(tested.sum()))])
        q[tested] = false_discovery_control(every)[: int(tested.sum())]
    rank = table["mean"].abs().where(single).rank(ascending=False, method="min")
    return table.assign(low=mean - half, high=mean + half, q=q, rank=rank)


def largest(record: Record, kind: str, quantity: str) -> float:
    """The largest size of a quantity over models, arms and probe sets, seeds averaged: where the colours of its maps end."""
    together = ["share", "graft"] if quantity in ("share", "graft") else [quantity]
    found = record.sizes.loc[kind, together].max()
    return float(found) if found > 0 else 1.0


def against(record: Record, model: str, arm: str, probe: str, kind: str, across: str) -> pd.DataFrame:
    """Strengthening of single components and what it is held against, seeds averaged: layer, index, across, strengthening."""
    means = _means(record, model, arm, probe, kind)
    table = means[["layer", "index", "strengthening"]].assign(across=means[across].astype("float64"))
    return table.dropna().reset_index(drop=True)


def _means(record: Record, model: str, arm: str, probe: str, kind: str) -> pd.DataFrame:
    """Single components, seeds averaged; kept, since every rival asks for them."""
    key = ("means", model, arm, probe, kind)
    if key not in record.kept:
        rows = cells(record, model, arm, probe, kind)
        columns = [column for column in ("strengthening", *ACROSS) if column != "layer"]
        means = rows[rows["index"] != REST].groupby(_PLACE)[columns].mean().astype("float64")
        record.kept[key] = means.reset_index()
    return record.kept[key]


def correlations(record: Record) -> Table:
    """Spearman's rank correlation of strengthening with the cause and with each rival, by arm and kind, meaned over models."""
    return _over_models(record, ["", *(name for name, _ in ACROSS.values())], [
        lambda model, arm, probe, kind, across=across: spearman(
            against(record, model, arm, probe, kind, across), "across", "strengthening"
        )
        for across in ACROSS
    ])  # fmt: skip


def stability(record: Record) -> Table:
    """How alike strengthening is in two seeds, and on two probe sets, by arm and kind, meaned over models."""
    probes = first(record, "probe")

    @cache
    def wide(model: str, arm: str, probe: str, kind: str) -> pd.DataFrame:
        rows = cells(record, model, arm, probe, kind)
        return rows[rows["index"] != REST].pivot_table(index=_PLACE, columns="seed", values="strengthening").dropna()

    def seeds(model: str, arm: str, probe: str, kind: str) -> float:
        table = wide(model, arm, probe, kind)
        return _mean([spearman(table, *pair) for pair in combinations(table.columns, 2)])

    def shared(model: str, arm: str, probe: str, kind: str) -> float:
        table = wide(model, arm, probe, kind).abs()
        if len(table) <= FIRST:
            return float("nan")
        tops = [set(table[seed].nlargest(FIRST).index) for seed in table]
        return _mean([len(one & other) / FIRST for one, other in combinations(tops, 2)])

    def prompts(model: str, arm: str, probe: str, kind: str) -> float:
        others = [name for name in probes if name != probe]
        found = []
        for other in others:
            both = [wide(model, arm, name, kind).mean(axis=1).rename(name) for name in (probe, other)]
            found.append(spearman(pd.concat(both, axis=1).dropna(), probe, other))
        return _mean(found)

    head = ["", "two seeds, rank correlation", f"two seeds, share of the {FIRST} largest in common",
            "two probe sets, rank correlation"]  # fmt: skip
    return _over_models(record, head, [seeds, shared, prompts], shares=(1,))


def spearman(table: pd.DataFrame, one: object, other: object) -> float:
    """Spearman's correlation of two columns; NaN where there is none."""
    if len(table) < 3 or table[one].nunique() < 2 or table[other].nunique() < 2:
        return float("nan")
    return float(spearmanr(table[one], table[other]).statistic)


def hover(row: dict, kind: str, name: str, family: int, ranked: int) -> str:
    """One cell in words: the component, the estimate with its interval, q, rank, seeds."""
    seeds = f"{row['n']:.0f} seed{'' if row['n'] == 1 else 's'}"
    if row["index"] == REST:
        return f"layer {row['layer']}, {row['members']:.0f} other {kind}s, summed<br>{name}: {interval(row)}, {seeds}"
    q = "" if pd.isna(row["q"]) else f"<br>q = {row['q']:.2g} among {family}"
    return (
        f"layer {row['layer']}, {kind} {row['index']}<br>{name}: {interval(row)}, {seeds}{q}"
        f"<br>rank {row['rank']:.0f} of {ranked}"
    )


def _over_models(record: Record, head: list[str], columns: list, shares: tuple[int, ...] = ()) -> Table:
    """A row per arm and kind: each figure on the first probe set, meaned over models; of correlations with an interval."""
    if record.frames["totals"].empty:
        return Table(head, [])
    probe = first(record, "probe")[0]
    rows = []
    for arm in first(record, "arm"):
        for kind in SINGLE:
            shown_cells = []
            for place, figure in enumerate(columns):
                models = [model for model in first(record, "model") if not record.is_control(model)]
                values = [_figure(figure, model, arm, probe, kind) for model in models]
                found = [value for value in values if not np.isnan(value)]
                shown_cells.append(percent(_mean(found)) if found and place in shares else _cell(found))
            if any(cell != "–" for cell in shown_cells):
                rows.append([f"arm {shown(arm, 40)}, {KINDS[kind]}", *shown_cells])
    return Table(head, rows, tuple(range(1, len(head))))  # an interval may stand below its estimate


def _figure(figure, model: str, arm: str, probe: str, kind: str) -> float:
    try:
        return figure(model, arm, probe, kind)
    except RunError:  # this model has no such arm
        return float("nan")


def _cell(values: list[float]) -> str:
    """The mean of correlations, with its interval where there are three or more: by Fisher's z, so that it ends within ±1."""
    if not values:
        return "–"
    z = np.arctanh(np.clip(values, -0.9999, 0.9999))
    if len(values) < 3:
        return signed(float(np.tanh(z.mean())), 2)
    found = np.tanh([getattr(t_interval(z), end) for end in ("mean", "low", "high")])
    return f"{signed(found[0], 2)} [{signed(found[1], 2)}, {signed(found[2], 2)}]"


def _mean(values: list[float]) -> float:
    found = [value for value in values if not np.isnan(value)]
    return float(np.mean(found)) if found else float("nan")


__all__ = ["ACROSS", "SINGLE", "against", "cells", "correlations", "first", "hover", "largest", "measure", "number",
           "over_seeds", "spearman", "stability", "summed"]  # fmt: skip
