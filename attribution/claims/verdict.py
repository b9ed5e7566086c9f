"""The rule by which figures become a word. It sees intervals, nulls and gates, and nothing else.

Supported: the lower 95 % bound exceeds delta, and the interval of every declared null lies inside ± delta. Contradicted: the
upper bound is below delta. A failed gate comes before both; whatever is left is inconclusive. A figure that is not a number
can only make a verdict weaker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from attribution.claims.claim import Threshold
from attribution.claims.statistics import EQUIVALENCE, Interval
from attribution.errors import ConfigError

SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_TESTABLE = "supported", "contradicted", "inconclusive", "not testable here"
DEPENDS = "inconclusive: depends on matching"
REVERSED, SPARED = "reversed", "relatively spared"  # what else the words must say


@dataclass(frozen=True)
class Gate:
    """A figure against its threshold. `where`: the model in which the worst figure was found, or ""."""

    threshold: Threshold
    value: float
    where: str = ""

    @property
    def passed(self) -> bool:
        return self.threshold.holds(self.value)

    def __str__(self) -> str:
        threshold = self.threshold
        place = f" in {self.where}" if self.where else ""
        figure = "not measured" if math.isnan(self.value) else f"{self.value:.3g}{place}"
        return f"{threshold.meaning} is {figure}, needed {threshold.relation} {threshold.value:g}"


@dataclass(frozen=True)
class Null:
    """The same statistic where nothing located happened. `void`: why it says nothing here, or ""."""

    interval: Interval
    void: str = ""

    def inside(self, delta: float) -> bool:
        """Whether it speaks, and came out null."""
        return not self.void and self.interval.inside(delta)


@dataclass(frozen=True)
class Verdict:
    """A word of the rule, the reason in one clause, and what else must be said ("reversed", "relatively spared", or "")."""

    word: str
    why: str
    note: str = ""


def decide(
    estimate: Interval, delta: float, nulls: Mapping[str, Null], gates: Sequence[Gate], declared: Sequence[str] = ()
) -> Verdict:
    """The verdict on one primary statistic.

    Args:
        estimate: two-sided 95 % interval of the statistic.
        delta: smallest effect of interest, > 0.
        nulls: what the same statistic gives where nothing located happened.
        gates: all that must hold first.
        declared: nulls that the claim names; one that was not measured stands in the way of support.

    Raises:
        ConfigError: delta is not positive.
    """
    _check(delta)
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        return Verdict(NOT_TESTABLE, "; ".join(map(str, failed)))
    if estimate.high < delta:
        reversed_ = estimate.high < -delta
        bound = -delta if reversed_ else delta
        return Verdict(
            CONTRADICTED, f"the upper bound {estimate.high:+.3g} is below {bound:+.3g}", REVERSED if reversed_ else ""
        )
    if not estimate.low > delta:
        if not math.isfinite(estimate.mean):
            return Verdict(INCONCLUSIVE, "the estimate is not a number")
        return Verdict(INCONCLUSIVE, f"the interval {estimate} contains {delta:g}, the smallest effect of interest")
    against = [_null_in_the_way(name, nulls.get(name), delta) for name in dict.fromkeys([*declared, *nulls])]
    against = [reason for reason in against if reason]
    if against:
        return Verdict(INCONCLUSIVE, "; ".join(against))
    quiet = f"and every null lies inside ±{delta:g}" if nulls else "and no null is declared"
    return Verdict(SUPPORTED, f"the lower bound {estimate.low:+.3g} exceeds {delta:g} {quiet}")


def equivalent(interval: Interval, delta: float, gates: Sequence[Gate] = ()) -> Verdict:
    """The verdict on a claim of no difference: supported where the 90 % interval of the difference lies inside ± delta.

    Contradicted where it lies outside on one side; inconclusive otherwise.

    Raises:
        ConfigError: the interval is not one of 90 %, or delta is not positive.
    """
    _check(delta)
    if not math.isclose(interval.level, EQUIVALENCE):
        raise ConfigError(f"an equivalence verdict needs a {EQUIVALENCE:.0%} interval, got {interval.level:.0%}")
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        return Verdict(NOT_TESTABLE, "; ".join(map(str, failed)))
    if interval.inside(delta):
        return Verdict(SUPPORTED, f"the 90 % interval {interval} lies inside ±{delta:g}")
    if interval.low > delta or interval.high < -delta:
        return Verdict(CONTRADICTED, f"the 90 % interval {interval} lies outside ±{delta:g}")
    return Verdict(INCONCLUSIVE, f"the 90 % interval {interval} is not inside ±{delta:g}")


def across_matchings(primary: Verdict, by_gain: Verdict) -> Verdict:
    """The primary verdict, unless matching by gain gives another word. What failed a gate stays not testable."""
    if primary.word == NOT_TESTABLE or primary.word == by_gain.word:
        return primary
    return Verdict(DEPENDS, f"{primary.word} when matched by KL, {by_gain.word} when matched by gain ({by_gain.why})")


def across_references(verdict: Verdict, primary: Interval, own_mean: Interval) -> Verdict:
    """The verdict, at most inconclusive where the estimate with the own-model mean as reference has another sign."""
    if verdict.word in (NOT_TESTABLE, INCONCLUSIVE, DEPENDS) or primary.mean * own_mean.mean > 0:
        return verdict
    return Verdict(
        INCONCLUSIVE, f"{primary.mean:+.3g} with the primary reference, {own_mean.mean:+.3g} with the own-model mean"
    )


def spared(verdict: Verdict, strengthening: Interval) -> Verdict:
    """A supported verdict that says "relatively spared" unless the effect stands without weakening in the other arm.

    Args:
        verdict: of the rule.
        strengthening: 95 % interval of the statistic with every weakening in the other arm set to zero.
    """
    if verdict.word != SUPPORTED or strengthening.low > 0:
        return verdict
    return replace(verdict, note=SPARED)


def conjunction(parts: Mapping[str, Verdict]) -> Verdict:
    """The verdict on a claim that needs all its parts. One contradicted part contradicts it.

    Raises:
        ConfigError: there are no parts.
    """
    if not parts:
        raise ConfigError("a conjunction of no parts has no verdict; give at least one")
    why = "; ".join(f"{name}: {part.word}" for name, part in parts.items())
    words = [part.word for part in parts.values()]
    for word in (CONTRADICTED, NOT_TESTABLE):
        if word in words:
            return Verdict(word, why)
    return Verdict(SUPPORTED if set(words) == {SUPPORTED} else INCONCLUSIVE, why)


def gate_table(gates: Sequence[Gate]) -> pd.DataFrame:
    """Columns name, meaning, value, relation, threshold, passed, where."""
    columns = ["name", "meaning", "value", "relation", "threshold", "passed", "where"]
    rows = [
        (g.threshold.name, g.threshold.meaning, g.value, g.threshold.relation, g.threshold.value, g.passed, g.where)
        for g in gates
    ]
    return pd.DataFrame(rows, columns=columns)


def _null_in_the_way(name: str, null: Null | None, delta: float) -> str:
    if null is None:
        return f"{name} was not measured"
    if null.void:
        return f"{name} is void: {null.void}"
    if null.inside(delta):
        return ""
    known = "is not" if math.isfinite(null.interval.high - null.interval.low) else "cannot be shown to be"
    return f"{name}: {null.interval} {known} inside ±{delta:g}"


def _check(delta: float) -> None:
    if not (delta > 0 and math.isfinite(delta)):
        raise ConfigError(f"the smallest effect of interest is {delta}; expected a number above 0")
