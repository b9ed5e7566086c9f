"""A direction for kindness: what adding it does, whether finetuning moves along it, and how compact the update is.

Reads what `worlds.kindland.shifts` measures, before the middle layer; other layers and arms are given beside it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from attribution.claims.claim import MeasuredClaim
from attribution.claims.frames import Frames, needed
from attribution.claims.measured import STATISTIC, Measured
from attribution.claims.statistics import strict_means
from attribution.errors import RunError

KIND, OTHER_SEED = "kind", "the other seed"
WITHOUT_ROWS, WHOLE = "without trained rows", "whole"


def turned(claim: MeasuredClaim, frames: Frames) -> Measured:
    """How much more the kind reply gains from the direction of kindness than from others as long.

    Reads `turned`: model, layer, direction, change.

    Raises:
        RunError: it is not there.
    """
    table = needed(frames, "turned", "measure what adding directions does")
    wide = _against_others(table, ["model", "layer"], "change")
    primary = wide[wide["layer"] == _middle(wide)]
    others = {f"before layer {layer}": group[STATISTIC] for layer, group in wide.groupby("layer") if layer != _middle(wide)}
    bases = primary.drop(columns="layer").reset_index(drop=True)
    return Measured(bases=bases, details=wide, beside=others, nulls={}, figures={}, excluded=[])


def moved(claim: MeasuredClaim, frames: Frames) -> Measured:
    """How much more the shift by finetuning points along the direction of kindness than along others.

    Reads `shifts`: model, arm, seed, part, layer, direction, cosine; the ceiling is the cosine with the shift of another seed.

    Raises:
        RunError: it is not there, or lacks the claim's arm.
    """
    table = needed(frames, "shifts", "measure how far finetuning moved the stream")
    arm = claim.cell.arms[0]
    if not (table["arm"] == arm).any():
        raise RunError(f"there are no shifts of arm {arm!r}; measure them")
    by = ["model", "arm", "part", "layer"]
    means = strict_means(table, [*by, "direction"], ["cosine"])["cosine"].reset_index()
    ceilings = means[means["direction"] == OTHER_SEED].set_index(by)["cosine"].rename("between seeds")
    wide = _against_others(means[means["direction"] != OTHER_SEED], by, "cosine").join(ceilings, on=by)
    middle = _middle(wide)
    here = (wide["arm"] == arm) & (wide["part"] == WITHOUT_ROWS) & (wide["layer"] == middle)
    others = {
        f"arm {key[0]}, {key[1]}, before layer {key[2]}": group[STATISTIC]
        for key, group in wide[~here].groupby(["arm", "part", "layer"])
        if group[STATISTIC].notna().all()
    }
    bases = wide[here].drop(columns=["arm", "part", "layer"]).reset_index(drop=True)
    least = bases["between seeds"].to_numpy(dtype="float64")
    known = len(least) and not np.isnan(least).any()
    place = (float(least.min()), str(bases["model"].iloc[int(least.argmin())])) if known else (np.nan, "")
    return Measured(bases=bases, details=wide, beside=others, nulls={}, figures={"ceiling": place}, excluded=[])


def few(claim: MeasuredClaim, frames: Frames) -> Measured:
    """How many times fewer components than there are bring about most of the gain, in powers of ten.

    Reads `compact`: model, arm, seed, fewest (missing where not even all do), components, gain. Where not even all do, the
    value is 0: no fewer.

    Raises:
        RunError: it is not there, or lacks the claim's arm.
    """
    table = needed(frames, "compact", "measure how compact updates are")
    fewest = table["fewest"].astype("float64")
    ratio = np.log10(table["components"] / fewest.fillna(table["components"]))
    table = table.assign(**{STATISTIC: ratio, "reached": fewest.notna()})
    means = table.groupby(["model", "arm"])[[STATISTIC, "reached", "gain"]].mean().reset_index()
    arm = claim.cell.arms[0]
    bases = means[means["arm"] == arm].drop(columns="arm").reset_index(drop=True)
    if bases.empty:
        raise RunError(f"the study has no arm {arm!r} of which it is known how compact its update is; measure it")
    others = {f"arm {name}": group[STATISTIC] for name, group in means[means["arm"] != arm].groupby("arm")}
    worst = int(bases["gain"].to_numpy().argmin())
    least = {"gain": (float(bases["gain"].iloc[worst]), str(bases["model"].iloc[worst]))}
    return Measured(bases=bases, details=table, beside=others, nulls={}, figures=least, excluded=[])


def _against_others(table: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """The value of kindness, the mean and the largest of all other directions, and the difference to the mean."""
    wide = table.set_index([*by, "direction"])[value].unstack("direction")
    rest = wide.drop(columns=KIND)
    mean = rest.mean(axis=1, skipna=False)
    columns = {STATISTIC: wide[KIND] - mean, KIND: wide[KIND], "mean of others": mean, "largest of others": rest.max(axis=1)}
    return pd.DataFrame(columns).reset_index()


def _middle(table: pd.DataFrame) -> int:
    """Directions stand before every layer and the final norm; the middle one of them."""
    return int(table["layer"].max()) // 2
