"""At which step arms are compared: where both have moved equally far, found by interpolation and never beyond the record.

Knows series over steps; knows nothing about what is read at the steps it finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from attribution.claims.claim import Matching
from attribution.claims.frames import NEUTRAL, trajectories
from attribution.errors import RunError
from attribution.store import TRAINING

Run = tuple[str, str, int]  # model, arm, seed


def reading_name(what: str, matching: Matching, reference: str) -> str:
    """How one reading of a statistic is called in tables and sentences."""
    matched = "equal steps" if matching == "steps" else f"{matching.replace('kl', 'KL')}-matched"
    return f"{what}, {matched}, reference {reference}"


@dataclass(frozen=True)
class Matched:
    """Steps at which arms that belong together are read.

    Attributes:
        target: value of the matched quantity, NaN for equal steps.
        steps: one per arm, in the order asked; fractional; NaN where the arm cannot be read.
        reasons: one per arm, empty where it can.
    """

    target: float
    steps: tuple[float, ...]
    reasons: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return not any(self.reasons)


def quantity(probes: pd.DataFrame, matching: Matching) -> dict[Run, pd.Series]:
    """What is matched, over steps, for every run.

    "kl": KL(now || start) on the neutral probes, nats. "gain": metric on the arm's training samples minus its own value at
    step 0, nats. "steps": the step itself.

    Raises:
        RunError: the study did not record it.
    """
    name, column = (TRAINING, "metric") if matching == "gain" else (NEUTRAL, "kl")
    rows = probes[probes["probe"] == name]
    if rows.empty:
        raise RunError(f"the study has no probe set {name!r}, by which arms are matched; record it and run again")
    found = {}
    for run, values in trajectories(rows, ["model", "arm", "seed"], [column]).items():
        series = values[column]
        if matching == "gain":
            series = series - value_at(series, 0.0)
        found[run] = pd.Series(series.index, index=series.index, dtype="float64") if matching == "steps" else series
    return found


def match(series: Mapping[Run, pd.Series], runs: tuple[Run, ...], matching: Matching, fraction: float) -> Matched:
    """Where to read runs that are compared.

    The target is a fraction of the smallest run's maximum; a run is read at its first crossing, linearly interpolated
    between adjacent recorded steps. Equal steps: the last step that all have recorded. A run without the target (it
    never moved that way, has gaps, was not recorded, or only past the target) is named in `reasons`; nothing is
    extrapolated.

    Args:
        series: of `quantity`.
        runs: those compared.
        matching: what `series` is.
        fraction: of the smallest maximum.
    """
    label = {"kl": "KL", "gain": "gain", "steps": "step"}[matching]
    reasons = tuple(
        "was not recorded" if run not in series
        else f"has a {label} that is not a number" if not np.isfinite(series[run].to_numpy()).all()
        else f"has a {label} that never rises above 0" if matching != "steps" and not series[run].max() > 0
        else ""
        for run in runs
    )  # fmt: skip
    if any(reasons):
        return Matched(np.nan, (np.nan,) * len(runs), reasons)
    if matching == "steps":
        common = set.intersection(*(set(series[run].index) for run in runs))
        last = float(max(common)) if common else np.nan
        return Matched(np.nan, (last,) * len(runs), ("" if common else "shares no step with its partner",) * len(runs))
    target = fraction * min(float(series[run].max()) for run in runs)
    steps = tuple(crossing(series[run], target) for run in runs)
    short = f"does not reach the matching target ({label} {target:.3g})"
    return Matched(target, steps, tuple("" if np.isfinite(step) else short for step in steps))


def crossing(series: pd.Series, target: float) -> float:
    """Fractional step at which a series over steps first reaches a target.

    NaN where it never does, where the target is no rise (<= 0), or where it was already passed at the first record.
    """
    steps, values = series.index.to_numpy(dtype="float64"), series.to_numpy(dtype="float64")
    reached = np.flatnonzero(values >= target)
    if not target > 0 or not len(reached):
        return np.nan
    last = int(reached[0])
    if last == 0:
        return float(steps[0]) if values[0] == target else np.nan
    below, above = values[last - 1], values[last]
    return float(steps[last - 1] + (target - below) / (above - below) * (steps[last] - steps[last - 1]))


def value_at(series: pd.Series, step: float) -> float:
    """Value of a series at a fractional step, linear between adjacent records; NaN outside of them."""
    if not np.isfinite(step) or series.empty:
        return np.nan
    steps, values = series.index.to_numpy(dtype="float64"), series.to_numpy(dtype="float64")
    if step in steps:  # a gap elsewhere, or just behind, does not touch a recorded value
        return float(values[np.flatnonzero(steps == step)[0]])
    return float(np.interp(step, steps, values, left=np.nan, right=np.nan))
