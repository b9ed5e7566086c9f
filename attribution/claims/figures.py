"""Small figures that gates and nulls are made of. A figure that is not a number comes first, never last."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd


def ratio_to_error(before: float, error: float) -> float:
    """Influence in units of its error, signed; infinite where two halves agree exactly."""
    if error > 0 or math.isnan(error) or math.isnan(before):
        return before / error if error else np.nan
    return math.copysign(np.inf, before) if before else np.nan


def smallest(rows: pd.DataFrame, columns: Sequence[str]) -> tuple[float, str]:
    """The smallest figure in some columns and the model it belongs to."""
    values = rows[list(columns)].to_numpy(dtype="float64")
    if not values.size:
        return np.nan, ""
    worst = values.min(axis=1)  # NaN where any is, and argmin takes the first NaN
    place = int(worst.argmin())
    return float(worst[place]), str(rows["model"].iloc[place])


def relative_size(before: Iterable[float], real: Iterable[float]) -> float:
    """Mean absolute influence of some sets, each as a fraction of that of the real one in whose place it stands."""
    found = [abs(one) / abs(other) if other else np.nan for one, other in zip(before, real, strict=True)]
    return float(np.mean(found)) if found else np.nan


def wrong_partitions(sets: Iterable[str], mechanisms: Sequence[str]) -> list[str]:
    """The names wrong-1, wrong-2, … of those partitions of which every mechanism has a set among these."""
    names = set(map(str, sets))
    found = {match[1] for name in names if (match := re.fullmatch(rf"(wrong-\d+) {re.escape(mechanisms[0])}", name))}
    return sorted(each for each in found if all(f"{each} {mechanism}" in names for mechanism in mechanisms))


def too_little(size: float, count: int, which: str, needed: int, least: float) -> str:
    """Why a null that is a mean over partitions says nothing, or "": too few of them, or too little influence to lose."""
    if count < needed:
        return f"{count or 'no'} {which} were measured, {needed} are needed"
    if not size >= least:
        return f"the sets have {size:.0%} of the real mechanisms' influence before, {least:.0%} is needed"
    return ""
