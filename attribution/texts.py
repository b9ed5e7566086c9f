"""Files that a user names: read whole, from regular files alone, so that no pipe or device is waited for; written whole or not.

Knows bytes, text and JSON; knows nothing about what they mean. What goes wrong is an OSError, whose `strerror` says why, or a
ValueError of what stands in the file; callers make their sentence of it.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"  # in the name of a file that is being written


def content(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file. Raises OSError: none is there, or it is a directory, a pipe, a device, or no path at all."""
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, "no file can have this name") from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, which cannot be read twice")
    return Path(path).read_bytes()


def text(path: str | os.PathLike[str]) -> str:
    """The same as text. Raises OSError: as `content`, and where it is not UTF-8."""
    try:
        return content(path).decode("utf-8")
    except UnicodeDecodeError:
        raise OSError(errno.EINVAL, "it is not UTF-8 text") from None


def parsed(given: str | bytes) -> Any:
    """JSON. Raises ValueError with the reason, nesting without end among them."""
    try:
        return json.loads(given)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_text(path: Path, given: str) -> None:
    """`write` of text."""
    write(path, given.encode("utf-8"))


def write(path: Path, given: bytes) -> None:
    """Write a file, and the folders it needs, under a temporary name, flush it to disk and rename it.

    Raises OSError: it cannot be written; what stood there is left.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(given)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except ValueError:
        raise OSError(errno.EINVAL, "no file can have this name") from None
    finally:
        with suppress(OSError, ValueError):
            temporary.unlink()
