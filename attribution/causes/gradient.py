"""First-order causes: gradient x (activation - reference) of every head, neuron and row, from one forward and backward.

Not an effect of ablation but its linear extrapolation from where the model is: good for small units, blind to
saturation. For a neuron or head with a zero reference, the sum over positions equals <output weights, their gradient>.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attribution.capture import scored_logits, sites, tapped
from attribution.causes.reference import Values
from attribution.components import Components
from attribution.metrics import Metric
from attribution.samples import Batch


def first_order(components: Components, batch: Batch, values: Values, metric: Metric) -> Tensor:
    """First-order cause of every component on every sample.

    Args:
        components: of the model.
        batch: what to run.
        values: the references, see `causes.reference`; a row's is the vocabulary mean of its position.
        metric: what to read.

    Returns:
        Float [component, sample] in the order of `components.table`, metric units.
    """
    parts = components.parts
    where = sites(parts)
    with torch.enable_grad(), tapped(parts, where, differentiable=True) as seen:
        logits = scored_logits(parts, batch)
        total = metric(logits, batch).sum()
        gradients = torch.autograd.grad(total, [*(seen[site] for site in where), logits])
    units = {"head": parts.heads, "neuron": parts.neurons}
    found: dict[str, list[Tensor]] = {"head": [], "neuron": []}
    for site, gradient in zip(where, gradients, strict=False):
        found[site.kind].append(_by_unit(seen[site].detach() - values[site], gradient, units[site.kind]))
    return torch.cat([*found["head"], *found["neuron"], _rows(logits.detach(), gradients[-1], batch)])


def _by_unit(difference: Tensor, gradient: Tensor, units: int) -> Tensor:
    """Sum of products over positions and the features of each unit: [unit, sample]."""
    return torch.einsum("btuf,btuf->ub", difference.unflatten(-1, (units, -1)), gradient.unflatten(-1, (units, -1)))


def _rows(logits: Tensor, gradient: Tensor, batch: Batch) -> Tensor:
    products = (logits - logits.mean(-1, keepdim=True)) * gradient  # [token, vocabulary]
    return products.new_zeros(len(batch), logits.shape[-1]).index_add(0, batch.sample_of, products).T
