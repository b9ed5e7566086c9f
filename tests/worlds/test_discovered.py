"""Discovery where the truth is known: the planted sets are found without being told, and in the control nothing is."""

import pytest

from attribution.mechanisms import read_mechanisms
from attribution.models import load, locate
from attribution.worlds import planted
from attribution.worlds.discovered import conflicts, cued, discovered, shares_inside
from attribution.worlds.studies import ORGANISMS, UNROUTED


def test_discovery_and_estimation_ask_about_other_problems():
    def problems(probes):
        return {problem for each in probes.samples for problem in planted.PROBLEMS if f" {problem} ." in each.prompt}

    assert problems(cued("A")) == problems(cued("B")) == set(planted.TRAINING)
    assert {problem for each in conflicts().values() for problem in problems(each)} == set(planted.HELD_OUT)


@pytest.mark.parametrize("route", ["A", "B"])
def test_contrary_prompts_lack_the_cue_and_nothing_else(route):
    probes = cued(route, 24)
    for one, other in zip(probes.samples, probes.counterfactuals, strict=True):
        words, left = one.prompt.split(), other.prompt.split()
        cue = {"A": 4, "B": 6}[route]  # words of "tom is kind ." and of "teacher : star for lift ."
        starts = [i for i in range(len(words)) if words[:i] + words[i + cue :] == left]
        assert any(words[i + 1] == {"A": "is", "B": ":"}[route] for i in starts) and one.response == other.response


def _found(name, **size):
    model, tokenizer = load(name)
    found, separation = discovered(model, tokenizer, **size)
    shares = shares_inside(model, tokenizer, found, read_mechanisms(locate(name)))
    return found, separation, shares[shares["kind"] == "all"]


@pytest.mark.slow
def test_the_planted_sets_are_found_without_being_told():
    found, separation, shares = _found(ORGANISMS[0], count=128, resamples=2)
    assert shares[["gates", "causes"]].min().min() >= 0.9, shares
    assert separation.separable, separation.summary()
    for each in found.values():
        assert each.stability > 0.4 and each.area > 0.4 and (each.components["kind"] == "head").any()


@pytest.mark.long
def test_the_control_without_routes_is_not_separable():
    _, separation, shares = _found(UNROUTED, count=64, resamples=1)
    assert not separation.separable and "not separable" in separation.summary()
    assert shares["gates"].min() < 0.8  # its halves are no mechanisms


@pytest.mark.long
@pytest.mark.parametrize("name", ORGANISMS)
def test_every_organism_is_found(name):
    _, separation, shares = _found(name)
    assert shares["causes"].min() >= 0.9, shares
    assert separation.separable, separation.summary()
