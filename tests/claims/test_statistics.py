"""Intervals: those of scipy, over organisms, and honest about what is missing."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from attribution.claims.statistics import Interval, organism_means, over_organisms, t_interval


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_is_student_s(level):
    values = np.random.default_rng(0).normal(size=7)
    found = t_interval(values, level=level)
    expected = stats.ttest_1samp(values, 0).confidence_interval(level)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(values.mean()) and (found.n, found.level) == (7, level)


def test_seeds_are_averaged_within_organisms_first():
    rows = pd.DataFrame({"model": ["a", "a", "a", "b"], "x": [1.0, 2.0, 3.0, 6.0]})
    assert organism_means(rows, ["x"])["x"].to_dict() == {"a": 2.0, "b": 6.0}
    assert over_organisms(rows, "x") == t_interval([2.0, 6.0])


def test_few_or_missing_values_never_look_certain():
    one = t_interval([0.0])
    assert (one.low, one.high) == (-math.inf, math.inf) and not one.inside(1e9)
    assert not t_interval([]).inside(1.0) and t_interval([]).n == 0
    for bad in (math.nan, math.inf):
        found = t_interval([0.0, 0.0, bad])
        assert math.isnan(found.mean) and math.isnan(found.low) and not found.inside(1.0)
    rows = pd.DataFrame({"model": ["a", "a", "b"], "x": [1.0, np.nan, 6.0]})
    assert math.isnan(over_organisms(rows, "x").mean)


def test_inside_is_on_both_sides_and_strict():
    def inside(low, high):
        return Interval(0.0, low, high, 5).inside(0.1)

    assert inside(-0.09, 0.09)
    assert not inside(-0.11, 0.0) and not inside(0.0, 0.11) and not inside(-0.1, 0.1) and not inside(-0.09, math.nan)
