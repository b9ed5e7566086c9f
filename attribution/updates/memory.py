"""Which errors say that memory ran out, and what to do where that was in a reading of the recorder. Knows no model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from attribution.errors import RecordError
from attribution.updates.record import Record

_ALLOCATOR = ("not enough memory", "can't allocate memory", "out of memory", "cannot allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether it is one of Python's, of CUDA's, or of torch's allocator on the processor."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(each in str(error).lower() for each in _ALLOCATOR)


@contextmanager
def reading(what: str, record: Record) -> Iterator[None]:
    """The block reads this; where memory runs out in it, the error says what is recorded and what takes less.

    Raises:
        RecordError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise RecordError(
            f"out of memory while reading {what} after step {record.steps}; what was recorded until then is kept in "
            f"{record.writer.path}, which goes on from its newest checkpoint where more memory is free; less is taken by fewer "
            "or shorter probe samples, fewer probe sets, named sets and layers, share_passes 0 (no gradients on probe sets) or "
            "a smaller training batch, which make it another run"
        ) from error
