"""What an ablated component's activation is replaced by: zero, a mean, or another prompt's activation.

Knows activations; knows nothing about metrics. Rows have no reference: an ablated row puts out the
vocabulary mean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attribution.capture import Edit, Site, rewritten, scored_logits, sites, tapped
from attribution.errors import ConfigError, DataError
from attribution.models import Anatomy
from attribution.samples import Batch, Encoded, collate
from attribution.sharding import device_of

REFERENCES = ("zero", "mean", "resample")
VOCABULARY = "vocabulary"  # of input embeddings alone
Values = Mapping[Site, Tensor]  # broadcastable to [sample, position, feature]


def check_reference(
    reference: str,
    encoded: Sequence[Encoded],
    counterfactuals: Sequence[Encoded] | None,
    accepted: Sequence[str] = REFERENCES,
) -> None:
    """Refuse an unknown reference, and counterfactuals that are missing or cannot be aligned.

    Raises:
        ConfigError: unknown reference.
        DataError: counterfactuals missing, or, for "resample", not one per sample with equal numbers of tokens.
    """
    if reference not in accepted:
        raise ConfigError(f"unknown reference {reference!r}; expected {', '.join(accepted)}")
    if reference in ("zero", VOCABULARY):
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


Look = Callable[[Batch], Mapping[Any, Tensor]]  # what is to be replaced, [sample, position, feature], as it is on a batch


@torch.no_grad()
def mean_of(look: Look, batches: Sequence[Batch]) -> dict[Any, Tensor]:
    """Mean of every feature over all tokens of these batches: Float [feature] by key."""
    totals: dict[Any, Tensor] = {}
    tokens = 0.0
    for batch in batches:
        real = batch.mask.bool()
        tokens += real.sum().item()
        for key, value in look(batch).items():
            totals[key] = totals.get(key, 0) + value[real.to(value.device)].sum(0)
    return {key: total / tokens for key, total in totals.items()}


def at_sites(parts: Anatomy) -> Look:
    """Look at the activations of all heads and neurons, by site."""

    def look(batch: Batch) -> Mapping[Any, Tensor]:
        with torch.no_grad(), tapped(parts, sites(parts)) as seen:
            scored_logits(parts, batch)
        return seen

    return look


def at_outputs(parts: Anatomy, modules: Iterable[nn.Module]) -> Look:
    """Look at the outputs of these modules, by module."""
    listed = list(modules)

    def look(batch: Batch) -> Mapping[Any, Tensor]:
        seen: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module) -> Edit:
            return lambda out: seen.setdefault(module, out.detach())

        with torch.no_grad(), rewritten({module: keep(module) for module in listed}):
            scored_logits(parts, batch)
        return seen

    return look


def mean_activations(parts: Anatomy, batches: Sequence[Batch]) -> Values:
    """Mean activation of every feature over all tokens of these batches: Float [feature] per site."""
    return mean_of(at_sites(parts), batches)


def aligned_activations(parts: Anatomy, counterfactuals: Sequence[Encoded]) -> Values:
    """Activations on counterfactuals, position by position: Float [sample, position, feature] per site."""
    return at_sites(parts)(collate(counterfactuals, device_of(parts.model)))


class Reference:
    """What replaces the activations of one batch, at sites or elsewhere.

    Args:
        name: of `REFERENCES`.
        counterfactuals: batches: all for a mean, the aligned one for resampling, none for zero.
    """

    def __init__(self, name: str, counterfactuals: Sequence[Batch] = ()):
        self.name, self._counterfactuals = name, counterfactuals
        self._means: dict[str, Mapping[Any, Tensor]] = {}

    def of(self, what: str, look: Look) -> Mapping[Any, Tensor]:
        """References for what is looked at, by its keys; means are kept under the name `what`."""
        if self.name == "zero":
            return defaultdict(lambda: torch.zeros(()))
        if self.name == "resample":
            return look(self._counterfactuals[0])
        if what not in self._means:
            self._means[what] = mean_of(look, self._counterfactuals)
        return self._means[what]

    @torch.no_grad()
    def of_embeddings(self, parts: Anatomy) -> Tensor:
        """Reference for the input embeddings, broadcastable to [sample, position, width]."""
        if self.name == VOCABULARY:
            return parts.embedding(torch.arange(parts.embedding.num_embeddings, device=parts.embedding.weight.device)).mean(0)
        return self.of("embeddings", at_outputs(parts, [parts.embedding]))[parts.embedding]


def zeros(parts: Anatomy) -> Values:
    """Zero at every site."""
    zero = torch.zeros((), device=device_of(parts.model))
    return defaultdict(lambda: zero)


def like(value: Tensor, activation: Tensor) -> Tensor:
    """A reference for this activation: of its type and place, and of as many positions where it has its own for each."""
    value = value[:, : activation.shape[1]] if value.ndim > 1 else value
    return value.to(activation).expand(activation.shape)
