"""What a layer's projections put out when one vector is added to the stream they read, position by position so much of it.

A norm divides by one number per position, and the projections after it are linear, so that what they put out is a
combination of two outputs known ahead, those of the intact stream and of the vector: nothing has to be multiplied by a
matrix for each ablation, and nothing is approximated. An ablated neuron changes the stream in just this way.

Knows norms and projections; knows nothing about why a vector is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attribution.replay import Replay
from attribution.sharding import present

EXACT = 1e-5  # relative; a norm whose outputs its formula does not give so closely is run for each ablation


class Norm(NamedTuple):
    """norm(h) = gain * (h - its mean, where centred) / sqrt(mean square of that + eps) + bias."""

    gain: Tensor
    bias: Tensor
    eps: float
    centred: bool

    @classmethod
    def of(cls, module: Any, hidden: Tensor) -> Norm | None:
        """The formula of a norm whose weights are here, checked on these inputs; None where it has another, or is elsewhere."""
        gain, eps = getattr(module, "weight", None), getattr(module, "eps", getattr(module, "variance_epsilon", None))
        if not isinstance(gain, Tensor) or eps is None or gain.device != hidden.device:
            return None
        bias = getattr(module, "bias", None)
        gain, bias = gain.detach().clone(), torch.zeros_like(gain) if bias is None else bias.detach().clone()
        found = cls(gain, bias, eps, isinstance(module, nn.LayerNorm))  # copies: the module's own may go elsewhere again
        expected, stream = module(hidden), found.direction(hidden)
        given = found.gain * stream * (stream.square().mean(-1, keepdim=True) + eps).rsqrt() + found.bias
        return found if (given - expected).abs().max() <= EXACT * expected.abs().max() else None

    def direction(self, stream: Tensor) -> Tensor:
        return stream - stream.mean(-1, keepdim=True) if self.centred else stream


class Projected:
    """The projections of one layer that read its input through a norm.

    Args:
        model: whose weights may be sharded, or offloaded.
        hidden: input of the layer in the intact pass, Float [sample, position, width].
        through: those projections, by their norm.
    """

    def __init__(self, model: nn.Module, hidden: Tensor, through: Mapping[nn.Module, tuple[Norm, Sequence[nn.Module]]]):
        self.model, self.hidden, self.through = model, hidden, through
        every = [*through, *(each for _, projections in through.values() for each in projections)]
        with present(model, *every):
            self._known = {
                projection: _linear(projection, norm(hidden), formula.bias)
                for norm, (formula, projections) in through.items()
                for projection in projections
            }

    @classmethod
    def of(cls, replay: Replay, layer: int) -> Projected | None:
        """Those of a layer of a pass; None where it has none, or computes in half precision, which would round otherwise."""
        if layer == replay.parts.depth or replay.hidden[layer].dtype.itemsize < 4:
            return None
        hidden, through = replay.hidden[layer], {}
        model, norms = replay.parts.model, replay.through[layer]
        formulas = {}
        for norm in dict.fromkeys(norms.values()):
            with present(model, norm):
                formulas[norm] = Norm.of(norm, hidden)
        for projection, norm in norms.items():
            if (formula := formulas[norm]) is not None:
                through.setdefault(norm, (formula, []))[1].append(projection)
        return cls(model, hidden, through) if through else None

    def __call__(self, change: Tensor, written: Tensor) -> dict[nn.Module, Tensor]:
        """What norms and projections put out, by module, each Float [copy * sample, position, feature].

        What a norm itself puts out is not computed: whoever reads it beside the projections reads NaN.

        Args:
            change: Float [copy, sample, position], how much of its vector each copy adds.
            written: Float [copy, width], the vectors.
        """
        found: dict[nn.Module, Tensor] = {}
        unknown = torch.full((), float("nan"), dtype=self.hidden.dtype, device=self.hidden.device)
        for norm, (formula, projections) in self.through.items():
            kept, added = self._scales(formula, change, written)
            found[norm] = unknown.expand(change.shape.numel() // self.hidden[0, :, 0].numel(), *self.hidden.shape[1:])
            vectors = formula.gain * formula.direction(written)
            with present(self.model, *projections):
                of_vectors = [projection(vectors) for projection in projections]
            for projection, put_out in zip(projections, of_vectors, strict=True):
                intact, constant, bias = self._known[projection]
                out = (intact * kept).addcmul_(added, (put_out if bias is None else put_out - bias)[:, None, None])
                found[projection] = (out if constant is None else out.add_(constant)).flatten(0, 1)
        return found

    def _scales(self, norm: Norm, change: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
        """What the intact output and that of the vector are multiplied by, each [copy, sample, position, 1].

        In float64: where one neuron writes most of the stream, what is left of it without is a small difference.
        """
        stream, vectors = norm.direction(self.hidden.double()), norm.direction(written.double())
        change, width = change.double(), stream.shape[-1]
        before = stream.square().mean(-1)
        across = torch.einsum("btd,ud->ubt", stream, vectors) / width
        after = before + change * (2 * across + change * vectors.square().mean(-1)[:, None, None])
        scale = (after.clamp_min(0) + norm.eps).rsqrt()
        kept, added = scale * (before + norm.eps).sqrt(), scale * change
        return kept[..., None].to(self.hidden.dtype), added[..., None].to(self.hidden.dtype)


def _linear(projection: nn.Module, normed: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a projection puts out: beside a constant, which a norm's bias and its own make, and the latter; None for zeros."""
    constant, own = projection(bias[None]), projection(torch.zeros_like(bias[None]))
    found = [each if each.any() else None for each in (constant, own)]
    return projection(normed) - constant, found[0], found[1]
