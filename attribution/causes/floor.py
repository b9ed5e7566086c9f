"""The noise floor of half precision: how far effects move when every activation is rounded differently.

A bfloat16 number holds 8 bits, and two orders of the same sum differ in the last of them. Effects are small differences of
large numbers, so this shows. The floor is the largest difference between effects as computed and as computed while the
residual stream before every layer and the activations at every site are moved by up to half a unit in the last place at
random (Monte Carlo arithmetic, Parker 1997). Knows rounding; knows nothing about what a method does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from attribution.capture import edited, sites, streamed
from attribution.causes.given import Given
from attribution.causes.methods import Asked
from attribution.causes.result import Found, mean
from attribution.components import Components
from attribution.metrics import Metric
from attribution.models import Anatomy

COMPONENTS = 32  # at most so many are computed again, drawn at random


def rounds(parts: Anatomy) -> bool:
    """Whether the model computes in less than 32 bits."""
    return any(parameter.dtype.itemsize < 4 for parameter in parts.model.parameters())


@contextmanager
def rounded_otherwise(parts: Anatomy, seed: int = 0) -> Iterator[None]:
    """Move activations by up to half a unit in the last place, in every pass inside the block."""
    generators: dict[torch.device, torch.Generator] = {}

    def move(value: Tensor) -> Tensor:
        if value.dtype.itemsize >= 4:
            return value
        if value.device not in generators:
            generators[value.device] = torch.Generator(value.device).manual_seed(seed)
        noise = torch.rand(value.shape, generator=generators[value.device], device=value.device) - 0.5
        # A unit in the last place is up to eps times the value. The sum is rounded again, so noise is added in float32.
        return (value.float() * (1 + torch.finfo(value.dtype).eps * noise)).to(value.dtype)

    with (
        streamed(parts, dict.fromkeys(range(parts.depth + 1), move)),
        edited({site.module(parts): move for site in sites(parts)}),
    ):
        yield


def floor_of(
    asked: Asked, index: Components, positions: np.ndarray, given: Given, found: Found, metric: Metric
) -> float | None:
    """The largest difference that rounding otherwise makes to effects, means over the samples of the first batch.

    Args:
        asked, index, positions, given, metric: the question.
        found: the effects of the first batch, as computed.
    """
    some = np.sort(np.random.default_rng(0).permutation(len(positions))[:COMPONENTS])
    if not len(some):
        return None
    batch, reference = next(given.batches())
    with rounded_otherwise(index.parts):
        again = asked.run(index, positions[some], batch, reference, metric).effect
    difference = again - found.effect[torch.as_tensor(some)]
    return float(np.abs(mean(difference, given.weights[: len(batch)])).max())
