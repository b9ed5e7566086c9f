"""Conductance of every head, neuron and row, of all layers at once: how a change of the input reaches the metric through each.

Input embeddings move on a straight line from a baseline (s = 0) to what they are (s = 1). The conductance of a component is
the integral of d metric / d activation x d activation / d s (Dhamdhere, Sundararajan & Yan 2019). What adds up: at each
layer and kind of component, the heads (or neurons) and the residual stream that goes past them form a cut through which all
must pass, so that their conductances sum to metric(input) - metric(baseline input); rows are a cut by themselves. Between
layers nothing adds up: every layer passes on the same change.

Derivatives along the path are exact (forward differentiation), so the sum rule holds at every node, and one backward pass
serves all layers; captum's LayerConductance takes one run for each layer and first-order increments.

Knows embeddings, sites and the residual stream between them; knows nothing about ablation.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from attribution.capture import Edit, edited, rewritten, scored_logits, sites, streamed
from attribution.causes.cost import saved, size
from attribution.causes.gradient import by_unit, of_rows, per_sample
from attribution.causes.integrated import NODES, integrate, tolerance_of
from attribution.causes.reference import like
from attribution.causes.result import Cut, Found
from attribution.components import Components
from attribution.errors import ModelError
from attribution.metrics import Metric
from attribution.models import Anatomy
from attribution.samples import Batch

_ROWS, _INPUT = "rows", "input"


def conductance(components: Components, batch: Batch, baseline: Tensor, metric: Metric, nodes: int = NODES) -> Found:
    """Conductance of every component, in the order of `components.table`, with the sum rule of every cut.

    Args:
        components: of the model.
        batch: what to run.
        baseline: of the input embeddings, broadcastable to [sample, position, width].
        metric: what to read.
        nodes: Gauss-Legendre nodes of each piece of the path.

    Raises:
        ModelError: an attention that torch cannot differentiate forward, or a mixture of experts.
    """
    parts = components.parts
    if parts.row.experts:
        raise ModelError(
            "a mixture of experts has no conductance: along the path tokens jump from expert to expert, and what the metric "
            'jumps there is no integral of a gradient; use method="ablation" or "gradient"'
        )
    most = 0
    with torch.no_grad():
        end = parts.embedding(batch.ids).detach()  # under checkpointing it asks for a gradient
    start = like(baseline, end)

    def at(s: float) -> Tensor:
        return start + s * (end - start)

    @torch.no_grad()
    def read(s: float) -> Tensor:
        with rewritten({parts.embedding: lambda _out: at(s)}):
            return metric(scored_logits(parts, batch), batch).cpu()

    def slopes(s: float) -> Tensor:
        nonlocal most
        tangents = _tangents(parts, batch, at(s), end - start)
        with saved(parts.model) as graph:
            gradients = _gradients(parts, batch, at(s), metric)
        most = max(most, graph.bytes + size(tangents.values()))
        return torch.cat([_by_component(parts, batch, gradients, tangents), _beside(parts, batch, gradients, tangents)])

    found = integrate(slopes, read, nodes, lambda values: values[-1], tolerance_of(parts))
    total, beside = found.total[: len(components)], found.total[len(components) :]
    cuts, first = {}, 0
    for which, (kind, count) in enumerate((("head", parts.heads), ("neuron", parts.neurons))):
        for layer in range(parts.depth):
            mine = total[first : first + count].sum(0)
            cuts[f"{kind}s of layer {layer}"] = Cut(mine, beside[which * parts.depth + layer], found.change)
            first += count
    cuts["rows"] = Cut(total[first:].sum(0), beside[-2], found.change)
    return Found(total, 5.0 * found.evaluations + found.readings, most, cuts=cuts)


@contextmanager
def _watched(parts: Anatomy, keep: Callable[[Hashable, Tensor], None]) -> Iterator[None]:
    """Show to `keep` the activations at every site, what every branch writes, and the stream before every layer."""

    def look(key: Hashable) -> Edit:
        def edit(value: Tensor) -> Tensor:
            keep(key, value)
            return value

        return edit

    branches = {
        parts.branch(layer, which): look((which, layer)) for layer in range(parts.depth) for which in ("attention", "mlp")
    }
    with (
        edited({site.module(parts): look(site) for site in sites(parts)}),
        rewritten(branches),
        streamed(parts, {layer: look(("stream", layer)) for layer in range(parts.depth)}),
    ):
        yield


def _tangents(parts: Anatomy, batch: Batch, here: Tensor, direction: Tensor) -> dict[Hashable, Tensor]:
    """Derivative of everything watched, and of the logits, as the input embeddings move in a direction."""
    found: dict[Hashable, Tensor] = {_INPUT: direction}

    def keep(key: Hashable, value: Tensor) -> None:
        tangent = forward_ad.unpack_dual(value).tangent
        found[key] = torch.zeros_like(value) if tangent is None else tangent

    try:
        # Only this kernel has a forward derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), _watched(parts, keep):
            moving = forward_ad.make_dual(here, direction)
            with rewritten({parts.embedding: lambda _out: moving}):
                keep(_ROWS, parts.rows_of(scored_logits(parts, batch)))
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error):
            raise
        raise ModelError(
            f"this model's attention ({parts.model.config._attn_implementation}) has no forward derivative; call "
            'model.set_attn_implementation("eager") first'
        ) from error
    return found


def _gradients(parts: Anatomy, batch: Batch, here: Tensor, metric: Metric) -> dict[Hashable, Tensor]:
    """Gradient of the metric with respect to everything watched, the logits and the input embeddings."""
    seen: dict[Hashable, Tensor] = {_INPUT: here.detach().requires_grad_()}
    with torch.enable_grad(), _watched(parts, seen.__setitem__), rewritten({parts.embedding: lambda _out: seen[_INPUT]}):
        seen[_ROWS] = parts.rows_of(scored_logits(parts, batch))
        total = metric(parts.logits_of(seen[_ROWS]), batch).sum()
        found = torch.autograd.grad(total, list(seen.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(seen, found, strict=True))


def _by_component(
    parts: Anatomy, batch: Batch, gradients: Mapping[Hashable, Tensor], tangents: Mapping[Hashable, Tensor]
) -> Tensor:
    """d metric / d s through every component: Float [component, sample]."""
    units = by_unit(parts, {site: (tangents[site], gradients[site]) for site in sites(parts)})
    return torch.cat([units.cpu(), of_rows(tangents[_ROWS], gradients[_ROWS], batch).cpu()])


def _beside(parts: Anatomy, batch: Batch, gradients: Mapping[Hashable, Tensor], tangents: Mapping[Hashable, Tensor]) -> Tensor:
    """d metric / d s past the heads of every layer, past its neurons, in all rows alike, in all: [2 * depth + 2, sample]."""
    found = []
    for which in ("attention", "mlp"):
        for layer in range(parts.depth):
            past = tangents["stream", layer]
            if which == "mlp":
                past = past + tangents["attention", layer]
            elif parts.parallel:  # the MLP goes past the heads too
                past = past + tangents["mlp", layer]
            found.append((past * gradients[which, layer]).sum((1, 2)).cpu())
    alike = tangents[_ROWS].mean(-1, keepdim=True) * gradients[_ROWS].sum(-1, keepdim=True)
    found.append(per_sample(alike if parts.cap else 0 * alike, batch)[0].cpu())  # a metric knows no shift of all logits
    found.append((tangents[_INPUT] * gradients[_INPUT]).sum((1, 2)).cpu())
    return torch.stack(found)
