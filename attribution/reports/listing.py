"""What lies below a directory of runs, as text: every study with its verdicts, every arm with the seeds that are done.

Knows runs and findings; imports no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from attribution.errors import RunError, printable
from attribution.launch.tickets import Ticket, tickets
from attribution.store import find_runs, is_finished, read_run
from attribution.store.shapes import told as told_in

SILENT_SECONDS = 1800  # in which a run that is under way writes something, unless one step of it takes longer


@dataclass(frozen=True)
class _Row:
    """One run, begun or asked for."""

    path: Path
    state: str
    steps: Any
    seed: int
    recipe: Any
    model: Any
    note: str = ""  # what else is to say of its state


def listing(root: str | os.PathLike[str], *, every: bool = False) -> str:
    """Studies and runs below a directory, a line per arm and model.

    Of a run that a cluster was asked for: queued until it begins, and failed where its job did. Of a run that says it is
    under way and has written nothing for long, for how long: its process may be gone.

    Args:
        root: where to look.
        every: a line per run instead.

    Raises:
        RunError: there is no run, or a file of one is damaged.
    """
    begun = {path: _begun(path) for path in find_runs(root)}
    asked = {ticket.run: _asked(ticket) for ticket in tickets(root) if ticket.run not in begun}
    rows = sorted([*begun.values(), *asked.values()], key=lambda row: row.path)
    if not rows:
        raise RunError(f"there are no runs below {root}; make one with `attribution study`")
    lines = []
    for place, own in groupby(rows, key=lambda row: row.path.parent.parent):  # runs/<study>/<arm>-<hash>/seed-<s>
        own = list(own)
        if (place / "study.json").exists():
            lines += _headed(place, own)
        lines += [_line(row) for row in own] if every else list(_arms(own))
    return "\n".join(lines)


def _begun(path: Path) -> _Row:
    run, ticket = read_run(path), Ticket(path)
    state, config = run.status.get("state", "unknown"), run.config
    if ticket.state not in ("", "running") and not is_finished(path):
        state = ticket.state
    steps = run.status.get("steps", run.status.get("step", 0))
    return _Row(
        path, state, steps, int(config.get("seed", 0)), config.get("recipe"), config.get("model"), _note(path, state, ticket)
    )


def _asked(ticket: Ticket) -> _Row:
    """A run of which there is no record yet."""
    told, state = ticket.told, ticket.state
    return _Row(ticket.run, state, 0, told["seed"], told["recipe"], told["model"], _note(ticket.run, state, ticket))


def _note(path: Path, state: str, ticket: Ticket) -> str:
    if state in ("queued", "queued again"):
        return f"Slurm job {ticket.told['job']}"
    if state == "running" and path.exists():
        silent = time.time() - max(file.stat().st_mtime for file in (*path.glob("*"), *path.glob("*/*")) if file.is_file())
        if silent >= SILENT_SECONDS:
            return (
                f"nothing written for {silent / 60:.0f} min" if silent < 7200 else f"nothing written for {silent / 3600:.0f} h"
            )
    return ""


def _headed(place: Path, rows: list[_Row]) -> Iterator[str]:
    done = sum(row.state == "finished" for row in rows)
    yield f"{place}: {done} of {len(rows)} runs finished"
    findings = told_in(place / "findings.json") if (place / "findings.json").exists() else []
    for found in findings:
        row = found["verdict"][0]
        note = f" ({row['note']})" if row.get("note") else ""
        yield f"  {_safe(found['claim']['id'])}: {_safe(row['verdict'])}{_safe(note)}"
    for claim, reason in (told_in(place / "study.json").get("not_judged") or {}).items():
        yield f"  {_safe(claim)}: not judged, {_safe(reason)}"


def _arms(rows: list[_Row]) -> Iterator[str]:
    """One line per directory of an arm, with what became of its seeds, and per run that stands alone."""
    for place, own in groupby(rows, key=lambda row: row.path.parent if row.path.name.startswith("seed-") else row.path):
        seeds = sorted(own, key=lambda row: (row.state, row.seed))
        states = []
        for state, of in groupby(seeds, key=lambda row: row.state):
            told = [_seed(row) for row in of]
            states.append(f"{_safe(state)}: seed{'s' if len(told) > 1 else ''} {', '.join(map(_safe, told))}")
        yield "  ".join([str(place), "; ".join(states), _safe(seeds[0].recipe), _safe(seeds[0].model)])


def _seed(row: _Row) -> str:
    said = "" if row.state == "finished" or (row.state == "queued" and not row.steps) else f" at step {row.steps}"
    return f"{row.seed}{said}" + (f" ({row.note})" if row.note and row.state == "running" else "")


def _line(row: _Row) -> str:
    told = (row.state + (f" ({row.note})" if row.note else ""), f"{row.steps} steps", row.recipe, row.model)
    return "  ".join([str(row.path), *map(_safe, told)])


def _safe(value: Any) -> str:
    return printable(str(value))
