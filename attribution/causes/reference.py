"""What an ablated component's activation is replaced by: zero, a mean, or another prompt's activation.

Knows activations; knows nothing about metrics. Rows have no reference: an ablated row's logit is the vocabulary mean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attribution.capture import Site, scored_logits, sites, tapped
from attribution.errors import ConfigError, DataError
from attribution.models import Anatomy
from attribution.samples import Batch, Encoded, collate

REFERENCES = ("zero", "mean", "resample")
Values = Mapping[Site, Tensor]  # broadcastable to [sample, position, feature]


def check_reference(reference: str, encoded: Sequence[Encoded], counterfactuals: Sequence[Encoded] | None) -> None:
    """Refuse an unknown reference, and counterfactuals that are missing or cannot be aligned.

    Raises:
        ConfigError: unknown reference.
        DataError: counterfactuals missing, or, for "resample", not one per sample with equal numbers of tokens.
    """
    if reference not in REFERENCES:
        raise ConfigError(f"unknown reference {reference!r}; expected {', '.join(REFERENCES)}")
    if reference == "zero":
        return
    if not counterfactuals:
        raise DataError(f"reference {reference!r} takes its values from counterfactual samples; give cue-neutral ones")
    if reference == "resample":
        if len(counterfactuals) != len(encoded):
            raise DataError(f"{len(counterfactuals)} counterfactuals for {len(encoded)} samples; resampling needs one for each")
        for number, (one, other) in enumerate(zip(encoded, counterfactuals, strict=True), start=1):
            if (len(one.ids), one.start) != (len(other.ids), other.start):
                raise DataError(
                    f"counterfactual {number} cannot be aligned: {other.start} + {len(other.ids) - other.start} tokens, "
                    f"the sample has {one.start} + {len(one.ids) - one.start}; give prompts and responses of equal length"
                )


@torch.no_grad()
def mean_activations(parts: Anatomy, batches: Sequence[Batch]) -> Values:
    """Mean activation of every feature over all tokens of these batches: Float [feature] per site."""
    totals: dict[Site, Tensor] = {}
    tokens = 0.0
    for batch in batches:
        with tapped(parts, sites(parts)) as seen:
            scored_logits(parts, batch)
        real = batch.mask.bool()
        tokens += real.sum().item()
        for site, value in seen.items():
            totals[site] = totals.get(site, 0) + value[real].sum(0)
    return {site: total / tokens for site, total in totals.items()}


@torch.no_grad()
def aligned_activations(parts: Anatomy, counterfactuals: Sequence[Encoded]) -> Values:
    """Activations on counterfactuals, position by position: Float [sample, position, feature] per site."""
    batch = collate(counterfactuals, next(parts.model.parameters()).device)
    with tapped(parts, sites(parts)) as seen:
        scored_logits(parts, batch)
    return seen


def zeros(parts: Anatomy) -> Values:
    """Zero at every site."""
    zero = torch.zeros((), device=next(parts.model.parameters()).device)
    return defaultdict(lambda: zero)
