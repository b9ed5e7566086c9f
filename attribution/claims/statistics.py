"""Intervals over organisms: the unit of replication of every statement about a world is the model, not the run or prompt.

Nothing here drops a value: one that is not a number makes the whole interval not a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

EQUIVALENCE = 0.90  # level of the interval that must lie inside the bounds: two one-sided tests at 5 %


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided t-interval.

    Attributes:
        mean, low, high: NaN where a value was not a number; infinite bounds where there is only one value.
        n: number of values.
        unit: what one value stands for.
        level: of confidence.
    """

    mean: float
    low: float
    high: float
    n: int
    unit: str = "organism"
    level: float = 0.95

    def inside(self, delta: float) -> bool:
        """Whether the whole interval lies within ± delta; never where a bound is not a number."""
        return self.low > -delta and self.high < delta

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.n == 0:
            return "not measured"
        if np.isnan(self.mean):
            return "not a number"
        if self.n == 1:
            return f"{self.mean:+.3g} (one value, no interval)"
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


def t_interval(values: Iterable[float], *, level: float = 0.95, unit: str = "organism") -> Interval:
    """Two-sided t-interval of the mean of independent values (Student 1908): mean ± t(n - 1) · s / sqrt(n)."""
    found = np.asarray(list(values), dtype="float64")
    n = len(found)
    if n == 0 or not np.isfinite(found).all():
        return Interval(np.nan, np.nan, np.nan, n, unit, level)
    mean = float(found.mean())
    if n == 1:
        return Interval(mean, -np.inf, np.inf, n, unit, level)
    half = float(t.ppf((1 + level) / 2, n - 1)) * float(found.std(ddof=1)) / n**0.5
    return Interval(mean, mean - half, mean + half, n, unit, level)


def strict_means(rows: pd.DataFrame, by: list[str], columns: list[str]) -> pd.DataFrame:
    """Means of groups, indexed by `by`; a group with a value that is not a number has none."""
    return rows.groupby(by, observed=True)[columns].agg(lambda values: values.mean(skipna=False))


def organism_means(rows: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Means over the training seeds of each model, one row per model, models sorted; NaN is not skipped."""
    found = {model: group[columns].to_numpy(dtype="float64").mean(axis=0) for model, group in rows.groupby("model")}
    return pd.DataFrame.from_dict(found, orient="index", columns=columns).rename_axis("model")


def over_organisms(rows: pd.DataFrame, column: str, *, level: float = 0.95) -> Interval:
    """Interval over models of a column of rows per model and seed, seeds averaged within models first."""
    return t_interval(organism_means(rows, [column])[column], level=level)


def pseudo_values(units: Iterable[Any], statistic: Callable[[list[Any]], float]) -> dict[Any, float]:
    """Jackknife pseudo-values of a statistic of several units (Tukey 1958): n · whole - (n - 1) · without the unit.

    Their mean with its t-interval estimates the statistic where it is no mean over units itself.

    Args:
        units: at least two.
        statistic: of a list of units.
    """
    every = list(units)
    n, whole = len(every), statistic(every)
    return {unit: n * whole - (n - 1) * statistic([other for other in every if other != unit]) for unit in every}
