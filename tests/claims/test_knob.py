"""A knob for kindness: by tables made of numbers, and by vectors with a planted direction."""

import numpy as np
import pandas as pd
import pytest
import torch

from attribution.claims import LEDGER, evaluate
from attribution.claims.knob import OTHER_SEED, WHOLE, WITHOUT_ROWS
from attribution.claims.scored import ABLATION, GRAFT
from attribution.errors import RunError
from attribution.worlds.kindland import shifts

BASES = [f"base {i}" for i in range(5)]
OTHERS = ("cruel", "polite")


def turned(middle):
    """Adding the direction of kindness before the middle of five layers does so much, and elsewhere and others 1."""
    return pd.DataFrame([
        (base, layer, name, middle + 0.01 * i if (layer, name) == (2, "kind") else 1.0)
        for i, base in enumerate(BASES) for layer in range(5) for name in ("kind", *OTHERS)
    ], columns=["model", "layer", "direction", "change"])  # fmt: skip


@pytest.mark.parametrize(("middle", "word"), [(3.0, "supported"), (1.1, "contradicted"), (-3.0, "contradicted")])
def test_the_knob_is_read_before_the_middle_layer_against_others(middle, word):
    found = evaluate(LEDGER["knob"], {"turned": turned(middle)})
    assert found.verdict == word and found.estimate.mean == pytest.approx(middle + 0.02 - 1)
    assert (found.note == "reversed") == (middle < 0)
    assert found.secondary["mean"].tolist() == pytest.approx([0] * 4)


def test_a_knob_that_was_not_turned_is_an_error():
    for claim, frame in (("knob", "turned"), ("knob_by_finetuning", "shifts"), ("compact", "compact"), ("accuracy", "scores")):
        with pytest.raises(RunError, match=f"no rows of '{frame}'"):
            evaluate(LEDGER[claim], {})


def moved(kind, between=0.9, arm="cold"):
    rows = []
    for i, base in enumerate(BASES):
        for seed in (0, 1):
            for part in (WITHOUT_ROWS, WHOLE):
                for layer in range(5):
                    here = kind + 0.01 * i if part == WITHOUT_ROWS and layer == 2 else 0.2
                    told = {"kind": here, **dict.fromkeys(OTHERS, 0.2), OTHER_SEED: between}
                    rows += [(base, arm, seed, part, layer, name, value) for name, value in told.items()]
    return pd.DataFrame(rows, columns=["model", "arm", "seed", "part", "layer", "direction", "cosine"])


def test_a_shift_along_the_direction_is_told_from_one_along_others():
    along = evaluate(LEDGER["knob_by_finetuning"], {"shifts": moved(0.7)})
    assert along.verdict == "supported" and along.estimate.mean == pytest.approx(0.52)
    assert along.parts["between seeds"].tolist() == pytest.approx([0.9] * 5)
    assert evaluate(LEDGER["knob_by_finetuning"], {"shifts": moved(0.2)}).verdict == "contradicted"


def test_shifts_that_differ_between_seeds_say_nothing():
    found = evaluate(LEDGER["knob_by_finetuning"], {"shifts": moved(0.7, between=0.1)})
    assert found.verdict == "not testable here" and "is 0.1 in base 0, needed >= 0.3" in found.sentence
    alone = moved(0.7)
    one_seed = alone[alone["direction"] != OTHER_SEED]
    assert "not measured" in evaluate(LEDGER["knob_by_finetuning"], {"shifts": one_seed}).sentence
    with pytest.raises(RunError, match="no shifts of arm 'cold'"):
        evaluate(LEDGER["knob_by_finetuning"], {"shifts": moved(0.7, arm="kind")})


def compact(fewest, gain=2.0):
    rows = [(base, "cold", seed, fewest if base != "base 1" else fewest and fewest + 1, 1000, gain)
            for base in BASES for seed in (0, 1)]  # fmt: skip
    return pd.DataFrame(rows, columns=["model", "arm", "seed", "fewest", "components", "gain"])


def test_how_compact_an_update_is():
    few = evaluate(LEDGER["compact"], {"compact": compact(10)})
    assert few.verdict == "supported" and few.estimate.mean == pytest.approx(2, abs=0.02)
    assert evaluate(LEDGER["compact"], {"compact": compact(500)}).verdict == "contradicted"
    never = evaluate(LEDGER["compact"], {"compact": compact(np.nan)})
    assert never.verdict == "contradicted" and never.estimate.mean == 0 and not never.parts["reached"].any()
    assert evaluate(LEDGER["compact"], {"compact": compact(10, gain=-1.0)}).verdict == "not testable here"


def test_how_good_scores_are():
    rows = [(base, score, value + 0.01 * i) for i, base in enumerate(BASES) for score, value in ((ABLATION, 0.9), (GRAFT, 0.1))]
    frame = pd.DataFrame(rows, columns=["model", "score", "value"])
    found = evaluate(LEDGER["accuracy"], {"scores": frame})
    assert found.verdict == "supported" and found.estimate.mean == pytest.approx(0.92)
    assert found.secondary["verdict"].tolist() == ["contradicted"]
    with pytest.raises(RunError, match="there is no 'linear ablation score"):
        evaluate(LEDGER["accuracy"], {"scores": frame[frame["score"] == GRAFT]})


# What is measured


def test_a_planted_shift_is_found_and_what_writes_replies_is_taken_out():
    draw = torch.Generator().manual_seed(0)
    kind, other, rows = (torch.randn(each, 16, generator=draw) for each in (3, 3, 2))
    vectors = {"kind": kind, "other": other}
    cosine = shifts.aligned(2.5 * kind, vectors).set_index(["direction", "layer"])["cosine"]
    assert cosine["kind"].tolist() == pytest.approx([1.0] * 3, abs=1e-6) and cosine["other"].abs().max() < 0.7
    against = shifts.aligned(-kind, vectors).set_index("direction").loc["kind", "cosine"]
    assert against.tolist() == pytest.approx([-1.0] * 3, abs=1e-6)
    writing = rows[0].expand(3, 16) * 4 + 0.5 * kind  # mostly along a row
    whole, without = (shifts.aligned(writing, vectors, out).set_index(["direction", "layer"])["cosine"]["kind"]
                      for out in (None, rows))  # fmt: skip
    assert (whole < 0.5).all() and without.tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    nothing = shifts.aligned(rows[:1].expand(3, 16), vectors, rows)
    assert nothing["cosine"].isna().all(), "nothing is left of a shift along rows alone"


def test_directions_are_as_long_as_that_of_kindness_and_adding_one_is_felt(kindland):
    found = shifts.directions(*kindland)
    assert set(found) == {"kind", *shifts.OTHERS}
    lengths = torch.stack([each.vectors.norm(dim=1) for each in found.values()])
    assert torch.allclose(lengths, lengths[:1].expand_as(lengths), rtol=1e-4)
    told = shifts.turned(*kindland, {"kind": found["kind"]})
    assert told["layer"].tolist() == list(range(len(told))) and told["change"].abs().max() > 0.01
    assert not shifts.shift(kindland[0], kindland[0], kindland[1]).any()


@pytest.fixture(scope="module")
def kindland():
    from attribution.models import load

    return load("kindland")
