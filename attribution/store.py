"""The run directory: what is written, when it counts as finished, and how it is read back as tidy frames.

Knows files, JSON and parquet; knows nothing about models or torch, so that reading a run never imports them.

    runs/<study>/<arm>-<hash8>/seed-<s>/
      config.json               what was asked; another config in the same directory is an error
      meta.json                 versions, model shape, cost; vocabulary.json: the words of the unembedding rows
      status.json               running | failed | interrupted | finished, and how far; log.txt: when what was done
      steps.parquet/            one row per optimizer step
      probes.parquet/           step x probe set
      components.parquet/       step x probe set x component part
      influence.parquet/        milestone x probe set x component: exact ablation
      sets.parquet/             step x probe set x named set of components: joint ablation
      grafts.parquet/           probe set x component
      set_grafts.parquet/       probe set x named set x set ablated meanwhile
      result.json               written last: the completion marker

Every file appears under a temporary name and is renamed, so a reader never meets half of one. The columns of each
frame, with units, are in `COLUMNS`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attribution.errors import RunError

FORMAT = 1
_TEMPORARY = ".tmp-"
BATCH = "batch"  # the name under which the training batch stands among the probe sets
TRAINING = "training samples"  # and the samples of the training file on which causes were measured before training
# Other readings of a set's influence, beside that with the run's own reference
OWN_MEAN, BASE_MEAN, NORMS_KEPT = "mean", "base mean", "norms before training"
BESIDE = (OWN_MEAN, BASE_MEAN, NORMS_KEPT)

_KEY = {
    "step": "optimizer steps done after this row's update (1 … T); in `probes` and `influence` 0 is the start",
    "probe": f"name of the probe set, {BATCH!r} for the training batch, or {TRAINING!r} (influence at step 0: the causes)",
    "kind": "head, neuron, row, or remainder",
    "layer": "layer, -1 where a component belongs to none",
    "index": "head, neuron or token id within its layer; -1 for a remainder group or a whole layer",
}
COLUMNS: dict[str, dict[str, str]] = {
    "steps": {
        "step": _KEY["step"],
        "loss": "training loss the trainer logged, in the trainer's units (null in hand-written loops)",
        "learning_rate": "of the first parameter group",
        "grad_norm": "norm of the gradient the optimizer consumed, over the recorded parameters",
        "grad_norm_raw": "the same before clipping (grad_norm / clip_factor)",
        "clip_factor": "consumed / raw gradient of one reference tensor",
        "update_norm": "norm of the parameter change",
        "grad_dot_update": "<g, dtheta>: first-order change of the training loss",
        "normalizer": "the loss is a sum over labels divided by this (null: unknown, causes are of the loss as optimized)",
        "batch_before": "sum of log p(label) over the batch before the step (null where the pass cannot be replayed)",
        "batch_after": "the same after the step, same dropout masks",
        "seconds": "wall time since the previous step",
        "recorder_seconds": "of which the recorder's own",
    },
    "probes": {
        "step": _KEY["step"],
        "probe": _KEY["probe"],
        "metric": "mean over the probe set of the metric named in config.json (of sets only watched: of log-odds)",
        "kl": "mean KL(model now || model at the start) per response token, nats",
        "change": "metric minus the metric one step earlier",
        "share_sum": "sum of the update shares of all groups in this step",
        "residual": "change - share_sum",
        "resolved": "residual within 1 % of the change + 1e-5",
        "passes": "gradient passes spent on this step's shares, shared end points counted once",
    },
    "components": {
        **_KEY,
        "part": "writing (output weights), routing (q), gating (gate, up) or the name of a remainder group",
        "cause_before": "first-order cause before the step; sum over the batch, or mean over the probe set",
        "cause_after": "the same after the step",
        "weight_norm": "norm of the part's weights before the step (batch rows only, as all below but `share`)",
        "grad_norm": "norm of the consumed gradient",
        "update_norm": "norm of the change",
        "grad_dot_update": "<g, dtheta>",
        "changed": "fraction of elements whose bits changed",
        "share": "update share of the probe set's metric (probe rows only)",
    },
    "influence": {
        **_KEY,
        "effect": "metric(intact) - metric(component ablated), mean over the probe set",
        "kl": "KL(ablated || intact) per response token, nats",
    },
    "sets": {
        "step": _KEY["step"],
        "probe": _KEY["probe"],
        "set": "name of a set of components, ablated jointly",
        "reference": "what replaces the ablated activations: zero, mean (over counterfactuals, of the model as it is), "
        "resample; base mean: that of the model at the start; norms before training: the run's own reference, while every "
        "component's output weights are scaled to their norm at the start",
        "effect": "metric(intact) - metric(set ablated), mean over the probe set",
        "effect_even": "the same over samples 0, 2, 4, …",
        "effect_odd": "the same over samples 1, 3, 5, …",
        "kl": "KL(ablated || intact) per response token, nats",
    },
    "set_grafts": {
        "probe": _KEY["probe"],
        "set": "whose change is put into the model at the start: a named set, or the remainder",
        "ablated": "named set that is ablated while reading, before and after; empty: none",
        "graft": "metric with the change - metric without",
    },
    "grafts": {
        **_KEY,
        "graft": "metric(start + the component's change) - metric(start)",
        "prune": "metric(end) - metric(end - the component's change)",
    },
}


def config_hash(config: Mapping[str, Any]) -> str:
    """Eight hex digits of a config, independent of key order."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it.

    Raises:
        RunError: the directory cannot be written.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RunError(f"cannot write {path}: {error.strerror or error}; choose a directory you can write to") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; keys keep their order."""
    write_atomic(path, (json.dumps(value, indent=2, default=_plain) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON. Raises RunError when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{path} is missing: {path.parent} is not a run directory, or not a whole one") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); restore it or run again in another directory") from None


class RunWriter:
    """Writes one run directory. Rows are collected per frame and leave memory at `flush`.

    Args:
        path: the directory, created if needed.
        config: what was asked; written at once. A directory that holds another config is refused.

    Raises:
        RunError: another config or a finished run lies there, or it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], config: Mapping[str, Any]):
        self.path = Path(path)
        self._rows: dict[str, list[pd.DataFrame]] = {}
        self._parts: dict[str, int] = {}
        claim(self.path, config)
        write_json(self.path / "config.json", config)
        self.status("running", step=0)

    def add(self, frame: str, rows: pd.DataFrame) -> None:
        """Append rows to one of the frames in `COLUMNS`; columns it lacks become null."""
        unknown = set(rows.columns) - set(COLUMNS[frame])
        if unknown:
            raise ValueError(f"columns {sorted(unknown)} are not documented in COLUMNS[{frame!r}]")
        self._rows.setdefault(frame, []).append(rows.reindex(columns=list(COLUMNS[frame])))

    def flush(self) -> None:
        """Write what was added since the last flush as one new part per frame."""
        for frame, pieces in self._rows.items():
            if pieces:
                number = self._parts.get(frame, 0)
                rows = _narrow(pd.concat(pieces, ignore_index=True))
                data = rows.to_parquet(index=False, compression="zstd")
                write_atomic(self.path / f"{frame}.parquet" / f"part-{number:05d}.parquet", data)
                self._parts[frame] = number + 1
                pieces.clear()

    def status(self, state: str, **details: Any) -> None:
        write_json(self.path / "status.json", {"state": state, **details})

    def log(self, line: str) -> None:
        """Append a line to log.txt, with the time."""
        with open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')}  {line}\n")

    def meta(self, value: Mapping[str, Any]) -> None:
        write_json(self.path / "meta.json", {"format": FORMAT, **value})

    def vocabulary(self, words: list[str]) -> None:
        write_json(self.path / "vocabulary.json", words)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Flush, then write result.json, which marks the run as finished."""
        self.flush()
        self.status("finished", **{key: result[key] for key in ("steps",) if key in result})
        write_json(self.path / "result.json", result)


def claim(path: Path, config: Mapping[str, Any]) -> None:
    """Check that a run with this config may be written at `path`; changes nothing but moving an unfinished record aside.

    An unfinished record of the same config is kept as `<name>.interrupted-<k>` next to the directory.

    Raises:
        RunError: the directory holds another config, a finished run, or something that is not a run.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; name a directory for the run")
    if not path.exists() or all(_TEMPORARY in entry.name for entry in path.iterdir()):
        return  # a temporary file is what a writer leaves that was killed before its first rename
    if not (path / "config.json").exists():
        raise RunError(f"{path} is not empty and holds no run; name a new directory")
    found = read_json(path / "config.json")
    wanted = json.loads(json.dumps(config, default=_plain))
    if found != wanted:
        keys = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        raise RunError(f"{path} holds a run with another config (different: {', '.join(keys)}); name another directory")
    if is_finished(path):
        raise RunError(f"{path} holds a finished run with this config; read it, or name another directory")
    number = 1
    while (aside := path.with_name(f"{path.name}.interrupted-{number}")).exists():
        number += 1
    try:
        path.rename(aside)
    except OSError as error:
        raise RunError(
            f"cannot move the unfinished run {path} aside: {error.strerror}; choose a directory you can write to"
        ) from None


def is_finished(path: str | os.PathLike[str]) -> bool:
    """Whether the completion marker is there."""
    return (Path(path) / "result.json").is_file()


@dataclass(frozen=True)
class Run:
    """A run read back; every frame is read when first asked for. Columns and units: `COLUMNS`."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    @cached_property
    def meta(self) -> dict[str, Any]:
        return read_json(self.path / "meta.json")

    @cached_property
    def status(self) -> dict[str, Any]:
        return read_json(self.path / "status.json")

    @cached_property
    def result(self) -> dict[str, Any] | None:
        """The result, or None while the run is not finished."""
        return read_json(self.path / "result.json") if is_finished(self.path) else None

    @cached_property
    def vocabulary(self) -> list[str]:
        """Word of every unembedding row; empty when the recorder was given no tokenizer."""
        path = self.path / "vocabulary.json"
        return read_json(path) if path.exists() else []

    @cached_property
    def steps(self) -> pd.DataFrame:
        return self._frame("steps")

    @cached_property
    def probes(self) -> pd.DataFrame:
        return self._frame("probes")

    @cached_property
    def parts(self) -> pd.DataFrame:
        """All that was recorded, one row per step, probe set and *part* of a component."""
        return self._frame("components")

    @cached_property
    def components(self) -> pd.DataFrame:
        """The same with the parts of each component put together: shares, causes and products added, norms combined."""
        parts = self.parts
        keys = ["step", "probe", "kind", "layer", "index"]
        remainder = parts["kind"] == "remainder"
        whole = parts[~remainder].copy()
        norms = ["weight_norm", "grad_norm", "update_norm"]
        whole[norms] = whole[norms].astype("float64") ** 2
        sums = ["cause_before", "cause_after", "grad_dot_update", "share", *norms]
        grouped = whole.groupby(keys, sort=False, observed=True)
        joined = grouped[sums].sum(min_count=1)
        joined[norms] = np.sqrt(joined[norms])
        joined["changed"] = grouped["changed"].mean()
        rest = parts[remainder].rename(columns={"part": "name"})
        return pd.concat([joined.reset_index(), rest], ignore_index=True)

    @cached_property
    def influence(self) -> pd.DataFrame:
        return self._frame("influence")

    @cached_property
    def sets(self) -> pd.DataFrame:
        return self._frame("sets")

    @cached_property
    def grafts(self) -> pd.DataFrame:
        return self._frame("grafts")

    @cached_property
    def set_grafts(self) -> pd.DataFrame:
        return self._frame("set_grafts")

    def _frame(self, name: str) -> pd.DataFrame:
        files = sorted((self.path / f"{name}.parquet").glob("part-*.parquet"))
        if not files:
            return pd.DataFrame(columns=list(COLUMNS[name]))
        try:
            parts = [pd.read_parquet(file) for file in files]
        except (OSError, ValueError) as error:
            raise RunError(f"a part of {self.path / name}.parquet cannot be read ({error}); restore it or run again") from None
        for column in parts[0].select_dtypes("category"):  # one dtype, however the rows were split into parts
            words = sorted(set().union(*(part[column].cat.categories for part in parts)))
            for part in parts:
                part[column] = part[column].cat.set_categories(words)
        return pd.concat(parts, ignore_index=True)


def read_run(path: str | os.PathLike[str]) -> Run:
    """Open a run directory.

    Raises:
        RunError: there is no run, or it was written by a newer version of this package.
    """
    run = Run(Path(path))
    if not (run.path / "config.json").is_file():
        raise RunError(f"{run.path} holds no run (no config.json); `attribution ls` lists the runs below a directory")
    if (run.path / "meta.json").exists() and run.meta.get("format", FORMAT) > FORMAT:
        raise RunError(
            f"{run.path} was written in format {run.meta['format']}, this version reads {FORMAT}; upgrade attribution"
        )
    return run


def find_runs(root: str | os.PathLike[str]) -> list[Path]:
    """Every run directory at or below `root`, sorted by path; records that were moved aside are left out."""
    found = (path.parent for path in Path(root).glob("**/config.json") if (path.parent / "status.json").exists())
    return sorted(path for path in found if ".interrupted-" not in path.name)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _narrow(rows: pd.DataFrame) -> pd.DataFrame:
    """float32, int16/int32 and categories: a record of 1e6 rows stays in the tens of megabytes."""
    for column in rows.columns:
        if column in ("layer",):
            rows[column] = rows[column].astype("int16")
        elif column in ("step", "index"):
            rows[column] = rows[column].astype("int32")
        elif column in ("probe", "kind", "part", "set", "ablated", "reference"):
            rows[column] = rows[column].astype("category")
        elif column not in ("resolved",):
            rows[column] = pd.to_numeric(rows[column]).astype("float32" if column != "passes" else "Int32")
    return rows
