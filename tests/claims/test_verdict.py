"""The rule: every branch of it, and how often it errs where the truth is known."""

import math
from itertools import pairwise

import numpy as np
import pytest

from attribution.claims import BOOST
from attribution.claims.statistics import Interval, t_interval
from attribution.claims.verdict import (
    Gate,
    Null,
    Verdict,
    across_matchings,
    across_references,
    conjunction,
    decide,
    equivalent,
    gate_table,
    spared,
)  # fmt: skip
from attribution.errors import ConfigError

DELTA, NAN, INF = 0.1, math.nan, math.inf
INSIDE = {"null": Null(Interval(0, -0.05, 0.05, 5))}
STUDIES = 4000


def interval(low, high, level=0.95):
    return Interval((low + high) / 2, low, high, 5, level=level)


def gate(value):
    return Gate(BOOST.gates[1], value, "planted/3")


@pytest.mark.parametrize(
    ("low", "high", "word", "note"),
    [
        (0.11, 0.5, "supported", ""),
        (0.10, 0.5, "inconclusive", ""),
        (-0.2, 0.5, "inconclusive", ""),
        (0.02, 0.09, "contradicted", ""),
        (-0.3, 0.09, "contradicted", ""),
        (-0.3, -0.09, "contradicted", ""),
        (-0.3, -0.11, "contradicted", "reversed"),
        (-INF, INF, "inconclusive", ""),
        (NAN, NAN, "inconclusive", ""),
    ],
)
def test_the_interval_decides(low, high, word, note):
    found = decide(interval(low, high), DELTA, INSIDE, [gate(9.0)])
    assert (found.word, found.note) == (word, note) and found.why


@pytest.mark.parametrize("value", [5.0, -9.0, NAN])
def test_a_failed_gate_comes_first_and_shows_its_figure(value):
    found = decide(interval(0.3, 0.5), DELTA, INSIDE, [gate(9.0), gate(value)])
    assert found.word == "not testable here" and "needed > 5" in found.why
    assert ("not measured" if math.isnan(value) else f"{value:g} in planted/3") in found.why
    table = gate_table([gate(9.0), gate(value)])
    assert table["passed"].tolist() == [True, False] and table["threshold"].tolist() == [5, 5]


@pytest.mark.parametrize(
    "null",
    [
        Null(interval(-0.11, 0.0)),
        Null(interval(0.0, 0.11)),
        Null(interval(NAN, NAN)),
        Null(interval(-INF, INF)),
        Null(interval(-0.01, 0.01), void="too weak"),
    ],
)
def test_every_null_must_speak_and_come_out_null(null):
    found = decide(interval(0.3, 0.5), DELTA, {**INSIDE, "other": null}, [])
    assert found.word == "inconclusive" and "other" in found.why and null.void in found.why
    assert decide(interval(-0.3, 0.05), DELTA, {"other": null}, []).word == "contradicted"


def test_of_one_value_nothing_is_said_that_only_an_interval_could_show():
    said = decide(interval(0.2, 0.4), DELTA, {"null": Null(Interval(-0.012, -INF, INF, 1))}, []).why
    assert said == "null: -0.012 (one value, no interval) cannot be shown to be inside ±0.1"


def test_a_declared_null_that_was_not_measured_forbids_support():
    found = decide(interval(0.3, 0.5), DELTA, INSIDE, [], declared=("null", "control"))
    assert (found.word, found.why) == ("inconclusive", "control was not measured")


def test_matchings_must_agree():
    yes, no, no_gate = (Verdict(word, "why") for word in ("supported", "contradicted", "not testable here"))
    assert across_matchings(yes, yes) is yes
    for pair in ((yes, no), (no, yes), (yes, no_gate)):
        assert across_matchings(*pair).word == "inconclusive: depends on matching"
    assert across_matchings(no_gate, yes) is no_gate


@pytest.mark.parametrize("word", ["supported", "contradicted"])
def test_references_of_another_sign_leave_it_open(word):
    verdict, plus, minus = Verdict(word, "why"), interval(0.2, 0.4), interval(-0.2, 0.1)
    assert across_references(verdict, plus, interval(-0.1, 0.4)) is verdict
    for other in (minus, interval(NAN, NAN)):
        assert across_references(verdict, plus, other).word == "inconclusive"
    assert across_references(Verdict("not testable here", ""), plus, minus).word == "not testable here"


def test_strengthened_or_only_spared():
    yes, no = Verdict("supported", ""), Verdict("contradicted", "", "reversed")
    assert spared(yes, interval(0.01, 0.2)).note == ""
    for weak in (interval(-0.01, 0.2), interval(NAN, NAN)):
        assert spared(yes, weak).note == "relatively spared" and spared(yes, weak).word == "supported"
    assert spared(no, interval(-1, -0.5)) is no


def test_equivalence_needs_the_whole_90_percent_interval_inside():
    assert equivalent(interval(-0.09, 0.09, 0.9), DELTA).word == "supported"
    for low, high in ((-0.11, 0.0), (0.0, 0.11), (NAN, NAN), (-INF, INF)):
        assert equivalent(interval(low, high, 0.9), DELTA).word == "inconclusive"
    assert (
        equivalent(interval(0.11, 0.2, 0.9), DELTA).word == equivalent(interval(-0.2, -0.11, 0.9), DELTA).word == "contradicted"
    )
    assert equivalent(interval(0.0, 0.0, 0.9), DELTA, [gate(1.0)]).word == "not testable here"
    with pytest.raises(ConfigError, match="needs a 90% interval"):
        equivalent(interval(0, 0), DELTA)


def test_a_conjunction_needs_all_its_parts():
    def words(*parts):
        return conjunction({str(i): Verdict(part, "") for i, part in enumerate(parts)}).word

    assert words("supported", "supported") == "supported"
    assert words("supported", "inconclusive") == "inconclusive"
    assert words("supported", "inconclusive: depends on matching") == "inconclusive"
    assert words("supported", "not testable here", "inconclusive") == "not testable here"
    assert words("supported", "not testable here", "contradicted") == "contradicted"
    with pytest.raises(ConfigError, match="no parts"):
        conjunction({})


@pytest.mark.parametrize("delta", [0.0, -0.1, NAN, INF])
def test_delta_must_be_positive(delta):
    with pytest.raises(ConfigError, match="smallest effect"):
        decide(interval(0, 1), delta, {}, [])
    with pytest.raises(ConfigError, match="smallest effect"):
        equivalent(interval(0, 1, 0.9), delta)


def rate(word, verdicts):
    return sum(verdict.word == word for verdict in verdicts) / STUDIES


def test_false_support_stays_under_5_percent_and_power_rises():
    noise = np.random.default_rng(0).normal(size=(STUDIES, 5)) * 0.05
    rates = [
        rate("supported", (decide(t_interval(effect + each), DELTA, INSIDE, []) for each in noise))
        for effect in (0.0, DELTA, 1.5 * DELTA, 2 * DELTA, 3 * DELTA)
    ]
    bound = 1.645 * (0.05 * 0.95 / STUDIES) ** 0.5
    assert 0.01 < rates[1] <= 0.05 + bound  # at the boundary; 0.025 expected, and 0.06 with a normal quantile
    assert all(low < high for low, high in pairwise(rates)) and rates[3] > 0.8
    contradicted = rate("contradicted", (decide(t_interval(DELTA + each), DELTA, INSIDE, []) for each in noise))
    assert 0.01 < contradicted <= 0.05 + bound


@pytest.mark.parametrize("edge", [DELTA, -DELTA])
def test_false_equivalence_stays_under_5_percent_at_its_boundary(edge):
    noise = np.random.default_rng(1).normal(size=(STUDIES, 5)) * 0.02
    false = rate("supported", (equivalent(t_interval(edge + each, level=0.9), DELTA) for each in noise))
    assert 0.03 < false <= 0.05 + 1.645 * (0.05 * 0.95 / STUDIES) ** 0.5
    assert rate("supported", (equivalent(t_interval(each, level=0.9), DELTA) for each in noise)) > 0.8
