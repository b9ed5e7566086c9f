"""Where an unfinished run goes on: its newest checkpoint that is whole, and whose rows are all still there.

Knows the run directory and what the recorder writes beside a checkpoint; knows nothing about how training is resumed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from attribution.errors import RunError
from attribution.store import read_json
from attribution.store.checksums import damaged

CHECKPOINTS = "trainer"  # the trainer's own directory in that of the run


def choose(path: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that a run can go on from, and what is said of it; damaged newer ones are removed.

    Returns:
        Its folder, None where there is none, and sentences for the log.
    """
    said = [_last_attempt(path)]
    for folder in _all(path):
        if not (wrong := _wrong(path, folder)):
            return folder, said
        said.append(f"{folder.name} is left out: {wrong}")
        remove(folder)  # what is trained again is written there anew, and must not be taken for whole before it is
    return None, said


def state(checkpoint: Path) -> dict[str, Any]:
    """What the recorder wrote beside a checkpoint."""
    return read_json(checkpoint / _state_file())


def remove(folder: Path) -> None:
    (folder / _state_file()).unlink(missing_ok=True)  # first: half of it is none
    shutil.rmtree(folder, ignore_errors=True)


def remove_all(path: Path) -> None:
    """Those of a run, once it is finished."""
    shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)


def _all(path: Path) -> list[Path]:
    """Newest first; only those beside which the recorder wrote."""
    found = [file.parent for file in (path / CHECKPOINTS).glob(f"checkpoint-*/{_state_file()}")]
    return sorted(found, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)


def _wrong(path: Path, folder: Path) -> str:
    """What is missing or damaged of a checkpoint, or of the record that it goes on; empty: nothing."""
    try:
        known = state(folder)
    except RunError as error:
        return str(error)
    if not (isinstance(known, dict) and {"files", "checksums", "parts"} <= known.keys()):
        return f"its {_state_file()} is of an earlier version, or damaged"
    for name, size in known["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return f"its {name} is missing or cut off"
    return damaged(path, known["checksums"])


def _last_attempt(path: Path) -> str:
    """How an unfinished run ended."""
    try:
        status = read_json(path / "status.json")
    except RunError:
        status = {}
    how = {"failed": "failed", "interrupted": "was interrupted"}.get(status.get("state", ""), "was killed")
    told = f" ({status['error']})" if status.get("error") else ""
    return f"the attempt before {how}, at step {status.get('step', 0)} or after{told}"


def _state_file() -> str:
    from attribution.updates.recorder import STATE

    return STATE
