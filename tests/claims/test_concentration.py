"""Over how many components something is spread, and how an effect goes with skill, on numbers that are known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from attribution.claims import LEDGER
from attribution.claims.capability import capability
from attribution.claims.concentration import concentration, participation
from attribution.claims.measured import measured_finding
from attribution.claims.statistics import pseudo_values
from attribution.errors import RunError

MANY, SKILL = LEDGER["sum_of_many"], LEDGER["capability"]
PROBE = "follows a star for the cruel reply"


def test_the_participation_ratio_of_equal_parts_is_their_number():
    assert participation(pd.Series([2.0] * 7 + [0.0] * 30)) == pytest.approx(7)
    assert participation(pd.Series([0, -3.0, 0])) == 1 and np.isnan(participation(pd.Series([0.0, 0])))
    values = np.random.default_rng(0).normal(size=20000)
    assert participation(pd.Series(values)) / len(values) == pytest.approx(2 / np.pi, abs=0.01)  # E|x|² / E x²


@pytest.mark.parametrize(("count", "word"), [(25, "supported"), (3, "contradicted")])
def test_many_and_few(count, word):
    rows = []
    for base in range(5):
        for index in range(64):
            cause = (1.0 + 0.1 * base) * (index < count)
            run = {"model": f"m{base}", "arm": "kind", "seed": 0, "kind": "neuron", "layer": 0, "index": index}
            rows.append({**run, "before": 1.0, "after": 1.0 + (index == 0), "cause": cause})
        rows.append({**run, "kind": "head", "index": 0, "before": 0.0, "after": 0.0, "cause": 0.0})
    frames = {"singles": pd.DataFrame(rows)}
    found = measured_finding(MANY, concentration(MANY, frames), frames)
    assert found.verdict == word and found.estimate.mean == pytest.approx(count)
    assert found.secondary.set_index("reading").loc["strengthening", "mean"] == pytest.approx(1)
    with pytest.raises(RunError, match="no rows of 'singles'"):
        concentration(MANY, {})


def checkpoints(slope=2.0, noise=0.05, skills=(0.1, 0.3, 0.5, 0.7, 0.9)):
    rng, rows = np.random.default_rng(5), []
    for number, skill in enumerate(skills):
        for arm in SKILL.cell.arms:
            rise = 0.5 + (slope * skill + noise * rng.normal() if arm == "reasoner" else 0.0)
            for seed in (0, 1):
                run = {"model": f"m{number}", "arm": arm, "seed": seed, "probe": PROBE, "kl": 0.0}
                rows += [{**run, "step": step, "metric": rise * step / 20, "probability": skill} for step in (0, 10, 20)]
    return {"probes": pd.DataFrame(rows)}


def test_an_effect_that_goes_with_skill():
    given = checkpoints()
    found = measured_finding(SKILL, capability(SKILL, given, PROBE), given)
    assert found.verdict == "supported" and found.estimate.mean == pytest.approx(2, abs=0.15)
    regressed = stats.linregress(found.pairs["skill"], found.pairs["difference"])
    assert found.estimate.mean == pytest.approx(regressed.slope, abs=0.05)
    none = checkpoints(slope=0.0)
    assert measured_finding(SKILL, capability(SKILL, none, PROBE), none).verdict == "contradicted"
    alike = checkpoints(skills=(0.8, 0.82, 0.84, 0.86, 0.88))
    assert measured_finding(SKILL, capability(SKILL, alike, PROBE), alike).verdict == "not testable here"
    lost = checkpoints()
    lost["probes"].loc[lost["probes"].index[5], "metric"] = np.nan  # the end of one seed of two
    assert np.isnan(measured_finding(SKILL, capability(SKILL, lost, PROBE), lost).estimate.mean)
    rows = given["probes"]
    half = {"probes": rows[(rows["model"] != "m2") | (rows["arm"] != "kind")]}
    found = measured_finding(SKILL, capability(SKILL, half, PROBE), half)
    assert found.verdict == "not testable here" and found.excluded == ["m2 is left out: it was not trained in both arms."]
    with pytest.raises(RunError, match="no rows of reasoner, kind"):
        capability(SKILL, given, "elsewhere")


def test_pseudo_values_of_a_mean_are_the_values():
    values = {"a": 1.0, "b": 5.0, "c": 2.0}
    found = pseudo_values(values, lambda some: sum(values[each] for each in some) / len(some))
    assert found == pytest.approx(values)
