"""Mechanisms: named sets of components, planted, read from a file, or discovered."""

from attribution.mechanisms.discovery import Discovery, discover
from attribution.mechanisms.separation import Separation, disjoint, separate
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
    "FILE", "Discovery", "Mechanisms", "Separation", "complement", "discover", "disjoint", "halves", "read_mechanisms",
    "separate", "write_mechanisms", "wrong_partition",
]  # fmt: skip
