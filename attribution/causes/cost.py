"""What a method keeps in memory beyond the model, in bytes, counted where it is kept. Knows tensors only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attribution.sharding import local


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; those that share a storage count it once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@dataclass
class Saved:
    """Bytes that autograd saved for a backward pass."""

    bytes: int = 0


@contextmanager
def saved(model: nn.Module) -> Iterator[Saved]:
    """Count what autograd saves inside the block, without the model's own parameters and buffers."""
    found = Saved()
    seen = {local(each).untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found.bytes += storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield found
