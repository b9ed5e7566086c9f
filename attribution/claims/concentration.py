"""Over how many components the causes of an output are spread: the participation ratio, (sum |c|)² / sum c².

It is 1 where one component does it all, and n where n do it alike; the rest of the components may be as many as there are.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from attribution.claims.claim import MeasuredClaim
from attribution.claims.frames import Frames, needed
from attribution.claims.measured import STATISTIC, Measured
from attribution.claims.statistics import strict_means


def concentration(claim: MeasuredClaim, frames: Frames) -> Measured:
    """What the claim's statistic is measured from: `singles`, see `store.singles`.

    Raises:
        RunError: the study lacks them.
    """
    table = needed(frames, "singles", "run its arms with singles 'all'")
    table = table[table["arm"].isin(claim.cell.arms)].assign(grown=table["after"] - table["before"])
    rows = [
        {"model": model, "arm": arm, "seed": seed, "components": len(group), **_ratios(group)}
        for (model, arm, seed), group in table.groupby(["model", "arm", "seed"])
    ]
    names = list(_ratios(table))
    runs = pd.DataFrame(rows, columns=["model", "arm", "seed", "components", *names])
    bases = strict_means(runs, ["model"], names).reset_index().rename(columns={names[0]: STATISTIC})
    beside = {name: bases[name] for name in names[1:]}
    return Measured(bases=bases, details=runs, beside=beside, nulls={}, figures={}, excluded=[])


def participation(values: pd.Series) -> float:
    """Effective number of components; NaN where all values are 0, or one is not a number."""
    size = values.abs().to_numpy(dtype="float64")
    return float(size.sum() ** 2 / (size**2).sum()) if (size**2).sum() else np.nan


def _ratios(group: pd.DataFrame) -> dict[str, float]:
    """The primary one first."""
    found = {"causes of the trained output": participation(group["cause"])}
    for kind in ("head", "neuron"):
        found[f"causes, {kind}s alone"] = participation(group.loc[group["kind"] == kind, "cause"])
    return found | {"influence before": participation(group["before"]), "strengthening": participation(group["grown"])}
