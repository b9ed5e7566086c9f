"""Which components are written at a step, and the tidy rows themselves.

Heads and the remainder are written at every step. Neurons and rows too where the model is small; where it is large,
their sums per layer, and a fixed choice of single ones: those with the largest first-order causes before training, and
as many at random, chosen once, so that no row is selected on the outcome.

Knows the partition; knows nothing about how values were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attribution.components import Components

CHOSEN = 64  # neurons, and rows, by cause; as many again at random
SQUARED = ("weight_norm", "grad_norm", "update_norm")  # columns given as squares, which add up; written as norms


class Rows:
    """The rule of what is written, for one model.

    Args:
        components: of the model.
        everything: write every component at every step.
        causes: first-order causes before training, Float64 [components] each, to choose by.

    Attributes:
        heads: positions of all heads in `Components.table`.
        exact: positions of the components ablated exactly at both ends.
    """

    def __init__(self, components: Components, everything: bool, causes: Sequence[Tensor]):
        self.components, self.everything = components, everything
        table = components.table
        self._kinds = {kind: np.flatnonzero(table["kind"] == kind) for kind in ("head", "neuron", "row")}
        self.heads = self._kinds["head"]
        self.exact = np.arange(len(table)) if everything else self.heads
        self._output = torch.as_tensor(components.output_groups)
        self._written: np.ndarray | None = np.arange(components.group_count) if everything else None
        if causes:
            self.choose(torch.stack([cause.abs() for cause in causes]).sum(0))

    @property
    def rule(self) -> str:
        """What is left out, in words."""
        return (
            f"between milestones, single neurons and rows were written for the {CHOSEN} of each kind with the largest "
            f"first-order causes before training and {CHOSEN} at random, the others as sums per layer; the same ones were "
            "ablated exactly."
        )

    def choose(self, score: Tensor) -> None:
        """Fix the choice by a score, Float [components]; later calls change nothing."""
        if self._written is not None:
            return
        size, generator = score.abs().cpu().numpy(), np.random.default_rng(0)
        picked = [self.heads]
        for kind in ("neuron", "row"):
            positions = self._kinds[kind]
            ranked = positions[np.argsort(-size[positions], kind="stable")]
            rest = ranked[CHOSEN:]
            picked += [ranked[:CHOSEN], generator.choice(rest, min(CHOSEN, len(rest)), replace=False)]
        self.exact = np.sort(np.concatenate(picked))
        chosen = self.components.group_mask(self.exact) | self.components.remainder_mask
        self._written = np.flatnonzero(chosen.numpy())

    def of_components(self, values: Tensor) -> Tensor:
        """Values per component as values per group: on output weights, NaN elsewhere."""
        spread = torch.full((self.components.group_count,), float("nan"), dtype=torch.float64)
        spread[self._output] = values.double().cpu()
        return spread

    def frame(self, step: int, probe: str, columns: Mapping[str, Tensor], *, whole: bool = False) -> pd.DataFrame:
        """Rows of the frame `components`.

        Args:
            step, probe: of these rows.
            columns: Float64 [groups] each; those in `SQUARED` as squares.
            whole: write every group at this step.
        """
        values = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
        table = pd.concat([self.components.groups, values], axis=1)
        rows = table if whole or self._written is None else table.iloc[self._written]
        if not self.everything:
            apart = table[table["kind"].isin(("neuron", "row"))]
            sums = apart.groupby(["kind", "layer", "part"], sort=False)[list(columns)].sum(min_count=1).reset_index()
            rows = pd.concat([rows, sums.drop(columns="changed", errors="ignore").assign(index=-1)], ignore_index=True)
        rows = rows.assign(step=step, probe=probe)
        for name in SQUARED:
            if name in rows:
                rows[name] = np.sqrt(rows[name])
        return rows
