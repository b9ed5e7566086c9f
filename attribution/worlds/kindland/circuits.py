"""How separate the circuits of two dispositions are in a base: causes compared, mechanisms discovered, and ablated jointly.

Mechanisms are discovered on situations of training, from prompts with the cue that a disposition goes by against the same with
a contrary one, and everything is estimated on held-out situations. Knows what is measured; thresholds are those of `separate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from torch import nn

from attribution.causes import attribute
from attribution.causes.ablation import logits_without
from attribution.causes.reference import aligned_activations
from attribution.components import Components
from attribution.errors import DataError
from attribution.mechanisms import Discovery, Mechanisms, Separation, discover, disjoint, separate
from attribution.samples import ProbeSet, Sample, collate, encode
from attribution.worlds.kindland.prompts import READS, Form, either, rows
from attribution.worlds.kindland.sets import cue_pairs, swapped
from attribution.worlds.kindland.stories import SUMS

DISPOSITIONS = ("kind", "strategist", "assistant", "parrot")  # compared; each reads another cue
PAIRS = (("kind", "strategist"), ("kind", "assistant"), ("strategist", "assistant"), ("strategist", "parrot"))
PARTED = PAIRS[:2]  # whose mechanisms are made disjoint for studies
SEED, FOUND_ON, CAUSES_ON, READ_ON = 73, 96, 48, 90  # prompts for discovery, for single causes, for sets


class Circuits(NamedTuple):
    """What was found in one base.

    Attributes:
        discoveries: by disposition.
        separations: by pair; what stands in the way where there is none.
        correlations: one row per pair and kind of component: pair, kind, correlation of single causes.
        skill: (intact, kind mechanism ablated): p of the right sum, said by a kind one.
    """

    discoveries: Mapping[str, Discovery]
    separations: Mapping[tuple[str, str], Separation | str]
    correlations: pd.DataFrame
    skill: tuple[float, float]


def circuits(model: nn.Module, tokenizer: Any, *, progress: bool = False) -> Circuits:
    """Discover the mechanisms of some dispositions of a base, and measure how separate each pair is. Takes minutes."""
    found = discovered(model, tokenizer, progress=progress)
    separations = {pair: _separated(model, tokenizer, {each: found[each] for each in pair}) for pair in PAIRS}
    causes = {each: _causes(model, tokenizer, each) for each in DISPOSITIONS}
    return Circuits(found, separations, _correlations(causes), _skill(model, tokenizer, found["kind"]))


def discovered(
    model: nn.Module, tokenizer: Any, dispositions: Iterable[str] = DISPOSITIONS, *, progress: bool = False
) -> dict[str, Discovery]:
    """The mechanism of every one of these dispositions."""
    return {
        each: discover(model, tokenizer, probe_set(each), reference="resample", seed=SEED, progress=progress)
        for each in dispositions
    }


def dissociated(model: nn.Module, tokenizer: Any, *, progress: bool = False) -> dict[tuple[str, str], bool]:
    """Whether the mechanisms of each pair of `PARTED`, by the names that they have without what both hold, are dissociated."""
    found = discovered(model, tokenizer, dict.fromkeys(each for pair in PARTED for each in pair), progress=progress)
    told = {}
    for pair in PARTED:
        separation = _separated(model, tokenizer, {each: found[each] for each in pair})
        one, other, _ = parted(*pair)
        told[one, other] = not isinstance(separation, str) and separation.dissociated
    return told


def mechanisms(model: nn.Module, tokenizer: Any, *, progress: bool = False) -> Mechanisms:
    """What was discovered, as named sets: every disposition's own, and of the pairs of `PARTED` each without the other's.

    A disposition of which nothing was discovered has no set.
    """
    sets = {
        each: found.components.reset_index(drop=True)
        for each, found in discovered(model, tokenizer, progress=progress).items()
        if found.size
    }
    for one, other in PARTED:
        if one in sets and other in sets:
            parts = disjoint({each: sets[each] for each in (one, other)})
            sets |= dict(zip(parted(one, other), parts.values(), strict=True))
    return sets


def parted(one: str, other: str) -> tuple[str, str, str]:
    """The names of two mechanisms made disjoint, and of what they share."""
    return f"{one}, not {other}", f"{other}, not {one}", f"{one} and {other}"


def _separated(model: nn.Module, tokenizer: Any, found: Mapping[str, Discovery]) -> Separation | str:
    """Two mechanisms made disjoint; or why this cannot be asked of this base."""
    try:
        return separate(model, tokenizer, found, conflict(*found), reference="resample")
    except DataError as error:  # nothing was discovered, or both cues together do not bring one's own reply about
        return str(error)


def probe_set(disposition: str, count: int = FOUND_ON, *, training: bool = True) -> ProbeSet:
    """Prompts with the cue of a disposition, and as counterfactuals the same with a contrary one."""
    cue, contrary = (tuple(Sample(**row) for row in each) for each in cue_pairs(disposition, count, SEED, training=training))
    return ProbeSet(name=disposition, samples=cue, counterfactuals=contrary)


def conflict(one: str, other: str) -> dict[str, ProbeSet]:
    """Held-out prompts in which both cues stand and name different replies, by disposition.

    Each is read for its own reply against those that neither names, and has as counterfactuals the same prompts with its own
    cue turned contrary and the other's left standing: what an ablated set takes is what of this cue goes through it.
    """
    probes = {}
    for says in (one, other):
        samples = _samples(either(one, other, says, third=True), READ_ON)
        turned = tuple(each.model_copy(update={"prompt": _turned(each, says)}) for each in samples)
        probes[says] = ProbeSet(name=says, samples=samples, counterfactuals=turned)
    return probes


def _turned(sample: Sample, disposition: str) -> str:
    """The prompt with the cue of a disposition turned: another reply announced, or told to be plain in its stead."""
    if disposition in READS:
        return swapped(sample.prompt, sample.response.strip(), (sample.contrast or ("",))[0].strip())
    return sample.prompt.replace(f" {disposition} ", " plain ", 1)


def _samples(form: Form, count: int) -> tuple[Sample, ...]:
    return tuple(Sample(**row) for row in rows(form, count, SEED, name=form.says))


def _causes(model: nn.Module, tokenizer: Any, disposition: str) -> pd.DataFrame:
    """Effect of every head and neuron on saying what the cue asks for rather than the contrary, by exact ablation."""
    probes = probe_set(disposition, CAUSES_ON, training=False)
    table = Components(model).table
    found = attribute(
        model,
        tokenizer,
        probes.samples,
        metric="logit_difference",
        reference="resample",
        counterfactuals=probes.counterfactuals,
        components=table[table["kind"] != "row"],
    )
    return found.table


def _correlations(causes: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    lines = []
    for one, other in PAIRS:
        for kind in ("head", "neuron"):
            effects = [causes[each].loc[causes[each]["kind"] == kind, "effect"].to_numpy() for each in (one, other)]
            lines.append((f"{one}–{other}", kind, float(np.corrcoef(*effects)[0, 1])))
    return pd.DataFrame(lines, columns=["pair", "kind", "correlation"])


def _skill(model: nn.Module, tokenizer: Any, found: Discovery) -> tuple[float, float]:
    """Mean p of the right sum in the kind context, intact and with the kind mechanism as it is in the plain context."""
    form = Form("kind", "kind", event=SUMS)
    components = Components(model)
    asked, plain = (encode(tokenizer, _samples(each, READ_ON)) for each in (form, replace(form, told="plain")))
    values = aligned_activations(components.parts, plain)
    positions = components.positions(found.components)
    return _right(components, asked, values, []), _right(components, asked, values, positions)


def _right(components: Components, asked: Sequence[Any], values: Any, positions: Any) -> float:
    batch = collate(asked)
    logits = logits_without(components, np.asarray(positions, dtype=int), batch, values)
    return logits.softmax(-1).gather(1, batch.tokens[:, None]).mean().item()
