"""One run of many: where it belongs, doing it in this process, and marking it when the process that did it is gone.

Knows runs and their tickets; knows nothing about when a job is done.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from attribution.errors import AttributionError, RunError
from attribution.launch.tickets import Ticket
from attribution.runs import RunConfig, run
from attribution.store import is_finished, read_json, write_json
from attribution.store.files import locked

LOG = "log.txt"


@dataclass(frozen=True, eq=False)
class Job:
    """One run of a study."""

    arm: str
    config: RunConfig
    path: Path


def attempt(config: str, path: str) -> str | None:
    """Do one run in this process.

    Args:
        config: of the run, as JSON.
        path: of the run.

    Returns:
        What went wrong, if anything. Where it is a bug, of this package or of a trainer, the log has the traceback too. What
        asks the process to end (an interrupt, a requeue) is not caught.
    """
    try:
        run(RunConfig.model_validate_json(config), path, page=False)
    except AttributionError as error:
        return str(error)
    except Exception as error:  # must not take the other runs with it
        traceback.print_exc()
        note(Path(path), traceback.format_exc())
        return f"{type(error).__name__}: {error}"
    return None


def note(path: Path, text: str) -> None:
    """Append to the log of a run that has one."""
    if (path / LOG).exists():
        with open(path / LOG, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')}  {text.rstrip()}\n")


def mark_lost(path: Path, error: str) -> None:
    """Write into a run that it failed, where the process that did it could not, because it is gone.

    A run that is finished, that ended by itself or that another process writes is left as it is.
    """
    if is_finished(path) or not (path / "status.json").exists():
        return
    try:
        lock = locked(path)
    except RunError:  # somebody goes on with it
        return
    with lock:
        status = read_json(path / "status.json")
        if status.get("state") == "running":
            note(path, error)
            write_json(path / "status.json", {**status, "state": "failed", "error": error})


def log_of(path: Path) -> Path | None:
    """Where the log of a run is: the cluster's, where one was asked to do it, or the run's own; None if there is neither."""
    told = Ticket(path).told
    found = [Path(told["log"])] if told else [path / LOG]
    return next((each for each in found if each.exists()), None)
