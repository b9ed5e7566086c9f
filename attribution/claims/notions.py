"""Are the notion that is spoken of and the one that acts one? Correlation of their causes, against a noise ceiling."""

from __future__ import annotations

import numpy as np

from attribution.claims.claim import MeasuredClaim
from attribution.claims.frames import Frames, needed
from attribution.claims.measured import STATISTIC, Measured

PRIMARY = "head and neuron"


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
    bases = wide[wide["kind"] == PRIMARY].drop(columns="kind").reset_index(drop=True)
    least = bases["ceiling"].fillna(0.0)
    place = int(least.to_numpy().argmin()) if len(least) else 0
    figure = (float(least.iloc[place]), str(bases["model"].iloc[place])) if len(least) else (np.nan, "")
    others = {f"{kind}s alone": group[STATISTIC] for kind, group in wide[wide["kind"] != PRIMARY].groupby("kind")}
    return Measured(bases=bases, details=wide, beside=others, nulls={}, figures={"ceiling": figure}, excluded=[])
