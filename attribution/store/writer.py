"""Writing a run directory: rows in parts, status, and the marker of completion."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import pandas as pd

from attribution.errors import RunError
from attribution.store.checksums import crc32
from attribution.store.columns import COLUMNS, FORMAT, SAMPLES
from attribution.store.files import (
    LOCK,
    append,
    locked,
    plain,
    remove_temporary,
    unwritable,
    write_atomic,
    write_json,
)
from attribution.store.shapes import place, told
from attribution.texts import TEMPORARY


def config_hash(config: Mapping[str, Any]) -> str:
    """Eight hex digits of a config, independent of key order."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


LINES = "samples.jsonl"


class Columns(dict[str, Any]):
    """Many rows by column: arrays, or one value for all. A frame is made of them only when they are written."""


class RunWriter:
    """Writes one run directory. Rows are collected per frame and leave memory at `flush`.

    Args:
        path: the directory, created if needed.
        config: what was asked; written at once. A directory that holds another config is refused.
        parts: go on with the unfinished record there, of which this many parts per frame, and bytes of samples.jsonl, are kept
            and later ones dropped; None: begin anew, and move an unfinished record aside.
        lock: of an unfinished record there, as `hold` gives it; this takes it over.

    Raises:
        RunError: another config or a finished run lies there, another process writes it, or it cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        parts: Mapping[str, int] | None = None,
        lock: IO[str] | None = None,
    ):
        self.path = Path(path)
        if parts is None:
            claim(self.path, config, lock)
            self._lock = locked(self.path)
            if (self.path / "config.json").exists():
                self.close()
                raise RunError(f"another process began a run in {self.path} just now; start again, or name another directory")
        else:
            held = lock or hold(self.path, config)
            if held is None:
                raise RunError(f"{self.path} holds no run to go on with; begin anew")
            self._lock = held
        # How much is on disk, and what is not: one value, so that no moment is between the two
        self._frames: dict[str, tuple[int, list[pd.DataFrame | Mapping[str, Any]]]] = {}
        self._lines: tuple[int, int, list[str]] = (0, 0, [])  # bytes, their CRC-32, lines to come
        self._sums: dict[str, tuple[int, int]] = {}
        try:
            if parts is not None:
                self._keep(parts)
            remove_temporary(self.path)
            write_json(self.path / "config.json", config)
            self.status("running", step=0)
        except OSError as error:
            self.close()
            raise unwritable(self.path, error) from None
        except BaseException:
            self.close()
            raise

    @property
    def parts(self) -> dict[str, int]:
        """How many parts of each frame are written, and how many bytes of samples.jsonl."""
        length = self._lines[0]
        return {frame: count for frame, (count, _) in self._frames.items() if count} | ({LINES: length} if length else {})

    @property
    def checksums(self) -> dict[str, tuple[int, int]]:
        """By file of what is written, its length and CRC-32."""
        length, crc, _ = self._lines
        return self._sums | ({LINES: (length, crc)} if length else {})

    def _keep(self, parts: Mapping[str, int]) -> None:
        """Drop what was written after the point from which the record goes on."""
        for frame in COLUMNS:
            self._frames[frame] = (parts.get(frame, 0), [])
            for part in sorted((self.path / f"{frame}.parquet").glob("part-*.parquet")):
                if int(part.stem.removeprefix("part-")) >= parts.get(frame, 0):
                    part.unlink()
                else:
                    self._sums[f"{part.parent.name}/{part.name}"] = (part.stat().st_size, crc32(part))
        if (self.path / LINES).exists():
            length = parts.get(LINES, 0)
            os.truncate(self.path / LINES, length)
            self._lines = (length, crc32(self.path / LINES), [])

    def add(self, frame: str, rows: pd.DataFrame | Mapping[str, Any]) -> None:
        """Append rows, `Columns` of them or one row by column, to one of the frames in `COLUMNS`; what is left out is null."""
        unknown = set(rows) - set(COLUMNS[frame])
        if unknown:
            raise ValueError(f"columns {sorted(unknown)} are not documented in COLUMNS[{frame!r}]")
        self._frames.setdefault(frame, (0, []))[1].append(rows)

    def samples(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines to samples.jsonl, with the fields of `SAMPLES`."""
        for line in lines:
            if set(line) != set(SAMPLES):
                raise ValueError(f"fields {sorted(line)} are not those documented in SAMPLES")
            self._lines[2].append(json.dumps(line, ensure_ascii=False, default=plain) + "\n")

    def flush(self) -> None:
        """Write what was added since the last flush as one new part per frame.

        Raises:
            RunError: the directory cannot be written.
        """
        length, crc, lines = self._lines
        if lines:
            text = "".join(lines).encode()
            self._lines = (append(self.path / LINES, text, length), zlib.crc32(text, crc), [])
        for frame, (number, pieces) in self._frames.items():
            if pieces:
                rows = _narrow(_joined(pieces).reindex(columns=list(COLUMNS[frame])))
                data = rows.to_parquet(index=False, compression="zstd", write_page_checksum=True)
                name = f"{frame}.parquet/part-{number:05d}.parquet"
                write_atomic(self.path / name, data)
                self._sums[name] = (len(data), zlib.crc32(data))
                self._frames[frame] = (number + 1, [])

    def status(self, state: str, **details: Any) -> None:
        self._state = state
        write_json(self.path / "status.json", {"state": state, **details})

    def log(self, line: str) -> None:
        """Append a line to log.txt, with the time.

        Raises:
            RunError: it cannot be written.
        """
        try:
            with open(self.path / "log.txt", "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')}  {line}\n")
        except OSError as error:
            raise unwritable(self.path / "log.txt", error) from None

    def meta(self, value: Mapping[str, Any]) -> None:
        write_json(self.path / "meta.json", {"format": FORMAT, **value})

    def vocabulary(self, words: list[str]) -> None:
        write_json(self.path / "vocabulary.json", words)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Flush, then write result.json, which marks the run as finished."""
        self.flush()
        self.status("finished", **{key: result[key] for key in ("steps",) if key in result})
        write_json(self.path / "result.json", {**result, "checksums": self.checksums})
        (self.path / LOCK).unlink(missing_ok=True)  # nobody writes to a finished run
        self.close()

    def fail(self, error: BaseException, **details: Any) -> None:
        """Write what is not on disk yet, and that the record broke off: interrupted, or failed.

        What cannot be written any more, on a full disk say, is left: the error that is under way is the one to be told.
        """
        if self._state != "running":
            return  # told already, by whoever met it first
        state = "interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
        said = f"{type(error).__name__}: {error}"
        for write in (self.flush, lambda: self.log(said), lambda: self.status(state, **details, error=said)):
            with suppress(RunError):
                write()

    def close(self) -> None:
        """Let another process write here; what was added and not flushed is lost."""
        self._lock.close()


class Unwritten(RunWriter):
    """Takes what a `RunWriter` takes and writes nothing, in a process beside the one that writes."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    @property
    def parts(self) -> dict[str, int]:
        return {}

    def add(self, frame: str, rows: pd.DataFrame | Mapping[str, Any]) -> None: ...
    def samples(self, lines: Iterable[Mapping[str, Any]]) -> None: ...
    def flush(self) -> None: ...
    def fail(self, error: BaseException, **details: Any) -> None: ...
    def status(self, state: str, **details: Any) -> None: ...
    def log(self, line: str) -> None: ...
    def meta(self, value: Mapping[str, Any]) -> None: ...
    def vocabulary(self, words: list[str]) -> None: ...
    def finish(self, result: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


def hold(path: Path, config: Mapping[str, Any]) -> IO[str] | None:
    """The lock of the unfinished record of this config that lies at `path`; None where there is none.

    Raises:
        RunError: the directory holds another config or a finished run, or another process writes it.
    """
    if not (path / "config.json").exists():
        return None
    _check_unfinished(path, config)
    lock = locked(path)
    try:
        _check_unfinished(path, config)  # whoever held it until now may have finished it
    except RunError:
        lock.close()
        raise
    return lock


def claim(path: Path, config: Mapping[str, Any], lock: IO[str] | None = None) -> None:
    """Check that a run with this config may be written at `path`; changes nothing but moving an unfinished record aside.

    An unfinished record of the same config is kept as `<name>.interrupted-<k>` next to the directory.

    Args:
        path: the directory.
        config: what is to be run.
        lock: of an unfinished record there, as `hold` gives it.

    Raises:
        RunError: the directory holds another config, a finished run, or something that is not a run.
    """
    place(path)
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; name a directory for the run")
    if not path.exists() or all(TEMPORARY in entry.name or entry.name == LOCK for entry in path.iterdir()):
        return  # a temporary file is what a writer leaves that was killed before its first rename
    if lock is None:
        _check_unfinished(path, config)
    with lock or locked(path):
        number = 1
        while (aside := path.with_name(f"{path.name}.interrupted-{number}")).exists():
            number += 1
        try:
            path.rename(aside)
        except OSError as error:
            raise RunError(
                f"cannot move the unfinished run {path} aside: {error.strerror}; choose a directory you can write to"
            ) from None


def _check_unfinished(path: Path, config: Mapping[str, Any]) -> None:
    if not (path / "config.json").exists():
        raise RunError(f"{path} is not empty and holds no run; name a new directory")
    found = told(path / "config.json")
    wanted = json.loads(json.dumps(config, default=plain))
    if found != wanted:
        keys = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        raise RunError(f"{path} holds a run with another config (different: {', '.join(keys)}); name another directory")
    if is_finished(path):
        raise RunError(f"{path} holds a finished run with this config; read it, or name another directory")


def is_finished(path: str | os.PathLike[str]) -> bool:
    """Whether the completion marker is there."""
    return (place(path) / "result.json").is_file()


def _joined(pieces: list[pd.DataFrame | Mapping[str, Any]]) -> pd.DataFrame:
    """Frames and single rows in their order; a frame of many rows is made once, at the end."""
    found: list[pd.DataFrame] = []
    for kind, group in groupby(pieces, key=type):
        rows: list[Any] = list(group)
        if issubclass(kind, Columns):
            found += [pd.DataFrame(each, copy=False) for each in rows]
        else:
            found += rows if issubclass(kind, pd.DataFrame) else [pd.DataFrame(rows)]
    return pd.concat(found, ignore_index=True)


def _narrow(rows: pd.DataFrame) -> pd.DataFrame:
    """float32, int16/int32 and categories: a record of 1e6 rows stays in the tens of megabytes."""
    for column in rows.columns:
        if column in ("layer",):
            rows[column] = rows[column].astype("int16")
        elif column in ("step", "index", "number", "sample", "position"):
            rows[column] = rows[column].astype("int32")
        elif column in ("probe", "kind", "part", "set", "group", "ablated", "reference", "when", "token"):
            rows[column] = rows[column].astype("category")
        elif column in ("resolved", "skipped"):
            rows[column] = rows[column].astype("boolean")
        else:
            rows[column] = pd.to_numeric(rows[column]).astype("float32" if column != "passes" else "Int32")
    return rows
