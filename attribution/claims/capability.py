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
from attribution.claims.statistics import pseudo_values, strict_means
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
    start = strict_means(wide[wide["step"] == 0], ["model", "arm"], ["metric", "probability"])
    end = strict_means(wide[wide["step"] == wide["last"]], ["model", "arm"], ["metric"])["metric"]
    rise = (end - start["metric"]).unstack()
    reasoner, kind = claim.cell.arms
    both = rows.groupby("model")["arm"].nunique() == 2
    lacking = [f"{model} is left out: it was not trained in both arms." for model in both.index[~both]]
    table = pd.DataFrame({
        "skill": start["probability"].unstack()[reasoner], "reasoner": rise[reasoner], "kind": rise[kind],
    })[both]  # fmt: skip
    table = table.assign(difference=table["reasoner"] - table["kind"]).reset_index()
    values = pseudo_values(table["model"], lambda some: _slope(table[table["model"].isin(some)])) if len(table) > 3 else {}
    bases = pd.DataFrame(list(values.items()), columns=["model", STATISTIC]).merge(table, on="model")
    spread = float(np.ptp(table["skill"].to_numpy())) if len(table) else np.nan
    return Measured(bases=bases, details=table, beside={}, nulls={}, figures={"spread": (spread, "")}, excluded=lacking)


def _slope(table: pd.DataFrame) -> float:
    skill, difference = table["skill"].to_numpy(), table["difference"].to_numpy()
    x, y = skill - skill.mean(), difference - difference.mean()
    return float(x @ y / (x @ x)) if x @ x else np.nan
