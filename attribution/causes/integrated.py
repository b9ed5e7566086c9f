"""Integrated gradients in unit masks: every head and neuron turned up together from its reference to what it is.

A mask m in [0, 1] for each unit turns its activation a into reference + m (a - reference), where a is what the masked model
computes. The effect of a unit is the integral of d metric / d m along m = s for all units, s from 0 to 1 (Sundararajan et
al. 2017 in the masks): effects add up to metric(intact) - metric(all units at their reference), and what integration misses
is measured and never distributed. Rows have a path of their own, in which all else is as it is: a model none of whose rows
is left says nothing about the units before them.

Knows scalars along a path, and masks; knows nothing about what else a path could run through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution.capture import Edit, Site, edited, scored_logits, sites
from attribution.causes.cost import saved, size
from attribution.causes.gradient import by_unit, of_rows
from attribution.causes.reference import Values, like
from attribution.causes.result import Cut, Found
from attribution.components import Components
from attribution.metrics import Metric
from attribution.models import Anatomy
from attribution.samples import Batch

NODES = 10  # Gauss-Legendre nodes of one piece of a path
TOLERANCE, FLOOR = 1e-3, 1e-5  # a path is split further while its residual exceeds TOLERANCE |change| + FLOOR, over samples
COARSE = 2e-2  # the tolerance in half precision, which does not come closer
PIECES = 16  # that it is split into at most
SPLIT = 0.25  # where: networks with norms bend most at the beginning, where little is left to normalize


@dataclass(frozen=True)
class Integral:
    """The integral of a path.

    Attributes:
        total: Float [quantity, sample].
        change: Float [sample], metric at the end minus at the start.
        evaluations: of the integrand.
        readings: of the metric alone.
    """

    total: Tensor
    change: Tensor
    evaluations: int
    readings: int


@dataclass(frozen=True)
class _Piece:
    start: float
    end: float
    total: Tensor
    residual: Tensor  # [sample]

    @property
    def off(self) -> float:
        return self.residual.abs().sum().item()


def integrate(
    integrand: Callable[[float], Tensor],
    metric: Callable[[float], Tensor],
    nodes: int = NODES,
    derivative: Callable[[Tensor], Tensor] = lambda values: values.sum(0),
    tolerance: float = TOLERANCE,
) -> Integral:
    """Integrate over s from 0 to 1 by Gauss-Legendre, splitting the worst piece until the metric's change is resolved.

    Args:
        integrand: at s, Float [quantity, sample].
        metric: at s, Float [sample].
        nodes: of each piece.
        derivative: of the metric with respect to s, Float [sample], from the integrand's value.
        tolerance: of the residual, relative to the change.
    """
    ends = {0.0: metric(0.0), 1.0: metric(1.0)}
    places, weights = np.polynomial.legendre.leggauss(nodes)

    def piece(start: float, end: float) -> _Piece:
        half = (end - start) / 2
        values = [half * w * integrand(start + half * (1 + x)) for x, w in zip(places.tolist(), weights.tolist(), strict=True)]
        total = torch.stack(values).sum(0)
        return _Piece(start, end, total, ends[end] - ends[start] - derivative(total))

    pieces, tried = [piece(0.0, 1.0)], 1
    bound = tolerance * (ends[1.0] - ends[0.0]).abs().sum().item() + FLOOR * len(ends[0.0])
    while torch.stack([each.residual for each in pieces]).sum(0).abs().sum() > bound and len(pieces) < PIECES:
        worst = max(pieces, key=lambda each: each.off)
        pieces.remove(worst)
        middle = worst.start + SPLIT * (worst.end - worst.start)
        ends[middle] = metric(middle)
        pieces += [piece(worst.start, middle), piece(middle, worst.end)]
        tried += 2
    total = torch.stack([each.total for each in pieces]).sum(0)
    return Integral(total, ends[1.0] - ends[0.0], tried * nodes, len(ends))


def tolerance_of(parts: Anatomy) -> float:
    """How close an integral over passes of this model can come."""
    return COARSE if any(parameter.dtype.itemsize < 4 for parameter in parts.model.parameters()) else TOLERANCE


def integrated(components: Components, batch: Batch, values: Values, metric: Metric, nodes: int = NODES) -> Found:
    """Integrated gradients of every component, in the order of `components.table`, with their sum rules.

    Args:
        components: of the model.
        batch: what to run.
        values: the references, see `causes.reference`.
        metric: what to read.
        nodes: Gauss-Legendre nodes of each piece of the path.
    """
    parts = components.parts
    where, most = sites(parts), 0

    def masks(s: float, kept: dict[Site, tuple[Tensor, Tensor]] | None = None) -> dict:
        def turn(site: Site) -> Edit:
            def edit(activation: Tensor) -> Tensor:
                if kept is not None and not activation.requires_grad:
                    activation = activation.detach().requires_grad_()
                value = like(values[site], activation)
                turned = value + s * (activation - value)
                if kept is not None:
                    kept[site] = (activation.detach() - value, turned)
                return turned

            return edit

        return {site.module(parts): turn(site) for site in where}

    @torch.no_grad()
    def read(s: float) -> Tensor:
        with edited(masks(s)):
            return metric(scored_logits(parts, batch), batch).cpu()

    def slopes(s: float) -> Tensor:
        nonlocal most
        kept: dict[Site, tuple[Tensor, Tensor]] = {}
        with torch.enable_grad(), saved(parts.model) as graph, edited(masks(s, kept)):
            total = metric(scored_logits(parts, batch), batch).sum()
        most = max(most, graph.bytes + size(difference for difference, _ in kept.values()))
        gradients = torch.autograd.grad(total, [turned for _, turned in kept.values()])
        products = {site: (difference, each) for (site, (difference, _)), each in zip(kept.items(), gradients, strict=True)}
        return by_unit(parts, products).cpu()

    @torch.no_grad()
    def rows_at(s: float) -> Tensor:
        return mean + s * (put_out - mean)

    def row_slopes(s: float) -> Tensor:
        turned = rows_at(s).requires_grad_()
        with torch.enable_grad():
            gradient = torch.autograd.grad(metric(parts.logits_of(turned), batch).sum(), turned)[0]
        return of_rows(put_out, gradient, batch).cpu()

    with torch.no_grad():
        put_out = parts.rows_of(scored_logits(parts, batch))
        mean = put_out.mean(-1, keepdim=True)
    units = integrate(slopes, read, nodes, tolerance=tolerance_of(parts))
    rows = integrate(row_slopes, lambda s: metric(parts.logits_of(rows_at(s)), batch).cpu(), nodes)
    nothing = torch.zeros(len(batch))
    cuts = {
        "heads and neurons": Cut(units.total.sum(0), nothing, units.change),
        "rows": Cut(rows.total.sum(0), nothing, rows.change),
    }
    passes = 3.0 * units.evaluations + units.readings + 1
    return Found(torch.cat([units.total, rows.total]), passes, most + size([put_out]), cuts=cuts)
