"""Flags that decide which further flags there are, read before the command line is parsed. Imports nothing heavy."""

from collections.abc import Sequence


def value_of(given: Sequence[str], flag: str) -> str | None:
    """The value of a flag, before it is known what else may stand on the command line."""
    for place, here in enumerate(given):
        if here == flag and place + 1 < len(given):
            return given[place + 1]
        if here.startswith(f"{flag}="):
            return here.partition("=")[2]
    return None
