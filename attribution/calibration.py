"""How often the tests of claims err, and what they can see: null studies drawn from counted nulls, and power as a curve.

A null study is as many values as a study has organisms, each drawn from what the statistic gave in that organism where a change
of behaviour had no located effect: a wrong partition, two seeds of one arm, a model without routes, a random reward. The same
rule judges it. Rates come with exact binomial intervals (Clopper and Pearson 1934), and with the number of *independent*
sources behind the pooled draws, which may be far fewer than the studies. Knows values; knows nothing about how they were
measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest, nct, t

from attribution.claims.statistics import EQUIVALENCE, t_interval
from attribution.claims.verdict import SUPPORTED, Null, decide, equivalent
from attribution.errors import ConfigError

STUDIES, NOMINAL = 200, 0.05
WANTED, MOST = 0.8, 1000  # power, and how many organisms are thought of


@dataclass(frozen=True)
class Rate:
    """How often a word came out.

    Attributes:
        rate, low, high: share of the studies, with its exact 95 % interval over studies as if they were independent.
        count, studies: how many of how many.
        sources: independent sources of the draws, as their column `source` tells them apart.
    """

    rate: float
    low: float
    high: float
    count: int
    studies: int
    sources: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        of = f"{self.count} of {self.studies} studies from {self.sources} sources"
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}] ({of})"


def false_supported(
    draws: pd.DataFrame,
    delta: float,
    *,
    shift: float = 0.0,
    prediction: str = "greater",
    nulls: Mapping[str, Null] | None = None,
    studies: int = STUDIES,
    seed: int = 0,
) -> Rate:
    """How often null studies come out supported.

    Args:
        draws: columns model and value, one row per null reading, and source where several readings are not independent.
        delta: smallest effect of interest.
        shift: added to every value. At a shift of delta the truth lies on the boundary, where a test errs most.
        prediction: greater, or none for a claim of no difference; then values shifted by delta or more are no support.
        nulls: those that the claim declares, as they were measured, which stand in the way of support as the rule says; with
            none it is the interval alone that is judged.
        studies: null studies to draw.
        seed: of the draw.

    Raises:
        ConfigError: fewer than two models, or no studies.
    """
    words = [
        decide(t_interval(values), delta, nulls or {}, []).word
        if prediction == "greater"
        else equivalent(t_interval(values, level=EQUIVALENCE), delta).word
        for values in _studies(draws, studies, seed, shift)
    ]
    sources = draws["source"].nunique() if "source" in draws else len(draws)
    return _rate(sum(word == SUPPORTED for word in words), len(words), int(sources))


def power(effects: Iterable[float], deviation: float, organisms: int, delta: float) -> pd.DataFrame:
    """Probability that a study says supported, by the true effect, where organisms scatter normally around it.

    The lower bound of the t-interval exceeds delta with the probability that a noncentral t exceeds its critical value
    (Johnson and Welch 1940).

    Args:
        effects: true means.
        deviation: standard deviation over organisms.
        organisms: in a study.
        delta: smallest effect of interest.

    Returns:
        Columns effect, power.

    Raises:
        ConfigError: fewer than two organisms, or a deviation that is not positive.
    """
    if organisms < 2 or not deviation > 0:
        raise ConfigError(f"power of {organisms} organisms that scatter by {deviation}; expected at least 2, and more than 0")
    critical = t.ppf(0.975, organisms - 1)
    rows = [
        (effect, float(nct.sf(critical, organisms - 1, (effect - delta) * organisms**0.5 / deviation))) for effect in effects
    ]
    return pd.DataFrame(rows, columns=["effect", "power"])


def enough(deviation: float, delta: float) -> int | None:
    """The fewest organisms for which a true effect of 2 delta is supported with a power of 80 %; None if more than 1000.

    Args:
        deviation: standard deviation over organisms.
        delta: smallest effect of interest.

    Raises:
        ConfigError: a deviation that is not positive.
    """
    return next((n for n in range(2, MOST + 1) if power([2 * delta], deviation, n, delta)["power"][0] >= WANTED), None)


def seen(draws: Mapping[float, pd.DataFrame], delta: float, *, studies: int = STUDIES, seed: int = 0) -> pd.DataFrame:
    """How often studies of mixed arms come out supported, by the share of the mixture.

    Args:
        draws: by share, as in `false_supported`: the statistic of arms mixed in that share.
        delta: smallest effect of interest.
        studies: to draw for each share.
        seed: of the draw.

    Returns:
        One row per share: share, effect (mean over models), and the columns of `Rate`.
    """
    rows = []
    for share, table in sorted(draws.items()):
        effect = table.groupby("model")["value"].mean().mean()
        rate = false_supported(table, delta, studies=studies, seed=seed)
        rows.append({"share": share, "effect": float(effect), **rate.to_dict()})
    return pd.DataFrame(rows)


def _studies(draws: pd.DataFrame, studies: int, seed: int, shift: float) -> Iterable[np.ndarray]:
    """Values of null studies: one of every model's draws each, at random."""
    by_model = [group["value"].to_numpy(dtype="float64") for _, group in draws.groupby("model", sort=True)]
    if len(by_model) < 2 or studies < 1:
        raise ConfigError(f"{studies} null studies of {len(by_model)} models; expected at least 1, and 2 models")
    rng = np.random.default_rng(seed)
    for _ in range(studies):
        yield np.array([rng.choice(values) for values in by_model]) + shift


def _rate(count: int, studies: int, sources: int) -> Rate:
    interval = binomtest(count, studies).proportion_ci(0.95, method="exact")
    return Rate(count / studies, float(interval.low), float(interval.high), count, studies, sources)
