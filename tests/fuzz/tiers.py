"""How bad input is tried out: how many cases, in what time, what a refusal looks like. Knows nothing about what is tried.

The sample is the same in every run: CI takes it. The long tier tries `FACTOR` times as many, other ones every time.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

from attribution.errors import AttributionError

CASES = {  # of the sample, by what is fed
    "samples": 40, "readers": 22, "text": 6, "configs": 34, "studies": 22, "recipes": 14, "names": 10, "models": 22, "runs": 10,
    "frames": 4, "markup": 2, "materials": 4, "words": 10,
}  # fmt: skip
FACTOR = 101
SECONDS = 60  # within which every case must end, on a machine that does other things too
WHAT_TO_DO = re.compile(
    r";|expected|should|refuses|must|needs|exceeded maximum|name |cannot be opened|true and false are no numbers"
)
tried: Counter[str] = Counter()


class Hang(BaseException):
    """Not an Exception: no handler of the package may take it for a refusal."""


def feed(row: str, tier: str, check: Callable[..., Any], /, **strategies: Any) -> None:
    """Try the cases of one row of `CASES` in this tier."""
    long = tier == "long"

    def counted(**case: Any) -> None:
        tried[row] += 1
        with promptly(SECONDS):
            check(**case)

    run = settings(
        max_examples=CASES[row] * (FACTOR if long else 1), derandomize=not long, database=None, deadline=None,
        print_blob=True, report_multiple_bugs=long, suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if long else [])],
    )(given(**strategies)(counted))  # fmt: skip
    run()


@contextmanager
def promptly(seconds: int) -> Iterator[None]:
    """Raise `Hang` where what is inside takes longer."""

    def late(*_: Any) -> None:
        raise Hang(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(call: Callable[[], Any], *kinds: type[AttributionError]) -> AttributionError | None:
    """Make a call that may go well or be refused by an error of these kinds, never otherwise; the error, if there is one."""
    try:
        call()
    except kinds or AttributionError as error:  # noqa: B030
        assert_one_sentence(str(error))
        return error
    return None


def assert_one_sentence(said: str) -> None:
    """One line that a terminal can show, of a length that a person reads, and that says what to do."""
    assert said and said.isprintable(), repr(said)
    assert len(said) < 3_000, f"{len(said)} characters: {said[:300]!r}"
    assert WHAT_TO_DO.search(said), said


def files(folder: Path) -> set[str]:
    """Everything below a folder, links not followed."""
    return {
        os.path.relpath(os.path.join(at, name), folder) for at, *names in os.walk(folder) for each in names for name in each
    }
