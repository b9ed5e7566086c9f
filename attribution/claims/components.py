"""The claim at the grain of single components: does what caused the output predict what grew, beyond what any gradient does?

Component by component, D = dI(arm A) - dI(arm B) is regressed on C(samples A) - C(samples B) and on the rivals, differenced
in the same way where arms differ in them: opportunity (norm of the first gradient), activity, and besides weight norm and
layer. Base, probes and start are the same, so what is shared cancels. Leave-one-base-out: coefficients come from all other
bases. The statistic of a base is the gain of R² by C over all rivals, with the sign of C's coefficient, mean over kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from attribution.claims.claim import ComponentClaim
from attribution.claims.finding import Finding, failed_runs
from attribution.claims.frames import Frames
from attribution.claims.recruitment import COLUMNS as RECRUITMENT
from attribution.claims.statistics import Interval, t_interval
from attribution.claims.terms import IDENTICAL
from attribution.claims.verdict import Gate, Null, decide, gate_table
from attribution.errors import RunError

KEY = ["kind", "layer", "index"]
RIVALS = ("opportunity", "activity")  # by arm, so differenced; weight norm and layer are those of the base
SUPPORTERS, OPPOSERS = "supporters", "opposers"


class Race(NamedTuple):
    """How well components' changes are predicted in a base that no coefficient was fitted on.

    Attributes:
        gain: R² with C and all rivals less R² with the rivals alone, times the sign of C's coefficient.
        full, rivals: those R².
        alone: R² of C alone.
        coefficient: of C, in standard deviations, beside all rivals.
    """

    gain: float
    full: float
    rivals: float
    alone: float
    coefficient: float


def component_finding(claim: ComponentClaim, frames: Frames) -> Finding:
    """The test; arguments and errors as `evaluate`. `frames` holds `singles`, see `store.singles`."""
    if "singles" not in frames or frames["singles"].empty:
        raise RunError("the study has no run that ablated every component one by one; run its arms with singles 'all'")
    table = frames["singles"].astype({"model": str, "arm": str, "kind": str})
    table = table[table["kind"].isin(claim.cell.kinds)]
    differences = _differences(table, *claim.cell.arms)
    races = _races(differences, claim.cell.kinds)
    estimate = _estimate(races)
    identical = _races(_of_identical(table, differences, claim.cell.arms), claim.cell.kinds)
    nulls = {IDENTICAL: Null(_estimate(identical), "" if len(identical) else "it needs two seeds of an arm")}
    gates = [Gate(threshold, *_figure(threshold.name, differences, claim.cell.kinds)) for threshold in claim.gates]
    verdict = decide(estimate, claim.delta, nulls, gates, claim.nulls)
    word = f"{verdict.word[0].upper()}{verdict.word[1:]}"
    sentence = f"{word} ({verdict.why}). {claim.statistic}: {estimate} ({claim.unit}; δ {claim.delta:g})."
    return Finding(
        claim=claim,
        verdict=verdict.word,
        note=verdict.note,
        sentence=sentence,
        estimate=estimate,
        nulls=nulls,
        gates=gate_table(gates),
        parts=_per_base(races),
        pairs=races,
        secondary=_halves(differences, claim),
        null_table=pd.DataFrame(
            [("primary", name, *_row(null.interval), null.inside(claim.delta), null.void) for name, null in nulls.items()],
            columns=["reading", "null", "mean", "low", "high", "n", "unit", "inside", "void"],
        ),
        partitions=pd.DataFrame(columns=["model", "partition"]),
        recruitment=pd.DataFrame(columns=RECRUITMENT),
        excluded=failed_runs(frames["failed"]) if "failed" in frames else [],
    )


def race(trained: Sequence[pd.DataFrame], left: pd.DataFrame) -> Race:
    """Fit on some bases, each standardized by itself, and predict another.

    Args:
        trained: components of one kind, one frame per base: grown, cause, the rivals, weight_norm, layer.
        left: of the base that is predicted.
    """
    rivals = [*RIVALS, "weight_norm", *_layers(left)]
    fit, held = pd.concat([_standard(each) for each in trained], ignore_index=True), _standard(left)
    with_cause, full = _predicted(fit, held, ["cause", *rivals])
    _, bare = _predicted(fit, held, rivals)
    _, alone = _predicted(fit, held, ["cause"])
    return Race(float(np.sign(with_cause[0]) * (full - bare)), full, bare, alone, float(with_cause[0]))


def _predicted(fit: pd.DataFrame, held: pd.DataFrame, columns: Sequence[str]) -> tuple[np.ndarray, float]:
    """Least squares on one frame, and R² on another, whose outcome has mean 0 and variance 1."""
    coefficients, *_ = np.linalg.lstsq(fit[list(columns)].to_numpy(), fit["grown"].to_numpy(), rcond=None)
    error = held["grown"].to_numpy() - held[list(columns)].to_numpy() @ coefficients
    return coefficients, float(1 - (error**2).mean())


def _standard(table: pd.DataFrame) -> pd.DataFrame:
    """Mean 0 and variance 1 of every column within the base; layers as indicators, centred; constants become 0."""
    layers = pd.get_dummies(table["layer"], prefix="layer", dtype="float64")
    found = pd.concat([table[["grown", "cause", *RIVALS, "weight_norm"]], layers], axis=1)
    spread = found.std(ddof=0)
    return (found - found.mean()) / spread.where(spread > 0, 1.0)


def _layers(table: pd.DataFrame) -> list[str]:
    return [f"layer_{layer}" for layer in sorted(table["layer"].unique())[1:]]


def _differences(table: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """One row per base and component, seeds averaged: grown, cause and rivals, arm A less arm B.

    Raises:
        RunError: an arm was not run.
    """
    arms = []
    for arm in (first, second):
        rows = table[table["arm"] == arm]
        if rows.empty:
            raise RunError(f"arm {arm!r} has no run that ablated every component one by one")
        rows = rows.assign(grown=rows["after"] - rows["before"])
        arms.append(rows.groupby(["model", *KEY])[["grown", "cause", "before", *RIVALS, "weight_norm"]].mean())
    both = arms[0].index.intersection(arms[1].index)
    one, other = (arm.loc[both] for arm in arms)
    found = one[["grown", "cause", *RIVALS]] - other[["grown", "cause", *RIVALS]]
    return found.assign(weight_norm=one["weight_norm"], before=one["before"]).reset_index()


def _of_identical(table: pd.DataFrame, differences: pd.DataFrame, arms: tuple[str, str]) -> pd.DataFrame:
    """What two seeds of one arm differ in, with the causes of the real pair of arms: nothing located happened there."""
    rows = []
    for arm in arms:
        runs = table[table["arm"] == arm]
        for model, group in runs.groupby("model"):
            seeds = sorted(group["seed"].unique())
            for one, other in zip(seeds[::2], seeds[1::2], strict=False):
                pair = [group[group["seed"] == seed].set_index(KEY) for seed in (one, other)]
                grown = (pair[0]["after"] - pair[0]["before"]) - (pair[1]["after"] - pair[1]["before"])
                rows.append(grown.rename("grown").reset_index().assign(model=model))
    if not rows:
        return differences.iloc[:0]
    mean = pd.concat(rows).groupby(["model", *KEY], as_index=False)["grown"].mean()
    return differences.drop(columns="grown").merge(mean, on=["model", *KEY])


def _races(differences: pd.DataFrame, kinds: Sequence[str]) -> pd.DataFrame:
    """One row per base and kind: the race in that base, fitted on all others. Empty with fewer than two bases."""
    rows = []
    models = sorted(differences["model"].unique())
    if len(models) > 1:
        for kind in kinds:
            of_kind = differences[differences["kind"] == kind]
            bases = {model: of_kind[of_kind["model"] == model] for model in models}
            for model in models:
                found = race([each for name, each in bases.items() if name != model], bases[model])
                rows.append({"model": model, "kind": kind, **found._asdict()})
    return pd.DataFrame(rows, columns=["model", "kind", *Race._fields])


def _estimate(races: pd.DataFrame) -> Interval:
    return t_interval(_per_base(races)["statistic"], unit="base, mean over kinds of component")


def _per_base(races: pd.DataFrame) -> pd.DataFrame:
    """Mean over kinds, one row per base."""
    means = races.groupby("model")[list(Race._fields)].agg(lambda values: values.mean(skipna=False)).reset_index()
    return means.rename(columns={"gain": "statistic"}).assign(seeds=1)


def _figure(name: str, differences: pd.DataFrame, kinds: Sequence[str]) -> tuple[float, str]:
    if name == "organisms":
        whole = differences.groupby("model")["kind"].nunique()
        return float((whole == len(kinds)).sum()), ""
    raise RunError(f"unknown gate {name!r}; expected organisms")


def _halves(differences: pd.DataFrame, claim: ComponentClaim) -> pd.DataFrame:
    """The same among components that support the outputs of arm A more than those of arm B, among opposers, and by kind."""
    some: Mapping[str, tuple[pd.DataFrame, Sequence[str]]] = {
        SUPPORTERS: (differences[differences["cause"] > 0], claim.cell.kinds),
        OPPOSERS: (differences[differences["cause"] < 0], claim.cell.kinds),
        **{f"{kind}s alone": (differences, (kind,)) for kind in claim.cell.kinds},
    }
    rows = []
    for name, (table, kinds) in some.items():
        found = _estimate(_races(table, kinds))
        verdict = decide(found, claim.delta, {}, [])
        rows.append((name, "steps", claim.cell.reference, *_row(found), verdict.word, verdict.note, verdict.why))
    columns = ["reading", "matching", "reference", "mean", "low", "high", "n", "unit", "verdict", "note", "why"]
    return pd.DataFrame(rows, columns=columns)


def _row(interval: Interval) -> tuple:
    return interval.mean, interval.low, interval.high, interval.n, interval.unit
