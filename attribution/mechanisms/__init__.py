"""Mechanisms: named sets of components, planted, read from a file, or discovered."""

from attribution.mechanisms.discovery import Discovery, discover
from attribution.mechanisms.sets import (
    FILE,
    Mechanisms,
    complement,
    halves,
    read_mechanisms,
    write_mechanisms,
    wrong_partition,
)

__all__ = [
    "FILE", "Discovery", "Mechanisms", "complement", "discover", "halves", "read_mechanisms", "write_mechanisms",
    "wrong_partition",
]  # fmt: skip
