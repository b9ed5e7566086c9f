"""How long a study takes: counted passes over the speed of a machine, corrected by a pass that was timed where there is one.

Knows machines and the recorder's passes; knows nothing about what they hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median

import torch

from attribution.causes import BATCH_SIZE
from attribution.doctor.memory import moving_of, read_of, trained_pass, wide_of
from attribution.doctor.opening import Opened
from attribution.doctor.passes import Pass, Shapes
from attribution.doctor.plan import Plan
from attribution.doctor.structure import Structure
from attribution.runs.stages import GRAFTED_NEURONS, GRAFTED_ROWS, WORD_NODES, WORDS

HEAD, NEURON = 1.1, 0.75  # time of the layers that an exact ablation runs again, over their time in a forward pass
OPTIMIZER = 20  # times that AdamW reads or writes an element of a parameter
RECORDER = 24  # the same of the recorder, around a step
SIZES = 6  # times that it reads or writes an element of an activation that it watches, with its gradient
SOFTMAX = 12  # times that an ablated row's metric and KL read or write a logit
TIMED_TOKENS = 4_096  # of the pass that is timed, at most
_PRODUCT, _ADDED, _REPEATS = 1_024, 2**22, 3


@dataclass(frozen=True)
class Machine:
    """What a device does in a second.

    Attributes:
        flops: floating-point operations of products of matrices.
        traffic: bytes read and written by other operations; infinite: they are not counted.
        correction: measured over expected seconds of a pass of the model itself; None where none was timed.
    """

    flops: float
    traffic: float
    correction: float | None = None

    def seconds(self, counted: Pass) -> float:
        """Of a forward and backward pass."""
        return (counted.flops / self.flops + counted.traffic / self.traffic) * (self.correction or 1.0)

    def forward(self, counted: Pass) -> float:
        """Of its forward pass."""
        return self.seconds(counted) * counted.forward / counted.flops


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
    flops = 2 * _PRODUCT**3 / median(_seconds(lambda: square @ square, device))
    if bandwidth is None:
        long, into = torch.zeros(2, _ADDED, device=device)
        traffic = 3 * long.nbytes / median(_seconds(lambda: torch.add(long, long, out=into), device))
    return Machine(flops, traffic)


def timed(here: Machine, given: Opened, plan: Plan, shapes: Shapes) -> Machine:
    """The machine, corrected by a training pass of the model itself on as many of the plan's tokens as are quick to run."""
    model, samples = given.model, max(1, min(plan.batch_size, TIMED_TOKENS // plan.length))
    ids = torch.zeros(samples, plan.length, dtype=torch.long, device=model.device)

    def once() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    expected = here.seconds(shapes.training(samples, plan.length))
    return replace(here, correction=median(_seconds(once, model.device.type)) / expected)


def seconds(
    found: Structure, plan: Plan, shapes: Shapes, here: Machine, ablated: Mapping[str, int], device: str = "cpu"
) -> dict[str, float]:
    """Seconds of every part of a run. Shares that need refining take more: up to `share_passes` - 2 readings in such a step.

    Args:
        found: the model.
        plan: the run.
        shapes: of the same model.
        here: where it runs.
        ablated: components ablated one at a time at both ends, by kind.
        device: cpu or cuda.
    """
    step = trained_pass(plan, shapes, device)
    trained = plan.lora * found.sides * 4 if plan.lora else found.bytes
    training = plan.max_steps * (plan.accumulation * here.seconds(step) + OPTIMIZER * trained / here.traffic)
    effective = 2 * plan.tokens * found.adapted / here.flops if plan.lora else 0.0  # gradients of effective weights
    read = read_of(plan)
    watched = SIZES * plan.tokens * found.layers * (found.heads * found.head_dim + found.neurons) * wide_of(found)
    behaviour = here.seconds(shapes.quiet(read, plan.length, plan.response))
    around = (RECORDER * moving_of(found, plan) + watched) / here.traffic + effective + behaviour
    parts = {"training": training, "recorder without probes": plan.max_steps * around}
    if plan.runs_again(found.small):
        once_more = here.seconds(shapes.training(plan.batch_size, plan.length))
        parts["training batches run again"] = plan.max_steps * plan.accumulation * once_more
    if not plan.probes:
        return parts
    samples = min(plan.probe_samples, BATCH_SIZE)
    ranked = 0.0 if found.small or plan.singles != "all" else here.seconds(shapes.causes(read, plan.length, plan.response))
    reading = shapes.probe(samples, plan.length, plan.response)
    repeats = plan.probes * max(1.0, plan.probe_samples / BATCH_SIZE)  # the last of several passes may be of fewer samples
    forward = here.forward(reading)
    again = forward * (found.layers + 1) / (2 * found.layers)  # the layers from its own on, on average
    heads, neurons = ablated["head"] * HEAD * again, ablated["neuron"] * NEURON * again
    row = SOFTMAX * samples * plan.response * found.rows * 4 / here.traffic
    singles = neurons + ablated["row"] * row
    layers = found.layers if plan.layers is None else len(plan.layers)
    grafted = min(layers * min(found.neurons, GRAFTED_NEURONS), ablated["neuron"]) + min(GRAFTED_ROWS, ablated["row"])
    return parts | {
        "readings of probe sets": (plan.max_steps + 1) * repeats * (here.seconds(reading) if plan.share_passes else forward),
        "exact ablation of heads": plan.ablated_at * repeats * heads,
        "exact ablation of neurons and rows, at both ends": 2 * repeats * singles,
        "causes on training samples": ranked + (heads + singles) * read / samples,
        "words of prompts": 2 * WORDS * here.seconds(shapes.words(WORD_NODES, plan.length, plan.response)),
        "grafts": 2 * (found.layers * found.heads + plan.probes * grafted) * repeats * forward,
    }


def _seconds(run: Callable[[], object], device: str) -> list[float]:
    """Of some calls, after one that is not counted."""
    found = []
    for turn in range(1 + _REPEATS):
        begun = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if turn:
            found.append(time.perf_counter() - begun)
    return found
