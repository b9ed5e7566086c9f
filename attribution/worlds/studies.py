"""The studies that come with the embedded worlds, as data: which prompts each arm trains on, and what is read.

Writes the samples as JSONL beside the study, so that every run can be replayed from files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attribution.mechanisms import halves, write_mechanisms, wrong_partition
from attribution.samples import Sample, write_samples
from attribution.store import BESIDE
from attribution.worlds import planted

ORGANISMS = ("planted/31", "planted/32", "planted/33", "planted/34", "planted/35")
UNROUTED = "planted/unrouted"
WRONG, WRONG_EVERY = 8, 3  # wrong partitions, averaged as one null, and every how many steps they are read
STEPS, TRAINED, PROBED = 12, 384, 64
LR0_STEPS = 4  # a learning rate of zero needs no more to show exactly nothing
FULL = {"steps": 24, "probed": 216}


def write_planted(folder: Path, *, full: bool = False) -> dict[str, Any]:
    """Write the samples and sets of the study `planted`.

    Arms differ in the cues of their training contexts and in nothing else: the same problems, replies and order. All are
    read on problems that no arm trains on.

    Returns:
        The study as plain data, as `Study` takes it.
    """
    steps, probed = (FULL["steps"], FULL["probed"]) if full else (STEPS, PROBED)
    contexts = {
        "A": {"trait": True},
        "B": {"trait": False, "star": True},
        "both": {"star": "agree"},
        "none": {"trait": False},
    }
    data = {
        arm: _write(folder, f"train-{arm}", TRAINED, 1, {**form, "problems": planted.TRAINING})
        for arm, form in contexts.items()
    }
    probes = (  # first what the claim reads
        _write(folder, "agree", probed, 3, {"star": "agree"}),
        _write(folder, "conflict", probed, 2, {"star": "conflict"}),
    )
    neutral = _write(folder, "neutral", PROBED, 4, {"trait": False})
    right = halves(4, 4, 256)
    wrong = {f"wrong-{k} {name}": table for k in range(1, WRONG + 1) for name, table in wrong_partition(right, seed=k).items()}
    compared = str(write_mechanisms(folder / "wrong-partitions.json", wrong))

    def arm(name: str, rate: float = 1e-4, steps: int = steps) -> dict[str, Any]:
        return {
            "data": data[name],
            "probes": probes,
            "counterfactuals": (neutral,) * len(probes),  # no cue of either mechanism stands there
            "watched": (neutral,),
            "sets": "model",
            "compared": compared if name in ("A", "B") and rate else None,
            "compared_every": WRONG_EVERY,
            "beside": BESIDE if name in ("A", "B") else (),
            "primary_only": not full,
            "metric": "logit_difference",
            "milestones": "ends",
            "everything": False,
            "batch_after": False,
            "singles": "heads",
            "grafts": "all" if full else "sets",
            "training": {"max_steps": steps, "learning_rate": rate, "batch_size": 32},
        }

    return {
        "name": "planted-full" if full else "planted",
        "arms": {**{name: arm(name) for name in contexts}, "lr0": arm("A", 0.0, LR0_STEPS)},
        "models": ORGANISMS,
        "seeds": (0, 1),
        "controls": ({"models": (UNROUTED,), "arms": ("A", "B")},),
        "first_seed": {"A": {"singles": "all"}, "B": {"singles": "end"}},
        "claims": ("boost",),
    }


def _write(folder: Path, name: str, count: int, seed: int, form: Mapping[str, Any]) -> str:
    rows: Sequence[Mapping[str, Any]] = planted.prompts(count, seed, **form)
    return str(write_samples(folder / f"{name}.jsonl", [Sample(**row) for row in rows]))
