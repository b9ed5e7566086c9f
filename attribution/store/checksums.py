"""CRC-32 of what a record consists of, so that a changed bit is never read as another number. Knows files, not frames."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

BLOCK = 1 << 20


def crc32(path: Path, length: int | None = None) -> int:
    """Of a file, or of its first so many bytes."""
    found = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK if length is None else min(BLOCK, length)):
            found = zlib.crc32(block, found)
            length = None if length is None else length - len(block)
    return found


def damaged(path: Path, checksums: Mapping[str, tuple[int, int]]) -> str:
    """The first file that does not begin with the bytes that were written, in words; empty: none.

    Args:
        path: the run directory.
        checksums: of its files, by name: length and CRC-32.
    """
    for name, (length, wanted) in checksums.items():
        try:
            if (path / name).stat().st_size < length:
                return f"{path / name} is cut off"
            if crc32(path / name, length) != wanted:
                return f"{path / name} is damaged"
        except FileNotFoundError:
            return f"{path / name} is missing"
        except OSError as error:
            return f"{path / name} cannot be read ({error.strerror or error})"
    return ""
