"""What the comparison of recipes computes from recorded frames, and that its page says what its frames say."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from attribution.study import Study
from attribution.worlds.studies import ORGANISMS, write_recipes
from experiments.recipes_compared import NOTHING, NULLS, REVERSED, TRAINERS, agreement, changes, checks, read, summary, table

RESULTS = Path(__file__).parents[1] / "results" / "recipes"


def influence(step, probe, name, effect, model="one", arm="x", seed=0):
    return {"model": model, "arm": arm, "seed": seed, "step": step, "probe": probe, "set": name, "reference": "zero",
            "effect": effect}  # fmt: skip


def test_a_change_is_relative_and_signed_for_the_mechanism():
    """In a conflict the metric speaks for A's reply, so that B's influence is the negative of its effect."""
    rows = [
        influence(0, "agree", "A", 2.0), influence(20, "agree", "A", 3.0),
        influence(0, "agree", "B", 4.0), influence(20, "agree", "B", 3.0),
        influence(0, "conflict", "A", 2.0), influence(20, "conflict", "A", 2.2),
        influence(0, "conflict", "B", -4.0), influence(20, "conflict", "B", -5.0),
        {**influence(0, "agree", "A", 9.0), "reference": "mean"},
    ]  # fmt: skip
    found = changes(pd.DataFrame(rows)).set_index("probe")
    assert found.loc["agree", ["A", "B", "D"]].tolist() == pytest.approx([0.5, -0.25, 0.75])
    assert found.loc["conflict", ["A", "B", "D"]].tolist() == pytest.approx([0.1, 0.25, -0.15])


def test_agreement_ranks_within_an_organism():
    rows = [
        {"model": model, "arm": arm, "probe": "agree", "what": what, "name": name, "step": 1, "forecast": sign * value,
         "measured": value + (100 if model == "two" else 0)}
        for what in ("set", "head")
        for model, sign in (("one", 1), ("two", -1))
        for arm, values in (("x", (1.0, 2.0)), ("y", (3.0, 4.0)))
        for name, value in zip("AB", values, strict=True)
    ]  # fmt: skip
    sets, heads = agreement(pd.DataFrame(rows)).to_dict("records")
    assert sets["ranked"] == 4 and sets["rho"].mean == pytest.approx(0.0) and sets["rho"].n == 2
    assert heads["ranked"] == 2 and heads["rho"].n == 0  # two heads have no rank correlation worth the name
    assert sets["of the sign alone"].n == 0  # one sign throughout


def test_the_study_has_every_arm_that_is_checked(tmp_path):
    arms = Study.model_validate(write_recipes(tmp_path)).arms
    wanted = {f"{trainer} {mine}" for trainer in TRAINERS for mine in "AB"} | {*NULLS, REVERSED, NOTHING}
    assert wanted <= set(arms) and arms[NOTHING].training.learning_rate == 0


@pytest.fixture(scope="module")
def frames():
    return read(RESULTS)


def test_the_page_says_what_the_frames_say(frames):
    assert (RESULTS / "summary.md").read_text(encoding="utf-8") == summary(frames)


def test_no_run_is_missing(frames):
    runs = frames["sets"].groupby(["arm", "model", "seed"], observed=True).ngroups
    arms = frames["sets"]["arm"].nunique()
    assert set(frames["sets"]["model"]) == set(ORGANISMS) and runs == arms * len(ORGANISMS) * 2
    assert len(table(frames)) == arms and frames["sets"]["effect"].notna().all()
    assert set(frames["forecasts"]["arm"]) == set(frames["sets"]["arm"]) and np.isfinite(frames["forecasts"]["measured"]).all()


def test_exchanging_the_mechanisms_turns_every_check_of_direction_round(frames):
    """Had the planted sets been called by each other's names, no trainer would strengthen what its reward was for."""
    names = frames["sets"]["set"].astype(str).replace({"A": "B", "B": "A"})
    effect = frames["sets"]["effect"].where(frames["sets"]["probe"] != "conflict", -frames["sets"]["effect"])
    swapped = checks({**frames, "sets": frames["sets"].assign(set=names, effect=effect)}).set_index(["check", "arm"])["holds"]
    held = checks(frames).set_index(["check", "arm"])["holds"]
    assert held["opposite"].all() and not swapped["opposite"].any() and not swapped["reversed"].any()
