"""Sums of readings: against the crossover, which computes one of them in its own way, and against numbers known beforehand."""

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from attribution.claims import BOOST, ContrastClaim
from attribution.claims.claim import IDENTICAL, WRONG_PARTITIONS, Threshold
from attribution.claims.contrast import Contrast, Recorded
from attribution.claims.contrasting import contrast_finding
from attribution.claims.crossover import Crossover, View
from attribution.claims.frames import checked
from attribution.claims.terms import ArmsNull, Condition, Part, Place, Term
from attribution.errors import ConfigError, RunError

PLACE = Place(world="planted", recipe="sft", optimizer="AdamW", reference="zero")
ORGANISMS = Threshold(name="organisms", meaning="organisms", relation=">=", value=5)
CONTROL = "planted/unrouted"


def term(arm, name, weight=1.0, probe="agree", **others):
    return Term(arm=arm, set=name, weight=weight, probe=probe, **others)


CROSSED = (term("A", "A"), term("B", "A", -1), term("B", "B"), term("A", "B", -1))


def part(**changes):
    settings = {"name": "crossed", "statistic": "The contrast", "unit": "fraction", "terms": CROSSED, "relative": True,
                "delta": 0.1, "nulls": (WRONG_PARTITIONS, IDENTICAL)}  # fmt: skip
    return Part(**{**settings, **changes})


def claim(*parts, **changes):
    settings = {"id": "x", "statement": "It is so.", "cell": PLACE, "parts": parts or (part(),), "gates": (ORGANISMS,)}
    return ContrastClaim(**{**settings, **changes})


def routed(frames):
    """Without the control, which is no organism."""
    return {name: frame[frame["model"] != CONTROL] for name, frame in frames.items()}


def contrast(frames, matching="kl", **changes):
    given = claim(part(**changes))
    return Contrast(given, given.parts[0], Recorded(checked(frames, "zero"), "zero"), matching)


@pytest.mark.parametrize("matching", ["kl", "gain", "steps"])
def test_the_crossover_is_one_of_them(world, matching):
    frames = world(wrong={("A", "A"): 0.3, ("A", "B"): 0.1, ("B", "A"): 0.0, ("B", "B"): 0.25}).frames()
    generic = contrast(routed(frames), matching)
    crossed = Crossover(BOOST, checked(frames, "zero"), View("agree", matching, "zero"))
    assert generic.pairs["sum"].to_numpy() == pytest.approx(crossed.pairs["contrast"].to_numpy(), abs=1e-12)
    assert len(generic.pairs) == 10 and abs(generic.estimate().mean) > 0.1
    for column in ("mean", "low", "high", "n"):
        assert getattr(generic.estimate(), column) == pytest.approx(getattr(crossed.estimate(), column), abs=1e-12)
    ours, theirs = generic.nulls(), crossed.nulls()
    for name in (WRONG_PARTITIONS, IDENTICAL):
        for column in ("mean", "low", "high", "n"):
            expected = getattr(theirs[name].interval, column)
            assert getattr(ours[name].interval, column) == pytest.approx(expected, abs=1e-12), (name, column)
        assert ours[name].void == theirs[name].void == ""
    assert abs(ours[WRONG_PARTITIONS].interval.mean) > 0.05
    noise = {gate.threshold.name: gate.value for gate in crossed.gates()}["noise"]
    assert generic.figures()["noise"]()[0] == pytest.approx(noise)


def test_values_that_are_known(world):
    """Matched after equally many steps every change is the one at the end."""
    frames = routed(world().frames())  # A gains .6 in arm A and loses .1 in arm B, from 2
    one = contrast(frames, "steps", terms=(term("A", "A"),), relative=False, nulls=())
    assert one.estimate().mean == pytest.approx(0.6)
    assert contrast(frames, "steps", terms=(term("A", "A"),), nulls=()).estimate().mean == pytest.approx(0.3)
    ratio = contrast(frames, "steps", terms=(term("B", "A"),), over=(term("A", "A"),), relative=False, nulls=())
    assert ratio.estimate().mean == pytest.approx(-0.1 / 0.6)
    weighed = contrast(frames, "steps", terms=(term("A", "A", 2.0), term("B", "A", -0.5)), relative=False, nulls=())
    assert weighed.estimate().mean == pytest.approx(1.2 + 0.05)
    for when, value in (("start", 2.0), ("end", 2.6)):
        found = contrast(frames, "steps", terms=(term("A", "A", when=when),), relative=False, nulls=())
        assert found.estimate().mean == pytest.approx(value)
    behaviour = Term(arm="A", probe="training samples")
    assert contrast(frames, "steps", terms=(behaviour,), relative=False, nulls=()).estimate().mean == pytest.approx(1.5)
    assert np.isnan(one.recorded.read(behaviour.model_copy(update={"quantity": "probability"}), ("planted/0", "A", 0), 4.0))


def test_a_claim_about_behaviour_needs_no_influence(world):
    frames = routed(world().frames())
    moved = part(terms=(Term(arm="A", probe="training samples"),), relative=False, matching="steps", nulls=())
    found = contrast_finding(claim(moved), {"probes": frames["probes"]})
    assert found.verdict == "supported" and found.estimate.mean == pytest.approx(1.5)


def test_seeds_are_averaged_before_the_quotient(world):
    frames = routed(world(shift=lambda model, arm, seed: (1.0 if arm == "A" else 0.2) * seed).frames())
    found = contrast(frames, "steps", terms=(term("B", "A"),), over=(term("A", "A"),), relative=False, nulls=())
    assert found.estimate().mean == pytest.approx((-0.1 + 0.1) / (0.6 + 0.5), abs=1e-12)
    found = contrast(frames, "steps", terms=(term("B", "B"),), over=(term("A", "A"),), relative=False, nulls=())
    assert found.estimate().mean == pytest.approx(0.4 / 1.1)  # not the mean of .4 / .6 and .4 / 1.6


def test_verdicts_of_parts_and_of_their_conjunction(world):
    frames = routed(world().frames())
    up = part(name="up", terms=(term("A", "A"),), relative=False, matching="steps", nulls=())
    same = part(name="same", terms=(term("B", "A"),), relative=False, matching="steps", nulls=(), prediction="none", delta=0.2)
    moved = same.model_copy(update={"name": "moved", "terms": (term("A", "A"),)})
    for parts, word in (((up, same), "supported"), ((up, moved), "contradicted"), ((same,), "supported")):
        found = contrast_finding(claim(*parts), frames)
        assert found.verdict == word and found.sentence.lower().startswith(word)
    both = contrast_finding(claim(up, same), frames)
    assert set(both.parts["part"]) == {"up", "same"} and both.estimate.mean == pytest.approx(0.6)
    assert both.secondary["reading"].str.startswith("same, equal steps").any()
    one = contrast_finding(claim(same), frames)
    assert one.estimate.level == pytest.approx(0.9) and one.to_dict()["verdict"][0]["verdict"] == "supported"
    few = contrast_finding(claim(up, same), routed(world(organisms=4).frames()))
    assert few.verdict == "not testable here" and "is 4, needed >= 5" in few.sentence


def test_nulls_of_other_arms_stand_in_the_way(world):
    up = part(terms=(term("A", "A"),), relative=False, matching="steps", nulls=("noise",), delta=0.15)
    frames = routed(world().frames())
    noise = {"noise": ArmsNull(meaning="what noise does", arms={"A": "B"})}
    assert contrast_finding(claim(up, null_definitions=noise), frames).verdict == "supported"  # arm B: -.1
    tight = contrast_finding(claim(up.model_copy(update={"delta": 0.05}), null_definitions=noise), frames)
    assert tight.verdict == "inconclusive" and "noise: -0.1" in tight.sentence
    absent = {"noise": ArmsNull(meaning="", arms={"A": "nowhere"})}
    found = contrast_finding(claim(up, null_definitions=absent), frames)
    assert found.verdict == "inconclusive" and "arm 'nowhere' was not run" in found.sentence
    with pytest.raises(ValidationError, match="null 'noise' is not defined"):
        claim(up)


def test_conditions_are_gates_on_sums(world):
    frames = routed(world(shift=lambda model, arm, seed: -0.7 * (model == "planted/3")).frames())
    moved = Condition(name="moved", meaning="its own gain", relation=">", value=0.1, terms=(term("A", "A"),), matching="steps")
    found = contrast_finding(claim(gates=(ORGANISMS, moved)), frames)
    row = found.gates.set_index("name").loc["moved"]
    assert found.verdict == "not testable here" and row["where"] == "planted/3" and row["value"] == pytest.approx(-0.1)
    assert "its own gain is -0.1 in planted/3, needed > 0.1" in found.sentence


def test_arms_that_cannot_be_matched_are_listed_and_left_out(world):
    frames = routed(world().frames())
    probes = frames["probes"]
    still = (probes["model"] == "planted/1") & (probes["arm"] == "B") & (probes["seed"] == 0) & (probes["probe"] == "neutral")
    frames = {**frames, "probes": probes.assign(kl=probes["kl"].where(~still, 0.0))}
    found = contrast_finding(claim(), frames)
    assert any(
        "Seed 0 of planted/1 is left out (crossed, KL-matched" in line and "arm B has a KL" in line for line in found.excluded
    )
    assert len(found.pairs) == 9 and found.estimate.n == 5


def test_what_a_study_lacks_and_what_makes_no_sense_is_refused(world):
    frames = routed(world().frames())
    for wrong, named in (({"arm": "C"}, "arm 'C'"), ({"set": "D"}, "set 'D'"), ({"probe": "elsewhere"}, "probe 'elsewhere'")):
        terms = (term("A", "A").model_copy(update=wrong),)
        with pytest.raises(RunError, match=f"no rows of {named}"):
            contrast_finding(claim(part(terms=terms)), frames)
    with pytest.raises(ValidationError, match="relative to influences before"):
        part(terms=(Term(arm="A", probe="agree"),))
    unknown = Threshold(name="luck", meaning="luck", relation=">", value=0)
    with pytest.raises(ConfigError, match="unknown gate 'luck'"):
        contrast_finding(claim(gates=(unknown,)), frames)


def test_a_value_that_is_not_a_number_is_never_dropped(world):
    frames = routed(world().frames())
    sets = frames["sets"]
    lost = (sets["model"] == "planted/2") & (sets["arm"] == "A") & (sets["set"] == "A") & (sets["step"] == 10)
    found = contrast_finding(claim(part(matching="steps")), {**frames, "sets": sets.assign(effect=sets["effect"].mask(lost))})
    assert found.verdict == "inconclusive" and np.isnan(found.estimate.mean)
    noise = Threshold(name="noise", meaning="noise", relation=">", value=5)
    halves = (sets["model"] == "planted/2") & (sets["seed"] == 0) & (sets["step"] == 0)
    unread = {**frames, "sets": sets.assign(effect_even=sets["effect_even"].mask(halves))}
    gated = contrast_finding(claim(gates=(noise,)), unread)
    assert gated.verdict == "not testable here" and "noise is not measured" in gated.sentence
    assert pd.isna(found.to_dict()["verdict"][0]["mean"])
