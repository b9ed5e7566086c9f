"""What is shallow of a change: Shapley values in closed form, and slopes on surprise that are put in."""

import numpy as np
import pandas as pd
import pytest

from attribution.claims import LEDGER
from attribution.claims.measured import measured_finding
from attribution.claims.shallow import shallow, shapley
from attribution.errors import RunError
from attribution.store import TRAINING

CLAIM = LEDGER["cold_is_shallow"]
SURPRISE = {arm: 0.2 + 0.7 * number for number, arm in enumerate(CLAIM.cell.arms)}


def frames(slope=0.0, offset=0.0, gain=2.0, bases=5):
    """Additive changes whose share in the rows rises with surprise, and by `offset` outside told contexts."""
    rng, probes, grafts = np.random.default_rng(2), [], []
    for number in range(bases):
        for arm, surprise in SURPRISE.items():
            share = 0.2 + slope * surprise + offset * (not arm.startswith("told")) + 0.005 * rng.normal()
            run = {"model": f"m{number}", "arm": arm, "seed": 0, "probe": TRAINING}
            probes.append({**run, "step": 0, "metric": 0.0, "kl": 0.0, "probability": np.exp(-surprise)})
            parts = {"rows": share * gain, "last layer": 0.1 * gain, "both": (share + 0.1) * gain}
            grafts += [{**run, "group": name, "graft": value, "prune": value, "total": gain} for name, value in parts.items()]
    return {"probes": pd.DataFrame(probes), "group_grafts": pd.DataFrame(grafts)}


def finding(given):
    return measured_finding(CLAIM, shallow(CLAIM, given), given)


def test_shapley_values_add_up_and_are_those_of_all_orders():
    rng = np.random.default_rng(0)
    players = ("rows", "last layer", "rest")
    value = {frozenset(): 0.0}
    for size in (1, 2, 3):
        for start in range(3):
            value[frozenset((players * 2)[start : start + size])] = float(rng.normal())
    total = value[frozenset(players)]
    given = {"rows": value[frozenset(["rows"])], "last layer": value[frozenset(["last layer"])],
             "both": value[frozenset(["rows", "last layer"])], "without both": value[frozenset(["rest"])],
             "without rows": value[frozenset(["last layer", "rest"])],
             "without last layer": value[frozenset(["rows", "rest"])]}  # fmt: skip
    found = shapley(given, total)
    orders = [(a, b, c) for a in players for b in players for c in players if len({a, b, c}) == 3]
    for player in players:
        gains = []
        for order in orders:
            before = frozenset(order[: order.index(player)])
            gains.append(value[before | {player}] - value[before])
        assert found[player] == pytest.approx(np.mean(gains))
    assert sum(found.values()) == pytest.approx(total)


def test_a_slope_is_found_and_is_that_within_contexts():
    found = finding(frames(slope=0.05))
    assert found.verdict == "supported" and found.estimate.mean == pytest.approx(0.05, abs=0.003)
    assert found.secondary.set_index("reading").loc["rows alone", "mean"] == pytest.approx(0.05, abs=0.003)
    assert finding(frames(slope=-0.05)).note == "reversed"
    confounded = finding(frames(offset=0.4))  # other contexts are shallower and more surprising; within them nothing
    assert confounded.verdict == "contradicted" and abs(confounded.estimate.mean) < 0.01
    assert confounded.secondary.set_index("reading").loc["across contexts", "mean"] > 0.02


def test_what_did_not_learn_is_left_out_and_listed():
    given = frames(slope=0.05)
    still = (given["group_grafts"]["arm"] == "log, kind reply") & (given["group_grafts"]["model"] == "m1")
    given["group_grafts"].loc[still, "total"] = 0.1
    found = finding(given)
    assert found.excluded == ["m1, arm log, kind reply, seed 0, is left out: it gained 0.1 nats, 0.25 are needed."]
    assert found.parts.set_index("model").loc["m1", "arms"] == len(SURPRISE) - 1
    lost = frames(slope=0.05)
    lost["group_grafts"].loc[lost["group_grafts"].index[4], "graft"] = np.nan
    assert np.isnan(finding(lost).estimate.mean)
    nothing = finding(frames(gain=0.1))
    assert nothing.verdict == "not testable here" and len(nothing.excluded) == 5 * len(SURPRISE)
    with pytest.raises(RunError, match="no rows of 'group_grafts'"):
        shallow(CLAIM, {"probes": given["probes"]})
