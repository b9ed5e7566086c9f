"""Exact ablation: the fall of a metric, and the KL, when single components or whole sets are switched off.

Each single ablation is a full recomputation of all that depends on the component, nothing is approximated: layers
before it are reused, many copies run as one batch, and a neuron's own layer and a row need no run at all because what
they write is linear. Knows activations and metrics; knows nothing about training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from attribution.capture import Edit, Site, edited, logits_alone
from attribution.causes.cost import size
from attribution.causes.projected import Projected
from attribution.causes.reference import Values, like
from attribution.components import Components
from attribution.metrics import Metric, kl
from attribution.models import Anatomy, output_weights
from attribution.replay import Replay
from attribution.samples import Batch
from attribution.sharding import present

TOKENS_AT_ONCE = 16_384  # tokens of all copies in one replay, and below their logits; both bound memory
TOKENS_ON_CPU = 3_072  # more are no faster
LOGITS_AT_ONCE = 2**26
KEPT_FREE = 2**25 - 2**16  # bytes


class Effects(NamedTuple):
    """Effects of ablations, one row each.

    Attributes:
        effect: Float [ablation, sample], metric(intact) - metric(ablated).
        kl: Float [ablation, sample], KL(ablated || intact) per response token, nats.
        passes: forward passes over the batch this took.
        bytes: most of what was kept at once, see `Causes.bytes`.
    """

    effect: Tensor
    kl: Tensor
    passes: float
    bytes: int = 0


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
    _keep_freed()
    replay = Replay(parts, batch)
    read = Reader(metric, batch, replay.logits)
    effect = replay.logits.new_zeros(len(positions), len(batch))
    divergence = torch.zeros_like(effect)
    chosen = components.table.iloc[positions].reset_index(drop=True)
    passes, most = 1.0, 0
    for (kind, layer), group in chosen.groupby(["kind", "layer"], sort=False):
        units, copies = group["index"].to_numpy(copy=True), _copies(replay)
        after = Projected.of(replay, int(layer) + 1) if _adds(parts, str(kind)) else None
        for start in range(0, len(units), copies):
            where = group.index[start : start + copies]
            some = units[start : start + copies]
            if kind == "row":
                found = without_rows(parts, replay.logits, some)
            else:
                found, layers = _without(replay, Site(str(kind), int(layer)), some, values, after)
                passes += len(some) * layers / parts.depth
            effect[where], divergence[where] = read(found)
            most = max(most, len(some) * (3 * size([replay.logits]) + (kind != "row") * 2 * size([replay.hidden[0]])))
    kept = size([*replay.hidden, *replay.activations.values(), replay.logits])
    return Effects(effect, divergence, passes, kept + most)


@cache
def _keep_freed() -> None:
    """Have this process keep what it frees, for good: pages of the system, asked for anew in every pass, take a tenth of it.

    glibc hands back what is free beyond twice the largest array that was ever freed, if that was below 32 MiB; in a process
    of small models that is little. No page of this one is touched.
    """
    np.empty(KEPT_FREE, dtype=np.uint8)  # of torch's own it would be counted as memory that is used


def _copies(replay: Replay) -> int:
    """How many ablations of one site are run together: few enough for memory."""
    at_once = min(TOKENS_AT_ONCE, TOKENS_ON_CPU) if replay.scored.device.type == "cpu" else TOKENS_AT_ONCE
    return max(1, min(at_once // replay.scored.numel(), LOGITS_AT_ONCE // replay.logits.numel()))


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
    read = Reader(metric, batch, logits_alone(components.parts, batch) if intact is None else intact)
    found = [read(logits_without(components, positions, batch, values)[None]) for positions in sets.values()]
    effect, divergence = (torch.cat(each) for each in zip(*found, strict=True))
    return Effects(effect, divergence, 1.0 + len(sets))


@torch.no_grad()
def logits_without(components: Components, positions: np.ndarray, batch: Batch, values: Values) -> Tensor:
    """Logits at scored positions, [token, vocabulary], of the model without a set of components."""
    parts = components.parts
    rows = [token for kind, _, tokens in components.places(positions) if kind == "row" for token in tokens.tolist()]
    with without(components, positions, values) as apart:
        return rows_at_mean(parts, logits_alone(parts, batch, apart), rows)


@contextmanager
def without(components: Components, positions: np.ndarray, values: Values) -> Iterator[list[nn.Module]]:
    """Context manager: the heads and neurons of a set are replaced by their reference in every pass inside.

    Yields:
        The modules at whose input each position has a reference of its own, as `logits_alone` takes them.
    """
    parts, edits = components.parts, edits_without(components, positions, values)
    with edited({site.module(parts): edit for site, edit in edits.items()}):
        yield [site.module(parts) for site in edits if values[site].ndim > 1]


def edits_without(components: Components, positions: np.ndarray, values: Values) -> dict[Site, Edit]:
    """What replaces the heads and neurons of a set by their reference, by site."""
    sites = ((Site(kind, layer), units) for kind, layer, units in components.places(positions) if kind != "row")
    return {site: _replace(features(components.parts, site, units), values[site]) for site, units in sites}


def _replace(features: Tensor, value: Tensor) -> Edit:
    def edit(activation: Tensor) -> Tensor:
        replaced = torch.zeros(activation.shape[-1], dtype=torch.bool).index_fill(0, features, True)
        return torch.where(replaced.to(activation.device), like(value, activation), activation)

    return edit


def features(parts: Anatomy, site: Site, units: np.ndarray) -> Tensor:
    """Int: the features of these heads or neurons at their site."""
    width = parts.head_dim if site.kind == "head" else 1
    return (torch.as_tensor(units)[:, None] * width + torch.arange(width)).flatten()


def _adds(parts: Anatomy, kind: str) -> bool:
    """Whether what a component of this kind writes is added to the stream as it is, so that its own layer need not run."""
    return kind == "neuron" and parts.row.mlp_post_norm is None and not parts.row.experts


def _without(replay: Replay, site: Site, units: np.ndarray, values: Values, projected: Projected | None) -> tuple[Tensor, int]:
    """Logits [unit, token, vocabulary] with each unit of one site ablated, and the number of layers run for each.

    Args:
        projected: of the next layer, where the units write a vector to the stream; None: its projections are run.
    """
    parts, copies = replay.parts, len(units)
    activation = replay.activations[site]
    value = like(values[site], activation)
    if _adds(parts, site.kind):
        with present(parts.model, parts.mlp_out[site.layer]):
            written = output_weights(parts.mlp_out[site.layer], parts.row)[:, units].T.contiguous()  # [unit, width]
        change, after = (value - activation)[..., units], replay.hidden[site.layer + 1]
        if site.layer == parts.depth - 1:
            scored = replay.scored.to(after.device)
            return replay.read(torch.addcmul(after[scored], change[scored].T[..., None], written[:, None])), 0
        change = change.permute(2, 0, 1).contiguous()  # [unit, sample, position]
        hidden = torch.addcmul(after, change[..., None], written[:, None, None])  # in one visit
        known = projected(change, written) if projected else None
        return replay.run(hidden.flatten(0, 1), site.layer + 1, known=known), parts.depth - site.layer - 1

    own = torch.zeros(copies, activation.shape[-1], dtype=torch.bool)  # the features of each copy's unit
    own[torch.arange(copies)[:, None], features(parts, site, units).view(copies, -1)] = True
    own = own[:, None, None].to(activation.device)

    def edit(tiled: Tensor) -> Tensor:
        return torch.where(own, value, tiled.unflatten(0, (copies, -1))).flatten(0, 1)

    hidden = replay.hidden[site.layer].repeat(copies, 1, 1)
    return replay.run(hidden, site.layer, {site.module(parts): edit}), parts.depth - site.layer


def without_rows(parts: Anatomy, logits: Tensor, tokens: np.ndarray) -> Tensor:
    """Logits [row, token, vocabulary] with each of these rows set to the mean over the vocabulary, before bias and cap."""
    changed, chosen = logits.repeat(len(tokens), 1, 1), torch.as_tensor(tokens)
    changed[torch.arange(len(tokens)), :, chosen] = all_rows_at_mean(parts, logits)[:, chosen].T
    return changed


def rows_at_mean(parts: Anatomy, logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Logits [..., vocabulary] with these rows set to the mean over the vocabulary, before bias and cap; differentiable."""
    if not len(tokens):
        return logits
    ablated = torch.zeros(parts.vocabulary, dtype=torch.bool).index_fill(0, torch.as_tensor(tokens, dtype=torch.long), True)
    return torch.where(ablated.to(logits.device), all_rows_at_mean(parts, logits), logits)


def all_rows_at_mean(parts: Anatomy, logits: Tensor) -> Tensor:
    """Logits [..., vocabulary] with every row at the mean."""
    return parts.logits_of(parts.rows_of(logits).mean(-1, keepdim=True).expand_as(logits))


class Reader:
    """Effect and KL, each Float [ablation, sample], from the logits of some ablations at once."""

    def __init__(self, metric: Metric, batch: Batch, intact: Tensor):
        self.metric, self.batch, self.intact, self.before = metric, batch, intact, metric(intact, batch)
        self._batches = {1: batch}

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits: Float [ablation, token, vocabulary]."""
        count = len(logits)
        batch = self._batches.setdefault(count, self.batch.repeated(count))
        flat = logits.flatten(0, 1)
        after, divergence = self.metric(flat, batch), kl(flat, self.intact.repeat(count, 1), batch)
        return self.before - after.unflatten(0, (count, -1)), divergence.unflatten(0, (count, -1))
