"""Writing a run directory: rows in parts, status, and the marker of completion."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from attribution.errors import RunError
from attribution.store.columns import COLUMNS, FORMAT, SAMPLES
from attribution.store.files import LOCK, TEMPORARY, append, locked, plain, read_json, write_atomic, write_json


def config_hash(config: Mapping[str, Any]) -> str:
    """Eight hex digits of a config, independent of key order."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


LINES = "samples.jsonl"


class RunWriter:
    """Writes one run directory. Rows are collected per frame and leave memory at `flush`.

    Args:
        path: the directory, created if needed.
        config: what was asked; written at once. A directory that holds another config is refused.
        parts: go on with the unfinished record there, of which this many parts per frame are kept and later ones dropped;
            None: begin anew, and move an unfinished record aside.

    Attributes:
        parts: how many parts of each frame are written, and how many bytes of samples.jsonl.

    Raises:
        RunError: another config or a finished run lies there, another process writes it, or it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], config: Mapping[str, Any], *, parts: Mapping[str, int] | None = None):
        self.path = Path(path)
        self._rows: dict[str, list[pd.DataFrame | Mapping[str, Any]]] = {}
        self._lines: list[str] = []
        if parts is None:
            claim(self.path, config)
        else:
            _check_unfinished(self.path, config)
        self._lock = locked(self.path)
        self.parts: dict[str, int] = dict(parts or {})
        for frame in COLUMNS if parts is not None else ():
            for part in (self.path / f"{frame}.parquet").glob("part-*.parquet"):
                if int(part.stem.removeprefix("part-")) >= self.parts.get(frame, 0):
                    part.unlink()
        if parts is not None and (self.path / LINES).exists():
            os.truncate(self.path / LINES, self.parts.get(LINES, 0))
        write_json(self.path / "config.json", config)
        self.status("running", step=0)

    def add(self, frame: str, rows: pd.DataFrame | Mapping[str, Any]) -> None:
        """Append rows, or one row by column, to one of the frames in `COLUMNS`; columns that are not there become null."""
        unknown = set(rows) - set(COLUMNS[frame])
        if unknown:
            raise ValueError(f"columns {sorted(unknown)} are not documented in COLUMNS[{frame!r}]")
        self._rows.setdefault(frame, []).append(rows)

    def samples(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines to samples.jsonl, with the fields of `SAMPLES`."""
        for line in lines:
            if set(line) != set(SAMPLES):
                raise ValueError(f"fields {sorted(line)} are not those documented in SAMPLES")
            self._lines.append(json.dumps(line, ensure_ascii=False, default=plain) + "\n")

    def flush(self) -> None:
        """Write what was added since the last flush as one new part per frame.

        Raises:
            RunError: the directory cannot be written.
        """
        if self._lines:
            self.parts[LINES] = append(self.path / LINES, "".join(self._lines).encode(), self.parts.get(LINES, 0))
            self._lines.clear()
        for frame, pieces in self._rows.items():
            if pieces:
                number = self.parts.get(frame, 0)
                rows = _narrow(_joined(pieces).reindex(columns=list(COLUMNS[frame])))
                data = rows.to_parquet(index=False, compression="zstd")
                write_atomic(self.path / f"{frame}.parquet" / f"part-{number:05d}.parquet", data)
                self.parts[frame] = number + 1
                pieces.clear()

    def status(self, state: str, **details: Any) -> None:
        write_json(self.path / "status.json", {"state": state, **details})

    def log(self, line: str) -> None:
        """Append a line to log.txt, with the time."""
        with open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')}  {line}\n")

    def meta(self, value: Mapping[str, Any]) -> None:
        write_json(self.path / "meta.json", {"format": FORMAT, **value})

    def vocabulary(self, words: list[str]) -> None:
        write_json(self.path / "vocabulary.json", words)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Flush, then write result.json, which marks the run as finished."""
        self.flush()
        self.status("finished", **{key: result[key] for key in ("steps",) if key in result})
        write_json(self.path / "result.json", result)
        (self.path / LOCK).unlink(missing_ok=True)  # nobody writes to a finished run
        self.close()

    def close(self) -> None:
        """Let another process write here; what was added and not flushed is lost."""
        self._lock.close()


class Unwritten(RunWriter):
    """Takes what a `RunWriter` takes and writes nothing, in a process beside the one that writes."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self.parts = Path(path), {}

    def add(self, frame: str, rows: pd.DataFrame | Mapping[str, Any]) -> None: ...
    def samples(self, lines: Iterable[Mapping[str, Any]]) -> None: ...
    def flush(self) -> None: ...
    def status(self, state: str, **details: Any) -> None: ...
    def log(self, line: str) -> None: ...
    def meta(self, value: Mapping[str, Any]) -> None: ...
    def vocabulary(self, words: list[str]) -> None: ...
    def finish(self, result: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


def claim(path: Path, config: Mapping[str, Any]) -> None:
    """Check that a run with this config may be written at `path`; changes nothing but moving an unfinished record aside.

    An unfinished record of the same config is kept as `<name>.interrupted-<k>` next to the directory.

    Raises:
        RunError: the directory holds another config, a finished run, or something that is not a run.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; name a directory for the run")
    if not path.exists() or all(TEMPORARY in entry.name or entry.name == LOCK for entry in path.iterdir()):
        return  # a temporary file is what a writer leaves that was killed before its first rename
    _check_unfinished(path, config)
    locked(path).close()
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
    found = read_json(path / "config.json")
    wanted = json.loads(json.dumps(config, default=plain))
    if found != wanted:
        keys = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        raise RunError(f"{path} holds a run with another config (different: {', '.join(keys)}); name another directory")
    if is_finished(path):
        raise RunError(f"{path} holds a finished run with this config; read it, or name another directory")


def is_finished(path: str | os.PathLike[str]) -> bool:
    """Whether the completion marker is there."""
    return (Path(path) / "result.json").is_file()


def _joined(pieces: list[pd.DataFrame | Mapping[str, Any]]) -> pd.DataFrame:
    """Frames and single rows in their order; a frame of many rows is made once, at the end."""
    found: list[pd.DataFrame] = []
    for single, group in groupby(pieces, key=lambda piece: not isinstance(piece, pd.DataFrame)):
        rows = list(group)
        found += [pd.DataFrame(rows)] if single else rows
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
