"""What to choose so that a study fits: each choice alone, and the first of them that together fit the memory there is.

The order is from what costs the least to what costs the most of what is learned. Knows plans; counts nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from attribution.doctor.plan import Plan

LOWER = 0.99  # of the peak before: what lowers it less is not worth a choice


@dataclass(frozen=True)
class Choice:
    """A change of a plan.

    Attributes:
        words: the settings, as they stand in a run's config.
        costs: what is lost by it.
        changes: of the plan.
    """

    words: str
    costs: str
    changes: Mapping[str, Any]


def choices(plan: Plan, small: bool) -> list[Choice]:
    """What could be chosen otherwise in a plan."""
    return list(_choices(plan, small))


def _choices(plan: Plan, small: bool) -> Iterator[Choice]:
    if plan.batch_size > 1:
        accumulation = plan.batch_size * plan.accumulation
        yield Choice(
            f"--training.batch-size 1 --training.accumulation {accumulation}",
            "nothing but time on a GPU",
            {"batch_size": 1, "accumulation": accumulation},
        )
    if plan.probes and plan.share_passes > 2:
        yield Choice("--share-passes 2", "update shares are not refined: some steps stay unresolved", {"share_passes": 2})
    if not plan.checkpointing:
        words = "--training.trainer '{\"gradient_checkpointing\": true}'"
        yield Choice(words, "a third of the time of a training pass", {"checkpointing": True})
    if plan.probes and plan.probe_samples > 8:
        fewer = max(8, plan.probe_samples // 8)
        yield Choice(f"probe sets of {fewer} samples", "precision of shares and influence", {"probe_samples": fewer})
    if plan.probes > 1:
        yield Choice("one probe set", "what the others read", {"probes": 1})
    if not plan.lora:
        yield Choice("--training.lora.rank 16", "another training: adapters instead of all weights", {"lora": 16})
    if plan.runs_again(small):
        yield Choice("--no-batch-after", "causes on the batch after a step", {"batch_after": False})
    if plan.writes_all(small):
        yield Choice("--no-everything", "neurons and rows one by one between milestones", {"everything": False})
    if plan.singles == "all":
        yield Choice("--singles heads", "exact ablation of neurons and rows", {"singles": "heads"})
    if len(plan.kinds) > 1:
        yield Choice("--kinds head", "neurons and rows one by one", {"kinds": ("head",)})
    if plan.milestones != "ends":
        yield Choice("--milestones ends", "influence of heads between start and end", {"milestones": "ends"})
    if plan.probes and plan.share_passes:
        words = "--share-passes 0 --grafts heads"
        yield Choice(words, "update shares, and first-order causes on probe sets", {"share_passes": 0})
    if plan.probes:
        yield Choice("no probe sets", "update shares and influence", {"probes": 0})


def fitting(plan: Plan, small: bool, peak: Callable[[Plan], float], room: float) -> tuple[list[Choice], Plan]:
    """The first choices that lower the peak, one after the other, until a plan fits.

    Args:
        plan: that is too large, or not.
        small: whether the model is.
        peak: bytes of a plan.
        room: bytes there are.

    Returns:
        The choices and the plan they make, which is still too large where `peak` of it is above `room`.
    """
    taken: dict[tuple[str, ...], Choice] = {}
    while peak(plan) > room:
        lower = (each for each in choices(plan, small) if peak(replace(plan, **each.changes)) < LOWER * peak(plan))
        choice = next(lower, None)
        if choice is None:
            break
        taken[tuple(choice.changes)] = choice
        plan = replace(plan, **choice.changes)
    return list(taken.values()), plan
