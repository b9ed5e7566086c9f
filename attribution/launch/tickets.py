"""What a cluster was asked to do for a run, and how that stands, as files beside the study's runs.

    <study>/slurm/tickets/<arm>-<hash8>/seed-<s>.json           written when the job is asked for: its id, its log, its run
    <study>/slurm/tickets/<arm>-<hash8>/seed-<s>.state.json     written by the job: running, queued again, or failed

Each file has one writer, so that none is lost. Knows files; asks no cluster.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attribution.store import read_json, write_json

FOLDER = "slurm"  # of a study, for tickets, logs and submitted scripts
_TICKETS = "tickets"


@dataclass(frozen=True)
class Ticket:
    """That of one run.

    Attributes:
        run: the run's directory, <study>/<arm>-<hash8>/seed-<s>, which need not be there yet.
    """

    run: Path

    @property
    def file(self) -> Path:
        return self.run.parent.parent / FOLDER / _TICKETS / self.run.parent.name / f"{self.run.name}.json"

    @property
    def _state_file(self) -> Path:
        return self.file.with_suffix(".state.json")

    @property
    def told(self) -> dict[str, Any]:
        """Job id, log, model, recipe and seed; empty where no cluster was asked."""
        return read_json(self.file) if self.file.exists() else {}

    @property
    def state(self) -> str:
        """queued, running, queued again, or failed; empty where no cluster was asked."""
        if not self.file.exists():
            return ""
        return read_json(self._state_file)["state"] if self._state_file.exists() else "queued"

    @property
    def error(self) -> str:
        """What went wrong with a job that failed."""
        return read_json(self._state_file).get("error", "") if self._state_file.exists() else ""

    def ask(self, told: Mapping[str, Any]) -> None:
        """Keep what was asked of the cluster."""
        write_json(self.file, dict(told))

    def write(self, state: str, error: str = "") -> None:
        """Keep how the job stands."""
        write_json(self._state_file, {"state": state, **({"error": error} if error else {})})

    def remove(self) -> None:
        """Forget it, if it is there."""
        for file in (self._state_file, self.file):
            file.unlink(missing_ok=True)


def tickets(root: str | os.PathLike[str]) -> list[Ticket]:
    """Every ticket of the studies at or below `root`, sorted by run."""
    files = Path(root).glob(f"**/{FOLDER}/{_TICKETS}/*/*.json")
    runs = (file.parents[3] / file.parent.name / file.stem for file in files if not file.name.endswith(".state.json"))
    return [Ticket(run) for run in sorted(runs)]
