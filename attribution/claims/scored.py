"""How well do sums of scores say what happens to random sets of components? One rank correlation per model and score."""

from __future__ import annotations

from attribution.claims.claim import MeasuredClaim
from attribution.claims.frames import Frames, needed
from attribution.claims.measured import STATISTIC, Measured
from attribution.errors import RunError

ABLATION, GRAFT = "linear ablation score of first-order causes", "linear graft score of update shares"
ABLATION_HALF, GRAFT_ONE_END = "the same, half of all components", "the same, grafts alone"


def scored(claim: MeasuredClaim, frames: Frames) -> Measured:
    """What the claim's statistic is measured from: `scores`, with the columns model, score and value.

    Raises:
        RunError: it is not there, or lacks the primary score.
    """
    table = needed(frames, "scores", "compare scores of components with sets that are ablated and grafted")
    wide = table.set_index(["model", "score"])["value"].unstack("score")
    if ABLATION not in wide:
        raise RunError(f"there is no {ABLATION!r}; measure it")
    bases = wide[[ABLATION]].rename(columns={ABLATION: STATISTIC}).reset_index()
    others = {str(name): wide[name] for name in wide if name != ABLATION}
    return Measured(bases=bases, details=table, beside=others, nulls={}, figures={}, excluded=[])
