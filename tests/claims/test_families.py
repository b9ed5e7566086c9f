"""Many readings at once: exact sign flips against enumeration by hand, and the error over the whole family."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from attribution.claims.families import family


def drawn(bases, members, seed, effect=0.0):
    values = np.random.default_rng(seed).normal(size=(bases, members))
    values[:, 0] += effect
    return pd.DataFrame(values, columns=[f"m{i}" for i in range(members)])


def test_the_largest_t_is_compared_with_all_sign_flips():
    table = drawn(5, 4, 0, effect=3.0)
    values = table.to_numpy()
    observed = np.abs(ttest_1samp(values, 0).statistic)
    flips = [np.abs(ttest_1samp(np.array(signs)[:, None] * values, 0).statistic).max()
             for signs in itertools.product((1, -1), repeat=5)]  # fmt: skip
    expected = [(np.array(flips) >= each - 1e-9).mean() for each in observed]
    found = family(table)
    assert found["p_family"].tolist() == pytest.approx(expected)
    assert found["p_family"].min() >= 2 / 32 and (found["p_family"] >= found["p"] - 0.2).all()
    assert found["p"].tolist() == pytest.approx(ttest_1samp(values, 0).pvalue.tolist())
    assert (found["q"] >= found["p"] - 1e-12).all()


def test_the_error_is_held_over_the_family_and_not_by_single_tests():
    studies = [family(drawn(8, 20, seed)) for seed in range(60)]
    assert np.mean([(study["p_family"] <= 0.05).any() for study in studies]) <= 0.15
    assert np.mean([(study["p"] <= 0.05).any() for study in studies]) > 0.4


def test_a_large_effect_is_found_and_constants_are_not_tested():
    table = drawn(9, 6, 1, effect=6.0).assign(same=1.0)
    found = family(table)
    assert found.loc["m0", "p_family"] <= 0.05 and found.loc["m0", "q"] < 0.05
    assert np.isnan(found.loc["same", ["p_family", "q"]].astype(float)).all() and found.loc["same", "mean"] == 1
