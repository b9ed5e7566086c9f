"""How circuits of kindland are compared: where two cues stand, each is turned alone."""

from pathlib import Path

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


def _reported():
    """The rows of the table of pairs in results/worlds.md."""
    lines = (Path(__file__).parents[2] / "results" / "worlds.md").read_text(encoding="utf-8").splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| base | pair |"))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[head + 2 :] if line.startswith("| kindland/")]


def test_the_report_tells_of_every_base_and_pair_and_kindness_is_apart_in_most():
    rows = [row for row in _reported() if len(row) == 9]
    assert {(row[0], row[1]) for row in rows} == {(base, "–".join(pair)) for base in BASES for pair in PAIRS}
    apart = {(row[0], row[1]) for row in rows if row[7] == "yes"}
    assert sum((base, "kind–strategist") in apart for base in BASES) >= 4  # what claims about the two rest on
    for row in rows:
        (one, off), (other, back) = ([float(value) for value in row[column].split(" / ")] for column in (4, 5))
        assert (row[7] == "yes") == (min(one, other) >= 0.5 and max(abs(off), abs(back)) <= 0.25), row


@pytest.mark.long
@pytest.mark.parametrize("name", BASES)
def test_circuits_are_those_of_the_report(name):
    found = circuits(*load(name))
    rows = {(row[0], row[1]): row for row in _reported()}
    for (one, other), separation in found.separations.items():
        row = rows[name, f"{one}–{other}"]
        assert isinstance(separation, Separation)
        assert (row[7], row[8]) == tuple("yes" if each else "no" for each in (separation.dissociated, separation.separable))
        share = separation.table.set_index(["set", "probe"])["share"]
        assert float(row[4].split(" / ")[0]) == pytest.approx(share[one, one], abs=0.02)
    intact, ablated = found.skill
    assert ablated < intact / 2  # one answers because one is kind
