"""How much memory a study takes on the device: what is held throughout, and what each part of a step adds at its peak.

Multiples of the model and counted passes. Knows what the recorder keeps; knows nothing about time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attribution.causes import BATCH_SIZE
from attribution.causes.ablation import LOGITS_AT_ONCE, TOKENS_AT_ONCE, TOKENS_ON_CPU
from attribution.doctor.passes import Shapes
from attribution.doctor.plan import Plan
from attribution.doctor.structure import Structure

WATCHED = 64  # training samples of which a run reads log-odds at every step


@dataclass(frozen=True)
class Memory:
    """Bytes on the device.

    Attributes:
        held: between steps, by what it is.
        peaks: at most, everything held included, by part of a step.
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
    wide = getattr(torch, found.dtype).itemsize
    used, tied = found.used * wide, found.rows * found.width * wide * found.tied
    trained = plan.lora * found.sides * wide if plan.lora else found.bytes
    moving = found.adapted * wide if plan.lora else found.bytes  # what the recorder copies: effective weights
    logits = plan.probe_samples * plan.response * found.rows * max(wide, 4)
    held = {
        "weights": found.bytes,
        "gradients": trained,
        "AdamW": 2 * trained,
        "recorder: weights before the step": moving,
        "recorder: gradient of each probe set": plan.probes * used,
        "recorder: logits of probe sets and of training samples": 2 * plan.probes * logits
        + WATCHED * plan.response * found.rows * max(wide, 4),
    }
    if plan.lora:
        held["adapters"] = trained
        held["recorder: effective weights"] = moving
    effective = found.adapted * max(wide, 4) if plan.lora else 0  # gradient in them
    whole, gradients = sum(held.values()), held["gradients"]
    accumulating = plan.accumulation > 1 or plan.lora > 0  # adapters: their gradients are held, the others' are never made
    step = shapes.training(plan.batch_size, plan.length, accumulating=accumulating, checkpointing=plan.checkpointing)
    scratch = 2 * found.largest * wide
    peaks = {
        "forward and backward": whole - (0 if accumulating else gradients) + step.peak + effective + tied,
        "step of the optimizer": whole + 2 * effective + tied + (trained if device != "cpu" else scratch),
    }
    if plan.probes:
        several = used if plan.probe_samples > BATCH_SIZE else 0  # the sum so far, beside the gradient of one pass
        reading = shapes.probe(min(plan.probe_samples, BATCH_SIZE), plan.length, plan.response).peak
        during = whole + 2 * effective + 2 * tied + several + reading
        peaks["reading of a probe set"] = during - used
        if plan.share_passes > 2:
            peaks["refining of its shares"] = during + moving
        peaks["exact ablation"] = whole + _replayed(found, plan, device) * wide
    return Memory(held, peaks)


def _replayed(found: Structure, plan: Plan, device: str) -> float:
    """Elements that exact ablation on one pass of samples keeps: the intact pass, and copies of it with one unit ablated."""
    samples = min(plan.probe_samples, BATCH_SIZE)
    tokens, scored = samples * plan.length, samples * plan.response
    intact = (found.layers + 1) * found.width + found.layers * (found.heads * found.head_dim + found.neurons)
    at_once = TOKENS_ON_CPU if device == "cpu" else TOKENS_AT_ONCE
    copies = max(1, min(at_once // tokens, LOGITS_AT_ONCE // (scored * found.rows)))
    copied = 4 * found.width + 3 * found.neurons
    return tokens * intact + scored * found.rows + copies * (tokens * copied + 3 * scored * found.rows)
