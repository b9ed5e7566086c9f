"""Which components are written at a step, and the tidy rows themselves.

Heads and the remainder are written at every recorded step. Neurons and rows too where the model is small; where it is
large, their sums per layer, and a fixed choice of single ones: those with the largest first-order causes before
training, and as many at random, chosen once, so that no row is selected on the outcome. What a selection leaves out is
in the sums of its layer, so that shares still add up.

Knows the partition; knows nothing about how values were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attribution.components import KINDS, Components
from attribution.store import Columns
from attribution.updates.selection import Selection

CHOSEN = 64  # neurons, and rows, by cause; as many again at random
SQUARED = ("weight_norm", "grad_norm", "update_norm", "intended_norm")  # given as squares, which add up; written as norms
_CAUSES = ("cause_before", "cause_after", "cause_rewarded", "cause_high", "cause_low")
_ADD_UP = (*_CAUSES, "grad_dot_update", "share", *SQUARED)


class Rows:
    """The rule of what is written, for one model.

    Args:
        components: of the model.
        everything: write every selected component at every recorded step.
        causes: first-order causes before training, Float64 [components] each, to choose by.
        selection: which components may be written one at a time.

    Attributes:
        heads: positions of the selected heads in `Components.table`.
        exact: positions of the components ablated exactly at both ends.
    """

    def __init__(self, components: Components, everything: bool, causes: Sequence[Tensor], selection: Selection | None = None):
        self.components, self.everything = components, everything
        table = components.table
        mask = (selection or Selection()).mask(components)
        self._selected = {kind: np.flatnonzero(mask & (table["kind"] == kind).to_numpy()) for kind in KINDS}
        counts = table["kind"].value_counts()
        self._in_part = [kind for kind in KINDS if len(self._selected[kind]) < counts[kind]]
        self.heads = self._selected["head"]
        self.exact = np.flatnonzero(mask) if everything else self.heads
        self._output = torch.as_tensor(components.output_groups)
        self._whole = self._groups(np.flatnonzero(mask))
        self._written: np.ndarray | None = self._whole if everything else None
        if not everything:
            self._in_part = list(dict.fromkeys([*self._in_part, "neuron", "row"]))
        kinds = components.groups["kind"].isin(self._in_part).to_numpy()
        runs = components.groups[["kind", "layer", "part"]]  # the groups of one of these stand next to each other
        self._starts = np.flatnonzero((runs != runs.shift()).any(axis=1))
        self._summed = np.flatnonzero(kinds[self._starts])
        self._labels: dict[tuple[str, bool], dict[str, Any]] = {}  # of the rows of a step: columns by probe, and if it is whole
        if causes:
            self.choose(torch.stack([cause.abs() for cause in causes]).sum(0))

    @property
    def rules(self) -> list[str]:
        """What is left out, in words."""
        whole = self.components.table["kind"].value_counts()
        found = [
            f"Single {kind}s: {len(self._selected[kind])} of {whole[kind]} were selected, the others are in the sums of layers."
            for kind in KINDS
            if len(self._selected[kind]) < whole[kind]
        ]
        if not self.everything:
            found.append(
                f"Neurons and rows: between milestones, single neurons and rows were written for the {CHOSEN} of each kind "
                f"with the largest first-order causes before training and {CHOSEN} at random, the others as sums per layer; "
                "the same ones were ablated exactly."
            )
        return found

    def choose(self, score: Tensor) -> None:
        """Fix the choice by a score, Float [components]; later calls change nothing."""
        if self._written is not None:
            return
        size, generator = score.abs().cpu().numpy(), np.random.default_rng(0)
        picked = [self.heads]
        for kind in ("neuron", "row"):
            positions = self._selected[kind]
            ranked = positions[np.argsort(-size[positions], kind="stable")]
            rest = ranked[CHOSEN:]
            picked += [ranked[:CHOSEN], generator.choice(rest, min(CHOSEN, len(rest)), replace=False)]
        self.restore(np.sort(np.concatenate(picked)))

    @property
    def chosen(self) -> list[int] | None:
        """Positions that were chosen, for `restore`; None where nothing was or need be chosen."""
        return None if self.everything or self._written is None else self.exact.tolist()

    def restore(self, exact: np.ndarray) -> None:
        """Fix the choice as it was fixed before, by positions in `Components.table`."""
        self.exact = exact
        self._written = self._groups(exact)
        self._labels.clear()

    def of_components(self, values: Tensor) -> Tensor:
        """Values per component as values per group: on output weights, NaN elsewhere."""
        spread = torch.full((self.components.group_count,), float("nan"), dtype=torch.float64)
        spread[self._output] = values.double().cpu()
        return spread

    def frame(self, step: int, probe: str, columns: Mapping[str, Tensor], *, whole: bool = False) -> Columns:
        """Rows of the frame `components`.

        Args:
            step, probe: of these rows.
            columns: Float64 [groups] each; those in `SQUARED` as squares.
            whole: write every selected component at this step.
        """
        where = self._whole if whole or self._written is None else self._written
        if (probe, whole) not in self._labels:  # kept as pandas has them: words are long to read in again
            groups = self.components.groups
            rows = pd.concat([groups.iloc[where], groups.iloc[self._starts[self._summed]].assign(index=-1)])
            self._labels[probe, whole] = {name: column.array for name, column in rows.assign(probe=probe).items()}
        values: dict[str, np.ndarray] = {}
        for name, column in columns.items():
            array = column.numpy()
            sums = np.add.reduceat(array, self._starts)[self._summed] if name in _ADD_UP else np.full(len(self._summed), np.nan)
            values[name] = np.concatenate([array[where], sums])
        values |= {name: np.sqrt(values[name]) for name in SQUARED if name in values}
        return Columns({"step": step, **self._labels[probe, whole], **values})

    def _groups(self, positions: np.ndarray) -> np.ndarray:
        """Every part of these components, and the remainder."""
        chosen = self.components.group_mask(positions) | self.components.remainder_mask
        return np.flatnonzero(chosen.numpy())
