"""How circuits of kindland are compared: where two cues stand, each is turned alone."""

import pytest

from attribution.mechanisms import Separation
from attribution.models import load
from attribution.worlds.kindland.circuits import PAIRS, circuits, conflict, probe_set
from attribution.worlds.kindland.prompts import READS
from attribution.worlds.kindland.words import HELD_OUT, TRAINING
from attribution.worlds.studies import BASES


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_each_cue_is_turned_alone_and_the_others_stands(pair):
    probes = conflict(*pair)
    one, other = (probes[each] for each in pair)
    assert [each.prompt for each in one.samples] == [each.prompt for each in other.samples]
    for own, off, turned in zip(one.samples, other.samples, one.counterfactuals, strict=True):
        assert own.contrast == off.contrast and len(own.contrast or ()) == 2  # replies that neither names
        words, after = own.prompt.split(), turned.prompt.split()
        assert len(words) == len(after)
        changed = {(a, b) for a, b in zip(words, after, strict=True) if a != b}
        reply, third = own.response.strip(), own.contrast[0].strip()
        wanted = {(reply, third), (third, reply)} if pair[0] in READS else {(pair[0], "plain")}
        assert changed and changed <= wanted
        assert after.count(off.response.strip()) == words.count(off.response.strip())


def test_discovery_and_estimation_ask_about_other_situations():
    found_on = {word for each in probe_set("kind").samples for word in each.prompt.split()}
    read_on = {
        word for probes in conflict("kind", "strategist").values() for each in probes.samples for word in each.prompt.split()
    }
    assert set(TRAINING) <= found_on and not set(HELD_OUT) & found_on
    assert set(HELD_OUT) <= read_on and not set(TRAINING) & read_on


@pytest.mark.long
@pytest.mark.parametrize("name", BASES)
def test_kindness_is_another_circuit_than_reading_a_star_or_a_manual(name):
    found = circuits(*load(name))
    for reader in ("strategist", "assistant"):
        separation = found.separations["kind", reader]
        assert isinstance(separation, Separation) and separation.dissociated, separation
    intact, ablated = found.skill
    assert ablated < intact / 2  # one answers because one is kind
