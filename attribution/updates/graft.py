"""Grafts: what a component's change does alone, put into the model before training, or taken out of the model after.

Graft: metric(theta_0 + dtheta_c) - metric(theta_0). Prune-back: metric(theta_1) - metric(theta_1 - dtheta_c)
(Panigrahi et al. 2023). Weights are copied, never computed, so both models end as they began, bit by bit.

Knows two models and the partition of their parameters; knows nothing about how one became the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from attribution.capture import evaluating
from attribution.causes import BATCH_SIZE
from attribution.causes.ablation import logits_without
from attribution.causes.reference import zeros
from attribution.components import Component, Components
from attribution.errors import ConfigError, ModelError
from attribution.metrics import Metric, metric_named
from attribution.samples import Batch, ProbeSet, batches, encode
from attribution.sharding import settle

REMAINDER = "remainder"
NOTHING = np.array([], dtype=np.int64)


def graft(
    base: nn.Module,
    tuned: nn.Module,
    components: Mapping[str, Iterable[Component] | pd.DataFrame | str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[ProbeSet],
    metric: str = "log_odds",
    progress: bool = False,
) -> pd.DataFrame:
    """Graft and prune-back of each of several sets of components, on each probe set.

    Args:
        base, tuned: the model before and after training.
        components: by name, sets of components; the word "remainder" stands for all parameters that belong to none.
        tokenizer: of the models.
        probes: what is read.
        metric: one of `metrics.METRICS`.
        progress: show a bar.

    Returns:
        One row per probe set and set of components: probe, set, groups (how many were swapped), graft, prune (metric
        units, mean over samples).

    Raises:
        ModelError: two models whose parameters do not correspond.
        ConfigError: no probe set, an unknown metric or component.
        DataError: samples that cannot be encoded or scored.
    """
    before, after = Components(base), Components(tuned)
    check_same_parameters(before, after)
    masks = {name: _mask(before, members) for name, members in components.items()}
    read = metric_named(metric)
    sets = readable(before, tokenizer, probes)
    at = {name: (level(before, found, read), level(after, found, read)) for name, found in sets.items()}
    rows = []
    for name, mask in tqdm(masks.items(), disable=not progress, unit="set", desc="grafts", leave=False):
        with swapped(before, after, mask):
            grafted = {probe: level(before, found, read) for probe, found in sets.items()}
        with swapped(after, before, mask):
            pruned = {probe: level(after, found, read) for probe, found in sets.items()}
        groups = int(mask.sum())
        rows += [(p, name, groups, grafted[p] - at[p][0], at[p][1] - pruned[p]) for p in sets]
    return pd.DataFrame(rows, columns=["probe", "set", "groups", "graft", "prune"])


def graft_sets(
    base: nn.Module,
    tuned: nn.Module,
    sets: Mapping[str, Iterable[Component] | pd.DataFrame],
    *,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[ProbeSet],
    metric: str = "log_odds",
) -> pd.DataFrame:
    """Graft each set, and the remainder, while nothing or one of the sets is ablated by zero: where does its gain come from?

    If a graft's gain vanishes while mechanism A is ablated, what was grafted feeds A; if it stays, it does the job itself.

    Args:
        base, tuned, tokenizer, probes, metric: as `graft`.
        sets: named sets of heads and neurons.

    Returns:
        One row per probe set, grafted set and ablated set ("" for none): probe, set, ablated, graft (metric units).

    Raises:
        As `graft`.
    """
    before, after = Components(base), Components(tuned)
    check_same_parameters(before, after)
    read = metric_named(metric)
    found = readable(before, tokenizer, probes)
    silent = {"": NOTHING, **{name: before.positions(members) for name, members in sets.items()}}
    masks = {name: _mask(before, members) for name, members in {**sets, REMAINDER: REMAINDER}.items()}

    def levels() -> dict[tuple[str, str], float]:
        every = product(silent.items(), found.items())
        return {(probe, name): level(before, each, read, ablated) for (name, ablated), (probe, each) in every}

    start, rows = levels(), []
    for name, mask in masks.items():
        with swapped(before, after, mask):
            grafted = levels()
        rows += [(probe, name, ablated, value - start[probe, ablated]) for (probe, ablated), value in grafted.items()]
    return pd.DataFrame(rows, columns=["probe", "set", "ablated", "graft"])


@contextmanager
def swapped(into: Components, source: Components, mask: Tensor) -> Iterator[None]:
    """Give the groups in `mask` (Bool [groups]) of one model the weights of another, inside the block.

    Raises:
        ModelError: two models whose parameters do not correspond, or do not lie alike in processes; a tied matrix in shards.
    """
    check_same_parameters(into, source)
    into.check_separable()
    saved: list[tuple[Tensor, Tensor]] = []
    with into.untied():
        try:
            with torch.no_grad():
                for use, other in zip(into.uses, source.uses, strict=True):
                    chosen = mask[use.owners]
                    if not chosen.any():
                        continue
                    weight = use.values
                    saved.append((weight, weight.clone()))
                    weight.copy_(torch.where(use.spread(chosen), other.values.to(weight.device), weight))
            settle(into.parts.model)
            yield
        finally:
            with torch.no_grad():
                for weight, values in saved:
                    weight.copy_(values)
            settle(into.parts.model)


def readable(components: Components, tokenizer: PreTrainedTokenizerBase, probes: Sequence[ProbeSet]) -> dict[str, list[Batch]]:
    """The batches of every probe set, by its name, on the model's device.

    Raises:
        ConfigError: no probe set.
        DataError: samples that cannot be encoded.
    """
    if not probes:
        raise ConfigError("there is no probe set to read grafts on; give at least one")
    model = components.parts.model
    context, device = getattr(model.config, "max_position_embeddings", None), next(model.parameters()).device
    return {p.name: batches(encode(tokenizer, p.samples, context=context), BATCH_SIZE, device) for p in probes}


@torch.no_grad()
def level(components: Components, found: Sequence[Batch], metric: Metric, ablated: np.ndarray = NOTHING) -> float:
    """Mean over samples of the metric, dropout off, without the components at these positions."""
    values = zeros(components.parts)
    with evaluating(components.parts.model):
        total = sum(metric(logits_without(components, ablated, batch, values), batch).sum().item() for batch in found)
    return total / sum(len(batch) for batch in found)


def check_same_parameters(one: Components, other: Components) -> None:
    """Raise ModelError unless one model may be a finetuned copy of the other, and lies in processes as it does."""
    if [(use.name, use.parameter.shape) for use in one.uses] != [(use.name, use.parameter.shape) for use in other.uses]:
        raise ModelError("the two models have different parameters; a graft needs a model and a finetuned copy of it")
    if one.together.size != other.together.size:
        raise ModelError(
            f"one model is sharded over {one.together.size} processes, the other over {other.together.size}; shard both alike"
        )


def _mask(components: Components, members: Iterable[Component] | pd.DataFrame | str) -> Tensor:
    if isinstance(members, str):
        if members != REMAINDER:
            raise ConfigError(f"unknown set {members!r}; expected components, or {REMAINDER!r}")
        return components.remainder_mask
    return components.group_mask(components.positions(members))
