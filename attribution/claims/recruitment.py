"""Where an arm's change sits, and whether it does the job itself or feeds the arm's own mechanism (cross-grafts).

A graft puts the change of one set of components into the model before training. Its gain is the change of the metric in the
direction in which the arm was trained. Interaction: (gain with the own mechanism intact - with it ablated) / gain intact.
Near 1, the grafted change feeds the arm's own mechanism; near 0, it does the job itself. For the own mechanism's graft it
is 1 by construction wherever a change works only through outputs that the ablation replaces.

Describes; gives no verdict.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from attribution.claims.claim import Claim
from attribution.claims.statistics import t_interval

REMAINDER = "remainder"
NEGLIGIBLE = 0.05  # of the summed |gain| of all three grafts: under it an interaction is a ratio of noise
COLUMNS = ["arm", "graft", "quantity", "mean", "low", "high", "n", "negligible"]


def recruitment(claim: Claim, grafts: pd.DataFrame) -> pd.DataFrame:
    """Gain and interaction by arm and grafted set, intervals over organisms (seeds averaged before ratios are taken).

    Args:
        claim: whose cell names arms, mechanisms, probes, signs and control.
        grafts: as `frames.checked` returns them; may be empty.

    Returns:
        Columns arm; graft: own, other or remainder; quantity: gain (nats) or interaction; mean, low, high, n (organisms);
        negligible: organisms left out of an interaction because the gain intact is under 5 % of the arm's summed gains.
    """
    cell = claim.cell
    rows = []
    here = grafts[(grafts["probe"] == cell.probes) & (grafts["model"] != cell.control)]
    for place, arm in enumerate(cell.arms):
        own, other = cell.mechanisms[place], cell.mechanisms[1 - place]
        sign = cell.signs[cell.probes][place]
        names = {own: "own", other: "other", REMAINDER: "remainder"}
        gains = here[(here["arm"] == arm) & here["set"].isin(names)]
        if gains.empty:
            continue
        signed = gains.assign(gain=sign * gains["graft"].astype("float64"), graft=gains["set"].map(names))
        means = {key: g["gain"].to_numpy().mean() for key, g in signed.groupby(["model", "graft", "ablated"])}
        models = sorted(signed["model"].unique())
        for graft in names.values():
            intact = [means.get((model, graft, ""), np.nan) for model in models]
            ratios = [_interaction(means, model, graft, own, list(names.values())) for model in models]
            kept = [ratio for ratio in ratios if ratio is not None]
            for quantity, values in (("gain", intact), ("interaction", kept)):
                found = t_interval(values)
                row = (arm, graft, quantity, found.mean, found.low, found.high, found.n, len(models) - found.n)
                rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def _interaction(means: Mapping, model: str, graft: str, own: str, all_grafts: list[str]) -> float | None:
    """(intact - ablated) / intact; None where the gain intact is negligible, NaN where it was not measured."""
    intact, ablated = means.get((model, graft, ""), np.nan), means.get((model, graft, own), np.nan)
    total = sum(abs(means.get((model, each, ""), 0.0)) for each in all_grafts)
    if abs(intact) <= NEGLIGIBLE * total:
        return None
    return float((intact - ablated) / intact)
