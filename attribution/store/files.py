"""Files that appear whole or not at all, and the lock of a directory. Knows nothing of runs."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np

from attribution.errors import RunError
from attribution.texts import TEMPORARY, content, parsed, write

try:
    import fcntl
except ImportError:  # not on Windows, where two processes in one directory are not noticed
    fcntl = None

LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def unwritable(path: Path, error: OSError) -> RunError:
    """What to do about a file or directory that cannot be written."""
    why = f"cannot write {path}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return RunError(f"{why}; free some space there and start again, which goes on, or choose another directory")
    return RunError(f"{why}; choose a directory you can write to")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, see `texts.write`.

    Raises:
        RunError: the directory cannot be written.
    """
    try:
        write(path, data)
    except OSError as error:
        raise unwritable(path, error) from None


def write_page(path: Path, text: str) -> None:
    """The same of text for people. Half of a surrogate pair, which JSON can hold and UTF-8 cannot, is written as its escape."""
    write_atomic(path, text.encode("utf-8", "backslashreplace"))


def append(path: Path, data: bytes, at: int) -> int:
    """Append to the first `at` bytes of a file, down to the disk; returns how long it is then.

    What stands after them is dropped: an attempt that failed may have left a part of itself.

    Raises:
        RunError: it cannot be written.
    """
    try:
        with open(path, "ab") as file:
            file.truncate(at)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return file.tell()
    except OSError as error:
        raise unwritable(path, error) from None


def remove_temporary(path: Path) -> None:
    """Remove what a writer that was killed left under temporary names, in a directory and those right below it."""
    for file in (*path.glob(f".*{TEMPORARY}*"), *path.glob(f"*/.*{TEMPORARY}*")):
        file.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; keys keep their order."""
    write_atomic(path, (json.dumps(value, indent=2, default=plain) + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON. Raises RunError when it is missing or damaged."""
    try:
        return parsed(content(path))
    except FileNotFoundError:
        raise RunError(
            f"{path} is missing: {Path(path).parent} is not a run directory, or not a whole one; name another, or run it again"
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); restore it or run again in another directory") from None


def locked(path: Path) -> IO[str]:
    """The lock of a run directory, held until it is closed or its process ends, however that happens.

    Raises:
        RunError: another process holds it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / LOCK, "w")  # noqa: SIM115
    except OSError as error:
        raise unwritable(path, error) from None
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                warnings.warn(f"{path}: this file system has no locks, so two processes here go unnoticed", stacklevel=2)
                return file
            file.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise unwritable(path, error) from None
            raise RunError(
                f"{path} is being written by another process, or by an open recorder of this one; wait until that ends, or "
                "name another directory"
            ) from None
    return file


def plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
