"""The race of causes against rivals on components made of numbers, where it is known what made them grow."""

import numpy as np
import pandas as pd
import pytest

from attribution.claims.claim import MeasuredClaim, Setting, Threshold
from attribution.claims.components import components, race
from attribution.claims.measured import measured_finding
from attribution.errors import RunError

CELL = Setting(world="w", recipe="sft", optimizer="AdamW", arms=("A", "B"), reference="zero")
CLAIM = MeasuredClaim(
    id="x", statement="It does.", statistic="Gain of R²", unit="R²", cell=CELL, delta=0.02,
    nulls=("identical arms",),
    gates=(Threshold(name="organisms", meaning="bases", relation=">=", value=5),),
)  # fmt: skip


def component_finding(claim, frames):
    return measured_finding(claim, components(claim, frames), frames)


def study(cause=0.0, opportunity=0.0, noise=1.0, shared=0.0, bases=6, seeds=2, private=0.3):
    """Components whose growth in an arm is a sum of what caused its outputs, of its gradient, and of noise.

    `shared`: how much of an opportunity is made of the cause; `private`: noise of a seed.
    """
    rng, rows = np.random.default_rng(3), []
    for base in range(bases):
        parts = [("head", layer, i) for layer in range(4) for i in range(16)]
        parts += [("neuron", layer, i) for layer in range(4) for i in range(64)]
        index = pd.MultiIndex.from_tuples(parts, names=["kind", "layer", "index"])
        scale = np.where(index.get_level_values("kind") == "head", 10.0, 1.0)  # kinds differ in size, which must not matter
        for arm in "AB":
            c = rng.normal(size=len(parts))
            o = shared * np.abs(c) + rng.normal(size=len(parts)) ** 2
            grown = cause * c + opportunity * o + noise * rng.normal(size=len(parts))
            for seed in range(seeds):
                own = grown + private * rng.normal(size=len(parts))
                table = pd.DataFrame({
                    "model": f"m{base}", "arm": arm, "seed": seed, "before": 0.5 * scale, "after": (0.5 + own) * scale,
                    "cause": c * scale, "opportunity": o, "activity": rng.random(len(parts)),
                    "weight_norm": rng.random(len(parts)),
                }, index=index)  # fmt: skip
                rows.append(table.reset_index())
    return {"singles": pd.concat(rows, ignore_index=True)}


def test_growth_that_follows_causes_is_seen_and_its_size_is_right():
    found = component_finding(CLAIM, study(cause=0.5))
    signal, noise = 2 * 0.25, 2 * (1 + 0.3**2 / 2)  # variances of the differences between arms, seeds averaged
    assert found.estimate.mean == pytest.approx(signal / (signal + noise), abs=0.04)
    assert found.verdict == "supported" and len(found.pairs) == 12 and set(found.pairs["kind"]) == {"head", "neuron"}
    assert found.pairs["alone"].mean() > 0.1 and found.nulls["identical arms"].inside(CLAIM.delta)
    explored = found.secondary["verdict"] == ""
    assert set(found.secondary.loc[~explored, "reading"]) == {"supporters", "opposers", "heads alone", "neurons alone"}
    assert explored.any() and found.secondary.loc[explored, "why"].str.contains("over all layers").all()
    assert found.to_dict()["parts"][0].keys() >= {"model", "statistic"}


def test_growth_against_causes_is_reversed():
    found = component_finding(CLAIM, study(cause=-0.5))
    assert found.verdict == "contradicted" and found.note == "reversed" and (found.pairs["coefficient"] < 0).all()


def test_what_any_gradient_would_do_is_not_counted():
    """Growth follows opportunity, which is half made of causes: alone they predict it, beside opportunity they add nothing."""
    found = component_finding(CLAIM, study(opportunity=0.5, shared=1.0, noise=0.3))
    assert found.verdict == "contradicted" and found.note == "" and abs(found.estimate.mean) < CLAIM.delta
    assert (found.pairs["rivals"] > 0.5).all()


def test_chance_gives_nothing():
    found = component_finding(CLAIM, study())
    assert found.estimate.high < CLAIM.delta and found.verdict == "contradicted"


def test_a_base_is_predicted_from_the_others_alone():
    """What holds in one base and not in the others does not help there, however well it would fit."""
    frames = study(cause=0.5, bases=2)
    one = frames["singles"]["model"] == "m1"
    frames["singles"].loc[one, "cause"] *= -1
    found = component_finding(CLAIM, frames)
    assert (found.pairs["full"] < found.pairs["rivals"]).all() and found.verdict == "not testable here"


def test_the_race_does_not_depend_on_units():
    rng = np.random.default_rng(0)
    columns = ["grown", "cause", "opportunity", "activity", "weight_norm"]
    bases = [pd.DataFrame(rng.normal(size=(60, 5)), columns=columns).assign(layer=np.arange(60) % 3) for _ in range(3)]
    scaled = [base.assign(**{name: 7 * base[name] - 2 for name in columns}) for base in bases]
    one, other = (race(each[1:], each[0]) for each in (bases, scaled))
    assert one == pytest.approx(other, abs=1e-9) and one.full < 1


@pytest.mark.parametrize("column", ["after", "cause", "opportunity"])
def test_a_value_that_is_not_a_number_is_never_dropped(column):
    frames = study(cause=0.5)
    frames["singles"].loc[frames["singles"].index[5], column] = np.nan  # of one seed of two
    found = component_finding(CLAIM, frames)
    assert np.isnan(found.estimate.mean) and found.verdict == "inconclusive"


def test_what_is_missing_is_said():
    frames = study(cause=0.5, seeds=1)
    found = component_finding(CLAIM, frames)
    assert found.verdict == "inconclusive" and "it needs two seeds of an arm" in found.sentence
    with pytest.raises(RunError, match=r"no rows of 'singles'.*run its arms with singles 'all'"):
        component_finding(CLAIM, {"singles": frames["singles"].iloc[:0]})
    with pytest.raises(RunError, match="arm 'B' has no run"):
        component_finding(CLAIM, {"singles": frames["singles"].query("arm == 'A'")})


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_base_that_has_none_in_a_layer_can_be_predicted_and_can_predict(lacking):
    """Among supporters alone, say: what is fitted where the layer is missing says nothing of it."""
    rng = np.random.default_rng(5)
    bases = []
    for number in range(2):
        table = pd.DataFrame(rng.normal(size=(60, 5)), columns=["grown", "cause", "opportunity", "activity", "weight_norm"])
        table = table.assign(layer=np.arange(60) % 3, grown=table["cause"] + 0.1 * table["grown"])
        bases.append(table[table["layer"] != 1] if number == lacking else table)
    found = race([bases[1]], bases[0])
    assert found.gain > 0.8 and found.coefficient > 0
