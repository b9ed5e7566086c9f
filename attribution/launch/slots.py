"""Jobs in processes of this machine, so many at once, of one thread each.

A process is used for one job after another, and what they would all measure of one model before training is measured once in
it (`updates.starts`). One that dies (killed where memory ran out, say) takes its own job with it and no other: a new process
stands in for it. All end with the process that started them, however that ends: none goes on holding a run directory after
its study was killed.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from threading import RLock, Thread
from types import ModuleType

from attribution.launch.job import Job, attempt, mark_lost
from attribution.runs.stopping import Terminated

START = "spawn"  # how processes are made: torch must not be forked once it computes
_LOOK_EVERY = 1.0  # seconds between looks at whether a process still lives: a child of it may hold its pipe open


def outcomes_in_slots(todo: Sequence[Job], slots: int) -> Iterator[tuple[Job, str | None]]:
    """Do jobs, at most `slots` at once; each as it ends, with what went wrong, if anything.

    An interrupt, SIGTERM (which lets the steps under way end), or leaving the loop asks the processes to end: what they
    recorded is closed and kept.
    """
    waiting = deque(todo)
    workers: list[_Worker] = []
    try:
        while waiting and len(workers) < slots:
            workers.append(_Worker())
            workers[-1].give(waiting.popleft())
        while workers:
            for worker in _ended(workers):
                job, error = worker.job, worker.error()
                if waiting:
                    worker.give(waiting.popleft())
                else:
                    workers.remove(worker)
                    worker.dismiss()
                yield job, error
    except BaseException as error:
        _stop(workers, politely=isinstance(error, Terminated))
        raise


class _Worker:
    """A process that does one job after another, as they are given; another one where it died."""

    job: Job
    pipe: Connection
    process: SpawnProcess

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context(START)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        with _without_main():
            self.process.start()
        theirs.close()

    def give(self, job: Job) -> None:
        self.job = job
        if not self.process.is_alive():
            self.pipe.close()
            self._start()
        self.pipe.send((job.config.model_dump_json(), str(job.path)))

    def error(self) -> str | None:
        """What went wrong with the job that ended, or with the process, of which its run is told."""
        with suppress(EOFError, ConnectionResetError):
            if self.pipe.poll():
                return self.pipe.recv()
        self.process.join()
        error = _death(self.process.exitcode or 0)
        mark_lost(self.job.path, error)
        return error

    def dismiss(self) -> None:
        with suppress(BrokenPipeError):  # it died on its own
            self.pipe.send(None)  # no more to do: to close the pipe is not enough where processes fork and hold it too
        self.pipe.close()
        self.process.join()


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that are started do not run the main script again, as multiprocessing would: they need nothing of it, it may
    have no `if __name__ == "__main__"`, and what comes from a pipe cannot be run twice."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _ended(workers: Sequence[_Worker]) -> list[_Worker]:
    """Those whose job ended or whose process did; waits until there is one."""
    while True:
        found = wait([*(worker.pipe for worker in workers), *(worker.process.sentinel for worker in workers)], _LOOK_EVERY)
        ended = [w for w in workers if w.pipe in found or w.process.sentinel in found or not w.process.is_alive()]
        if ended:
            return ended


def _death(code: int) -> str:
    """A process that ended by itself, in a sentence."""
    if code >= 0:
        return f"its process ended with exit code {code} before the run did; its log says how far it came"
    name = signal.Signals(-code).name
    memory = ", as a system does that runs out of memory; fewer slots at once need less" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{memory}"


def _stop(workers: Sequence[_Worker], *, politely: bool) -> None:
    """Ask them to close what they record, each time those that are still there, and end the rest.

    A terminal's Ctrl-C reaches the workers too; a SIGTERM may have been sent to the parent alone.

    Args:
        workers: to stop.
        politely: let the steps that are under way end.
    """
    first = (lambda process: os.kill(process.pid, signal.SIGTERM), 20) if politely else (lambda _: None, 5)
    interrupt = (lambda process: os.kill(process.pid, signal.SIGINT), 5)
    for ask, seconds in (first, interrupt, (lambda process: process.kill(), 5)):
        for worker in workers:
            if worker.process.is_alive():
                with suppress(ProcessLookupError):  # it died on its own
                    ask(worker.process)
        for worker in workers:
            worker.process.join(timeout=seconds)


def _serve(pipe: Connection) -> None:
    """Do jobs as they come, until there are no more; a worker is a process of its own."""
    _one_thread()
    from attribution.updates.starts import shared

    with shared():
        _do_each(pipe)


def _do_each(pipe: Connection) -> None:
    settled = False  # what all jobs need is loaded
    while True:
        try:
            given = pipe.recv()
        except EOFError:
            return
        if given is None:
            return
        config, path = given
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            error = attempt(config, path)
        except KeyboardInterrupt:
            os._exit(130)  # what was recorded is closed; a worker that went on would take the next run
        finally:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        pipe.send(error)
        if error is None and not settled:
            gc.collect()
            gc.freeze()  # modules, mostly, of which there are many: later trainers are collected without a look at them
            settled = True


def _one_thread() -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)  # between two runs there is nothing to close
    end_with_parent()
    import torch
    from tqdm import tqdm

    from attribution.runs.quiet import quiet

    quiet()
    tqdm.set_lock(RLock())  # its own is a semaphore of the system, which a worker that is stopped would leave behind
    torch.set_num_threads(1)


def end_with_parent() -> None:
    """Have this process end when the one that started it does, however that ends.

    For the initializer of a pool too, whose processes would go on with what they do when their parent is killed.

    Raises:
        RuntimeError: no process of multiprocessing's started this one.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("this process was not started by multiprocessing; there is no parent to end with")

    def watch() -> None:
        parent.join()
        os._exit(1)  # as if it had been killed too: what is recorded goes on from its checkpoint

    Thread(target=watch, daemon=True).start()
