"""One parameter as it is used in one place: who owns its elements, and sums over those of each owner.

Knows axes and owners; knows nothing about what an owner is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from attribution.sharding import local

BLOCK = 2**20, 2**24  # elements of an array that is made at a time: on a CPU, where larger ones get new pages, and elsewhere
STACKED = 2**17, 2**20, 2**24  # elements of uses that are visited together: on a CPU; elsewhere at least, and at most
_WIDE = (torch.float32, torch.float64)

Made = Callable[..., Iterable[Tensor]]  # makes, of arrays, others to sum; each is summed before the next is asked for


@dataclass(frozen=True)
class Use:
    """One parameter as used in one place.

    Attributes:
        name: the parameter's name under the module that uses it.
        module, attribute: where to find it; looked up anew each time, since `untied` replaces one.
        axes: the axes along which owners differ, ascending; none where one group owns all.
        owners: group id per index along `axes`, flat; a single id where there are none.
        output: whether it holds output weights of components.
        sharded: the parameter, where processes hold it in shards: the module has a gathered one in its place during passes.
        rows: of a sharded one, those along its first axis that lie in this process.
    """

    name: str
    module: nn.Module
    attribute: str
    axes: tuple[int, ...]
    owners: Tensor
    output: bool
    sharded: nn.Parameter | None = None
    rows: slice | None = None

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.attribute) if self.sharded is None else self.sharded

    @property
    def values(self) -> Tensor:
        """What of the parameter lies in this process, detached: all of it, or the shard."""
        return local(self.parameter)

    def here(self, each: Tensor) -> Tensor:
        """Of one entry per owner entry, those of what lies in this process."""
        if self.sharded is None or self.rows is None or 0 not in self.axes:
            return each
        return each.view([self.sharded.shape[axis] for axis in self.axes])[self.rows].reshape(-1)

    def sums(self, *arrays: Tensor, of: Made) -> Tensor:
        """Sums over every axis of `values` but `axes`: Float [quantity, owner entry], of what lies here.

        What is summed is made a block at a time, so that no array as large as the parameter is: it would take as much memory
        again and, on a CPU, the time that new pages take.

        Args:
            arrays: shaped like `values`.
            of: makes the quantities of them, element by element.
        """
        return _sums(arrays, self.axes, of)

    def given(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Of arrays by the names of uses that of this one; zeros that take no memory where there is none."""
        return arrays[self.name] if self.name in arrays else self.values.new_zeros(()).expand_as(self.values)

    def spread(self, each: Tensor) -> Tensor:
        """One number, or truth, per owner entry, where `values` are and shaped to broadcast against them."""
        shape = [size if axis in self.axes else 1 for axis, size in enumerate(self.values.shape)]
        return self.here(each).view(shape).to(self.values.device)


def stacked(whole: int, device: torch.device | str) -> int:
    """How many elements of small uses are visited together, of so many in all: to begin takes longer than such a visit.

    On a GPU, where it takes longest, an eighth of all: what is made on the way is then less than a model in float32.
    """
    on_cpu, least, most = STACKED
    return on_cpu if torch.device(device).type == "cpu" else min(most, max(least, whole // 8))


def sums_of_all(visits: Iterable[tuple[Use, Sequence[Tensor]]], of: Made, whole: int) -> dict[str, Tensor]:
    """`Use.sums` of many uses, by name; small ones that follow one another in one shape are visited together.

    Args:
        visits: uses, and the arrays of each, which may be made on the way.
        of: see `Use.sums`.
        whole: elements of all parameters.
    """
    found: dict[str, Tensor] = {}
    alike: list[tuple[Use, Sequence[Tensor]]] = []

    def visit() -> None:
        arrays, axes = [each for _, each in alike], alike[0][0].axes
        if len(alike) == 1:
            sums = (_sums(arrays[0], axes, of),)
        else:
            together = [torch.stack(each) for each in zip(*arrays, strict=True)]
            flat = _sums(together, (0, *(axis + 1 for axis in axes)), of)
            sums = flat.view(len(flat), len(alike), -1).unbind(1)
        found.update({use.name: own for (use, _), own in zip(alike, sums, strict=True)})
        alike.clear()

    kind, room = None, 0
    for use, arrays in visits:
        before, kind = kind, (use.axes, *((array.shape, array.dtype, array.device) for array in arrays))
        if alike and (kind != before or len(alike) >= room):
            visit()
        if not alike:
            room = stacked(whole, arrays[0].device) // max(1, arrays[0].numel())
        alike.append((use, arrays))
    if alike:
        visit()
    return found


def _sums(arrays: Sequence[Tensor], axes: Sequence[int], of: Made) -> Tensor:
    first, summed = arrays[0], partial(_summed, axes=axes)
    block = BLOCK[first.device.type != "cpu"]
    if first.numel() <= block:
        return torch.stack([*map(summed, of(*map(_wide, arrays)))]).flatten(1)
    totals: list[Tensor] = []
    for place in _blocks(first.shape, block):
        kept = tuple(there if axis in axes else slice(None) for axis, there in enumerate(place))
        for number, part in enumerate(map(summed, of(*(_wide(array[place]) for array in arrays)))):
            if number == len(totals):
                totals.append(part.new_zeros([size if axis in axes else 1 for axis, size in enumerate(first.shape)]))
            totals[number][kept] += part
    return torch.stack(totals).flatten(1)


def _summed(values: Tensor, axes: Sequence[int]) -> Tensor:
    """Over every axis but `axes`, of which one element is left."""
    others = [axis for axis in range(values.ndim) if axis not in axes]
    if not others:
        return _wide(values)
    return values.sum(others, keepdim=True, dtype=None if values.dtype in _WIDE else torch.float32)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype in _WIDE else values.float()  # half precision would round, or overflow


def _blocks(shape: Sequence[int], block: int) -> Iterator[tuple[slice, ...]]:
    """Places that together are an array of this shape, each of at most so many elements."""
    rest = prod(shape[1:])
    if rest <= block:
        rows = block // rest
        yield from ((slice(at, at + rows),) for at in range(0, shape[0], rows))
    else:
        for at in range(shape[0]):
            yield from ((slice(at, at + 1), *place) for place in _blocks(shape[1:], block))
