"""What every method of attribution returns, and what each is complete for. Knows nothing about how causes are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

# What the effects of a method are complete for, and what they are not.
COMPLETE = {
    "ablation": (
        "exact for each component alone; effects do not add up, and a component that others can stand in for shows less than "
        "it does (`self_repair`)"
    ),
    "direct": (
        "exact for what each component writes into the logits itself, with the scale of the final norm held; nothing that a "
        "later layer makes of it is counted"
    ),
    "gradient": (
        "first order: effects are a linear extrapolation from the model as it is and add up to no change of the metric; a "
        "component behind a saturated softmax or activation shows less than it does"
    ),
    "integrated": (
        "heads and neurons together: their effects and the residual add up to metric(intact) - metric(all of them ablated); "
        "so do rows, ablated alone; effects of single ablations they are not"
    ),
    "conductance": (
        "every cut through the network, of which there is one per layer and kind: the effects of its heads or neurons, what "
        "goes past them in the residual stream (`sums.beside`) and the residual add up to metric(input) - metric(baseline "
        "input); so do all rows; effects of different layers do not add up, since each layer passes the same change on"
    ),
}


class Cut(NamedTuple):
    """Effects that must add up. All Float [sample].

    Attributes:
        effects: sum over the components of the cut.
        beside: what passes beside them.
        change: of the metric, which both must add up to.
    """

    effects: Tensor
    beside: Tensor
    change: Tensor

    @property
    def residual(self) -> Tensor:
        return self.change - self.effects - self.beside


@dataclass(frozen=True)
class Found:
    """Effects of one batch.

    Attributes:
        effect: Float [component, sample].
        passes: forward passes over the batch.
        bytes: see `Causes.bytes`.
        kl: Float [component, sample], of ablations.
        cuts: sum rules, by the name of the cut.
        beside: further quantities of the components, Float [component, sample], NaN where a component has none.
    """

    effect: Tensor
    passes: float
    bytes: int
    kl: Tensor | None = None
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    def at(self, positions: Tensor, passes: float = 0.0) -> Found:
        """These components alone, and so many passes more."""
        beside = {name: value[positions] for name, value in self.beside.items()}
        return replace(self, effect=self.effect[positions], passes=self.passes + passes, beside=beside)


@dataclass(frozen=True)
class Verified:
    """A ranking put to the test: exact ablation of the components it puts first, and of others drawn at random.

    Attributes:
        table: kind, layer, index, first_order (the effect that ranks), exact, chosen ("top" or "random").
        spearman: rank correlation of first_order and exact, by "top" and "random"; NaN below three components.
        missed: share of the random ones whose exact effect is larger in size than the median of the top ones: an estimate of
            how much the ranking leaves out.
        passes: what the verification alone cost, in forward passes over all samples.
    """

    table: pd.DataFrame
    spearman: dict[str, float]
    missed: float
    passes: float


@dataclass(frozen=True)
class Causes:
    """How much each component contributed to the metric.

    Attributes:
        table: one row per component: kind, layer, index, effect (metric units, mean over samples, each times its
            weight), and, by ablation, kl: mean over samples of KL(ablated || intact), nats per response token.
        per_sample: Float [component, sample], effects before weighting, in the order of `table`.
        method, metric, reference, path: as asked.
        residual: change of the metric minus the sum of effects (and what passes beside them) that should make it up, of the cut
            where it is largest; None where the method has no sum rule.
        passes: cost in forward passes over all samples; a backward pass counts as two, a tangent as one, the unembedding of
            single ablations as nothing.
        sums: one row per cut: cut, effects, beside, change, residual, weighted means over samples as in `table`; None where
            the method has no sum rule.
        bytes: most of what the method keeps at once beyond the model: tensors that autograd saves, activations and copies of
            the batch, counted for the largest batch; what a layer needs while it runs is not in it.
        complete: what the effects add up to, or that they do not.
        caveats: what to mind in these results.
        floor: of half precision, see `causes.floor`: effects below it are rounding; None in float32 and wider.
        verified: exact ablation of the top of the ranking, where asked for.
    """

    table: pd.DataFrame
    per_sample: Tensor
    method: str
    metric: str
    reference: str
    residual: float | None
    passes: float
    path: str = "total"
    sums: pd.DataFrame | None = None
    bytes: int = 0
    complete: str = ""
    caveats: tuple[str, ...] = ()
    floor: float | None = None
    verified: Verified | None = None


def mean(per_sample: Tensor, weights: Tensor) -> np.ndarray:
    """Mean over samples, each times its weight, of Float [..., sample]."""
    return (per_sample.double().cpu() * weights.double().cpu()).mean(-1).numpy()


def sums_of(found: Sequence[Found], weights: Tensor) -> pd.DataFrame | None:
    """The sum rules of all batches together."""
    if not found[0].cuts:
        return None
    rows = []
    for name in found[0].cuts:
        effects, beside, change = (
            float(mean(torch.cat(each), weights)) for each in zip(*(batch.cuts[name] for batch in found), strict=True)
        )
        rows.append((name, effects, beside, change, change - effects - beside))
    return pd.DataFrame(rows, columns=["cut", "effects", "beside", "change", "residual"])


def largest(residuals: pd.Series) -> float:
    """The number furthest from zero."""
    return float(residuals.iloc[int(residuals.abs().to_numpy().argmax())])
