"""Exact ablation: the fall of a metric, and the KL, when single components or whole sets are switched off.

Each single ablation is a full recomputation of all that depends on the component, nothing is approximated: layers
before it are reused, many copies run as one batch, and a neuron's own layer and a row need no run at all because what
they write is linear. Knows activations and metrics; knows nothing about training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attribution.capture import Edit, Replay, Site, edited, scored_logits
from attribution.causes.reference import Values
from attribution.components import Components
from attribution.metrics import Metric, kl
from attribution.models import Anatomy, output_weights
from attribution.samples import Batch

TOKENS_AT_ONCE = 16_384  # tokens of all copies in one replay, and below their logits; both bound memory
TOKENS_ON_CPU = 512  # is faster while they fit its cache: measured 1.4 times at 16 and at 64 prompts of 20 tokens
LOGITS_AT_ONCE = 2**26


class Effects(NamedTuple):
    """Effects of ablations, one row each.

    Attributes:
        effect: Float [ablation, sample], metric(intact) - metric(ablated).
        kl: Float [ablation, sample], KL(ablated || intact) per response token, nats.
        passes: forward passes over the batch this took.
    """

    effect: Tensor
    kl: Tensor
    passes: float


@torch.no_grad()
def ablate_each(components: Components, positions: np.ndarray, batch: Batch, values: Values, metric: Metric) -> Effects:
    """Ablate components one at a time.

    Args:
        components: of the model.
        positions: which, as positions in `components.table`.
        batch: what to run.
        values: what replaces the activations, see `causes.reference`.
        metric: what to read.
    """
    parts = components.parts
    replay = Replay(parts, batch)
    read = _reader(metric, batch, replay.logits)
    effect = replay.logits.new_zeros(len(positions), len(batch))
    divergence = torch.zeros_like(effect)
    chosen = components.table.iloc[positions].reset_index(drop=True)
    passes = 1.0
    at_once = min(TOKENS_AT_ONCE, TOKENS_ON_CPU if batch.ids.device.type == "cpu" else TOKENS_AT_ONCE)
    copies = max(1, min(at_once // batch.ids.numel(), LOGITS_AT_ONCE // replay.logits.numel()))
    for (kind, layer), group in chosen.groupby(["kind", "layer"], sort=False):
        units = group["index"].to_numpy(copy=True)
        for start in range(0, len(units), copies):
            where = group.index[start : start + copies]
            some = units[start : start + copies]
            if kind == "row":
                found = _without_rows(replay.logits, some)
            else:
                found, layers = _without(replay, Site(str(kind), int(layer)), some, values)
                passes += len(some) * layers / parts.depth
            for place, logits in zip(where, found, strict=True):
                effect[place], divergence[place] = read(logits)
    return Effects(effect, divergence, passes)


@torch.no_grad()
def ablate_sets(
    components: Components,
    sets: Mapping[str, np.ndarray],
    batch: Batch,
    values: Values,
    metric: Metric,
    intact: Tensor | None = None,
) -> Effects:
    """Ablate whole sets of components jointly, one set after the other; rows of the result in the order of `sets`.

    Args:
        components, batch, values, metric: as `ablate_each`.
        sets: positions in `components.table`, by name.
        intact: logits of the model as it is, where they are known already.
    """
    parts = components.parts
    read = _reader(metric, batch, scored_logits(parts, batch) if intact is None else intact)
    found = []
    for positions in sets.values():
        with without(components, positions, values):
            found.append(read(_rows_at_mean(components, positions, scored_logits(parts, batch))))
    effect, divergence = (torch.stack(each) for each in zip(*found, strict=True))
    return Effects(effect, divergence, 1.0 + len(sets))


def without(components: Components, positions: np.ndarray, values: Values) -> AbstractContextManager[None]:
    """Context manager: the heads and neurons of a set are replaced by their reference in every pass inside."""
    edits = edits_without(components, positions, values)
    return edited({site.module(components.parts): edit for site, edit in edits.items()})


def edits_without(components: Components, positions: np.ndarray, values: Values) -> dict[Site, Edit]:
    """What replaces the heads and neurons of a set by their reference, by site."""
    chosen = components.table.iloc[positions]
    edits: dict[Site, Edit] = {}
    for (kind, layer), group in chosen[chosen["kind"] != "row"].groupby(["kind", "layer"]):
        site = Site(str(kind), int(layer))
        edits[site] = _replace(_features(components.parts, site, group["index"].to_numpy(copy=True)), values[site])
    return edits


def _replace(features: Tensor, value: Tensor) -> Edit:
    def edit(activation: Tensor) -> Tensor:
        activation = activation.clone()
        activation[..., features] = value.expand(activation.shape)[..., features].to(activation.dtype)
        return activation

    return edit


def _features(parts: Anatomy, site: Site, units: np.ndarray) -> Tensor:
    """Int: the features of these heads or neurons at their site."""
    width = parts.head_dim if site.kind == "head" else 1
    return (torch.as_tensor(units)[:, None] * width + torch.arange(width)).flatten()


def _without(replay: Replay, site: Site, units: np.ndarray, values: Values) -> tuple[Tensor, int]:
    """Logits [unit, token, vocabulary] with each unit of one site ablated, and the number of layers run for each."""
    parts, copies = replay.parts, len(units)
    activation = replay.activations[site]
    value = values[site].expand(activation.shape).to(activation.dtype)
    if site.kind == "neuron" and parts.row.mlp_post_norm is None:
        # What a neuron writes is added to the stream, so its own layer need not run again.
        written = output_weights(parts.mlp_out[site.layer], parts.row)[:, units].T  # [unit, width]
        change = (value - activation)[..., units].permute(2, 0, 1)  # [unit, sample, position]
        hidden = replay.hidden[site.layer + 1] + change[..., None] * written[:, None, None]
        return replay.run(hidden.flatten(0, 1), site.layer + 1), parts.depth - site.layer - 1

    own = torch.zeros(copies, activation.shape[-1], dtype=torch.bool)  # the features of each copy's unit
    own[torch.arange(copies)[:, None], _features(parts, site, units).view(copies, -1)] = True
    own = own[:, None, None].to(activation.device)

    def edit(tiled: Tensor) -> Tensor:
        return torch.where(own, value, tiled.unflatten(0, (copies, -1))).flatten(0, 1)

    hidden = replay.hidden[site.layer].repeat(copies, 1, 1)
    return replay.run(hidden, site.layer, {site.module(parts): edit}), parts.depth - site.layer


def _without_rows(logits: Tensor, tokens: np.ndarray) -> Iterator[Tensor]:
    """Logits with each of these rows set to the mean over the vocabulary, one after the other."""
    mean = logits.mean(-1)
    for token in tokens:
        changed = logits.clone()
        changed[:, token] = mean
        yield changed


def _rows_at_mean(components: Components, positions: np.ndarray, logits: Tensor) -> Tensor:
    chosen = components.table.iloc[positions]
    tokens = torch.as_tensor(chosen.loc[chosen["kind"] == "row", "index"].to_numpy(copy=True))
    logits[:, tokens] = logits.mean(-1, keepdim=True)
    return logits


def _reader(metric: Metric, batch: Batch, intact: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    before = metric(intact, batch)
    return lambda logits: (before - metric(logits, batch), kl(logits, intact, batch))
