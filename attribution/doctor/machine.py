"""How fast a machine is: by products of matrices and by additions, and by passes of a model itself where it can be run.

Knows devices, and runs the recorder's own readings to time them; knows nothing about the parts of a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from mmap import mmap
from statistics import median

import torch

from attribution.capture import scored_logits, streamed
from attribution.causes import BATCH_SIZE
from attribution.components import Components
from attribution.doctor.opening import Opened
from attribution.doctor.passes import Pass, Shapes, tiled_loss
from attribution.doctor.plan import Plan
from attribution.metrics import log_odds
from attribution.models import Anatomy
from attribution.runs.stages import WORD_NODES
from attribution.samples import Batch, Encoded, collate
from attribution.sharding import local
from attribution.updates.share import Path, glance, read

TRAINING, READING, FORWARD, WORDS = "training", "reading", "forward", "words"  # kinds of passes
VISIT = 12  # times that a visit of the weights reads or writes an element
TIMED_TOKENS = 4_096  # of a pass that is timed, at most
_PRODUCT, _ADDED = 1_024, 2**22
_FRESH = 2**26  # bytes of new memory that are written to
_VISITED = 2**27  # bytes of weights, and copies, that a visit is timed on
_REPEATS, _LONG = 3, 1.0  # calls that are timed; seconds after which no further one is


@dataclass(frozen=True)
class Machine:
    """What a device does in a second.

    Attributes:
        flops: floating-point operations of products of matrices.
        traffic: bytes read and written by other operations; infinite: they are not counted.
        timed: by kind of pass, measured over expected seconds of one of the model itself; empty where none was timed.
        visited: seconds for each byte of the weights in which the recorder compares them with what they were; None: that was
            not timed.
        fresh: seconds for each byte of memory that a process uses for the first time; 0 on other devices than a CPU.
    """

    flops: float
    traffic: float
    timed: Mapping[str, float] = field(default_factory=dict)
    visited: float | None = None
    fresh: float = 0.0

    def seconds(self, counted: Pass, kind: str = TRAINING) -> float:
        """Of all that was counted, as passes of this kind go."""
        return (counted.flops / self.flops + counted.traffic / self.traffic) * self.timed.get(kind, 1.0)

    def visits(self, weights: float) -> float:
        """Seconds in which so many bytes of weights are compared with what they were."""
        return weights * (VISIT / self.traffic if self.visited is None else self.visited)


def machine(dtype: str, device: str, tflops: float | None, bandwidth: float | None) -> Machine:
    """The speed of this machine, or of another that is described.

    Args:
        dtype, device: of the products that are timed.
        tflops: 1e12 operations per second; None: a product of matrices is timed here.
        bandwidth: GB per second; None: an addition is timed here, or, where `tflops` describes another machine, not counted.
    """
    traffic = float("inf") if bandwidth is None else bandwidth * 1e9
    if tflops is not None:
        return Machine(tflops * 1e12, traffic)
    square = torch.randn(_PRODUCT, _PRODUCT, device=device).to(getattr(torch, dtype))
    flops = 2 * _PRODUCT**3 / _seconds(lambda: square @ square, device)
    if bandwidth is None:
        long, into = torch.zeros(2, _ADDED, device=device)
        traffic = 3 * long.nbytes / _seconds(lambda: torch.add(long, long, out=into), device)
    fresh = 0.0
    if device == "cpu":
        fresh = _seconds(lambda: torch.frombuffer(mmap(-1, _FRESH), dtype=torch.uint8).fill_(1), device) / _FRESH
    return Machine(flops, traffic, fresh=fresh)


def timed(here: Machine, given: Opened, plan: Plan, shapes: Shapes) -> Machine:
    """The machine with what passes of the model itself take on it, on as many of the plan's tokens as are quick to run."""
    components = Components(given.model)
    trained, probed, copied = (
        max(1, min(count, TIMED_TOKENS // plan.length))
        for count in (plan.batch_size, min(plan.probe_samples, BATCH_SIZE), WORD_NODES)
    )
    probe, copies = (_zeros(count, plan, given.model.device) for count in (probed, copied))
    asked = plan.length, plan.response
    passes = {
        TRAINING: (lambda: _trained(given.model, trained, plan.length), shapes.trained(trained, plan.length, plan.length - 1)),
        READING: (lambda: read(components, [probe], log_odds, sized=True), shapes.probe(probed, *asked)),
        FORWARD: (lambda: glance(components, [probe], log_odds), shapes.quiet(probed, *asked)),
        WORDS: (lambda: _words(components.parts, copies), shapes.words(copied, *asked)),
    }
    device = given.model.device.type
    found = {kind: _seconds(run, device) / here.seconds(counted) for kind, (run, counted) in passes.items()}
    return replace(here, timed=found, visited=_visited(components, device))


def _visited(components: Components, device: str) -> float:
    """Seconds for each byte in a visit of some weights, the smaller ones, beside copies of them and gradients."""
    start: dict[str, torch.Tensor] = {}
    for name, stored in sorted(components.stored.items(), key=lambda each: each[1].numel()):
        if sum(each.nbytes for each in start.values()) < _VISITED:
            start[name] = local(stored).clone()
    gradients = {use.name: use.values.clone() for use in components.uses if components.source[use.name] in start}
    visit = _seconds(lambda: Path(components, start).moved(gradients), device)
    return visit / sum(each.nbytes for each in gradients.values())  # a tied matrix is visited for each of its uses


def _zeros(samples: int, plan: Plan, device: torch.device) -> Batch:
    one = Encoded(ids=(0,) * plan.length, start=plan.length - plan.response, weight=1.0, contrasts=())
    return collate([one] * samples, device)


def _trained(model: torch.nn.Module, samples: int, length: int) -> None:
    ids = torch.zeros(samples, length, dtype=torch.long, device=next(model.parameters()).device)
    tiled_loss(model, ids, length - 1).backward()
    model.zero_grad()


def _words(parts: Anatomy, copies: Batch) -> None:
    start: list[torch.Tensor] = []
    with streamed(parts, {0: lambda hidden: start.append(hidden) or hidden}):
        total = log_odds(scored_logits(parts, copies), copies).sum()
    torch.autograd.grad(total, start)


def _seconds(run: Callable[[], object], device: str) -> float:
    """Of a call, after one that is not counted: the median of some."""
    found: list[float] = []
    for turn in range(1 + _REPEATS):
        begun = time.perf_counter()
        run()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        if turn:
            found.append(time.perf_counter() - begun)
        if sum(found) > _LONG:
            break
    return median(found)
