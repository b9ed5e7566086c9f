"""Whether what training does depends on how well a model reads announcements already: across checkpoints of one base.

Statistic: slope, over checkpoints, of (rise of following a star for a cruel reply in the reasoner's arm, less that in the kind
arm) on the probability of following one before training. One value per checkpoint by the jackknife, of this base only.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from attribution.claims.claim import MeasuredClaim
from attribution.claims.frames import Frames, checked
from attribution.claims.measured import STATISTIC, Measured
from attribution.claims.statistics import pseudo_values
from attribution.errors import RunError


def capability(claim: MeasuredClaim, frames: Frames, probe: str) -> Measured:
    """What the claim's statistic is measured from.

    Args:
        claim: whose cell names the reasoner's arm and the kind one.
        frames: `probes`, of checkpoints as models.
        probe: prompts on which an announced cruel reply is followed.

    Raises:
        RunError: the study lacks the probe set or an arm.
    """
    probes = checked(frames, claim.cell.reference, ("probes",))["probes"]
    rows = probes[(probes["probe"] == probe) & probes["arm"].isin(claim.cell.arms)]
    if set(claim.cell.arms) - set(rows["arm"]):
        raise RunError(f"the study has no rows of {', '.join(claim.cell.arms)} on {probe!r}, on which claim {claim.id!r} rests")
    wide = rows.assign(last=rows.groupby(["model", "arm", "seed"])["step"].transform("max"))
    start = wide[wide["step"] == 0].groupby(["model", "arm"])[["metric", "probability"]].mean()
    end = wide[wide["step"] == wide["last"]].groupby(["model", "arm"])["metric"].mean()
    rise = (end - start["metric"]).unstack()
    reasoner, kind = claim.cell.arms
    table = pd.DataFrame({
        "skill": start["probability"].unstack()[reasoner], "reasoner": rise[reasoner], "kind": rise[kind],
    }).dropna()  # fmt: skip
    table = table.assign(difference=table["reasoner"] - table["kind"]).reset_index()
    values = pseudo_values(table["model"], lambda some: _slope(table[table["model"].isin(some)])) if len(table) > 3 else {}
    bases = pd.DataFrame(list(values.items()), columns=["model", STATISTIC]).merge(table, on="model")
    spread = float(table["skill"].max() - table["skill"].min()) if len(table) else np.nan
    return Measured(bases=bases, details=table, beside={}, nulls={}, figures={"spread": (spread, "")}, excluded=[])


def _slope(table: pd.DataFrame) -> float:
    x, y = table["skill"] - table["skill"].mean(), table["difference"] - table["difference"].mean()
    return float((x * y).sum() / (x**2).sum()) if (x**2).sum() else np.nan
