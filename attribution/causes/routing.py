"""Queries and keys of every head: what replacing them does to the metric, with the attention pattern computed anew.

A head here is what it puts out, so the softmax of its own pattern does not stand between it and the metric, and its first-order
cause needs no correction. The pattern itself is another question: what does it matter *where* the head looks? There a
plain gradient fails, since a saturated softmax has none; AtP* (Kramár, Lieberum, Shah & Nanda 2024) replaces the
query or key, recomputes the pattern exactly, and goes on in first order from the head's changed output. That is done here
for all queries of a head together, and for all keys as that head reads them, where the projection puts them out (before
rotation and query or key norms). Only that head's own output counts: other heads of a group read the same keys, and where a
norm runs over the queries of all heads (OLMo 2), replacing those of one rescales the others.

Knows projections and head outputs; knows nothing about what is done with the scores.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attribution.architectures import Projection
from attribution.capture import Edit, Site, scored_logits, tapped
from attribution.causes.ablation import TOKENS_AT_ONCE
from attribution.causes.reference import like
from attribution.components import Components
from attribution.metrics import Metric
from attribution.models import Anatomy
from attribution.replay import Replay
from attribution.samples import Batch

PARTS = {"queries": "q", "keys": "k"}


def projections(parts: Anatomy) -> list[nn.Module]:
    """The linears that put out queries or keys, of all layers."""
    return [
        parts.projection(layer, each)
        for layer in range(parts.depth)
        for each in parts.row.projections
        if set(each.parts) & {*PARTS.values()}
    ]


def routing(components: Components, batch: Batch, values: Mapping[nn.Module, Tensor], metric: Metric) -> dict[str, Tensor]:
    """First-order effect of replacing every head's queries, and its keys, by their reference, attention computed exactly.

    Args:
        components: of the model.
        batch: what to run.
        values: references for the outputs of `projections`.
        metric: what to read.

    Returns:
        "queries" and "keys": Float [component, sample] in the order of `components.table`, metric units, positive where the
        head's pattern helps; NaN for neurons and rows.
    """
    parts = components.parts
    where = [Site("head", layer) for layer in range(parts.depth)]
    with torch.enable_grad(), tapped(parts, where, differentiable=True) as seen:
        total = metric(scored_logits(parts, batch), batch).sum()
        gradients = dict(zip(where, torch.autograd.grad(total, [seen[site] for site in where]), strict=True))
    replay = Replay(parts, batch)
    found = {name: torch.full((len(components), len(batch)), torch.nan, dtype=total.dtype) for name in PARTS}
    for site in where:
        for name, part in PARTS.items():
            effects = _of_layer(replay, site.layer, part, values, gradients[site])
            found[name][site.layer * parts.heads : (site.layer + 1) * parts.heads] = effects.to(found[name])
    return found


@torch.no_grad()
def _of_layer(replay: Replay, layer: int, part: str, values: Mapping[nn.Module, Tensor], gradient: Tensor) -> Tensor:
    """<gradient, a head's output - its output with its queries or keys replaced>: Float [head, sample]."""
    parts = replay.parts
    intact = replay.activations[Site("head", layer)]
    gradient = gradient[:, : intact.shape[1]]
    at_once, found = max(1, TOKENS_AT_ONCE // replay.scored.numel()), []
    for start in range(0, parts.heads, at_once):
        heads = list(range(start, min(start + at_once, parts.heads)))
        edits = {
            parts.projection(layer, each): _replace(
                [_features(parts, each, part, head) for head in heads], values[parts.projection(layer, each)]
            )
            for each in parts.row.projections
            if part in each.parts
        }
        changed = replay.heads_with(layer, edits, len(heads)).unflatten(0, (len(heads), -1))
        difference = (intact - changed).unflatten(-1, (parts.heads, -1))  # [copy, sample, position, head, feature]
        # Of each copy its own head alone: others of its group read the same keys, and a norm over all queries joins heads.
        own = difference[torch.arange(len(heads)), :, :, heads]
        mine = gradient.unflatten(-1, (parts.heads, -1))[:, :, heads].permute(2, 0, 1, 3)
        found.append((own * mine).sum((2, 3)))
    return torch.cat(found)


def _replace(owned: list[Tensor], value: Tensor) -> Edit:
    """Replace each copy's own features."""

    def edit(out: Tensor) -> Tensor:
        changed = out.unflatten(0, (len(owned), -1)).clone()
        for copy, mine in enumerate(owned):
            changed[copy][..., mine] = like(value, changed[copy])[..., mine]
        return changed.flatten(0, 1)

    return edit


def _features(parts: Anatomy, projection: Projection, part: str, head: int) -> Tensor:
    """Int: the output features of a projection that are this head's queries, or the keys that it reads."""
    mine = head if part == "q" else head * parts.kv_heads // parts.heads
    part_of, unit_of = parts.owners(projection)
    return ((part_of == projection.parts.index(part)) & (unit_of == mine)).nonzero().flatten()
