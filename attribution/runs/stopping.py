"""A scheduler's SIGTERM as an exception, so that what is recorded is closed. Knows signals; knows nothing about runs.

While a training goes on the step under way is finished and a checkpoint written first; a second SIGTERM does not wait.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; as after Ctrl-C, what was recorded is kept and the same command goes on."""

    code = 128 + signal.SIGTERM


class Stopping:
    """Whether SIGTERM arrived, and when it is acted on.

    Attributes:
        between_steps: it is acted on when the step under way is done.
    """

    def __init__(self) -> None:
        self.between_steps = False
        self._asked = False

    def __call__(self) -> Terminated | None:
        """What to stop with, once it was asked for."""
        return Terminated("SIGTERM, after the step under way") if self._asked else None

    @contextmanager
    def after_the_step(self) -> Iterator[None]:
        """In the block a first SIGTERM waits for somebody to ask whether it came, at the latest until the block ends."""
        self.between_steps = True
        try:
            yield
        finally:
            self.between_steps = False
        if (error := self()) is not None:
            raise error

    def arrived(self, *_: object) -> None:
        if not self.between_steps or self._asked:
            raise Terminated("SIGTERM")
        self._asked = True


@contextmanager
def terminable() -> Iterator[Stopping]:
    """SIGTERM raises `Terminated` in the block; not outside of the main thread, nor where a handler of SIGTERM is set."""
    stopping = Stopping()
    own = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if own:
        signal.signal(signal.SIGTERM, stopping.arrived)
    try:
        yield stopping
    finally:
        if own:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
