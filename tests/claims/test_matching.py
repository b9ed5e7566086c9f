"""Matching: exact on straight lines, the first crossing, and never beyond the record."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.claims.matching import crossing, match, quantity, value_at
from attribution.errors import RunError

A, B = ("m", "A", 0), ("m", "B", 0)


def series(values, steps=None):
    return pd.Series(values, index=range(len(values)) if steps is None else steps, dtype="float64")


def test_the_first_crossing_is_interpolated_between_adjacent_records():
    assert crossing(series([0, 1, 3]), 2.0) == 1.5
    assert crossing(series([0, 4, 1, 5], [0, 2, 6, 8]), 3.0) == 1.5  # not the second rise
    assert crossing(series([0, 1, 3]), 3.0) == 2.0
    assert np.isnan(crossing(series([0, 1, 3]), 3.1))
    assert np.isnan(crossing(series([0, 1]), 0.0))
    assert np.isnan(crossing(series([2, 3], [4, 5]), 1.0))  # passed before the first record


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=12), st.floats(0.05, 1.0))
def test_reading_a_series_at_its_crossing_gives_the_target(rises, fraction):
    line = series(np.cumsum([0, *rises]))
    target = fraction * line.max()
    step = crossing(line, target)
    assert 0 < step <= len(rises) and value_at(line, step) == pytest.approx(target)


def test_values_are_read_inside_the_record_only():
    line = series([1, 3, np.nan], [2, 4, 6])
    assert value_at(line, 3.5) == 2.5 and value_at(line, 4) == 3.0
    for outside in (1.9, 6.1, 5.0, np.nan):
        assert np.isnan(value_at(line, outside))


def test_the_target_is_a_fraction_of_the_smallest_maximum():
    runs = {A: series([0, 1, 2, 3]), B: series([0, 0.5, 1.0])}
    found = match(runs, (A, B), "kl", 0.8)
    assert found.complete and found.target == pytest.approx(0.8)
    assert found.steps == pytest.approx((0.8, 1.6))


def test_arms_without_the_target_are_named_not_extrapolated():
    runs = {A: series([0, -1, -2]), B: series([0, 1, 2])}
    found = match(runs, (A, B), "gain", 0.8)
    assert not found.complete and found.reasons == ("has a gain that never rises above 0", "")
    found = match(runs, (B, ("m", "C", 0)), "kl", 0.8)
    assert found.reasons == ("", "was not recorded") and np.isnan(found.steps).all()
    found = match({A: series([0, np.nan, 2]), B: runs[B]}, (A, B), "kl", 0.8)
    assert found.reasons == ("has a KL that is not a number", "")
    found = match({A: series([5, 6], [4, 5]), B: runs[B]}, (A, B), "kl", 0.8)
    assert "does not reach the matching target (KL 1.6)" in found.reasons[0]


def test_equal_steps_are_the_last_common_one(supported):
    rows = supported["probes"]
    short = rows[~((rows["arm"] == "B") & (rows["step"] > 6))]
    steps = quantity(short, "steps")
    runs = (("planted/0", "A", 0), ("planted/0", "B", 0))
    assert match(steps, runs, "steps", 0.8).steps == (6.0, 6.0)
    apart = {A: series([1, 3], [1, 3]), B: series([2, 4], [2, 4])}
    assert match(apart, (A, B), "steps", 0.8).reasons[0] == "shares no step with its partner"


def test_gain_counts_from_the_own_start(supported):
    gain = quantity(supported["probes"], "gain")["planted/1", "B", 1]
    assert gain.loc[0] == 0 and gain.loc[10] == pytest.approx(0.75)
    with pytest.raises(RunError, match="no probe set 'neutral'"):
        quantity(supported["probes"].query("probe != 'neutral'"), "kl")
