"""Two notions or one: by correlations made of numbers, and by effects with planted overlap and noise."""

import numpy as np
import pandas as pd
import pytest

from attribution.claims import LEDGER, evaluate
from attribution.errors import RunError
from attribution.worlds.kindland import notions


def table(between, halves=0.8):
    rows = [(f"base {i}", kind, between + 0.01 * i, halves, halves) for i in range(5) for kind in ("head", "neuron")]
    return {"overlap": pd.DataFrame(rows, columns=["model", "kind", "between", "said", "enacted"])}


@pytest.mark.parametrize(("between", "word"), [(0.2, "supported"), (0.78, "contradicted"), (0.58, "inconclusive")])
def test_overlap_is_told_in_units_of_the_ceiling(between, word):
    found = evaluate(LEDGER["two_notions"], table(between))
    assert found.verdict == word and found.estimate.mean == pytest.approx(1 - (between + 0.02) / 0.8)


def test_noise_is_no_second_notion():
    found = evaluate(LEDGER["two_notions"], table(0.1, halves=0.2))
    assert found.verdict == "not testable here" and "is 0.2 in base 0, needed >= 0.5" in found.sentence
    assert evaluate(LEDGER["two_notions"], table(0.1, halves=-0.2)).verdict == "not testable here"
    with pytest.raises(RunError, match="no rows of 'overlap'"):
        evaluate(LEDGER["two_notions"], {})


@pytest.mark.parametrize("truth", [1.0, 0.0])
def test_the_same_causes_reach_the_ceiling_and_others_do_not(truth):
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=(2, 400, 1))
    said = shared + rng.normal(size=(400, 40))
    enacted = truth * shared + (1 - truth) * own + rng.normal(size=(400, 40))
    found = np.mean([notions._correlations(said, enacted, seed) for seed in range(20)], axis=0)
    assert found[0] / np.sqrt(found[1] * found[2]) == pytest.approx(truth, abs=0.1)
    assert 0.9 < found[1] < 1


@pytest.mark.slow
def test_it_is_measured_on_a_base(monkeypatch):
    from attribution.models import load

    monkeypatch.setattr(notions, "READ_ON", 12)
    found = notions.overlap(*load("kindland")).set_index("kind")
    assert set(found.index) == {"head", "neuron", "head and neuron"} and found.abs().max().max() <= 1
    assert found.loc["head", "enacted"] > 0.5
