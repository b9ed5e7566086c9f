"""Reading a study back: the frames of all its runs in one, each row with its model, arm and seed, and its verdicts.

A study is a directory of runs, or one of tables alone, as `results/` holds them. Every frame is read when first asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from attribution.errors import RunError
from attribution.store.columns import COLUMNS, SAMPLES
from attribution.store.quantities import SHOWN
from attribution.store.reader import Run, find_runs, read_run
from attribution.store.shapes import place, told

KEY = {
    "model": "as the config names it",
    "arm": "name of the arm in the study",
    "seed": "of data order, dropout and sampling",
}
STUDY_COLUMNS: dict[str, dict[str, str]] = {
    "runs": {
        **KEY,
        "state": "running, failed, interrupted, finished, or not run",
        "steps": "optimizer steps done",
        "seconds": "wall time of training and recording; null while it is not finished",
        "recipe": "as the config names it",
        "hash": "of the config, whatever its seed; the end of the directory's name",
        "path": "the run's directory",
    },
    "claims": {
        "claim": "its id, as `attribution claims` lists it",
        "hash": "of its declaration",
        "verdict": "supported, contradicted, inconclusive, or not testable here",
        "note": "a qualification of it, or empty",
        "mean": "the primary statistic, in the unit of the declaration",
        "low": "lower end of its interval",
        "high": "upper end",
        "n": "units of replication behind it",
        "unit": "what they are: organisms or bases",
        "level": "of the interval",
        "delta": "smallest effect of interest",
        "sentence": "the verdict in words",
    },
}


@dataclass(frozen=True)
class RecordedStudy:
    """A study read back. Columns and units: `STUDY_COLUMNS`; of all other frames `COLUMNS`, after model, arm and seed."""

    path: Path

    @cached_property
    def told(self) -> dict[str, Any]:
        """What study.json says: name, arms, models, seeds, runs, versions; empty while nothing is concluded."""
        file = self.path / "study.json"
        return told(file) if file.exists() else {}

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row per run, finished or not."""
        rows = []
        for run in self._runs:
            status, result = run.status, run.result
            rows.append((
                *self._named(run), status.get("state", "unknown"), status.get("steps", status.get("step", 0)),
                result.get("seconds") if result else None, run.config.get("recipe"), run.path.parent.name.rpartition("-")[2],
                str(run.path),
            ))  # fmt: skip
        if not rows:  # tables alone, beside which study.json lists what they were made of
            for each in self.told.get("runs", []):
                hashed = Path(each["path"]).parent.name.rpartition("-")[2]
                rows.append((each["model"], each["arm"], each["seed"], each.get("state", "unknown"), each.get("steps", 0),
                             each.get("seconds"), None,
                             hashed, each["path"]))  # fmt: skip
        return pd.DataFrame(rows, columns=list(STUDY_COLUMNS["runs"]))

    @cached_property
    def claims(self) -> pd.DataFrame:
        """One row per claim that was judged; empty while nothing is concluded."""
        file = self.path / "findings.json"
        findings = told(file) if file.exists() else []
        rows = [{"hash": found["hash"], **found["verdict"][0]} for found in findings]
        return pd.DataFrame(rows).reindex(columns=list(STUDY_COLUMNS["claims"]))

    def read(self, name: str, columns: Sequence[str] | None = None, **where: Any) -> pd.DataFrame:
        """Some columns and rows of a frame of all runs, without reading the rest.

            study.read("components", ["step", "layer", "index", "share"], arm="A", kind="head", probe="heldout")

        Args:
            name: of the frame, one of `COLUMNS`, or of what a concluded study keeps for its page, of `quantities.SHOWN`.
            columns: which, beside model, arm and seed; all if None.
            where: by column, model, arm and seed among them, the value or the values that a row must have there.

        Raises:
            RunError: an unknown frame or column, a part that cannot be read, or a study that has no such table.
        """
        wanted = {key: where.pop(key) for key in KEY if key in where}
        tables, runs = [], [] if name in SHOWN else self._runs
        for run in runs:
            names = dict(zip(KEY, self._named(run), strict=True))
            if all(names[key] in _values(value) for key, value in wanted.items()):
                tables.append(run.read(name, columns, **where).assign(**names))
        if not runs:
            tables.append(self._table(name, columns, {**wanted, **where}))
        tables = [table for table in tables if len(table)] or tables[:1]
        if not tables:
            return pd.DataFrame(columns=[*KEY, *(columns or COLUMNS[name])])
        found = pd.concat(tables, ignore_index=True)
        return found[[*KEY, *(column for column in found if column not in KEY)]]

    @cached_property
    def steps(self) -> pd.DataFrame:
        return self.read("steps")

    @cached_property
    def probes(self) -> pd.DataFrame:
        return self.read("probes")

    @cached_property
    def components(self) -> pd.DataFrame:
        """Every component of every step and run; of a large study `read` asks for less."""
        return self._whole("components", {**COLUMNS["components"]})

    @cached_property
    def samples(self) -> pd.DataFrame:
        """Completions that were trained on; fields in `SAMPLES`."""
        return self._whole("samples", SAMPLES)

    @cached_property
    def influence(self) -> pd.DataFrame:
        return self.read("influence")

    @cached_property
    def sets(self) -> pd.DataFrame:
        return self.read("sets")

    @cached_property
    def _runs(self) -> list[Run]:
        """Those of study.json, where they are still there; else all below the directory."""
        listed = [self.path / run["path"] for run in self.told.get("runs", [])]
        there = [path for path in listed if (path / "config.json").exists()]
        return [read_run(path) for path in (there if listed else find_runs(self.path))]

    def _named(self, run: Run) -> tuple[str, str, int]:
        """Model, arm and seed. The arm is the directory's name without the hash."""
        return str(run.config.get("model")), run.path.parent.name.rpartition("-")[0], int(run.config.get("seed", 0))

    def _whole(self, name: str, columns: dict[str, str]) -> pd.DataFrame:
        tables = [getattr(run, name).assign(**dict(zip(KEY, self._named(run), strict=True))) for run in self._runs]
        tables = [table for table in tables if len(table)] or [pd.DataFrame(columns=[*KEY, *columns])]
        found = pd.concat(tables, ignore_index=True)
        return found[[*KEY, *(column for column in found if column not in KEY)]]

    def _table(self, name: str, columns: Sequence[str] | None, where: dict[str, Any]) -> pd.DataFrame:
        """A frame of a study of tables alone."""
        file = self.path / "frames" / f"{name}.parquet"
        if not file.exists():
            there = sorted(path.stem for path in file.parent.glob("*.parquet"))
            raise RunError(
                f"{self.path} holds no {'' if name in SHOWN else 'runs and no '}table {name!r}; it has "
                f"{', '.join(there) or 'no tables'}: read the study where it was run"
            )
        known = [*KEY, *(SHOWN.get(name) or COLUMNS.get(name, {}))]
        if unknown := [column for column in (*(columns or ()), *where) if column not in known]:
            raise RunError(f"{name!r} has no column {unknown[0]!r}; expected {', '.join(known)}")
        wanted = [(column, "in", _values(value)) for column, value in where.items()]
        return pd.read_parquet(file, columns=None if columns is None else [*KEY, *columns], filters=wanted or None)


def _values(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple | set) else [given]


def read_study(path: str | os.PathLike[str]) -> RecordedStudy:
    """Open a study: a directory of runs, or one of its tables.

    Raises:
        RunError: there is neither.
    """
    study = RecordedStudy(place(path))
    if not (study.path / "study.json").exists() and not find_runs(study.path):
        raise RunError(
            f"{study.path} holds no study: neither runs nor study.json; `attribution ls` lists runs below a directory"
        )
    return study
