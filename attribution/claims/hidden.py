"""Do few weights change, or does bf16 hide the change? Fractions of weights that a training changed, by format and rate."""

from __future__ import annotations

from attribution.claims.claim import MeasuredClaim
from attribution.claims.frames import Frames, needed
from attribution.claims.measured import STATISTIC, Measured
from attribution.errors import RunError

WHOLE, HALF = "float32", "bfloat16"
RATE = 1e-5  # the learning rate of the primary statistic


def hidden(claim: MeasuredClaim, frames: Frames) -> Measured:
    """What the claim's statistic is measured from: `changed`, with the columns model, dtype, rate and changed.

    Raises:
        RunError: it is not there, or lacks a format or the primary rate.
    """
    table = needed(frames, "changed", "measure which fraction of the weights a training changed")
    if not {WHOLE, HALF} <= set(table["dtype"]) or not (table["rate"] == RATE).any():
        raise RunError(f"there are no fractions of changed weights in {WHOLE} and {HALF} at a rate of {RATE:g}; measure them")
    wide = table.pivot_table(index=["model", "rate"], columns="dtype", values="changed").reset_index()
    wide = wide.assign(hidden=wide[WHOLE] - wide[HALF])
    primary = wide[wide["rate"] == RATE]
    others = {f"at a rate of {rate:g}": group["hidden"] for rate, group in wide[wide["rate"] != RATE].groupby("rate")}
    bases = primary.rename(columns={"hidden": STATISTIC}).drop(columns="rate").reset_index(drop=True)
    return Measured(bases=bases, details=wide, beside=others, nulls={}, figures={}, excluded=[])
