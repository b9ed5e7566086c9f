"""What each of several GPUs would hold if FSDP2 sharded the model over them: an estimate from the same counts, not measured.

Weights, gradients, optimizer and the recorder's copies are taken to lie in equal shards; every GPU runs `batch_size` samples
and reads whole probe sets, with the parameters of two layers, the embedding and the unembedding gathered, and one layer's
gradient before it is scattered. Knows footprints; knows nothing about time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from attribution.causes import BATCH_SIZE
from attribution.doctor.memory import Memory, replayed, trained_pass, wide_of
from attribution.doctor.passes import Shapes
from attribution.doctor.plan import Plan
from attribution.doctor.structure import Structure

NUMBERS = (2, 4, 8, 16, 32, 64, 128, 256)  # of GPUs
UNASKED = NUMBERS[:3]  # those that are told where no memory is given
_LOGITS = "recorder: logits of probe sets and of training samples"


def per_gpu(found: Structure, plan: Plan, shapes: Shapes, device: str, whole: Memory, shards: int) -> float:
    """Most bytes on each of so many GPUs.

    Args:
        found, plan, shapes, device: as `footprint` takes them.
        whole: the footprint on one.
        shards: number of GPUs.
    """
    return max(_peaks(found, plan, shapes, device, whole, shards))


def _peaks(found: Structure, plan: Plan, shapes: Shapes, device: str, whole: Memory, shards: int) -> Iterator[float]:
    wide, logits = wide_of(found), whole.held[_LOGITS]
    held = (sum(whole.held.values()) - logits) / shards + logits
    root = found.rows * found.width * wide * (1 if found.tied else 2)
    layer = max(found.bytes - root, 0) / found.layers
    gathered, copied = root + 2 * layer, whole.held["recorder: weights before the step"] / shards
    trained = whole.held["gradients"] / shards
    effective = found.adapted * max(wide, 4) / shards if plan.lora else 0.0
    step = trained_pass(plan, shapes, device, accumulating=True)  # no gradient of the whole model is ever there
    yield held + step.peak + effective + gathered + layer
    yield held + 2 * effective + (trained if device != "cpu" else 0.0) + layer
    if not plan.probes:
        return
    samples = min(plan.probe_samples, BATCH_SIZE)
    yield held + replayed(found, plan, samples, device) + gathered
    if not plan.share_passes:
        return
    gradients = found.used * wide / shards * (1 + (plan.probe_samples > BATCH_SIZE))
    reading = shapes.causes(samples, plan.length, plan.response).peak + gradients + gathered + layer
    yield held + 2 * effective + reading + (copied if plan.share_passes > 2 else 0.0)


def spread(peak: Callable[[int], float], room: float | None) -> dict[int, float]:
    """Bytes on each GPU by their number, up to the first number that fits the room."""
    if room is None:
        return {shards: peak(shards) for shards in UNASKED}
    found: dict[int, float] = {}
    for shards in NUMBERS:
        found[shards] = peak(shards)
        if found[shards] <= room:
            break
    return found
