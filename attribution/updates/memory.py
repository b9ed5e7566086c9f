"""Which errors say that memory ran out: those of Python, of CUDA, and of torch's allocator on the processor."""

from __future__ import annotations

import sys

_ALLOCATOR = ("not enough memory", "can't allocate memory", "out of memory", "cannot allocate memory")


def out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(each in str(error).lower() for each in _ALLOCATOR)
