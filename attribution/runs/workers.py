"""Runs in worker processes of one thread, several at once, of which any may be killed without harm to the others.

A worker ends with its parent, however that ends: none goes on holding a run directory after its study was killed. Knows
runs and processes; knows nothing about studies.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from threading import RLock, Thread

from attribution.errors import AttributionError
from attribution.runs.config import RunConfig
from attribution.runs.execute import run
from attribution.runs.stopping import Terminated

START = "spawn"  # how processes are made: torch must not be forked once it computes
_KILLED = (
    "its process was killed, by the system where memory ran out; what it recorded is kept, and the same command goes on from "
    "its newest checkpoint (in less memory with fewer runs at once)"
)


def outcomes(todo: Sequence[tuple[RunConfig, Path]], slots: int) -> Iterator[tuple[int, str | None]]:
    """Do runs, so many at once; yields the place of each as it ends, with what went wrong, if anything.

    Args:
        todo: config and directory of each.
        slots: worker processes.
    """
    context = multiprocessing.get_context(START)

    def worker() -> ProcessPoolExecutor:  # a pool of its own: one that loses a process is lost as a whole
        return ProcessPoolExecutor(1, mp_context=context, initializer=_one_thread)

    free = [worker() for _ in range(min(slots, len(todo)))]
    waiting: dict[Future[str | None], tuple[int, ProcessPoolExecutor]] = {}
    pools, places = list(free), iter(range(len(todo)))
    try:
        while True:
            while free and (place := next(places, None)) is not None:
                pool = free.pop()
                waiting[pool.submit(_one, *todo[place])] = place, pool
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                place, pool = waiting.pop(future)
                try:
                    error = future.result()
                except BrokenProcessPool:
                    error, pool = _KILLED, worker()
                    pools.append(pool)
                free.append(pool)
                yield place, error
    except BaseException as error:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        _stop_workers(politely=isinstance(error, Terminated))
        raise
    finally:
        for pool in pools:
            pool.shutdown()


def _stop_workers(*, politely: bool) -> None:
    """Ask them to close what they record, each time those that are still there, and end the rest.

    A terminal's Ctrl-C reaches the workers too; a SIGTERM may have been sent to the parent alone.

    Args:
        politely: let the steps that are under way end.
    """
    first = (lambda worker: os.kill(worker.pid, signal.SIGTERM), 20) if politely else (lambda _: None, 5)
    interrupt = (lambda worker: os.kill(worker.pid, signal.SIGINT), 5)
    for ask, seconds in (first, interrupt, (lambda worker: worker.kill(), 5)):
        for worker in multiprocessing.active_children():
            with suppress(ProcessLookupError):  # it died on its own
                ask(worker)
        for worker in multiprocessing.active_children():
            worker.join(timeout=seconds)


def _one(config: RunConfig, path: Path) -> str | None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(config, path, page=False)
    except KeyboardInterrupt:
        os._exit(130)  # what was recorded is closed; a worker that went on would take the next run
    except AttributionError as error:
        return str(error)
    except Exception as error:  # a bug or a broken trainer must not take the other runs with it; the log has the rest
        return f"{type(error).__name__}: {error}"
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return None


def _one_thread() -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)  # between two runs there is nothing to close
    Thread(target=_end_with_parent, daemon=True).start()
    import torch
    from tqdm import tqdm

    from attribution.runs.quiet import quiet

    quiet()
    tqdm.set_lock(RLock())  # its own is a semaphore of the system, which a worker that is stopped would leave behind
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # as if it had been killed too: what is recorded goes on from its checkpoint
