"""Separation: disjoint sets, the double dissociation on prompts that no discovery saw, and the verdict by its rule."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import attribution as at
from attribution.capture import scored_logits
from attribution.errors import ConfigError, DataError
from attribution.mechanisms import Discovery, halves, separate
from attribution.mechanisms.discovery import paired
from attribution.mechanisms.separation import disjoint
from attribution.models import anatomy
from attribution.samples import ProbeSet, collate, encode
from attribution.worlds.discovered import conflicts, cued

COLUMNS = ["kind", "layer", "index"]
CONFLICTS = conflicts(36, seed=5)


def discovery(members, rest=(), prompts=()):
    """A discovery that found these components, with gates falling from 1."""
    rows = [*members, *rest]
    table = pd.DataFrame(rows, columns=COLUMNS).assign(gate=np.linspace(1, 0, len(rows), endpoint=False), frequency=1.0)
    return Discovery(
        name="x", table=table, curve=pd.DataFrame(), size=len(members), keep=0.9, area=1.0, stability=1.0, jaccard=1.0,
        intact=2.0, absent=0.0, metric="logit_difference", reference="zero", prompts=frozenset(prompts),
    )  # fmt: skip


@pytest.fixture(scope="module")
def organism():
    return at.load("planted")


@pytest.fixture(scope="module")
def true():
    return {name: discovery(list(table.itertuples(index=False, name=None))) for name, table in halves(4, 4, 256).items()}


def test_two_sets_are_made_disjoint_and_what_they_share_is_a_third():
    one = discovery([("head", 0, 1), ("neuron", 1, 2), ("neuron", 1, 3)], [("head", 0, 0)])
    other = discovery([("neuron", 1, 3), ("head", 0, 0)], [("head", 0, 1)])
    found = {name: table.values.tolist() for name, table in disjoint({"A": one.components, "B": other.components}).items()}
    assert found == {"A": [["head", 0, 1], ["neuron", 1, 2]], "B": [["head", 0, 0]], "shared": [["neuron", 1, 3]]}


def test_the_planted_halves_are_separable(organism, true):
    found = separate(*organism, true, CONFLICTS)
    assert found.separable and found.summary().startswith("A and B are separable") and found.common == {"A": 0, "B": 0}
    share = found.table.set_index(["set", "probe"])["share"]
    assert share["A", "A"] > 0.9 and share["B", "B"] > 0.9 and abs(share["A", "B"]) < 0.1 and abs(share["B", "A"]) < 0.1
    assert len(found.sets["shared"]) == 0 and share["shared", "A"] == 0 and share["whole A", "A"] == share["A", "A"]
    sizes = found.table.set_index(["set", "probe"])["size"]
    assert sizes["A", "A"] == 4 * (2 + 128)
    effect = at.ablate(*organism, CONFLICTS["A"].samples, {"A": true["A"].components}, metric="logit_difference")["effect"]
    assert share["A", "A"] * found.behaviour["A"] == pytest.approx(effect.item(), rel=1e-5)


def test_every_condition_can_fail(organism, true):
    swapped = separate(*organism, {"A": true["B"], "B": true["A"]}, CONFLICTS)
    assert not swapped.separable and not swapped.dissociated and len(swapped.failed) == 4
    assert "A takes" in swapped.summary() and "at least 50% is needed" in swapped.summary()
    same = separate(*organism, {"A": true["A"], "B": true["A"]}, CONFLICTS)
    assert any("100% of A lies in what both hold, at most 40%" in each for each in same.failed)
    everything = discovery([*true["A"].components.values.tolist(), *true["B"].components.values.tolist()])
    one = discovery([*true["A"].components.values.tolist(), true["B"].components.values.tolist()[-1]])
    heavy = replace(one, table=one.table.assign(gate=[0.001] * (one.size - 1) + [1.0]))  # nearly all of A in one neuron of B
    merged = separate(*organism, {"A": heavy, "B": true["B"]}, CONFLICTS)
    assert merged.dissociated and not merged.separable
    assert merged.summary().startswith("A and B are dissociated, but not separable: 66% of A lies in what both hold")
    wide = separate(*organism, {"A": true["A"], "B": everything}, CONFLICTS)
    assert "A takes 0% of its own" in wide.failed[0]


def test_a_behaviour_is_what_the_cue_adds(organism, true):
    """With counterfactuals its zero is the metric without the cue, in any metric."""
    probes = {route: cued(route, 12, seed=9) for route in ("A", "B")}
    found = separate(*organism, true, probes, metric="log_odds")
    for route, value in found.behaviour.items():
        logits = [
            scored_logits(anatomy(organism.model), batch)
            for batch in (collate(encode(organism.tokenizer, listed)) for listed in paired(probes[route]))
        ]
        batch = collate(encode(organism.tokenizer, probes[route].samples))
        odds = [each.softmax(-1).gather(1, batch.tokens[:, None]).logit().mean().item() for each in logits]
        assert value == pytest.approx(odds[0] - odds[1], rel=1e-3) and value > 1
    with pytest.raises(DataError, match="have no counterfactuals, without which log_odds has no zero"):
        separate(*organism, true, CONFLICTS, metric="log_odds")


def test_wrong_questions_are_refused(organism, true):
    prompts = [sample.prompt for sample in CONFLICTS["A"].samples[:2]]
    with pytest.raises(DataError, match=r"2 prompts of the probes 'A' were looked at when 'A'"):
        separate(*organism, {**true, "A": replace(true["A"], prompts=frozenset(prompts))}, CONFLICTS)
    with pytest.raises(DataError, match="'A' found no set"):
        separate(*organism, {**true, "A": replace(true["A"], size=0)}, CONFLICTS)
    for wrong in ({"A": true["A"]}, {"A": true["A"], "shared": true["B"]}, {"A": true["A"], "C": true["B"]}):
        with pytest.raises(ConfigError, match="expected two"):
            separate(*organism, wrong, CONFLICTS)
    turned = [s.model_copy(update={"response": s.contrast[0], "contrast": (s.response,)}) for s in CONFLICTS["A"].samples]
    with pytest.raises(DataError, match="the behaviour of the probes 'turned' is not there"):
        separate(*organism, true, {**CONFLICTS, "A": ProbeSet(name="turned", samples=tuple(turned))})
