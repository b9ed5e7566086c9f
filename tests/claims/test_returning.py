"""What comes back and what is learned anew, on curves made of numbers."""

import pandas as pd
import pytest

from attribution.claims import LEDGER, essay, evaluate

CLAIM = LEDGER["dormant"]
STEPS = range(13)


def frames(speed, models=5, level=-2.0, start=-6.0, slow=0.5, seeds=(0, 1)):
    """Replies that were trained away rise by `speed` a step from a level, those that were never there from far below it."""
    probes, sets = [], []
    for number in range(models):
        for seed in seeds:
            run = {"model": f"base {number}", "seed": seed}
            curves = {"back": lambda step: level + speed * step, "never there": lambda step: start + slow * step + (step < 3)}
            for arm, curve in curves.items():
                for step in STEPS:
                    metric = curve(step) + 0.01 * number * step
                    row = {**run, "arm": arm, "step": step, "probe": "training samples", "metric": metric, "kl": 0.0}
                    probes.append(row | {"probability": 0.5})
            for step, p in ((0, 0.8), (20, 0.1)):
                elicited = {"probe": "elicited, a kind one", "metric": 0.0, "kl": 0.0, "probability": p}
                probes.append({**run, "arm": "away", "step": step} | elicited)
                read = {"probe": essay.READ_ON[essay.KIND], "set": essay.KIND, "reference": "resample", "effect": 3 * p}
                sets.append({**run, "arm": "away", "step": step} | read)
    return {"probes": pd.DataFrame(probes), "sets": pd.DataFrame(sets)}


@pytest.mark.parametrize(("speed", "word"), [(1.0, "supported"), (0.5, "contradicted"), (0.2, "contradicted")])
def test_both_are_counted_from_one_level(speed, word):
    found = evaluate(CLAIM, frames(speed))
    assert found.verdict == word and found.estimate.mean == pytest.approx(4 * (speed - 0.5))
    first = found.parts.iloc[0]
    assert first["steps to that level"] == pytest.approx(8.0)  # from -6 by half a nat a step
    assert first[["p elicited before", "p elicited after"]].tolist() == pytest.approx([0.8, 0.1])
    assert first[["influence before", "influence after"]].tolist() == pytest.approx([2.4, 0.3])
    assert found.secondary["mean"].iloc[0] == pytest.approx(4 * speed - (4 * 0.5 - 1)), "from where each begins"


def test_a_level_that_is_never_reached_is_no_comparison():
    found = evaluate(CLAIM, frames(1.0, start=-20.0))
    assert found.verdict == "not testable here" and found.estimate.n == 0
    assert "base 0, seed 0, is left out: what was never there was not trained 4 steps from there." in found.excluded


def test_what_begins_above_the_level_is_counted_from_its_beginning():
    found = evaluate(CLAIM, frames(0.5, start=-1.0))
    assert found.parts["steps to that level"].tolist() == [0.0] * 5


def test_a_seed_that_was_not_trained_back_is_listed():
    given = frames(1.0)
    lost = (given["probes"]["arm"] == "back") & (given["probes"]["model"] == "base 3") & (given["probes"]["seed"] == 1)
    found = evaluate(CLAIM, {**given, "probes": given["probes"][~lost]})
    assert found.excluded == ["base 3, seed 1, is left out: it was not trained back in both arms."]
    assert found.estimate.n == 5
