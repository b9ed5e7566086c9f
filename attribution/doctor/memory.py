"""How much memory a study takes on the device: what is held throughout, and what each part of a run adds at its peak.

Multiples of the model and counted passes. Knows what the recorder keeps; knows nothing about time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from attribution.causes import BATCH_SIZE
from attribution.causes.ablation import LOGITS_AT_ONCE, TOKENS_AT_ONCE, TOKENS_ON_CPU
from attribution.doctor.passes import Pass, Shapes
from attribution.doctor.plan import Plan
from attribution.doctor.structure import Structure
from attribution.runs.stages import CAUSE_SAMPLES, WORD_NODES
from attribution.uses import BLOCK, stacked

PLANNED = 11  # arrays in float32 that planning a block of a step makes


@dataclass(frozen=True)
class Memory:
    """Bytes on the device.

    Attributes:
        held: between steps, by what it is.
        peaks: at most, everything held included, by part of the run.
    """

    held: dict[str, float]
    peaks: dict[str, float]

    @property
    def peak(self) -> float:
        return max(self.peaks.values())


def footprint(found: Structure, plan: Plan, shapes: Shapes, device: str) -> Memory:
    """The memory of a run; rows that wait to be written, on the host, are not in it.

    Args:
        found: the model.
        plan: the run.
        shapes: of the same model.
        device: cpu or cuda.
    """
    held = _held(found, plan)
    parts = (*_beside_training(found, plan, shapes, device), *_in_training(found, plan, shapes, device, held))
    return Memory(held, dict(parts))


def _held(found: Structure, plan: Plan) -> dict[str, float]:
    """Bytes that are there after a step until its gradients are dropped, by what they are."""
    wide, logits = wide_of(found), found.rows * plan.response * _of_a_logit(found)
    trained = plan.lora * found.sides * wide if plan.lora else found.bytes
    moving = moving_of(found, plan)  # what the recorder copies: effective weights
    held: dict[str, float] = {
        "weights": found.bytes,
        "gradients": trained,
        "AdamW": 2 * trained,
        "recorder: weights before the step": moving,
        "recorder: gradient of each probe set": plan.probes * found.used * wide if plan.share_passes else 0,
        "recorder: logits of probe sets and of training samples": (2 * plan.probes * plan.probe_samples + read_of(plan))
        * logits,
    }
    return held | ({"adapters": trained, "recorder: effective weights": moving} if plan.lora else {})


def _in_training(
    found: Structure, plan: Plan, shapes: Shapes, device: str, held: Mapping[str, float]
) -> Iterator[tuple[str, float]]:
    """Most bytes in every part of training, what is held included."""
    wide, whole = wide_of(found), sum(held.values())
    gradients, moving, used = held["gradients"], moving_of(found, plan), found.used * wide
    tied = found.rows * found.width * wide * found.tied
    effective = found.adapted * max(wide, 4) if plan.lora else 0  # gradient in them
    largest = found.largest * max(wide, 4)
    step = trained_pass(plan, shapes, device)
    accumulating = plan.accumulation > 1
    before = whole - (0 if accumulating else gradients)
    scattered = found.rows * found.width * (max(wide, 4) - wide) * found.tied  # a tied embedding's gradient, in float32
    yield "forward and backward", before + max(step.early, step.late + effective) + tied + scattered
    fused = gradients if device != "cpu" else 2 * largest  # optimizers on a GPU step through all parameters together
    during = whole + 2 * effective + 3 * tied + scattered  # a tied matrix: either use's gradient, what the embedding's is of
    yield "step of the optimizer", during + fused
    again = moving if plan.probes and plan.share_passes > 2 else 0  # weights after the step, once its shares were refined
    divergence = 5 * plan.response * found.rows * 4  # of a sample, from logits before and after
    behaviour = shapes.quiet(read_of(plan), plan.length, plan.response).peak + read_of(plan) * divergence
    of_probes = min(plan.probe_samples, BATCH_SIZE) * divergence if plan.probes else 0
    made = (2 if wide >= 4 else 5) * 4  # bytes of the arrays that are made of an element before and after, and its gradient
    block = made * min(found.largest, BLOCK[device != "cpu"])  # at a time
    compared = max(block, (made + 3 * wide) * min(found.used, stacked(found.used, device)))  # small ones stacked
    planned = 4 * PLANNED * min(found.largest, BLOCK[device != "cpu"]) if wide < 4 and not plan.lora else 0  # it rounds
    yield "recorder around a step", during + again + max(compared, planned, behaviour, of_probes)
    if plan.runs_again(found.small):
        yield "training batch run again", during + tied + shapes.again(plan.batch_size, plan.length, plan.response).peak
    if not plan.probes:
        return
    samples = min(plan.probe_samples, BATCH_SIZE)
    if not plan.share_passes:
        yield "reading of a probe set", during + shapes.quiet(samples, plan.length, plan.response).peak
    else:
        several = used if plan.probe_samples > BATCH_SIZE else 0  # the sum so far, beside the gradient of one pass
        reading = shapes.probe(samples, plan.length, plan.response).peak + tied + several
        yield "reading of a probe set", during - used + reading + (again if plan.probes > 1 else 0)
        if plan.share_passes > 2:
            refined = shapes.refined(samples, plan.length, plan.response).peak + block
            yield "refining of its shares", during + moving + refined + tied
    between = during if plan.ablated_at > 2 else whole - gradients  # the ends are outside steps
    yield "exact ablation", between + replayed(found, plan, samples, device)


def _beside_training(found: Structure, plan: Plan, shapes: Shapes, device: str) -> Iterator[tuple[str, float]]:
    """The same before and after it, where there is neither gradient nor optimizer."""
    wide, samples = wide_of(found), min(plan.probe_samples, BATCH_SIZE)
    tied = found.rows * found.width * wide * found.tied
    twin = moving_of(found, plan) if plan.lora else 0  # the trained model with its effective weights
    read = min(read_of(plan), BATCH_SIZE)
    ranked = 0 if found.small or plan.singles != "all" else shapes.causes(read, plan.length, plan.response).peak
    yield "causes on training samples", found.bytes + max(replayed(found, plan, read, device), ranked)
    if not plan.probes:
        return
    adapters = plan.lora * found.sides * wide
    yield "words of prompts", found.bytes + twin + adapters + shapes.words(WORD_NODES, plan.length, plan.response).peak
    swapped = 2 * found.largest * wide
    forward = shapes.quiet(samples, plan.length, plan.response).peak
    yield "grafts", 2 * found.bytes + twin + adapters + 2 * tied + swapped + forward


def trained_pass(plan: Plan, shapes: Shapes, device: str, *, accumulating: bool | None = None) -> Pass:
    """A pass of the plan's training; kernels of a GPU score the tokens of responses alone."""
    return shapes.trained(
        plan.batch_size, plan.length, plan.response if device != "cpu" else plan.length - 1, lora=plan.lora,
        accumulating=plan.accumulation > 1 if accumulating is None else accumulating, checkpointing=plan.checkpointing,
    )  # fmt: skip


def replayed(found: Structure, plan: Plan, samples: int, device: str) -> float:
    """Bytes that exact ablation on one pass of samples keeps: the intact pass, and copies of it with one unit ablated."""
    tokens, logits = samples * plan.length, samples * plan.response * found.rows
    intact = (found.layers + 1) * found.width + found.layers * (found.heads * found.head_dim + found.neurons)
    at_once = TOKENS_ON_CPU if device == "cpu" else TOKENS_AT_ONCE
    one_by_one = plan.singles == "all" and "neuron" in plan.kinds
    units = max(found.heads, found.neurons) if one_by_one else found.heads  # of one layer and kind, which run together
    copies = max(1, min(at_once // tokens, LOGITS_AT_ONCE // logits, units))
    wide, vocabulary = wide_of(found), _of_a_logit(found) * logits
    projections = (found.heads + 2 * found.kv_heads) * found.head_dim
    combined = one_by_one and wide >= 4 and not found.post_norms and found.experts == 1  # from known ones, see `Projected`
    kept, copied = intact + combined * projections, 4 * found.width + 3 * found.neurons + combined * projections
    # first the layers of the copies, then their logits: as they are, the intact ones beside them, and five of the KL
    return wide * tokens * kept + vocabulary + copies * max(wide * tokens * copied, 7 * vocabulary)


def wide_of(found: Structure) -> int:
    """Bytes of an element of the weights."""
    return getattr(torch, found.dtype).itemsize


def _of_a_logit(found: Structure) -> int:
    return max(wide_of(found), 4)


def moving_of(found: Structure, plan: Plan) -> int:
    """Bytes of what the recorder copies: the weights, or the effective ones that adapters move."""
    return found.adapted * wide_of(found) if plan.lora else found.bytes


def read_of(plan: Plan) -> int:
    """Training samples of which causes are read, and log-odds at every step."""
    return min(plan.samples, CAUSE_SAMPLES)
