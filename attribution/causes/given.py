"""What a question about causes is asked of: samples, checked and encoded, in batches with what replaces their activations.

Knows samples and references; knows nothing about methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from attribution.causes.reference import REFERENCES, Reference, Values, at_sites, check_reference
from attribution.errors import DataError
from attribution.metrics import Metric, check_scorable
from attribution.models import Anatomy
from attribution.samples import Batch, Encoded, Sample, batches, collate, encode
from attribution.sharding import check_callable, check_whole, device_of

BATCH_SIZE = 64  # samples of one pass


def encoded_for(
    parts: Anatomy, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], *, whole: bool = True
) -> list[Encoded]:
    """Encode samples for a model that is to run them.

    Args:
        parts, tokenizer, samples: what to encode for what.
        whole: all of the model has to lie in this process's memory.

    Raises:
        DataError: as `encode`, or a token that the model does not have.
        ModelError: weights that are not in memory.
    """
    check_callable(parts.model)
    if whole:
        check_whole(parts.model, "this question")
    listed = encode(tokenizer, samples, context=getattr(parts.model.config, "max_position_embeddings", None))
    largest = max(max(*each.ids, *(token for _, token in each.contrasts)) for each in listed)
    if largest >= parts.vocabulary:
        raise DataError(
            f"the tokenizer gives token {largest}, of which the model has {parts.vocabulary}, counted from 0; give the model's "
            "own tokenizer"
        )
    return listed


@dataclass(frozen=True)
class Given:
    """Samples of one question, checked and encoded, and what their activations are replaced by."""

    parts: Anatomy
    samples: list[Encoded]
    reference: str
    counterfactuals: list[Encoded] | None

    @classmethod
    def encoded(
        cls,
        parts: Anatomy,
        tokenizer: PreTrainedTokenizerBase,
        samples: Sequence[Sample],
        metric: Metric,
        reference: str,
        counterfactuals: Sequence[Sample] | None,
        accepted: Sequence[str] = REFERENCES,
        *,
        whole: bool = True,
    ) -> Given:
        """Check and encode them; `whole` as in `encoded_for`. Raises as `attribute`."""
        listed = encoded_for(parts, tokenizer, samples, whole=whole)
        others = encoded_for(parts, tokenizer, counterfactuals, whole=whole) if counterfactuals else None
        check_reference(reference, listed, others, accepted)
        check_scorable(metric, batches(listed, BATCH_SIZE), parts.vocabulary)
        return cls(parts, listed, reference, others)

    @property
    def weights(self) -> Tensor:
        return torch.tensor([each.weight for each in self.samples], dtype=torch.float64)

    def batches(self, progress: bool = False) -> Iterator[tuple[Batch, Reference]]:
        """Batches, each with its references."""
        device = device_of(self.parts.model)
        others = self.counterfactuals or []
        common = Reference(self.reference, batches(others, BATCH_SIZE, device))
        places = range(0, len(self.samples), BATCH_SIZE)
        for start in tqdm(places, disable=not progress, unit="batch", desc="attribution", leave=False):
            batch = collate(self.samples[start : start + BATCH_SIZE], device)
            if self.reference == "resample":
                yield batch, Reference(self.reference, [collate(others[start : start + BATCH_SIZE], device)])
            else:
                yield batch, common

    def with_values(self) -> Iterator[tuple[Batch, Values]]:
        """Batches, each with the values that replace its activations at sites."""
        for batch, reference in self.batches():
            yield batch, reference.of("sites", at_sites(self.parts))


def batches_with_values(
    parts: Anatomy, encoded: Sequence[Encoded], reference: str, others: Sequence[Encoded] | None
) -> Iterator[tuple[Batch, Values]]:
    """Batches of encoded samples, each with the values that replace its activations; checked beforehand."""
    return Given(parts, list(encoded), reference, list(others) if others else None).with_values()
