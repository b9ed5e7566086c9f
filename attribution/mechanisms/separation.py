"""Whether two discovered mechanisms are two: made disjoint, and each ablated while both behaviours are read.

What both hold is a third set, `shared`. Behaviours are read on estimation prompts that no discovery looked at, best with both
cues in them. The thresholds were chosen on organisms that are not shipped, with conflict prompts: on `planted` (seeds 97 and
99) a disjoint set takes 87 to 98 % of its own behaviour and changes the other's by at most 10 %, and at most 4 % of its gates
lie in what both hold; on `planted/unrouted` (seeds 96 and 98) one set takes 30 % of its own, and another 44 % of the other's.

Knows sets and metrics; knows nothing about how they were found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from attribution.capture import evaluating, scored_logits
from attribution.causes import ablate
from attribution.causes.given import BATCH_SIZE, encoded_for
from attribution.errors import ConfigError, DataError
from attribution.mechanisms.discovery import Discovery, paired
from attribution.mechanisms.sets import COLUMNS, Mechanisms
from attribution.metrics import check_scorable, metric_named
from attribution.models import anatomy
from attribution.samples import ProbeSet, Sample, batches

SHARED = "shared"
OWN, OTHER, COMMON = 0.5, 0.25, 0.4


@dataclass(frozen=True)
class Separation:
    """Two mechanisms made disjoint, and what each does to both behaviours.

    Attributes:
        sets: the two without what they share, by name, and "shared": kind, layer, index.
        table: one row per behaviour and ablated set: probe, set (of `sets`, or "whole A" for all of A), size, effect (fall of
            the metric), share (of the behaviour: metric - metric without the cue).
        common: share of each mechanism's summed gates that lies in what both hold, by name.
        behaviour: metric - metric without the cue, by probe.
        mixed: the conditions of a double dissociation that are not met, in words.
        merged: in words, which of the two lies mostly in what both hold.
    """

    sets: Mechanisms
    table: pd.DataFrame
    common: Mapping[str, float]
    behaviour: Mapping[str, float]
    mixed: tuple[str, ...]
    merged: tuple[str, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """The conditions of separability that are not met, in words."""
        return self.mixed + self.merged

    @property
    def dissociated(self) -> bool:
        """Whether each disjoint set takes its own behaviour away and leaves the other's, however much both hold."""
        return not self.mixed

    @property
    def separable(self) -> bool:
        """Whether they are dissociated, and neither lies mostly in what both hold."""
        return not self.failed

    def summary(self) -> str:
        """The verdict, in words."""
        one, other = self.common
        if not self.separable:
            but = "dissociated, but not" if self.dissociated else "not"
            return f"{one} and {other} are {but} separable: {'; '.join(self.failed)}"
        share = self.table.set_index(["set", "probe"])["share"]
        told = (
            f"{own} takes {share[own, own]:.0%} of {own} and {share[own, off]:.0%} of {off}"
            for own, off in ((one, other), (other, one))
        )
        return f"{one} and {other} are separable: ablated, {', '.join(told)}; both hold {len(self.sets[SHARED])} components"


def separate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    discoveries: Mapping[str, Discovery],
    probes: Mapping[str, ProbeSet],
    *,
    metric: str = "logit_difference",
    reference: str = "zero",
) -> Separation:
    """Make two discovered mechanisms disjoint, and say whether they are two. The model is left as it was.

    They are *dissociated* where, by the metric's fall in units of the behaviour, each set without the shared one, ablated
    jointly, takes at least one half of its own behaviour and changes the other's by at most a quarter. They are *separable*
    where besides the shared set holds at most two fifths of the summed gates of either: then most of what either needs is its
    own, and not only a part that each needs beside what both do.

    Args:
        model, tokenizer: those of the discoveries.
        discoveries: two, by name.
        probes: for each name, estimation prompts that read its behaviour, disjoint from all discovery prompts. A behaviour is
            the metric less the metric on the probe set's counterfactuals, the same prompts without the cue; without
            counterfactuals, less 0, which `logit_difference` alone allows: no preference.
        metric: one of `metrics.METRICS`.
        reference: as `discover`; "mean" and "resample" take it from the counterfactuals.

    Raises:
        ConfigError: not two discoveries, names without probes, or an unknown metric or reference.
        DataError: a discovery that found nothing, a prompt that a discovery has looked at, a behaviour that is not there, or
            samples that cannot be encoded, scored or aligned.
        ModelError: as `attribute`.
    """
    if len(discoveries) != 2 or SHARED in discoveries or set(probes) != set(discoveries):
        raise ConfigError(
            f"discoveries {', '.join(map(repr, discoveries))} with probes {', '.join(map(repr, probes))}; expected two, "
            f"neither called {SHARED!r}, and a probe set for each"
        )
    for name, found in discoveries.items():
        _check(name, found, probes, metric)
    sets = disjoint({name: found.components for name, found in discoveries.items()})
    ablated = {**sets, **{f"whole {name}": found.components for name, found in discoveries.items()}}
    behaviour, tables = {}, []
    for name, probe in probes.items():
        behaviour[name] = _behaviour(model, tokenizer, probe, metric)
        found = ablate(
            model, tokenizer, probe.samples, ablated, metric=metric, reference=reference,
            counterfactuals=probe.counterfactuals,
        )  # fmt: skip
        tables.append(found.assign(probe=name, share=found["effect"] / behaviour[name]))
    table = pd.concat(tables, ignore_index=True)[["probe", "set", "size", "effect", "share"]]
    common = {name: _common(found, sets[SHARED]) for name, found in discoveries.items()}
    return Separation(sets, table, common, behaviour, _mixed(table, common), _merged(common))


def disjoint(mechanisms: Mapping[str, pd.DataFrame]) -> Mechanisms:
    """Two mechanisms without what they share, and what they share."""
    tables = {name: table.reset_index(drop=True) for name, table in mechanisms.items()}
    one, other = tables.values()
    both = one.merge(other, on=COLUMNS)
    return {**{name: _less(table, both) for name, table in tables.items()}, SHARED: both}


def _less(table: pd.DataFrame, taken: pd.DataFrame) -> pd.DataFrame:
    marked = table.merge(taken, on=COLUMNS, how="left", indicator=True)
    return marked.loc[marked["_merge"] == "left_only", COLUMNS].reset_index(drop=True)


def _common(found: Discovery, shared: pd.DataFrame) -> float:
    """Share of a mechanism's summed gates that lies in the shared set."""
    members = found.table.head(found.size)
    return float(members.merge(shared, on=COLUMNS)["gate"].sum() / members["gate"].sum())


def _check(name: str, found: Discovery, probes: Mapping[str, ProbeSet], metric: str) -> None:
    if not found.size:
        raise DataError(f"discovery {name!r} found no set, so there is nothing to separate; its summary says how far it came")
    for probe in probes.values():
        if seen := [each for each in (*probe.samples, *probe.counterfactuals) if each.whole_prompt in found.prompts]:
            raise DataError(
                f"{len(seen)} prompts of the probes {probe.name!r} were looked at when {name!r} was discovered, the first "
                f"{seen[0].whole_prompt[:60]!r}; estimate on other prompts"
            )
        if not probe.counterfactuals and metric != "logit_difference":
            raise DataError(
                f"the probes {probe.name!r} have no counterfactuals, without which {metric} has no zero; give the same prompts "
                "without the cue, or use logit_difference"
            )


def _behaviour(model: nn.Module, tokenizer: PreTrainedTokenizerBase, probe: ProbeSet, metric: str) -> float:
    """Mean metric, each sample times its weight, less that without the cue."""
    parts, read = anatomy(model), metric_named(metric)
    device = next(parts.model.parameters()).device

    @torch.no_grad()
    def mean(samples: Sequence[Sample]) -> float:
        given = batches(encoded_for(parts, tokenizer, samples), BATCH_SIZE, device)
        check_scorable(read, given, parts.vocabulary)
        with evaluating(parts.model):
            return torch.cat([read(scored_logits(parts, each), each) * each.weights for each in given]).double().mean().item()

    found = mean(probe.samples)
    if probe.counterfactuals:
        found -= mean(paired(probe)[1])
    if not found > 0:
        raise DataError(
            f"the behaviour of the probes {probe.name!r} is not there: {metric} is {found:.3g} above that without the cue; "
            "give prompts on which the model shows it"
        )
    return found


def _mixed(table: pd.DataFrame, common: Mapping[str, float]) -> tuple[str, ...]:
    share = table.set_index(["set", "probe"])["share"]
    said = []
    for own in common:
        (other,) = (name for name in common if name != own)
        if not share[own, own] >= OWN:
            said.append(f"{own} takes {share[own, own]:.0%} of its own behaviour, at least {OWN:.0%} is needed")
        if not abs(share[own, other]) <= OTHER:
            said.append(
                f"{own} takes {share[own, other]:.0%} of the behaviour of {other}, at most {OTHER:.0%} either way is allowed"
            )
    return tuple(said)


def _merged(common: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(
        f"{share:.0%} of {name} lies in what both hold, at most {COMMON:.0%} is allowed"
        for name, share in common.items()
        if not share <= COMMON
    )
