"""All with all is for the long tier; of it, a test of every day takes each once."""

from collections.abc import Sequence
from typing import Any

import pytest


def in_turn(ones: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Parameters (one, other) of all pairs. Every one stands with one other, the next in turn; the other pairs are long."""

    def name(value: Any) -> str:
        return value if isinstance(value, str) else f"{value[0]}{' tied' * value[1]}"

    return [
        pytest.param(one, other, id=f"{name(other)}-{name(one)}", marks=() if place % len(others) == at else pytest.mark.long)
        for place, one in enumerate(ones)
        for at, other in enumerate(others)
    ]
