"""Cross-grafts: gains in the direction of training, and what they owe to the arm's own mechanism."""

import math

import pandas as pd
import pytest

from attribution.claims import BOOST
from attribution.claims.frames import checked
from attribution.claims.recruitment import recruitment

# arm -> grafted set -> (gain intact, gain with the own mechanism ablated), in the direction of training
GAINS = {
    "A": {"A": (0.6, 0.0), "B": (0.4, 0.1), "remainder": (0.2, 0.2)},
    "B": {"B": (0.5, 0.0), "A": (0.1, 0.1), "remainder": (0.001, 0.5)},
}


@pytest.fixture
def grafts(supported):
    rows = []
    for model in [*(f"planted/{i}" for i in range(5)), "planted/unrouted"]:
        for seed in (0, 1):
            for arm, sets in GAINS.items():
                other = "B" if arm == "A" else "A"
                for name, gains in sets.items():
                    for ablated, gain in zip(("", arm, other), (*gains, 9.0), strict=True):
                        value = gain + 0.01 * (2 * seed - 1) if model != "planted/unrouted" else 9.0
                        key = {"model": model, "arm": arm, "seed": seed, "probe": "agree", "set": name, "ablated": ablated}
                        rows.append({**key, "graft": value})
    return checked({**supported, "grafts": pd.DataFrame(rows)}, "zero")["grafts"]


def test_gain_and_interaction(grafts):
    table = recruitment(BOOST, grafts).set_index(["arm", "graft", "quantity"])
    for arm, sets in GAINS.items():
        for name, (intact, ablated) in sets.items():
            graft = "own" if name == arm else "remainder" if name == "remainder" else "other"
            gain, interaction = table.loc[(arm, graft, "gain")], table.loc[(arm, graft, "interaction")]
            assert gain["mean"] == pytest.approx(intact) and gain["n"] == 5
            if intact > 0.01:
                assert interaction["mean"] == pytest.approx((intact - ablated) / intact) and interaction["negligible"] == 0
            else:
                assert math.isnan(interaction["mean"]) and (interaction["n"], interaction["negligible"]) == (0, 5)


def test_what_was_not_measured_is_not_a_number(grafts):
    assert recruitment(BOOST, grafts.iloc[:0]).empty
    table = recruitment(BOOST, grafts[grafts["ablated"] == ""]).query("quantity == 'interaction' and arm == 'A'")
    assert table["mean"].isna().all() and (table["n"] == 5).all()
