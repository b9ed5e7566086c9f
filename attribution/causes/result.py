"""What every method of attribution returns. Knows nothing about how causes are found."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from torch import Tensor


@dataclass(frozen=True)
class Causes:
    """How much each component contributed to the metric.

    Attributes:
        table: one row per component: kind, layer, index, effect (metric units, mean over samples, each times its
            weight), and, by ablation, kl: mean over samples of KL(ablated || intact), nats per response token.
        per_sample: Float [component, sample], effects before weighting, in the order of `table`.
        method, metric, reference: as asked.
        residual: sum of effects minus the change that they should add up to; None where the method has no sum rule.
        passes: cost in forward passes over all samples; a backward pass counts as two.
    """

    table: pd.DataFrame
    per_sample: Tensor
    method: str
    metric: str
    reference: str
    residual: float | None
    passes: float
