"""How costs are compared: turn by turn in one process, with the bytes that one call needs, as rows of a table.

Knows clocks, bytes and budgets; knows nothing about what is measured.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

LEAST_SECONDS = 15.0  # of a comparison: quick ones take more turns than asked for


class Row(NamedTuple):
    """A line of the table; `met` is None where there is nothing to meet, `peak` in MiB."""

    what: str
    budget: str
    measured: str
    met: bool | None
    notes: str
    peak: float | None = None


def interleaved(turns: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other, at least `repeats` times, after one turn that is not counted.

    Each turn has an order of its own, drawn with one seed: whoever always came after the same neighbour would find what that
    one leaves in the caches, and at 0.7 M parameters the same step then differs from itself by 6 %.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    taken, draw = 0, Random(0)
    while taken <= repeats or sum(map(sum, seconds.values())) < LEAST_SECONDS:
        for name in draw.sample([*turns], len(turns)):
            found = seconds_of(turns[name])
            if taken:
                seconds[name].append(found)
        taken += 1
    return seconds


def seconds_of(run: Callable[[], Any]) -> float:
    """Of one call; a GPU is waited for before and after."""
    synchronize()
    begun = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begun


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors born inside the block, from birth to death: `now`, and the most there were, `peak`.

    A storage counts once however many tensors share it. What torch does not own (numpy, pandas, Python) is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(Tensor, self._born, func(*args, **(kwargs or {})))

    def _born(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._alive:
            self._alive[storage] = None
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())
        return tensor

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def peaks(turns: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """MiB of the tensors that one more call of each makes, the most alive at once."""
    found = {}
    for name, run in turns.items():
        gc.collect()
        with LiveBytes() as live:
            run()
        found[name] = live.peak / 2**20
    return found


def ratio_row(
    what: str, ratios: Sequence[float] | np.ndarray, budget: str = "none", notes: str = "", peak: float | None = None
) -> Row:
    """A row of ratios: their median and quartiles, against a budget such as "≤ 1.05", "≥ 4" or "none"."""
    if not len(ratios):
        return Row(what, budget, "not measured", None, notes, peak)
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    sign, _, limit = budget.partition(" ")
    met = None if not limit else bool(middle <= float(limit) if sign == "≤" else middle >= float(limit))
    return Row(what, budget, f"{middle:.2f} [{low:.2f}, {high:.2f}]", met, notes, peak)


def table(rows: Mapping[str, Sequence[Row]]) -> str:
    """Rows by model, as Markdown."""
    mark = {True: "met", False: "✗ missed", None: ""}
    lines = ["| model | what | budget | measured | | peak, MiB | notes |", "|---|---|---|---|---|---|---|"]
    for model, found in rows.items():
        lines += [
            f"| {model} | {r.what} | {r.budget} | {r.measured} | {mark[r.met]} | {'' if r.peak is None else f'{r.peak:.3g}'} "
            f"| {r.notes} |"
            for r in found
        ]
    return "\n".join(lines) + "\n"
