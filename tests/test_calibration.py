"""Error rates and power on draws whose truth is known, and against simulation."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm, t

from attribution.calibration import NOMINAL, enough, false_supported, power, seen
from attribution.claims.statistics import t_interval
from attribution.claims.verdict import Null
from attribution.errors import ConfigError

DELTA = 0.1


def draws(mean=0.0, deviation=0.1, models=5, each=400, seed=0, between=0.0):
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(models):
        own = mean + between * rng.normal()
        rows += [
            {"model": f"m{number}", "value": own + deviation * rng.normal(), "source": (number, i // 8)} for i in range(each)
        ]
    return pd.DataFrame(rows)


def test_at_the_boundary_the_rate_is_the_nominal_one():
    """True effect = delta: a two-sided 95 % interval lies above it in 2.5 % of studies."""
    found = false_supported(draws(each=20000), DELTA, shift=DELTA, studies=10000)
    assert found.rate == pytest.approx(0.025, abs=0.005) and found.high <= NOMINAL and found.studies == 10000
    assert found.sources == 5 * 2500
    assert false_supported(draws(), DELTA, studies=2000).rate < 0.01


def test_a_test_that_errs_is_seen_to():
    """Nulls that are no nulls: a located effect in all of them."""
    assert false_supported(draws(mean=0.4), DELTA).rate > 0.95


def test_equivalence_at_its_boundary():
    found = false_supported(draws(deviation=0.03, each=4000), DELTA, shift=DELTA, prediction="none", studies=4000)
    assert found.low < NOMINAL and found.rate > 0.03
    assert false_supported(draws(deviation=0.03), DELTA, prediction="none").rate > 0.9


def test_the_interval_is_exact():
    found = false_supported(draws(mean=-5), DELTA, studies=200)
    assert (found.count, found.low) == (0, 0) and found.high == pytest.approx(1 - 0.025 ** (1 / 200))


@pytest.mark.parametrize("organisms", [3, 5, 10])
def test_power_is_what_simulation_gives(organisms):
    rng, effects = np.random.default_rng(1), [0.0, 0.1, 0.2, 0.3]
    table = power(effects, 0.08, organisms, DELTA).set_index("effect")["power"]
    for effect in effects:
        values = effect + 0.08 * rng.normal(size=(20000, organisms))
        low = values.mean(1) - t.ppf(0.975, organisms - 1) * values.std(1, ddof=1) / organisms**0.5
        assert table[effect] == pytest.approx((low > DELTA).mean(), abs=0.01)
    assert table[0.1] == pytest.approx(0.025) and table.is_monotonic_increasing
    many = power([0.2], 0.5, 4000, DELTA)["power"][0]
    assert many == pytest.approx(norm.sf(norm.ppf(0.975) - 0.1 * 4000**0.5 / 0.5), abs=1e-3)


@pytest.mark.parametrize("deviation", [0.05, 0.2])
def test_so_many_organisms_are_enough_and_one_fewer_is_not(deviation):
    n = enough(deviation, DELTA)
    assert power([2 * DELTA], deviation, n, DELTA)["power"][0] >= 0.8 > power([2 * DELTA], deviation, n - 1, DELTA)["power"][0]
    normal = ((norm.ppf(0.975) + norm.ppf(0.8)) * deviation / DELTA) ** 2  # with the deviation known
    assert normal < n < normal + 4
    assert enough(100.0, DELTA) is None


def test_mixed_arms_are_seen_the_more_the_less_they_are_mixed():
    table = seen({share: draws(mean=0.5 * share, deviation=0.05) for share in (0.0, 0.2, 0.5, 1.0)}, DELTA)
    assert table["share"].tolist() == [0.0, 0.2, 0.5, 1.0] and table["rate"].is_monotonic_increasing
    assert table["rate"].iloc[0] < 0.05 and table["rate"].iloc[-1] > 0.95
    assert table["effect"].to_numpy() == pytest.approx([0, 0.1, 0.25, 0.5], abs=0.01)


def test_what_makes_no_study_is_refused():
    with pytest.raises(ConfigError, match="200 null studies of 1 models"):
        false_supported(draws(models=1), DELTA)
    with pytest.raises(ConfigError, match="power of 1 organisms"):
        power([0.1], 0.1, 1, DELTA)


def test_a_null_that_did_not_come_out_null_stands_in_the_way_of_support():
    draws = pd.DataFrame({"model": list("abcde") * 2, "value": [0.9, 1.0, 1.1, 1.0, 0.95] * 2})
    assert false_supported(draws, 0.1).rate == 1.0
    null = Null(t_interval([0.5, 0.6, 0.7]))
    assert false_supported(draws, 0.1, nulls={"wrong partitions": null}).rate == 0.0
    quiet = Null(t_interval([0.01, -0.01, 0.0]))
    assert false_supported(draws, 0.1, nulls={"wrong partitions": quiet}).rate == 1.0
