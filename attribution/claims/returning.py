"""Does what was trained away come back faster than what was never there is learned? Both from one level, in as many steps.

Replies that were never there begin far below those that were trained away, and what is surprising rises fast: so their rise is
counted from where they reach the level at which the others begin. Reads runs of the study's arms: "away" from the base, "back"
and "never there" from the model that "away" left, under the name of the base.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from attribution.claims.claim import MeasuredClaim
from attribution.claims.frames import Frames, needed, trajectories
from attribution.claims.matching import crossing, value_at
from attribution.claims.measured import STATISTIC, Measured
from attribution.claims.statistics import strict_means
from attribution.store import TRAINING

AWAY, BACK, NEVER = "away", "back", "never there"
STEPS = 4  # of training back


def returning(claim: MeasuredClaim, frames: Frames, elicited: str, mechanism: str, read_on: str) -> Measured:
    """What the claim's statistic is measured from: `probes` and, for what is shown beside it, `sets`.

    Args:
        claim: whose reference counts.
        frames: of the study.
        elicited: the probe set of a strong cue.
        mechanism: whose influence is shown, before and after training away.
        read_on: the probe set that it is read on.

    Raises:
        RunError: there are no probes.
    """
    probes = needed(frames, "probes", "run the arms away, back and never there")
    series = trajectories(probes, ["model", "arm", "seed", "probe"], ["metric", "probability"])
    influence = _influences(frames, claim.cell.reference, mechanism, read_on)
    rows, excluded = [], []
    for model, seed in sorted({(model, seed) for model, arm, seed, _ in series if arm == AWAY}):
        returned, learned = (series.get((model, arm, seed, TRAINING)) for arm in (BACK, NEVER))
        if returned is None or learned is None:
            excluded.append(f"{model}, seed {seed}, is left out: it was not trained back in both arms.")
            continue
        back, never = returned["metric"], learned["metric"]
        level, lowest = value_at(back, 0.0), value_at(never, 0.0)
        begun = 0.0 if lowest >= level else crossing(never - lowest, level - lowest)
        rise = value_at(never, begun + STEPS) - value_at(never, begun)
        if not np.isfinite(rise):
            excluded.append(
                f"{model}, seed {seed}, is left out: what was never there was not trained {STEPS} steps from there."
            )
            continue
        away = series.get((model, AWAY, seed, elicited))
        rows.append({
            "model": model, "seed": seed, STATISTIC: value_at(back, STEPS) - level - rise,
            "rise of what was trained away": value_at(back, STEPS) - level, "rise of what was never there": rise,
            "steps to that level": begun,
            "at equal steps": value_at(back, STEPS) - level - (value_at(never, STEPS) - value_at(never, 0.0)),
            "p elicited before": np.nan if away is None else away["probability"].iloc[0],
            "p elicited after": np.nan if away is None else away["probability"].iloc[-1],
            **influence.get((model, seed), {}),
        })  # fmt: skip
    table = pd.DataFrame(rows, columns=None if rows else ["model", "seed", STATISTIC, "at equal steps"])
    bases = strict_means(table, ["model"], [name for name in table if name not in ("model", "seed")]).reset_index()
    beside = {"from where each begins, in as many steps": bases["at equal steps"]}
    return Measured(bases=bases, details=table, beside=beside, nulls={}, figures={}, excluded=excluded)


def _influences(frames: Frames, reference: str, mechanism: str, read_on: str) -> dict[tuple[str, int], dict[str, float]]:
    """Influence of the mechanism before training away and after, by model and seed."""
    sets = frames.get("sets")
    if sets is None or sets.empty:
        return {}
    rows = sets[(sets["set"] == mechanism) & (sets["probe"] == read_on) & (sets["arm"] == AWAY)]
    rows = rows[rows["reference"].astype(str) == reference]
    found = trajectories(rows, ["model", "seed"], ["effect"])
    return {
        (str(key[0]), int(key[1])): {
            "influence before": float(each["effect"].iloc[0]), "influence after": float(each["effect"].iloc[-1]),
        }
        for key, each in found.items()
    }  # fmt: skip
