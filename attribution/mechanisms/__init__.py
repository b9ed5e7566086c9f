"""Mechanisms: named sets of components, planted, read from a file, or discovered; torch is imported for discovery alone."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attribution.mechanisms.sets import (
    FILE,
    Mechanisms,
    complement,
    halves,
    read_mechanisms,
    write_mechanisms,
    wrong_partition,
)

if TYPE_CHECKING:
    from attribution.mechanisms.discovery import Discovery, discover
    from attribution.mechanisms.separation import Separation, disjoint, separate

_HOMES = {
    "Discovery": "discovery",
    "Separation": "separation",
    "discover": "discovery",
    "disjoint": "separation",
    "separate": "separation",
}

__all__ = [
    "FILE", "Discovery", "Mechanisms", "Separation", "complement", "discover", "disjoint", "halves", "read_mechanisms",
    "separate", "write_mechanisms", "wrong_partition",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
