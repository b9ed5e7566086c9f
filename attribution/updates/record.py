"""The record being written: rows on their way to the run directory, the last step's row, notes, and the time it took.

Knows the run directory and clocks; knows nothing about how values were measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from attribution.errors import AttributionError, RecordError
from attribution.sharding import Processes
from attribution.store import RunWriter, Unwritten
from attribution.updates.provenance import versions

FLUSH_SECONDS = 15.0


def opened(
    path: str | os.PathLike[str] | RunWriter, config: Mapping[str, Any], parts: Mapping[str, int] | None, among: Processes
) -> Record:
    """The record of a training at `path`; of several processes one writes it, and the others learn where it cannot.

    Raises:
        RunError: the directory cannot be used.
        RecordError: an open writer, or a record to go on with, in one of several processes.
    """
    if among.several and (isinstance(path, RunWriter) or parts is not None):
        raise RecordError(
            f"{among.size} processes train this model together, whose recording neither goes on from a checkpoint nor into a "
            "directory that is open; give a new directory"
        )
    if isinstance(path, RunWriter):
        return Record(path, own=False)
    writer, refused = Unwritten(path), None
    if among.writes:
        try:
            writer = RunWriter(path, config, parts=parts)
        except AttributionError as error:
            refused = error
    among.agree(refused)
    return Record(writer, own=True)


class Record:
    """What a recorder writes, and when it leaves memory.

    Args:
        writer: of the run directory.
        own: whether this record opened it and so finishes it.

    Attributes:
        steps: optimizer steps made so far.
    """

    def __init__(self, writer: RunWriter, *, own: bool):
        self.writer, self.own, self.steps = writer, own, 0
        self._notes: dict[str, None] = {}
        self._row: dict[str, Any] | None = None
        self._started = time.strftime("%Y-%m-%dT%H:%M:%S")
        self._begun, self._before = time.monotonic(), 0.0  # seconds of the attempts that this one goes on from
        self._flushed = time.perf_counter()
        self._last, self._recorder_seconds, self._at_last = time.perf_counter(), 0.0, 0.0

    @property
    def seconds(self) -> float:
        """Since the record began."""
        return round(self._before + time.monotonic() - self._begun, 2)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the block as the recorder's own time."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._recorder_seconds += time.perf_counter() - begun

    def note(self, *sentences: str) -> None:
        """Say on the record what could not be measured."""
        self._notes |= dict.fromkeys(sentences)

    def add(self, frame: str, rows: pd.DataFrame | Mapping[str, Any]) -> None:
        """Rows, or one row by column."""
        self.writer.add(frame, rows)

    def samples(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Lines of samples.jsonl."""
        self.writer.samples(lines)

    def step(self, row: Mapping[str, Any]) -> None:
        """Keep the row of the step that was just made, until the next begins: a trainer may have more to say on it."""
        if row["skipped"]:
            self.note("Some updates were skipped (`skipped` in steps): their gradients were dropped, and no weight moved.")
        now = time.perf_counter()
        self._row = {
            **row, "step": self.steps, "seconds": now - self._last, "recorder_seconds": self._recorder_seconds - self._at_last,
        }  # fmt: skip
        self._last, self._at_last = now, self._recorder_seconds

    def logged(self, values: Mapping[str, Any]) -> None:
        """What a trainer says of the last step: reward and advantage, and its loss where the pass did not tell."""
        if self._row is not None:
            said = {name: values[name] for name in ("loss", "reward", "advantage") if name in values}
            self._row |= {name: value for name, value in said.items() if self._row.get(name) is None}

    def settle(self) -> None:
        """Nothing more will be said on the last step; write what has waited long enough."""
        if self._row is not None:
            self.add("steps", self._row)
            self._row = None
        if time.perf_counter() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self.writer.flush()
        self.writer.status("running", step=self.steps)
        self._flushed = time.perf_counter()

    def describe(self, **about: Any) -> None:
        """Write meta.json: versions, cost, what was not measured, and what is given here."""
        self.writer.meta({
            "started": self._started,
            "versions": versions(),
            **about,
            "seconds": {"total": self.seconds, "recorder": round(self._recorder_seconds, 2)},
            "not_measured": list(self._notes),
        })  # fmt: skip

    def finish(self, result: Mapping[str, Any]) -> None:
        """Everything is written; the run is finished where it is the record's own."""
        self.flush()
        if self.own:
            self.writer.finish(result)

    def close(self, error: BaseException) -> None:
        """Failed or interrupted, with what was recorded."""
        self.writer.fail(error, step=self.steps)
        if self.own:
            self.writer.close()

    def state(self, folder: Path, name: str) -> dict[str, Any]:
        """What a resumed record goes on from; all rows so far are flushed.

        Args:
            folder: of the checkpoint, in which all but this is written.
            name: of the file that this is written into.
        """
        self.settle()
        self.flush()
        beside = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != name]
        return {
            "steps": self.steps, "parts": self.writer.parts, "notes": list(self._notes), "seconds": self.seconds,
            "started": self._started, "checksums": self.writer.checksums,
            "files": {str(file.relative_to(folder)): file.stat().st_size for file in beside},
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        self.note(*state["notes"])
        self._started, self._before = state["started"], state["seconds"]
