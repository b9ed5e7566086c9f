"""First-order causes: gradient x (activation - reference) of every head, neuron and row, from one forward and backward.

Not an effect of ablation but its linear extrapolation from where the model is: good for small units, blind to
saturation. For a neuron or head with a zero reference, the sum over positions equals <output weights, their gradient>.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attribution.capture import Site, scored_logits, sites, tapped
from attribution.causes.reference import Values, like
from attribution.components import Components
from attribution.metrics import Metric
from attribution.models import Anatomy
from attribution.samples import Batch


def first_order(components: Components, batch: Batch, values: Values, metric: Metric) -> Tensor:
    """First-order cause of every component on every sample.

    Args:
        components: of the model.
        batch: what to run.
        values: the references, see `causes.reference`; a row's is the vocabulary mean of its position.
        metric: what to read.

    Returns:
        Float [component, sample] in the order of `components.table`, metric units, where the batch is.
    """
    parts = components.parts
    where = sites(parts)
    with torch.enable_grad(), tapped(parts, where, differentiable=True) as seen:
        rows = parts.rows_of(scored_logits(parts, batch))
        total = metric(parts.logits_of(rows), batch).sum()
        gradients = torch.autograd.grad(total, [*(seen[site] for site in where), rows])
    products = {
        site: (seen[site].detach() - like(values[site], seen[site]), gradient)
        for site, gradient in zip(where, gradients, strict=False)
    }
    units = by_unit(parts, products).to(rows.device)
    return torch.cat([units, of_rows(rows.detach(), gradients[-1], batch)])


def by_unit(parts: Anatomy, products: Mapping[Site, tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of products over positions and the features of each unit: Float [unit, sample], heads before neurons.

    Args:
        parts: of the model.
        products: two factors at every site, each [sample, position, feature].
    """
    found: dict[str, list[Tensor]] = {"head": [], "neuron": []}
    counts = {"head": parts.heads, "neuron": parts.neurons}
    for site in sites(parts):
        wide = torch.promote_types(products[site][1].dtype, torch.float32)  # half precision would round the sums
        one, other = (factor.to(wide).unflatten(-1, (counts[site.kind], -1)) for factor in products[site])
        found[site.kind].append(torch.einsum("btuf,btuf->ub", one, other))
    device = found["head"][0].device
    return torch.cat([each.to(device) for kind in found for each in found[kind]])


def of_rows(rows: Tensor, gradient: Tensor, batch: Batch) -> Tensor:
    """(what a row puts out - vocabulary mean) x gradient, summed over response tokens: Float [row, sample].

    Args:
        rows: Float [token, vocabulary], see `Anatomy.rows_of`, or their change along a path.
        gradient: in them.
        batch: of the tokens.
    """
    return per_sample((rows - rows.mean(-1, keepdim=True)) * gradient, batch)


def per_sample(values: Tensor, batch: Batch) -> Tensor:
    """Sum over the response tokens of each sample: Float [row, sample], of Float [token, row]."""
    return values.new_zeros(len(batch), values.shape[-1]).index_add(0, batch.sample_of, values).T
