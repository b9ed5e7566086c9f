"""Quantities of single components of a run: causes, the four of every page, their course over steps, and the rivals of a cause.

What a page of many runs draws is made here too: of every layer the components that are largest over seeds, the others summed.
Knows the frames of a run; knows nothing about pages. Quantities are of the run's metric, in nats: causes as means over training
samples before training, the others as means over a held-out probe set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import pandas as pd

from attribution.store.columns import BATCH, TRAINING
from attribution.store.reader import Run

QUANTITIES = ("influence", "strengthening", "share", "graft")
RIVALS = {"opportunity": "grad_norm", "activity": "activation_before", "weight_norm": "weight_norm"}  # of a cause
SHOWN: dict[str, dict[str, str]] = {  # the columns of what is drawn of a run, after model, arm and seed
    "totals": {
        "probe": "name of the probe set",
        "kind": "head, neuron or row",
        "layer": "layer",
        "index": "head, neuron or token id within it; -1 for all others of the layer, summed",
        "members": "components in this row",
        "word": "of a row of the unembedding, as the vocabulary spells it",
        "influence": "effect of ablating it at the start, nats",
        "strengthening": "change of that to the last milestone, nats",
        "share": "update share, summed over steps, nats",
        "graft": "metric with its change alone, put into the model at the start, minus without, nats",
        "cause": "effect of ablating it on training samples before training, nats",
        "opportunity": "norm of its gradient on the first batch",
        "activity": "root mean square of its activation on the first batch",
        "weight_norm": "norm of its weights before training",
    },
    "courses": {
        "step": "optimizer steps done",
        "probe": "name of the probe set",
        "kind": "head, neuron or row",
        "layer": "layer",
        "index": "head, neuron or token id within it",
        "share": "update share, summed up to this step, nats; null where it was not read at every step",
        "influence": "effect of ablating it, nats; null between milestones",
    },
}
KINDS = ("head", "neuron", "row")
TOP = 64  # neurons and rows of a layer that are kept one by one
_PLACE = ["kind", "layer", "index"]
_KEYS = ["probe", *_PLACE]
_BY_KIND = ["kind", "probe", "layer", "index"]  # the same, in the order of rows
_OF = ["model", "arm", "probe", "kind", "layer"]  # within which the largest are chosen
P = ParamSpec("P")
T = TypeVar("T")


def kept(make: Callable[Concatenate[Run, P], T]) -> Callable[Concatenate[Run, P], T]:
    """Make something of a run once and keep it with the run, of which a page asks for the same table many times."""

    @wraps(make)
    def once(run: Run, *args: P.args, **kwargs: P.kwargs) -> T:
        key = (make, args, *sorted(kwargs.items()))
        if key not in run.made:
            run.made[key] = make(run, *args, **kwargs)
        return copy(run.made[key])  # of a table pandas copies nothing until somebody writes into it

    return once


@kept
def causes(run: Run) -> pd.DataFrame:
    """How much each component caused the trained responses: exact ablation on training samples, before training.

    Returns:
        One row per component: kind, layer, index, cause (nats) and kl (ablated || intact, nats per token); no row where
        causes were not recorded.
    """
    rows = run.influence
    rows = rows[(rows["probe"] == TRAINING) & (rows["step"] == 0) & (rows["index"] >= 0) & rows["effect"].notna()]
    table = plain(rows).rename(columns={"effect": "cause"})[["kind", "layer", "index", "cause", "kl"]]
    return table.astype({"layer": int, "index": int, "cause": "float64", "kl": "float64"}).reset_index(drop=True)


def per_component(run: Run, kind: str) -> pd.DataFrame:
    """The four quantities of every recorded component of one kind.

    Returns:
        One row per probe set and component: probe, layer, index, the columns of `QUANTITIES` (NaN where not
        measured), and share_steps, the number of steps the share is summed over.
    """
    every = _quantities(run)
    return every[every["kind"] == kind].drop(columns="kind").reset_index(drop=True)


def components(run: Run) -> pd.DataFrame:
    """Every recorded component with its four quantities, its cause and the rivals of that: `SHOWN`, but for `members`."""
    table = _quantities(run).merge(causes(run)[[*_PLACE, "cause"]], on=_PLACE, how="left")
    table = table.merge(_rivals(run), on=_PLACE, how="left")
    words = run.vocabulary
    rows = (table["kind"] == "row") & (table["index"] < len(words))
    table["word"] = [words[index] if row else "" for row, index in zip(rows, table["index"], strict=True)]
    return table[[column for column in SHOWN["totals"] if column != "members"]]


def timelines(run: Run) -> pd.DataFrame:
    """Share and influence of every component over steps: `SHOWN`. Shares of those alone that were read at every step."""
    shares = _single(run.components)
    shares = shares.loc[shares["share"].notna(), ["step", *_KEYS, "share"]].astype({"share": "float64"})
    read = shares.groupby(_KEYS)["step"].transform("nunique")
    shares = shares[read == shares.groupby("probe")["step"].transform("nunique")].sort_values("step")
    shares["share"] = shares.groupby(_KEYS)["share"].cumsum()
    influence = _single(run.influence)[["step", *_KEYS, "effect"]].rename(columns={"effect": "influence"})
    both = shares.merge(influence.astype({"influence": "float64"}).dropna(), on=["step", *_KEYS], how="outer")
    return both.astype({"step": int, "layer": int, "index": int})[list(SHOWN["courses"])]


def drawn(tables: Sequence[pd.DataFrame], courses: Sequence[pd.DataFrame]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is drawn of several runs: all heads, the `TOP` neurons and rows of every layer, and the sum of the layer's others.

    Which are the largest goes by the mean size, over seeds, of the update share, or else of the strengthening, or of the
    influence before.

    Args:
        tables: `components` of every run, with model, arm and seed.
        courses: `timelines` alike.

    Returns:
        Both in one frame each, with the columns of `SHOWN` after model, arm and seed.
    """
    every = pd.concat(tables, ignore_index=True)
    size = every[["share", "strengthening", "influence"]].abs().bfill(axis=1).iloc[:, 0].rename("size")
    over_seeds = size.groupby([every[key] for key in (*_OF, "index")]).mean()
    place = over_seeds.groupby(level=_OF).rank(ascending=False, method="first")
    keys = pd.MultiIndex.from_frame(every[[*_OF, "index"]])
    kept = (every["kind"] == "head").to_numpy() | (place.reindex(keys) <= TOP).to_numpy()
    by = ["model", "arm", "seed", "probe", "kind", "layer"]
    others = every[~kept].groupby(by)
    rest = others[[*QUANTITIES, "cause"]].sum(min_count=1)
    rest = rest.assign(index=-1, members=others.size(), word="").reset_index()
    chosen = pd.concat([every[kept].assign(members=1), rest], ignore_index=True)
    course = pd.concat(courses, ignore_index=True)
    wanted = pd.MultiIndex.from_frame(every.loc[kept, [*_OF, "index"]].drop_duplicates())
    course = course[pd.MultiIndex.from_frame(course[[*_OF, "index"]]).isin(wanted)]
    named = ["model", "arm", "seed"]
    return _small(chosen[[*named, *SHOWN["totals"]]]), _small(course[[*named, *SHOWN["courses"]]].reset_index(drop=True))


def pictured(runs: Iterable[tuple[Run, Mapping[str, Any]]]) -> dict[str, pd.DataFrame]:
    """What the page of a study draws of single components and of words: the frames totals, courses and tokens.

    Args:
        runs: each with its model, arm and seed; at least one.
    """
    found: dict[str, list[pd.DataFrame]] = {"totals": [], "courses": [], "tokens": []}
    for run, key in runs:
        words = run.tokens.astype({"when": str, "probe": str, "token": str})
        for name, frame in zip(found, (components(run), timelines(run), words), strict=True):
            found[name].append(frame.assign(**key)[[*key, *frame.columns]])
    chosen, courses = drawn(found["totals"], found["courses"])
    return {"totals": chosen, "courses": courses, "tokens": pd.concat(found["tokens"], ignore_index=True)}


def plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Categories as strings, so that grouping knows only the values that are there."""
    return frame.astype({name: object for name in ("probe", "kind", "part") if name in frame})


def _rivals(run: Run) -> pd.DataFrame:
    batch = plain(run.components)
    batch = batch[(batch["probe"] == BATCH) & (batch["step"] == 1) & (batch["index"] >= 0) & batch["kind"].isin(KINDS)]
    found = batch[[*_PLACE, *RIVALS.values()]].rename(columns={column: name for name, column in RIVALS.items()})
    return found.astype({"layer": int, "index": int, **dict.fromkeys(RIVALS, "float64")})


def _small(frame: pd.DataFrame) -> pd.DataFrame:
    """Half the bytes: what is drawn needs no more digits."""
    return frame.astype({column: "float32" for column in frame if frame[column].dtype == "float64"})


@kept
def _quantities(run: Run) -> pd.DataFrame:
    """`per_component` of every kind, with the column kind before the others."""
    influence, parts, grafts = (_single(frame) for frame in (run.influence, run.parts, run.grafts))
    of = ["kind", "probe"]
    last = influence.groupby(of)["step"].transform("max")
    before = _total(influence[influence["step"] == 0], "effect")
    after = _total(influence[(influence["step"] == last) & (influence["step"] > 0)], "effect")
    recorded = parts[parts["share"].notna()]
    columns = {
        "influence": before,
        "strengthening": after - before,
        "share": _total(recorded, "share"),
        "share_steps": recorded.groupby(_BY_KIND)["step"].nunique(),
        "graft": _total(grafts[grafts["step"] == grafts.groupby(of)["step"].transform("max")], "graft"),
    }
    pieces = [column.rename(name) for name, column in columns.items() if len(column)]
    numbers = {"layer": int, "index": int, **dict.fromkeys(columns, "float64")}
    if not pieces:
        return pd.DataFrame(columns=[*_BY_KIND, *columns]).astype(numbers)
    return pd.concat(pieces, axis=1).reindex(columns=list(columns)).sort_index().reset_index().astype(numbers)


def _single(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of single components on held-out probe sets: no whole layers, no remainder, nothing trained on."""
    return plain(frame[frame["kind"].isin(KINDS) & (frame["index"] >= 0) & ~frame["probe"].isin((BATCH, TRAINING))])


def _total(rows: pd.DataFrame, column: str) -> pd.Series:
    values = rows[[*_BY_KIND, column]].astype({column: "float64"})
    return values.groupby(_BY_KIND)[column].sum(min_count=1).dropna()
