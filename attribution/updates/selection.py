"""What of a training is recorded: at which steps, and which components are written and ablated one at a time.

Data and plain rules; knows nothing about what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attribution.components import KINDS, Components
from attribution.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Some of the steps of a training.

    Args:
        of: "all", "log" (1, 2, 4, 8, …), "ends" (none but the first and the last, which are read anyway), every k-th step
            as a number, or a list of steps.

    Raises:
        ConfigError: none of these.
    """

    of: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.of, (str, int)):
            object.__setattr__(self, "of", tuple(each.item() if isinstance(each, np.generic) else each for each in self.of))
        known = self.of in ("all", "log", "ends") if isinstance(self.of, str) else True
        counts = (self.of,) if isinstance(self.of, int) else () if isinstance(self.of, str) else self.of
        if not known or any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in counts):
            raise ConfigError(
                f"unknown steps {self.of!r}; expected 'all', 'log', 'ends', a number k for every k-th step, or a list of steps"
            )

    def due(self, step: int) -> bool:
        if isinstance(self.of, int):
            return step % self.of == 0
        if isinstance(self.of, str):
            return self.of == "all" or (self.of == "log" and step & (step - 1) == 0)
        return step in self.of


@dataclass(frozen=True)
class Selection:
    """Which components are written, and ablated, one at a time. The sums of their layer hold all, chosen or not.

    Args:
        kinds: of components.
        layers: of heads and neurons; None: all. Rows belong to no layer.
        heads: as (layer, head), of the layers selected; None: all.
    """

    kinds: Sequence[str] = KINDS
    layers: Sequence[int] | None = None
    heads: Sequence[tuple[int, int]] | None = None

    def mask(self, components: Components) -> np.ndarray:
        """Bool over `Components.table`.

        Raises:
            ConfigError: a kind, layer or head that this model does not have.
        """
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise ConfigError(f"unknown component kind {unknown[0]!r}; expected {', '.join(KINDS)}")
        depth = components.parts.depth
        outside = [layer for layer in self.layers or () if not 0 <= layer < depth]
        if outside:
            raise ConfigError(f"there is no layer {outside[0]}; this model has layers 0 to {depth - 1}")
        table = components.table
        chosen = table["kind"].isin(self.kinds).to_numpy(copy=True)
        if self.layers is not None:
            chosen &= (table["layer"].isin(self.layers) | (table["kind"] == "row")).to_numpy()
        if self.heads is not None:
            wanted = np.zeros(len(table), dtype=bool)
            wanted[components.positions([("head", layer, head) for layer, head in self.heads])] = True  # type: ignore[list-item]
            chosen &= wanted | (table["kind"] != "head").to_numpy()
        return chosen
