"""How much a record takes on disk: rows as the recorder would choose them, written once by the store, with random numbers.

Knows the recorder's rule of what is written and the store; knows nothing about the model's weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attribution.components import KINDS, Components
from attribution.doctor.plan import Plan
from attribution.store import BATCH, RunWriter
from attribution.updates.record import FLUSH_SECONDS
from attribution.updates.rows import SQUARED, Rows
from attribution.updates.selection import Selection

SAMPLED = 200_000  # rows written at most; of more, the bytes are in proportion
_OF_OUTPUTS = {
    BATCH: ("cause_before", "activation_before", "gradient_before"),
    "probe": tuple(f"{name}_{when}" for name in ("cause", "activation", "gradient") for when in ("before", "after")),
}
_OF_GROUPS = {BATCH: (*(name for name in SQUARED if name != "intended_norm"), "grad_dot_update"), "probe": ("share",)}


@dataclass(frozen=True)
class Disk:
    """What a run writes.

    Attributes:
        rows, bytes: of the frame `components` in one step, on the batch and all probe sets.
        whole: bytes of a step at which everything selected is written.
        total: bytes of the run.
        ablated: number of components ablated one at a time at the start and at the end, by kind.
    """

    rows: int
    bytes: float
    whole: float
    total: float
    ablated: dict[str, int]


def disk(components: Components, plan: Plan, small: bool, seconds: float) -> Disk:
    """The record of a run.

    Args:
        components: of the model.
        plan: the run.
        small: whether the model is so small that everything is written by default.
        seconds: one step is thought to take; rows are written every so often, and a part of many rows is packed better.
    """
    everything, draw = plan.writes_all(small), torch.Generator().manual_seed(0)
    causes = torch.rand(len(components), generator=draw, dtype=torch.float64)
    numbers = torch.randn(max(components.group_count, len(components)), generator=draw, dtype=torch.float64)
    rows = Rows(components, everything, [causes], Selection(plan.kinds, plan.layers))
    again = plan.runs_again(small)

    def some(count: int) -> Tensor:
        """Random numbers that no earlier ones pack with: times another factor, which takes less than drawing them anew."""
        return numbers[:count] * torch.rand((), generator=draw, dtype=torch.float64)

    def frame(step: int, whole: bool) -> pd.DataFrame:
        names = [BATCH, *(f"probe {number}" for number in range(plan.probes if plan.share_passes else 0))]
        made = (rows.frame(step, name, _columns(components, rows, name, again, some), whole=whole) for name in names)
        return pd.concat([pd.DataFrame(each) for each in made])

    first = frame(1, False)
    together = int(max(1, min(FLUSH_SECONDS / seconds, plan.max_steps, SAMPLED // len(first))))
    each = _written("components", pd.concat([first, *(frame(step, False) for step in range(2, together + 1))])) / together
    milestones = 0 if everything else sum(map(plan.whole_at, range(1, plan.max_steps + 1)))
    whole = _written("components", frame(1, True)) if milestones else each
    exact = rows.exact if plan.singles == "all" else rows.heads
    influence = components.table.iloc[exact].assign(
        step=1, probe="probe 0", effect=causes[exact].numpy(), kl=causes[exact].numpy()
    )
    singles = _written("influence", influence) if len(exact) else 0.0
    read = (2 + (plan.ablated_at - 2) * len(rows.heads) / max(len(exact), 1)) * plan.probes
    total = (plan.max_steps - milestones) * each + milestones * whole + read * singles
    kinds = influence["kind"].value_counts()
    return Disk(len(first), each, whole, total, {kind: int(kinds.get(kind, 0)) for kind in KINDS})


def _columns(components: Components, rows: Rows, name: str, again: bool, some: Callable[[int], Tensor]) -> dict[str, Tensor]:
    kind = BATCH if name == BATCH else "probe"
    found = {column: some(components.group_count).abs() for column in _OF_GROUPS[kind]}
    if kind == BATCH:
        found["changed"] = torch.ones(components.group_count, dtype=torch.float64)
    outputs = (*_OF_OUTPUTS[kind], "cause_after") if kind == BATCH and again else _OF_OUTPUTS[kind]
    return found | {column: rows.of_components(some(len(components))) for column in outputs}


def _written(frame: str, rows: pd.DataFrame) -> float:
    """Bytes of the rows as one part of a frame."""
    kept = rows.iloc[np.linspace(0, len(rows) - 1, min(SAMPLED, len(rows))).astype(int)]
    with tempfile.TemporaryDirectory() as place:
        writer = RunWriter(Path(place) / "run", {})
        writer.add(frame, kept.reset_index(drop=True))
        writer.flush()
        writer.close()
        size = sum(part.stat().st_size for part in (writer.path / f"{frame}.parquet").iterdir())
    return size * len(rows) / len(kept)
