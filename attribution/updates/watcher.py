"""Hooks that are on between `start` and `stop`, and look away inside `paused`. Knows nothing about what they see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class Watcher:
    """What every watch of a training shares. A subclass says in `_hooks` which hooks it has, and asks `_paused` in them."""

    _handles: tuple[Any, ...] = ()
    _paused = False
    idle = False  # nothing that takes long is wanted of the passes to come; set between steps

    def start(self) -> None:
        self._handles = tuple(self._hooks())

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look away from passes made inside the block."""
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before

    def _hooks(self) -> Iterable[Any]:
        """Put the hooks on, and give their handles."""
        raise NotImplementedError
