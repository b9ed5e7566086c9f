"""Are idle components recruited: how much of what training brought feeds the mechanism at work from early parts of another?

Reads what `experiments.recruited` measures: grafts of halves of mechanisms while nothing, or a mechanism, is ablated. That
part of a graft's gain feeds a mechanism which is lost while it is ablated. Whatever changes early may feed what comes later:
the change of the same parts in the arm where they are themselves at work is subtracted.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from attribution.claims.claim import MeasuredClaim
from attribution.claims.frames import Frames, needed
from attribution.claims.measured import STATISTIC, Measured
from attribution.claims.statistics import strict_means
from attribution.errors import RunError

EARLY, LATE, REMAINDER = "early", "late", "remainder"
ALONE, TOGETHER = "alone", "agree"  # prompts with the cue of one mechanism, and of both
OWN, HERE, THERE = "own gain", "fed", "fed by what it became in the arm where it is at work"
SHOWN = [OWN, "gain", HERE, THERE]


def recruited(claim: MeasuredClaim, frames: Frames) -> Measured:
    """What idle early components came to bring to the mechanism at work, as a fraction of what its own change does.

    Reads `recruited`: model, arm, seed, probe ("A alone", "B alone", "agree"), set ("A", "A, early", "A, late", those of B, and
    the remainder), ablated ("", "A" or "B"), graft. An arm has the name of the mechanism that is at work in it.

    Raises:
        RunError: it is not there, or lacks a graft.
    """
    table = needed(frames, "recruited", "measure what halves of mechanisms bring about")
    keys = ["model", "arm", "probe", "set", "ablated"]
    gains = strict_means(table, keys, ["graft"])["graft"]
    rows = []
    for model in sorted(table["model"].unique()):
        for arm, idle in zip(claim.cell.arms, claim.cell.arms[::-1], strict=True):
            for probe in (f"{arm} {ALONE}", TOGETHER):
                own = np.float64(_gain(gains, model, arm, probe, arm) or np.nan)  # of nothing there is no fraction
                for part, name in ((EARLY, f"{idle}, {EARLY}"), (LATE, f"{idle}, {LATE}"), (REMAINDER, REMAINDER)):
                    gain = _gain(gains, model, arm, probe, name)
                    here, there = (
                        _gain(gains, model, each, probe, name) - _gain(gains, model, each, probe, name, arm)
                        for each in (arm, idle)
                    )
                    rows.append((model, arm, probe, part, own, gain / own, here / own, there / own, (here - there) / own))
    found = pd.DataFrame(rows, columns=["model", "arm", "probe", "part", *SHOWN, STATISTIC])
    alone = found[found["probe"] != TOGETHER]
    early = alone[alone["part"] == EARLY]
    others = {f"arm {arm}": rows.set_index("model")[STATISTIC] for arm, rows in early.groupby("arm")}
    others["late half"] = _by_model(alone, LATE)
    others["cues of both"] = _by_model(found[found["probe"] == TOGETHER], EARLY)
    others |= {f"early half, {name}": _by_model(alone, EARLY, name) for name in (HERE, THERE)}
    others[f"remainder, {HERE}"] = _by_model(alone, REMAINDER, HERE)
    worst = early.loc[early[OWN].fillna(0).idxmin()]
    least = {"gain": (float(worst[OWN]), f"{worst['model']}, arm {worst['arm']}")}
    bases = early.groupby("model")[[*SHOWN, STATISTIC]].mean().reset_index()
    return Measured(bases=bases, details=found, beside=others, nulls={}, figures=least, excluded=[])


def _by_model(rows: pd.DataFrame, part: str, column: str = STATISTIC) -> pd.Series:
    return rows[rows["part"] == part].groupby("model")[column].mean()


def _gain(gains: pd.Series, *key: str) -> float:
    """Of a model, arm, probe set and grafted set, with nothing or the last named ablated."""
    model, arm, probe, grafted, *ablated = key
    try:
        return float(gains[model, arm, probe, grafted, ablated[0] if ablated else ""])
    except KeyError:
        raise RunError(
            f"no graft of {grafted!r} is measured on {probe!r} in arm {arm!r} of {model}"
            + (f" with {ablated[0]} ablated" if ablated else "")
            + "; measure it"
        ) from None
