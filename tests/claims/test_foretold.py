"""Forecasts against what was measured, on numbers whose rank correlation is known."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata

from attribution.claims import LEDGER
from attribution.claims.foretold import foretold
from attribution.claims.measured import measured_finding
from attribution.errors import RunError

CLAIM = LEDGER["forecast"]
MECHANISMS = ("x", "y")


def frames(noise=0.0, sign=1.0, bases=5, arms=12, early=1.0):
    """Strengthening is the forecast times a positive number, and noise; early on it may be something else."""
    rng, sets, ahead = np.random.default_rng(4), [], []
    for number in range(bases):
        for arm in range(arms):
            for name in (*MECHANISMS, "shared"):
                forecast = rng.normal()
                for seed in (0, 1):
                    key = {"model": f"m{number}", "arm": f"arm {arm}", "seed": seed, "probe": "p", "set": name}
                    ahead.append({**key, "influence": 1.0, "strengthening": forecast + 0.1 * (seed - 0.5)})
                    for step, part in ((0, 0.0), (1, early), (20, 3.0)):
                        effect = 1 + (sign * forecast if step != 1 else rng.normal()) * part + noise * rng.normal() * (step > 0)
                        sets.append(
                            {**key, "step": step, "effect": effect, "effect_even": effect, "effect_odd": effect, "kl": 0.0}
                        )
    probes = [{"model": "m0", "arm": "arm 0", "seed": 0, "step": 0, "probe": "p", "metric": 0.0, "kl": 0.0}]
    return {"sets": pd.DataFrame(sets), "forecasts": pd.DataFrame(ahead), "probes": pd.DataFrame(probes)}


def finding(given):
    return measured_finding(CLAIM, foretold(CLAIM, given, MECHANISMS), given)


def test_a_forecast_that_holds_and_one_that_is_the_wrong_way_round():
    found = finding(frames())
    assert found.verdict == "supported" and found.estimate.mean == pytest.approx(1)
    assert set(found.pairs["set"]) == set(MECHANISMS) and found.gates.set_index("name").loc["pairs", "value"] == 24
    early = found.secondary.set_index("reading").loc["after 1 steps"]
    assert abs(early["mean"]) < 0.3 and early["verdict"] == "contradicted"
    assert finding(frames(sign=-1)).note == "reversed"


def test_it_is_the_rank_correlation_of_means_over_seeds():
    given = frames(noise=2.0)
    found = finding(given)
    last = found.pairs[(found.pairs["step"] == 20) & (found.pairs["model"] == "m2")]
    one, other = rankdata(last["forecast"]), rankdata(last["grown"])
    assert found.parts.set_index("model").loc["m2", "statistic"] == pytest.approx(np.corrcoef(one, other)[0, 1])
    row = last[(last["arm"] == "arm 3") & (last["set"] == "x")].iloc[0]
    runs = given["sets"].query("model == 'm2' and arm == 'arm 3' and set == 'x'").set_index(["seed", "step"])["effect"]
    assert row["grown"] == pytest.approx(np.mean([runs[seed, 20] - runs[seed, 0] for seed in (0, 1)]))


@pytest.mark.parametrize(("frame", "column"), [("sets", "effect"), ("forecasts", "strengthening")])
def test_a_value_that_is_not_a_number_is_never_dropped(frame, column):
    given = frames()
    of_one = given[frame][(given[frame]["set"] == "x") & (given[frame]["seed"] == 1) & (given[frame].get("step", 20) == 20)]
    given[frame].loc[of_one.index[0], column] = np.nan
    assert np.isnan(finding(given).estimate.mean)


def test_too_few_pairs_and_none():
    few = finding(frames(arms=4))
    assert few.verdict == "not testable here" and "pairs of a forecast and a measurement" in few.sentence
    with pytest.raises(RunError, match="no rows of 'forecasts'"):
        foretold(CLAIM, {"sets": frames()["sets"]}, MECHANISMS)
