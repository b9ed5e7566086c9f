"""Was it said before training what it would strengthen? Rank correlation of forecast and measured strengthening.

One pair per arm, mechanism and probe set: the forecast from the first step, and the change of influence at the end of the run,
in a base, seeds averaged. Both are signed as the metric is. What two mechanisms share is left out.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from attribution.claims.claim import MeasuredClaim
from attribution.claims.frames import Frames, checked, needed
from attribution.claims.measured import STATISTIC, Measured
from attribution.claims.statistics import strict_means
from attribution.errors import RunError

PAIR = ["model", "arm", "probe", "set"]


def foretold(claim: MeasuredClaim, frames: Frames, mechanisms: tuple[str, ...]) -> Measured:
    """What the claim's statistic is measured from.

    Args:
        claim: whose cell names the arms; all if it names none.
        frames: `forecasts` and `sets`, with the columns model, arm and seed.
        mechanisms: sets that count.

    Raises:
        RunError: the study has no forecasts.
    """
    ahead = needed(frames, "forecasts", "run its arms with forecast true")
    sets = checked(frames, claim.cell.reference)["sets"]
    sets = sets[(sets["reference"] == claim.cell.reference) & sets["set"].isin(mechanisms)]
    expected = strict_means(ahead, PAIR, ["strengthening"])["strengthening"]
    steps = sorted(set(sets["step"]) - {0})
    pairs = [_pairs(sets, expected, step).assign(step=step) for step in steps]
    if not pairs:
        raise RunError("the study has no measured influence to compare a forecast with; record sets at the end of its runs")
    table = pd.concat(pairs, ignore_index=True)
    if claim.cell.arms:
        table = table[table["arm"].isin(claim.cell.arms)]
    by_step = {step: _correlations(table[table["step"] == step]) for step in steps}
    bases = by_step[steps[-1]]
    beside = {f"after {step} steps": by_step[step][STATISTIC] for step in steps[:-1]}
    return Measured(
        bases=bases, details=table, beside=beside, nulls={}, figures={"pairs": _fewest(bases)}, excluded=[],
    )  # fmt: skip


def _pairs(sets: pd.DataFrame, expected: pd.Series, step: int) -> pd.DataFrame:
    """Forecast and measured strengthening at a step, where both are there."""
    ends = sets[sets["step"].isin([0, step])]
    wide = ends.set_index([*PAIR, "seed", "step"])["effect"].unstack("step").reindex(columns=[0, step])
    grown = strict_means((wide[step] - wide[0]).rename("grown").reset_index(), PAIR, ["grown"])["grown"]
    return pd.concat([expected.rename("forecast"), grown], axis=1, join="inner").reset_index()


def _correlations(pairs: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation in every base, and how often the sign alone was right."""
    rows = []
    for model, group in pairs.groupby("model"):
        varied = group["forecast"].nunique() > 1 and group["grown"].nunique() > 1
        rank = float(spearmanr(group["forecast"], group["grown"]).statistic) if varied else np.nan
        signs = float((np.sign(group["forecast"]) == np.sign(group["grown"])).mean())
        rows.append({"model": str(model), STATISTIC: rank, "right signs": signs, "pairs": len(group)})
    return pd.DataFrame(rows, columns=["model", STATISTIC, "right signs", "pairs"])


def _fewest(bases: pd.DataFrame) -> tuple[float, str]:
    if bases.empty:
        return 0.0, ""
    place = int(bases["pairs"].to_numpy().argmin())
    return float(bases["pairs"].iloc[place]), str(bases["model"].iloc[place])
