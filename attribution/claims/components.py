"""The claim at the grain of single components: does what caused the output predict what grew, beyond what any gradient does?

Component by component, D = dI(arm A) - dI(arm B) is regressed on C(samples A) - C(samples B) and on the rivals, differenced
in the same way where arms differ in them: opportunity (norm of the first gradient), activity, and besides weight norm and
layer. Base, probes and start are the same, so what is shared cancels. Leave-one-base-out: coefficients come from all other
bases. The statistic of a base is the gain of R² by C over all rivals, with the sign of C's coefficient, mean over kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from attribution.claims.claim import IDENTICAL, MeasuredClaim
from attribution.claims.families import family
from attribution.claims.finding import INTERVAL, interval_row
from attribution.claims.frames import Frames, needed
from attribution.claims.measured import STATISTIC, Measured, interval_of
from attribution.claims.statistics import strict_means
from attribution.claims.verdict import Null
from attribution.errors import RunError

KINDS = ("head", "neuron")  # of components, each with equal weight
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


def components(claim: MeasuredClaim, frames: Frames) -> Measured:
    """What the claim's statistic is measured from: `singles`, see `store.singles`.

    Raises:
        RunError: the study lacks them, or one of the claim's two arms.
    """
    table = needed(frames, "singles", "run its arms with singles 'all'")
    first, second = claim.cell.arms
    differences = _differences(table[table["kind"].isin(KINDS)], first, second)
    races = _races(differences, KINDS)
    identical = _per_base(_races(_of_identical(table, differences, (first, second)), KINDS))[STATISTIC]
    some = {
        SUPPORTERS: (differences[differences["cause"] > 0], KINDS),
        OPPOSERS: (differences[differences["cause"] < 0], KINDS),
        **{f"{kind}s alone": (differences, (kind,)) for kind in KINDS},
    }
    return Measured(
        bases=_per_base(races),
        details=races,
        beside={name: _per_base(_races(rows, kinds))[STATISTIC] for name, (rows, kinds) in some.items()},
        nulls={IDENTICAL: Null(interval_of(claim, identical), "" if len(identical) else "it needs two seeds of an arm")},
        figures={},
        excluded=[],
        explored=_explored(claim, differences),
    )


def _explored(claim: MeasuredClaim, differences: pd.DataFrame) -> pd.DataFrame:
    """Which layers' heads and neurons grew more in the one arm than in the other, with the error over all layers of a kind."""
    rows = []
    for kind in KINDS:
        of_kind = differences[differences["kind"] == kind]
        wide = strict_means(of_kind, ["model", "layer"], ["grown"])["grown"].unstack("layer")
        if len(wide) < 2:
            continue
        tests = family(wide)
        for layer, test in zip(wide, tests.to_dict("records"), strict=True):
            found = interval_of(claim, wide[layer])
            said = f"exploratory: p {test['p']:.2g}, {test['p_family']:.2g} over all layers (max-T), q {test['q']:.2g}"
            where = (f"{kind}s of layer {layer}, growth in {claim.cell.arms[0]} less {claim.cell.arms[1]} (nats)", "steps")
            rows.append((*where, claim.cell.reference, *interval_row(found), "", "", said))
    return pd.DataFrame(rows, columns=["reading", "matching", "reference", *INTERVAL, "verdict", "note", "why"])


def race(trained: Sequence[pd.DataFrame], left: pd.DataFrame) -> Race:
    """Fit on some bases, each standardized by itself, and predict another.

    Args:
        trained: components of one kind, one frame per base: grown, cause, the rivals, weight_norm, layer.
        left: of the base that is predicted.
    """
    layers = sorted({layer for each in (*trained, left) for layer in each["layer"].unique()})
    rivals = [*RIVALS, "weight_norm", *(f"layer_{layer}" for layer in layers[1:])]
    fit, held = pd.concat([_standard(each, layers) for each in trained], ignore_index=True), _standard(left, layers)
    with_cause, full = _predicted(fit, held, ["cause", *rivals])
    _, bare = _predicted(fit, held, rivals)
    _, alone = _predicted(fit, held, ["cause"])
    return Race(float(np.sign(with_cause[0]) * (full - bare)), full, bare, alone, float(with_cause[0]))


def _predicted(fit: pd.DataFrame, held: pd.DataFrame, columns: Sequence[str]) -> tuple[np.ndarray, float]:
    """Least squares on one frame, and R² on another, whose outcome has mean 0 and variance 1; NaN where a value is none."""
    used = ["grown", *columns]
    if not (np.isfinite(fit[used].to_numpy()).all() and np.isfinite(held[used].to_numpy()).all()):
        return np.full(len(columns), np.nan), np.nan
    coefficients, *_ = np.linalg.lstsq(fit[list(columns)].to_numpy(), fit["grown"].to_numpy(), rcond=None)
    error = held["grown"].to_numpy() - held[list(columns)].to_numpy() @ coefficients
    return coefficients, float(1 - (error**2).mean())


def _standard(table: pd.DataFrame, layers: Sequence[int]) -> pd.DataFrame:
    """Mean 0 and variance 1 of every column within the base; layers as indicators, centred; constants become 0."""
    indicators = {f"layer_{layer}": (table["layer"] == layer).astype("float64") for layer in layers}
    found = pd.concat([table[["grown", "cause", *RIVALS, "weight_norm"]], pd.DataFrame(indicators)], axis=1)
    spread = found.std(ddof=0, skipna=False)
    return (found - found.mean(skipna=False)) / spread.where(spread != 0, 1.0)


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
        arms.append(strict_means(rows, ["model", *KEY], ["grown", "cause", "before", *RIVALS, "weight_norm"]))
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
    mean = strict_means(pd.concat(rows), ["model", *KEY], ["grown"]).reset_index()
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


def _per_base(races: pd.DataFrame) -> pd.DataFrame:
    """Mean over kinds, one row per base."""
    means = races.groupby("model")[list(Race._fields)].agg(lambda values: values.mean(skipna=False)).reset_index()
    return means.rename(columns={"gain": STATISTIC})
