"""What lies below a directory of runs, as text: every study with its verdicts, every arm with the seeds that are done.

Knows runs and findings; imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from attribution.errors import RunError, printable
from attribution.store import Run, find_runs, read_run
from attribution.store.shapes import told


def listing(root: str | os.PathLike[str], *, every: bool = False) -> str:
    """Studies and runs below a directory, a line per arm and model.

    Args:
        root: where to look.
        every: a line per run instead.

    Raises:
        RunError: there is no run, or a file of one is damaged.
    """
    runs = [read_run(path) for path in find_runs(root)]
    if not runs:
        raise RunError(f"there are no runs below {root}; make one with `attribution study`")
    lines = []
    for place, own in groupby(runs, key=_study):
        own = list(own)
        if (place / "study.json").exists():
            lines += _headed(place, own)
        lines += [_line(run) for run in own] if every else list(_arms(own))
    return "\n".join(lines)


def _study(run: Run) -> Path:
    """The directory of the study: runs/<study>/<arm>-<hash>/seed-<s>."""
    return run.path.parent.parent


def _headed(place: Path, runs: list[Run]) -> Iterator[str]:
    done = sum(run.status.get("state") == "finished" for run in runs)
    yield f"{place}: {done} of {len(runs)} runs finished"
    findings = told(place / "findings.json") if (place / "findings.json").exists() else []
    for found in findings:
        row = found["verdict"][0]
        note = f" ({row['note']})" if row.get("note") else ""
        yield f"  {_safe(found['claim']['id'])}: {_safe(row['verdict'])}{_safe(note)}"
    for claim, reason in (told(place / "study.json").get("not_judged") or {}).items():
        yield f"  {_safe(claim)}: not judged, {_safe(reason)}"


def _arms(runs: list[Run]) -> Iterator[str]:
    """One line per directory of an arm, with what became of its seeds, and per run that stands alone."""
    for place, own in groupby(runs, key=lambda run: run.path.parent if run.path.name.startswith("seed-") else run.path):
        seeds = sorted(own, key=lambda run: (run.status.get("state", "unknown"), int(run.config.get("seed", 0))))
        states = []
        for state, of in groupby(seeds, key=lambda run: run.status.get("state", "unknown")):
            told = [f"{run.config.get('seed', 0)}" + ("" if state == "finished" else f" at step {_steps(run)}") for run in of]
            states.append(f"{_safe(state)}: seed{'s' if len(told) > 1 else ''} {', '.join(map(_safe, told))}")
        config = seeds[0].config
        yield "  ".join([str(place), "; ".join(states), _safe(config.get("recipe")), _safe(config.get("model"))])


def _line(run: Run) -> str:
    told = (run.status.get("state", "unknown"), f"{_steps(run)} steps", run.config.get("recipe"), run.config.get("model"))
    return "  ".join([str(run.path), *map(_safe, told)])


def _steps(run: Run) -> Any:
    return run.status.get("steps", run.status.get("step", 0))


def _safe(value: Any) -> str:
    return printable(str(value))
