"""Are the notion that is spoken of and the one that acts one? Correlation of their causes, against a noise ceiling."""

from __future__ import annotations

import numpy as np

from attribution.claims.claim import MeasuredClaim
from attribution.claims.frames import Frames, needed
from attribution.claims.measured import STATISTIC, Measured
from attribution.claims.statistics import strict_means

KINDS = ("head", "neuron")  # each with equal weight: a few heads have most of the effect of all components


def notions(claim: MeasuredClaim, frames: Frames) -> Measured:
    """How far the correlation of two causes stays below what their own noise allows: 1 - between / sqrt(said x enacted).

    Reads `overlap`: model, kind, between, said, enacted. Where halves of the same prompts do not correlate there is no
    ceiling, and no value.

    Raises:
        RunError: it is not there.
    """
    table = needed(frames, "overlap", "measure the causes of saying and of enacting")
    halves = table[["said", "enacted"]]
    ceiling = np.sqrt(halves.prod(axis=1).where((halves > 0).all(axis=1)))
    wide = table.assign(ceiling=ceiling, **{STATISTIC: 1 - table["between"] / ceiling})
    primary = wide[wide["kind"].isin(KINDS)]
    bases = strict_means(primary, ["model"], [STATISTIC, "between", "ceiling"]).reset_index()
    least = primary["ceiling"].fillna(0.0)
    place = int(least.to_numpy().argmin())
    figure = (float(least.iloc[place]), str(primary["model"].iloc[place]))
    others = {f"{kind}s": group[STATISTIC] for kind, group in wide.groupby("kind")}
    return Measured(bases=bases, details=wide, beside=others, nulls={}, figures={"ceiling": figure}, excluded=[])
