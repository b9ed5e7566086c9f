"""Update shares: how much each group's parameter change contributed to the change of a metric, along a straight path.

The share of group c is the integral over s in [0, 1] of <grad_c metric(theta + s dtheta), dtheta_c> (loss change
allocation, Lan et al. 2019, read on a probe set). Shares add up to the change of the metric; what numerical
integration misses is the residual, which is measured, never distributed.

Knows scalars and vectors along a path; knows nothing about training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attribution.capture import evaluating, logits_alone, scored_logits, tapped_for_logits
from attribution.components import Components
from attribution.metrics import Metric
from attribution.samples import Batch
from attribution.sharding import copy_all, local, settle
from attribution.updates.sizes import Measured, Sizes
from attribution.uses import Use, sums_of_all

TOLERANCE, FLOOR = 0.01, 1e-5  # a residual within TOLERANCE |change| + FLOOR (metric units) is resolved
PASSES = 9  # forward and backward passes that one step's shares may take on one probe set
_ROWS = "rows"


@dataclass(frozen=True)
class Reading:
    """A metric and its gradient at one place.

    Attributes:
        metric: mean over samples.
        gradients: of that mean, per use; none where it was read without.
        logits: at scored positions, one per batch.
        sizes: of activations, and of the gradient of each sample's own metric; None where they were not asked for.
    """

    metric: float
    gradients: dict[str, Tensor]
    logits: list[Tensor]
    sizes: Measured | None = None


def read(
    components: Components,
    batches: Sequence[Batch],
    metric: Metric,
    *,
    sized: bool = False,
    see: Callable[[Use, Tensor], None] | None = None,
    edited: Collection[nn.Module] = (),
) -> Reading:
    """Metric and gradient of the model as it is, dropout off, `.grad` untouched, tied weights parted by use.

    Args:
        components, batches, metric: what to read.
        sized: measure the sizes of activations and their gradients too.
        see: is handed the gradient of each use for each batch as it is made, and none is kept: memory of one parameter.
        edited: as `capture.logits_alone` takes them; of a model that is edited so sizes are not measured.
    """
    assert not (sized and edited)
    parts, total, gradients, logits = components.parts, 0.0, {}, []
    sizes = Sizes(components) if sized else None
    samples = sum(len(batch) for batch in batches)
    with (
        torch.enable_grad(),
        evaluating(parts.model),
        components.untied(),
        all_trainable(components),
        handed(components, None if components.together.several else see),
    ):
        for batch in batches:
            seen, beside = {}, {}
            if sizes is None:
                found = logits_alone(parts, batch, edited)
            else:
                with tapped_for_logits(parts, batch) as (seen, beside):
                    found = scored_logits(parts, batch)
            rows = parts.rows_of(found)
            mean = metric(parts.logits_of(rows), batch).sum() / samples
            now = components.gradients(mean, {**seen, _ROWS: rows} if sizes else None)
            if sizes:  # of each sample's own metric, not of the mean over samples
                sizes.add_rows(rows.detach(), now.pop(_ROWS), samples)
                sizes.add(seen, {site: now.pop(site) for site in seen}, batch.mask, beside, samples)
            if see is not None and components.together.several:  # FSDP's own backward pass gives all of a batch at once
                for use in components.uses:
                    see(use, now.pop(use.name))
            for name in [*now] if see is None else ():  # taken out one by one: held on to, they would be a model's worth beside
                gradient = now.pop(name)  # the next batch's
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
            total += mean.item()
            logits.append(found.detach())
    return Reading(total, gradients, logits, sizes and sizes.measured())


@torch.no_grad()
def glance(components: Components, batches: Sequence[Batch], metric: Metric) -> Reading:
    """The metric alone of the model as it is, dropout off."""
    with evaluating(components.parts.model):
        logits = [logits_alone(components.parts, batch) for batch in batches]
    total = sum(metric(found, batch).sum().item() for found, batch in zip(logits, batches, strict=True))
    return Reading(total / sum(len(batch) for batch in batches), {}, logits)


@dataclass(frozen=True)
class Node:
    """The path at one place: s in [0, 1], the metric there, and Float64 [groups] <grad_c metric, dtheta_c>."""

    s: float
    metric: float
    products: Tensor


@dataclass(frozen=True)
class Shares:
    """Shares of one path.

    Attributes:
        share: Float64 [groups], metric units.
        change: metric at the end minus at the start.
        residual: change - sum of shares.
        resolved: whether the residual is within TOLERANCE |change| + FLOOR.
        passes: gradient evaluations used, both ends included.
    """

    share: Tensor
    change: float
    residual: float
    resolved: bool
    passes: int


def integrate(start: Node, end: Node, between: Callable[[float], Node], passes: int = PASSES) -> Shares:
    """Trapezoid first; where that does not resolve, Simpson, then bisection of whichever piece misses most.

    The metric at the ends of every piece is known, so the error of each piece is measured rather than estimated.

    Args:
        start, end: the path at 0 and at 1.
        between: the path at a given s.
        passes: evaluations allowed in all, the ends included.
    """
    change = end.metric - start.metric
    bound = TOLERANCE * abs(change) + FLOOR
    share, used = (start.products + end.products) / 2, 2
    if abs(change - share.sum().item()) > bound and used < passes:
        pieces, used = [_Piece.simpson(start, between(0.5), end)], 3
        while abs(sum(piece.residual for piece in pieces)) > bound and used + 2 <= passes:
            worst = max(pieces, key=lambda piece: abs(piece.residual))
            pieces.remove(worst)
            for a, b in ((worst.start, worst.middle), (worst.middle, worst.end)):
                pieces.append(_Piece.simpson(a, between((a.s + b.s) / 2), b))
            used += 2
        share = torch.stack([piece.share for piece in pieces]).sum(0)
    residual = change - share.sum().item()
    return Shares(share, change, residual, abs(residual) <= bound, used)


@dataclass(frozen=True)
class _Piece:
    start: Node
    middle: Node
    end: Node
    share: Tensor
    residual: float

    @classmethod
    def simpson(cls, start: Node, middle: Node, end: Node) -> _Piece:
        share = (end.s - start.s) / 6 * (start.products + 4 * middle.products + end.products)
        return cls(start, middle, end, share, end.metric - start.metric - share.sum().item())


class Moved(NamedTuple):
    """What a path is from its start to its end, all in one.

    Attributes:
        length: norm of the whole change.
        products: Float64 [groups], <gradient_c, dtheta_c>.
        squares: Float64 [groups], |dtheta_c|^2.
        changed: Float64 [groups], number of elements that are not what they were.
    """

    length: float
    products: Tensor
    squares: Tensor
    changed: Tensor


class Path:
    """The straight line from stored weights to the weights the model has when this is made.

    Differences are taken a block of a parameter at a time when they are wanted, so that a path holds no copy of the model but
    the start, and the end while it is somewhere between.

    Args:
        components: of the model.
        start: weights at s = 0, what of them lies here, by the names of `Components.stored`; those left out did not change.
    """

    def __init__(self, components: Components, start: Mapping[str, Tensor]):
        self.components, self.start = components, start
        self._end: dict[str, Tensor] = {}

    def ends(self, use: Use) -> tuple[Tensor, Tensor] | None:
        """What lies here of a parameter at the start and at the end; None where nothing changes."""
        name = self.components.source[use.name]
        if name not in self.start:
            return None
        return self.start[name], self._end.get(name, local(self.components.stored[name]))

    def product(self, use: Use, gradient: Tensor) -> Tensor | None:
        """<gradient, dtheta> by owner, as `Use.sums` makes it; None where nothing changes."""
        ends = self.ends(use)
        return None if ends is None else use.sums(gradient, *ends, of=lambda *blocks: [along(*blocks)])

    def products(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """<gradient_c, dtheta_c>: Float64 [groups]. A use without a gradient counts as zero."""

        def factors(use: Use) -> tuple[Tensor, ...] | None:
            ends = self.ends(use) if use.name in gradients else None
            return None if ends is None else (gradients[use.name], *ends)

        return self.components.reduce(factors, along)

    def moved(self, gradients: Mapping[str, Tensor]) -> Moved:
        """The whole change in one visit of the weights, and `products` with these gradients."""
        found = ((use, self.ends(use)) for use in self.components.by_shape)
        visits = ((use, (*ends, use.given(gradients))) for use, ends in found if ends is not None)
        sums = sums_of_all(visits, _moved, self.components.elements)
        squares = [sums[name][1:2] for name in self.start]  # once, not for each use of a tied matrix
        total = torch.cat([each.to(squares[0].device) for each in squares], 1).cpu().double().sum().item() if squares else 0.0
        length = self.components.together.sums(total)[0] ** 0.5
        return Moved(length, *self.components.grouped(sums, quantities=3))

    def node(self, s: float, reading: Reading) -> Node:
        return Node(s, reading.metric, self.products(reading.gradients))

    @contextmanager
    def at(self, s: float) -> Iterator[None]:
        """Put the model at s; afterwards the end weights are copied back bit by bit."""
        stored = self.components.stored
        self._end = self._end or {name: local(stored[name]).clone() for name in self.start}
        try:
            with torch.no_grad():
                for name, start in self.start.items():
                    torch.lerp(start, self._end[name], s, out=local(stored[name]))  # in one pass, with no matrix in between
            settle(self.components.parts.model)
            yield
        finally:
            with torch.no_grad():
                copy_all([*self._end.values()], [local(stored[name]) for name in self._end])
            settle(self.components.parts.model)


def along(gradient: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """What each element of a parameter has of <gradient, change>."""
    return gradient * (end - start)


def _moved(start: Tensor, end: Tensor, gradient: Tensor) -> Iterator[Tensor]:
    change = end - start
    yield gradient * change
    yield change.square()
    yield change.ne_(0)  # numbers: truths take five times as long to sum


def shares(path: Path, batches: Sequence[Batch], metric: Metric, start: Node, end: Node, passes: int = PASSES) -> Shares:
    """Update shares of one path on one probe set, from its two ends."""

    components = path.components

    def between(s: float) -> Node:
        sums: dict[str, Tensor] = {}

        def see(use: Use, gradient: Tensor) -> None:
            found = path.product(use, gradient)
            if found is not None:
                sums[use.name] = sums[use.name] + found if use.name in sums else found

        with path.at(s):
            reading = read(components, batches, metric, see=see)
        return Node(s, reading.metric, components.grouped(sums)[0])

    return integrate(start, end, between, passes)


@contextmanager
def handed(components: Components, see: Callable[[Use, Tensor], None] | None) -> Iterator[None]:
    """Hand every gradient on as soon as it is made, and let zeros that take no memory stand for it."""

    def arrives(use: Use) -> Callable[[Tensor], Tensor]:
        def arrived(gradient: Tensor) -> Tensor:
            assert see is not None
            see(use, gradient)
            return gradient.new_zeros(()).expand_as(gradient)

        return arrived

    uses = [use for use in components.uses if see is not None and use.parameter.requires_grad]
    handles = [use.parameter.register_hook(arrives(use)) for use in uses]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def all_trainable(components: Components) -> Iterator[None]:
    """Let gradients reach frozen parameters too, so that the sum rule covers every parameter."""
    frozen = [use.parameter for use in components.uses if not use.parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
