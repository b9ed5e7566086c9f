"""How much of what an arm learned sits near the output, and whether that grows with how surprising its replies were.

The change of the metric on an arm's own samples is divided among unembedding rows, the last layer's components, and the rest
(with the remainder) by the Shapley value (Shapley 1953), whose coalitions are grafts: v(S) is what the change of S does, put
into the model before training. Shallow share: rows and last layer over the whole. Statistic of a base: slope of that share on
surprise, -log of the mean probability of the replies before training, within contexts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from attribution.claims.claim import MeasuredClaim
from attribution.claims.frames import Frames, needed
from attribution.claims.measured import STATISTIC, Measured
from attribution.claims.statistics import strict_means
from attribution.store import TRAINING

RUN = ["model", "arm", "seed"]
LEAST_GAIN = 0.25  # nats: an arm that learned less has no share to speak of
SLOPES = ("model", STATISTIC, "slope of rows", "slope of last layer", "slope across contexts", "arms", "mean share")
LEVELS = 3  # surprises within a context that a slope needs


def shallow(claim: MeasuredClaim, frames: Frames) -> Measured:
    """What the claim's statistic is measured from: `group_grafts` and `probes`, with the columns model, arm and seed.

    Raises:
        RunError: the study lacks them.
    """
    grafts = needed(frames, "group_grafts", "run its arms with grafts 'depth'")
    runs = _runs(claim, grafts, frames["probes"])
    still = runs["gain"] < LEAST_GAIN  # a gain that is not a number is no reason to leave a run out
    learned = runs[~still]
    excluded = [
        f"{row.model}, arm {row.arm}, seed {row.seed}, is left out: it gained {row.gain:.2g} nats, {LEAST_GAIN:g} are needed."
        for row in runs[still].itertuples()
    ]
    values = ["surprise", "gain", "rows", "last layer", "share"]
    means = strict_means(learned, ["model", "arm", "context"], values).reset_index()
    bases = pd.DataFrame([_slopes(str(model), group) for model, group in means.groupby("model")], columns=list(SLOPES))
    beside = {
        "rows alone": bases["slope of rows"],
        "last layer alone": bases["slope of last layer"],
        "across contexts": bases["slope across contexts"],
    }
    return Measured(
        bases=bases, details=runs, beside=beside, nulls={}, figures={"levels": _levels(means)},
        excluded=excluded,
    )  # fmt: skip


def shapley(values: Mapping[str, float], total: float) -> dict[str, float]:
    """Shapley values of three players from what coalitions do.

    Args:
        values: by "rows", "last layer" and "both" the graft of each, and by "without rows", "without last layer" and "without
            both" that of the rest of the whole change.
        total: of the whole change.

    Returns:
        By "rows", "last layer" and "rest"; they add up to the total.
    """
    alone = {"rows": values["rows"], "last layer": values["last layer"], "rest": values["without both"]}
    pairs = {
        frozenset(("rows", "last layer")): values["both"],
        frozenset(("last layer", "rest")): values["without rows"],
        frozenset(("rows", "rest")): values["without last layer"],
    }
    found = {}
    for player in alone:
        others = [other for other in alone if other != player]
        joined = sum(pairs[frozenset((player, other))] - alone[other] for other in others)
        found[player] = alone[player] / 3 + joined / 6 + (total - pairs[frozenset(others)]) / 3
    return found


def _runs(claim: MeasuredClaim, grafts: pd.DataFrame, probes: pd.DataFrame) -> pd.DataFrame:
    """One row per run of the claim's arms: surprise, gain, Shapley values and shallow share."""
    training = probes[(probes["probe"] == TRAINING) & probes["arm"].isin(claim.cell.arms)]
    start = training[training["step"] == 0].set_index(RUN)["probability"].astype("float64")
    rows = []
    of_training = grafts[(grafts["probe"].astype(str) == TRAINING) & grafts["arm"].isin(claim.cell.arms)]
    for key, group in of_training.groupby(RUN, observed=True):
        table = group.astype({"group": str}).set_index("group")
        total = float(table["total"].iloc[0])
        values = {name: float(table.loc[name, "graft"]) for name in table.index}
        values |= {f"without {name}": total - float(table.loc[name, "prune"]) for name in table.index}
        found = shapley(values, total)
        near = found["rows"] + found["last layer"]
        model, arm, seed = key
        rows.append({
            "model": model, "arm": arm, "seed": seed, "context": str(arm).partition(",")[0],
            "surprise": -np.log(start[key]), "gain": total, **found, "share": near / total if total else np.nan,
        })  # fmt: skip
    columns = [*RUN, "context", "surprise", "gain", "rows", "last layer", "rest", "share"]
    return pd.DataFrame(rows, columns=columns)


def _slopes(model: str, arms: pd.DataFrame) -> dict[str, object]:
    """Slopes on surprise in one base: of the shallow share within contexts, of its two parts, and across contexts."""
    parts = {STATISTIC: arms["share"], "slope of rows": arms["rows"] / arms["gain"]}
    parts["slope of last layer"] = arms["last layer"] / arms["gain"]
    within = arms["surprise"] - arms["surprise"].groupby(arms["context"]).transform("mean")
    slopes = {name: _slope(within, share - share.groupby(arms["context"]).transform("mean")) for name, share in parts.items()}
    across = _slope(arms["surprise"] - arms["surprise"].mean(), arms["share"] - arms["share"].mean())
    return {"model": model, **slopes, "slope across contexts": across, "arms": len(arms), "mean share": arms["share"].mean()}


def _slope(x: pd.Series, y: pd.Series) -> float:
    one, other = x.to_numpy(), y.to_numpy()
    return float(one @ other / (one @ one)) if one @ one else np.nan


def _levels(means: pd.DataFrame) -> tuple[float, str]:
    """The smallest number, over bases, of contexts with enough surprises in them."""
    counts = means.groupby(["model", "context"]).size()
    enough = (counts >= LEVELS).groupby("model").sum()
    return (float(enough.min()), str(enough.idxmin())) if len(enough) else (0.0, "")
