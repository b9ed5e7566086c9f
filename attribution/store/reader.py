"""Reading a run directory back as tidy frames, each when it is first asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attribution.errors import RunError
from attribution.store.checksums import damaged
from attribution.store.columns import COLUMNS, FORMAT, SAMPLES
from attribution.store.shapes import checked, place, shaped, told
from attribution.store.writer import LINES, is_finished
from attribution.texts import content, parsed


@dataclass(frozen=True)
class Run:
    """A run read back; every frame is read when first asked for. Columns and units: `COLUMNS`."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return told(self.path / "config.json")

    @cached_property
    def meta(self) -> dict[str, Any]:
        return told(self.path / "meta.json")

    @cached_property
    def status(self) -> dict[str, Any]:
        return told(self.path / "status.json")

    @cached_property
    def result(self) -> dict[str, Any] | None:
        """The result, or None while the run is not finished."""
        return told(self.path / "result.json") if is_finished(self.path) else None

    @cached_property
    def vocabulary(self) -> list[str]:
        """Word of every unembedding row; empty when the recorder was given no tokenizer."""
        path = self.path / "vocabulary.json"
        return told(path) if path.exists() else []

    def read(self, name: str, columns: Sequence[str] | None = None, **where: Any) -> pd.DataFrame:
        """Some columns and rows of a frame, without reading the rest: a record may be larger than memory.

            run.read("components", ["step", "layer", "index", "share"], kind="head", probe="heldout", step=[1, 20])

        Args:
            name: of the frame, one of `COLUMNS`.
            columns: which; all if None.
            where: by column, the value, or the values, that a row must have there.

        Raises:
            RunError: an unknown frame or column, or a part that cannot be read.
        """
        if name not in COLUMNS:
            raise RunError(f"there is no frame {name!r}; expected {', '.join(COLUMNS)}")
        if unknown := [column for column in (*(columns or ()), *where) if column not in COLUMNS[name]]:
            raise RunError(f"{name!r} has no column {unknown[0]!r}; expected {', '.join(COLUMNS[name])}")
        wanted = [(column, "in", [value] if isinstance(value, str) else list(np.atleast_1d(value).tolist()))
                  for column, value in where.items()]  # fmt: skip
        return self._frame(name, columns=list(columns) if columns is not None else None, filters=wanted or None)

    @cached_property
    def steps(self) -> pd.DataFrame:
        return self._frame("steps")

    @cached_property
    def samples(self) -> pd.DataFrame:
        """Completions that were trained on, one row each; fields in `SAMPLES`. Empty where nothing was sampled or preferred."""
        path = self.path / LINES
        if LINES in self._checksums and (wrong := damaged(self.path, {LINES: self._checksums[LINES]})):
            raise RunError(f"{wrong}; restore it from a copy, or move {self.path} away and run it again")
        # what follows the last line break is a line that a killed process was writing
        try:
            whole = content(path).rpartition(b"\n")[0] if path.exists() else b""
            rows = [parsed(line) for line in whole.split(b"\n") if line]
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}); restore it or run again") from None
        return pd.DataFrame(shaped(path, rows), columns=list(SAMPLES))

    @cached_property
    def probes(self) -> pd.DataFrame:
        return self._frame("probes")

    @cached_property
    def parts(self) -> pd.DataFrame:
        """All that was recorded, one row per step, probe set and *part* of a component."""
        return self._frame("components")

    @cached_property
    def components(self) -> pd.DataFrame:
        """The same with the parts of each component put together.

        Shares, causes and products are added, norms combined; sizes are those of the writing part, and `changed` is the mean
        over parts.
        """
        parts = self.parts
        keys = ["step", "probe", "kind", "layer", "index"]
        remainder = parts["kind"] == "remainder"
        whole = parts[~remainder].copy()
        norms = ["weight_norm", "grad_norm", "update_norm", "intended_norm"]
        whole[norms] = whole[norms].astype("float64") ** 2
        causes = ["cause_before", "cause_after", "cause_rewarded", "cause_high", "cause_low"]
        sums = [*causes, "grad_dot_update", "share", *norms]
        grouped = whole.groupby(keys, sort=False, observed=True)
        joined = grouped[sums].sum(min_count=1)
        joined[norms] = np.sqrt(joined[norms])
        joined["changed"] = grouped["changed"].mean()
        sizes = [f"{what}_{when}" for what in ("activation", "gradient") for when in ("before", "after")]
        joined[sizes] = grouped[sizes].first()
        rest = parts[remainder].rename(columns={"part": "name"})
        return pd.concat([joined.reset_index(), rest], ignore_index=True)

    @cached_property
    def influence(self) -> pd.DataFrame:
        return self._frame("influence")

    @cached_property
    def sets(self) -> pd.DataFrame:
        return self._frame("sets")

    @cached_property
    def tokens(self) -> pd.DataFrame:
        return self._frame("tokens")

    @cached_property
    def grafts(self) -> pd.DataFrame:
        return self._frame("grafts")

    @cached_property
    def set_grafts(self) -> pd.DataFrame:
        return self._frame("set_grafts")

    @cached_property
    def forecasts(self) -> pd.DataFrame:
        return self._frame("forecasts")

    @cached_property
    def group_grafts(self) -> pd.DataFrame:
        return self._frame("group_grafts")

    @cached_property
    def linear_grafts(self) -> pd.DataFrame:
        return self._frame("linear_grafts")

    def _frame(self, name: str, columns: list[str] | None = None, **how: Any) -> pd.DataFrame:
        files = sorted((self.path / f"{name}.parquet").glob("part-*.parquet"))
        if not files:
            return pd.DataFrame(columns=columns or list(COLUMNS[name]))
        wanted = columns or COLUMNS[name]
        parts = [checked(file, self._part(file, columns=columns, **how), wanted) for file in files]
        for column in parts[0].select_dtypes("category"):  # one dtype, however the rows were split into parts
            words = sorted(set().union(*(part[column].cat.categories for part in parts)))
            for part in parts:
                part[column] = part[column].cat.set_categories(words)
        return pd.concat(parts, ignore_index=True)

    def _part(self, file: Path, **how: Any) -> pd.DataFrame:
        name = f"{file.parent.name}/{file.name}"
        wrong = damaged(self.path, {name: self._checksums[name]}) if name in self._checksums else ""
        try:
            if not wrong:
                return pd.read_parquet(file, page_checksum_verification=True, **how)
        except Exception as error:  # a damaged footer makes pyarrow and pandas raise almost anything
            wrong = f"{file} is damaged or cannot be read ({' '.join(str(error).split())[:200]})"
        raise RunError(f"{wrong}; restore it from a copy, or move {self.path} away and run it again")

    @cached_property
    def made(self) -> dict[tuple[Any, ...], Any]:
        """Tables that others made of these frames, by who made them and of what; see `quantities.kept`."""
        return {}

    @cached_property
    def _checksums(self) -> dict[str, tuple[int, int]]:
        """Of a finished run, by file; records of earlier versions have none."""
        return {name: (size, crc) for name, (size, crc) in (self.result or {}).get("checksums", {}).items()}


def read_run(path: str | os.PathLike[str]) -> Run:
    """Open a run directory.

    Raises:
        RunError: there is no run, or it was written by a newer version of this package.
    """
    run = Run(place(path))
    if not (run.path / "config.json").is_file():
        raise RunError(f"{run.path} holds no run (no config.json); `attribution ls` lists the runs below a directory")
    if (run.path / "meta.json").exists() and run.meta.get("format", FORMAT) > FORMAT:
        raise RunError(
            f"{run.path} was written in format {run.meta['format']}, this version reads {FORMAT}; upgrade attribution"
        )
    return run


def find_runs(root: str | os.PathLike[str]) -> list[Path]:
    """Every run directory at or below `root`, sorted by path; records that were moved aside are left out."""
    found = (path.parent for path in place(root).glob("**/config.json") if (path.parent / "status.json").exists())
    return sorted(path for path in found if ".interrupted-" not in path.name)
