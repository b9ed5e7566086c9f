"""How long a study takes: counted passes over the speed of a machine, as passes of the model go where some were timed.

Knows machines, and what the recorder runs and visits; knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Mapping

from attribution.causes import BATCH_SIZE
from attribution.doctor.machine import FORWARD, READING, WORDS, Machine
from attribution.doctor.memory import footprint, moving_of, read_of, trained_pass, wide_of
from attribution.doctor.passes import Shapes
from attribution.doctor.plan import Plan
from attribution.doctor.structure import Structure
from attribution.runs.stages import GRAFTED_NEURONS, GRAFTED_ROWS, WORD_NODES
from attribution.runs.stages import WORDS as PROMPTS

AGAIN = 0.9  # time of the layers that an exact ablation runs again, over their share of a forward pass
OPTIMIZER = 1.7  # visits of the weights that a step of AdamW takes as long as
RECORDER, PROBED = 2.0, 1.4  # visits of the weights by the recorder around a step, and more for each probe set with shares
REFINED = 2.0  # visits for a further reading of shares: the model is moved along its path and back
SIZES = 6  # times that it reads or writes an element of an activation that it watches, with its gradient
SOFTMAX = 12  # times that an ablated row's metric and KL read or write a logit
ENDS = 9  # forward passes, as a node of the path takes them, of a prompt whose words are read: four, each of one sample alone
FRESH = "memory used for the first time"


def seconds(
    found: Structure, plan: Plan, shapes: Shapes, here: Machine, ablated: Mapping[str, int], device: str = "cpu"
) -> dict[str, float]:
    """Seconds of every part of a run, without the refining of shares, see `refining`.

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
    training = plan.max_steps * (plan.accumulation * here.seconds(step) + OPTIMIZER * here.visits(trained))
    read = read_of(plan)
    watched = SIZES * plan.tokens * found.layers * (found.heads * found.head_dim + found.neurons) * wide_of(found)
    behaviour = here.seconds(shapes.quiet(read, plan.length, plan.response), FORWARD)
    moving = moving_of(found, plan) if plan.lora else found.used * wide_of(found)  # a tied matrix twice
    compared = here.visits(moving) * (RECORDER + PROBED * plan.probes * (plan.share_passes > 0))
    around = compared + watched / here.traffic + behaviour
    parts = {"training": training, "recorder around steps": plan.max_steps * around}
    if here.fresh:  # weights too: they lie in their file until they are written to
        parts[FRESH] = here.fresh * footprint(found, plan, shapes, device).peak
    if plan.lora:
        product = 2 * plan.tokens * found.adapted / here.flops + here.visits(moving)
        parts["gradients of effective weights"] = plan.max_steps * product
    if plan.runs_again(found.small):
        once_more = here.seconds(shapes.training(plan.batch_size, plan.length))
        parts["training batches run again"] = plan.max_steps * plan.accumulation * once_more
    if not plan.probes:
        return parts
    samples = min(plan.probe_samples, BATCH_SIZE)
    asked = plan.length, plan.response
    ranked = 0.0 if found.small or plan.singles != "all" else here.seconds(shapes.causes(read, *asked), READING)
    repeats = plan.probes * max(1.0, plan.probe_samples / BATCH_SIZE)  # the last of several passes may be of fewer samples
    forward = here.seconds(shapes.quiet(samples, *asked), FORWARD)
    reading = here.seconds(shapes.probe(samples, *asked), READING) if plan.share_passes else forward
    row = SOFTMAX * samples * plan.response * found.rows * 4 / here.traffic
    layers = range(found.layers) if plan.layers is None else plan.layers
    layer = AGAIN * forward / found.layers
    run = layer * sum(found.layers - each for each in layers) / max(len(layers), 1)  # from a head's own layer on
    heads = ablated["head"] * (run + row)
    own = layer if found.post_norms or found.experts > 1 else 0.0  # elsewhere what a neuron writes is added as it is
    singles = ablated["neuron"] * (run - layer + own + row) + ablated["row"] * row
    grafted = min(len(layers) * min(found.neurons, GRAFTED_NEURONS), ablated["neuron"]) + min(GRAFTED_ROWS, ablated["row"])
    return parts | {
        "readings of probe sets": (plan.max_steps + 1) * repeats * reading,
        "exact ablation of heads": plan.ablated_at * repeats * (heads + forward * (ablated["head"] > 0)),
        "exact ablation of neurons and rows, at both ends": 2 * repeats * singles,
        "causes on training samples": ranked + (heads + singles) * read / samples,
        "words of prompts": 2 * PROMPTS * (1 + ENDS / (3 * WORD_NODES)) * here.seconds(shapes.words(WORD_NODES, *asked), WORDS),
        "grafts": 2 * (found.layers * found.heads + plan.probes * grafted) * repeats * forward,
    }


def refining(found: Structure, plan: Plan, shapes: Shapes, here: Machine) -> float:
    """Seconds of a further reading of one probe set between two steps; a step takes `share_passes` - 2 of them at most."""
    samples = min(plan.probe_samples, BATCH_SIZE)
    reading = here.seconds(shapes.refined(samples, plan.length, plan.response), READING)
    return reading * max(1.0, plan.probe_samples / BATCH_SIZE) + here.visits(moving_of(found, plan)) * REFINED
