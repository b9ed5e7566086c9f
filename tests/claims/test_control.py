"""Shares of variance on numbers whose shares are known, and the jackknife of their difference."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from attribution.claims import LEDGER
from attribution.claims.control import _shares, control
from attribution.claims.measured import measured_finding

CLAIM = LEDGER["control"]
MECHANISMS, STEPS = {"x": "read x", "y": "read y"}, (0, 5, 10)  # each with its probe set
OTHER = 0.25  # by how much of its influence before mechanism y grows in every arm


def frames(context=0.0, base=0.0, order=0.0, bases=6, seeds=2):
    """A study in which mechanism x grows by an effect of the context, one of the base, and one of chance, from 2."""
    rng, sets, probes = np.random.default_rng(1), [], []
    of_arm = dict(zip(CLAIM.cell.arms, rng.normal(size=len(CLAIM.cell.arms)) * context, strict=True))
    for number, arm, seed in itertools.product(range(bases), CLAIM.cell.arms, range(seeds)):
        own = np.random.default_rng(100 + number).normal() * base
        grown = {"x": 2 * (of_arm[arm] + own + rng.normal() * order), "y": 2 * OTHER}
        run = {"model": f"m{number}", "arm": arm, "seed": seed}
        for step in STEPS:
            probes += [{**run, "step": step, "probe": "training samples", "metric": step / 10.0, "kl": 0.0}]
            probes += [{**run, "step": step, "probe": "neutral", "metric": 0.0, "kl": step / 100}]
            for name in MECHANISMS:
                effect = 2 + grown[name] * step / 8  # all that is grown where all have gained .8
                halves = {"effect_even": effect, "effect_odd": effect}
                sets.append(
                    {**run, "step": step, "probe": MECHANISMS[name], "set": name, "effect": effect, **halves, "kl": 0.0}
                )
    return {"sets": pd.DataFrame(sets), "probes": pd.DataFrame(probes)}


def finding(given):
    return measured_finding(CLAIM, control(CLAIM, given, MECHANISMS), given)


def test_shares_are_those_of_the_analysis_of_variance():
    rng = np.random.default_rng(0)
    rows = [(m, a, s, rng.normal() + (a == "p")) for m in "abc" for a in "pq" for s in (0, 1)]
    table = pd.DataFrame(rows, columns=["model", "arm", "seed", "outcome"])
    shares = _shares(table)
    assert sum(shares.values()) == pytest.approx(1)
    groups = [group["outcome"].to_numpy() for _, group in table.groupby("arm")]
    f, between = stats.f_oneway(*groups).statistic, len(groups) - 1  # share = between / total, from the F of one factor alone
    assert shares["context"] == pytest.approx(f * between / (f * between + len(table) - len(groups)))


def test_who_decides_is_seen():
    by_context = finding(frames(context=1.0, order=0.1))
    assert by_context.verdict == "contradicted" and by_context.note == "reversed" and by_context.estimate.mean < -0.9
    by_base = finding(frames(base=1.0, order=0.1))
    assert by_base.verdict == "supported" and by_base.estimate.mean > 0.9
    assert len(by_base.parts) == 6 and len(by_base.pairs) == 6 * 6 * 2
    few = finding(frames(base=1.0, order=0.1, bases=4))
    assert few.verdict == "not testable here"


def test_the_outcome_is_relative_to_the_influence_before_at_equal_gain():
    found = finding(frames(context=1.0))
    rng = np.random.default_rng(1)
    effects = dict(zip(CLAIM.cell.arms, rng.normal(size=len(CLAIM.cell.arms)), strict=True))
    for row in found.pairs.itertuples():
        assert row.outcome == pytest.approx(effects[row.arm] - OTHER)


def test_a_value_that_is_not_a_number_is_never_dropped():
    given = frames(context=1.0, order=0.1)
    lost = given["sets"][(given["sets"]["step"] == 10) & (given["sets"]["set"] == "x")].index[3]
    given["sets"].loc[lost, "effect"] = np.nan
    assert np.isnan(finding(given).estimate.mean)


def test_bases_with_fewer_seeds_are_left_out_and_listed():
    given = frames(context=1.0, order=0.1)
    given = {name: frame[(frame["model"] != "m0") | (frame["seed"] == 0)] for name, frame in given.items()}
    found = finding(given)
    assert len(found.parts) == 5 and "6 runs of bases with fewer seeds are left out of the layout." in found.excluded
