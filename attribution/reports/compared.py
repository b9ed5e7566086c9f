"""Two recipes, or two arms, as small tables: what each strengthened, and the difference with its interval.

A side is one run, the runs of one arm (its seeds), or one arm of a study (its models and seeds). Differences are paired: by
model, seeds averaged within it, where both sides have several models; else by seed, and hold for that model only. Knows runs
and the tables of `quantities`; knows nothing about figures, HTML or Markdown.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attribution.claims.statistics import Interval, t_interval
from attribution.errors import ConfigError, RunError
from attribution.reports.quantities import behaviour, per_component, probe_sets, shown
from attribution.store import Run, find_runs, is_finished, read_run, read_study

COMPARED = {"strengthening": "strengthening", "share": "update share", "graft": "graft"}  # of single components
ENDS = ["one", "other", "difference", "low", "high", "n"]
_SAME = ("metric", "reference")  # settings without which nothing can be compared


@dataclass(frozen=True)
class Side:
    """The runs of one recipe or arm.

    Attributes:
        name: as the page calls it.
        runs: finished.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(str(run.config.get("model")) for run in self.runs))


def side(given: str | os.PathLike[str]) -> Side:
    """One side of a comparison.

    Args:
        given: a run directory; a directory of the runs of one arm; or STUDY:ARM, all runs of an arm of a study on its models.

    Raises:
        RunError: nothing is there, or no run of it is finished.
        ConfigError: several arms where one is to be named.
    """
    place, arm = Path(given), ""
    if not os.path.exists(place) and ":" in str(given):
        folder, _, arm = str(given).rpartition(":")
        place = Path(folder)
    if arm:
        study = read_study(place)
        listed = study.runs
        if models := study.told.get("models"):  # and not those that a study only compares with
            listed = listed[listed["model"].isin(models)]
        if arm not in set(listed["arm"]):
            there = ", ".join(sorted(set(listed["arm"]))) or "none"
            raise RunError(f"{place} has no arm {arm!r}; it has {there}")
        found = [Path(path) for path in listed.loc[listed["arm"] == arm, "path"]]
    else:
        found = find_runs(place)
        if not found:
            raise RunError(f"there is no run at or below {place}; name a run, a directory of one arm's runs, or STUDY:ARM")
        arms = {path.resolve().parent for path in found}
        if len(arms) > 1:
            raise ConfigError(f"{place} holds runs of {len(arms)} arms; name one of them, or STUDY:ARM")
        # a run in a directory of its own is called by that
        arm = found[0].resolve().parent.name.rpartition("-")[0] or found[0].resolve().name
    finished = tuple(read_run(path) for path in found if (path / "config.json").exists() and is_finished(path))
    if not finished:
        raise RunError(f"no run of {given} is finished; a comparison needs both ends of each")
    return Side(arm, finished)


@dataclass(frozen=True)
class Compared:
    """Two sides, and what differs between them.

    Args:
        one, other: the sides.

    Raises:
        ConfigError: sides that share no model, or read another metric or reference.
    """

    one: Side
    other: Side

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError(
                f"{self.names[0]} was run on {', '.join(self.one.models)}, {self.names[1]} on {', '.join(self.other.models)}; "
                "compare runs that begin from the same model"
            )
        for key in _SAME:
            values = [{str(run.config.get(key)) for run in each.runs} for each in (self.one, self.other)]
            if values[0] != values[1] or len(values[0]) > 1:
                told = " and ".join(", ".join(sorted(value)) for value in values)
                raise ConfigError(f"the two differ in {key} ({told}), so that their numbers are not of one kind")

    @property
    def names(self) -> tuple[str, str]:
        """The names of both sides; where they are the same, with the directory they stand in."""
        if self.one.name != self.other.name:
            return self.one.name, self.other.name
        first, second = (str(each.runs[0].path.parent) for each in (self.one, self.other))
        return (first, second) if first != second else (f"{self.one.name}, first", f"{self.other.name}, second")

    @cached_property
    def models(self) -> list[str]:
        return [model for model in self.one.models if model in self.other.models]

    @cached_property
    def probes(self) -> list[str]:
        """Held-out probe sets of both sides; their names, and their contents where both tell them, agree."""
        first, second = self.one.runs[0], self.other.runs[0]
        digests = [_digests(run) for run in (first, second)]
        return [
            name
            for name in probe_sets(first)
            if name in probe_sets(second) and digests[0].get(name, "") == digests[1].get(name, digests[0].get(name, ""))
        ]

    @cached_property
    def unit(self) -> str:
        """What an interval is over."""
        return "models, seeds averaged within each" if len(self.models) > 1 else "training seeds, and hold for this model only"

    @cached_property
    def pairs(self) -> list[tuple[str, int]]:
        """Model and seed that both sides have."""
        keys = [{_key(run) for run in each.runs} for each in (self.one, self.other)]
        return sorted(keys[0] & keys[1])

    def settings(self) -> list[tuple[str, str, str]]:
        """Name and both values of every setting in which the two differ; what names a run alone is left out."""
        from attribution.reports.document import flat

        configs = [
            dict(flat({key: value for key, value in each.runs[0].config.items() if key not in ("seed", "model", "inputs")}))
            for each in (self.one, self.other)
        ]
        keys = dict.fromkeys([*configs[0], *configs[1]])
        return [
            (key, configs[0].get(key, "–"), configs[1].get(key, "–"))
            for key in keys
            if configs[0].get(key) != configs[1].get(key)
        ]

    def behaviours(self) -> pd.DataFrame:
        """Change of the metric and KL to the start, per probe set: probe, quantity, and `ENDS`."""
        return self._table(_behaviours, ["probe", "quantity"])

    def mechanisms(self) -> pd.DataFrame:
        """Strengthening of named sets, ablated jointly: probe, set, and `ENDS` (nats)."""
        return self._table(_sets, ["probe", "set"])

    def components(self, kind: str) -> pd.DataFrame:
        """What became of single components: probe, layer, index, quantity (of `COMPARED`), and `ENDS` (nats).

        Empty where there are several models: components of one are none of another's.
        """
        keys = ["probe", "layer", "index", "quantity"]
        if len(self.models) > 1:
            return pd.DataFrame(columns=[*keys, *ENDS])
        return self._table(lambda run: _components(run, kind), keys)

    def _table(self, read: Any, keys: list[str]) -> pd.DataFrame:
        """Means of both sides over models, seeds averaged, and the paired difference with its interval."""
        sides = []
        for each in (self.one, self.other):
            tables = [read(run).assign(model=model, seed=seed) for run in each.runs for model, seed in [_key(run)]]
            tables = [table for table in tables if len(table)] or [pd.DataFrame(columns=[*keys, "value", "model", "seed"])]
            sides.append(pd.concat(tables, ignore_index=True))
        unit = ["model"] if len(self.models) > 1 else ["model", "seed"]
        means = []
        for table in sides:
            table = table[table["model"].isin(self.models) & table["probe"].isin(self.probes)]
            means.append(table.groupby([*keys, *unit])["value"].mean())
        both = pd.concat(means, axis=1, keys=["one", "other"]).dropna()
        rows = []
        for key, group in both.groupby(keys, sort=False):
            found: Interval = t_interval(group["other"] - group["one"], unit=self.unit)
            ends = [found.mean, found.low, found.high] if found.n > 1 else [found.mean, np.nan, np.nan]
            rows.append((*key, group["one"].mean(), group["other"].mean(), *ends, found.n))
        return pd.DataFrame(rows, columns=[*keys, *ENDS])


def compared(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> Compared:
    """Two sides to be compared. Raises as `side` and `Compared`."""
    return Compared(side(one), side(other))


def _key(run: Run) -> tuple[str, int]:
    return str(run.config.get("model")), int(run.config.get("seed", 0))


def _digests(run: Run) -> dict[str, str]:
    """Hash of the file of every probe set, by its name."""
    return {Path(name).stem: digest for name, digest in run.config.get("inputs", {}).items()}


def _behaviours(run: Run) -> pd.DataFrame:
    table = behaviour(run).rename_axis("probe")[["change", "kl"]]
    return table.melt(ignore_index=False, var_name="quantity", value_name="value").dropna().reset_index()


def _sets(run: Run) -> pd.DataFrame:
    """Change of the effect of every named set but wrong partitions, with the run's own reference."""
    rows = run.sets
    rows = rows[(rows["reference"] == run.config.get("reference")) & ~rows["set"].astype(str).str.startswith("wrong-")]
    rows = rows.astype({"probe": str, "set": str, "effect": "float64"}).sort_values("step")
    ends = rows.groupby(["probe", "set"])["effect"].agg(["first", "last"])
    return (ends["last"] - ends["first"]).rename("value").dropna().reset_index()


def _components(run: Run, kind: str) -> pd.DataFrame:
    table = per_component(run, kind)[["probe", "layer", "index", *COMPARED]]
    long = table.melt(["probe", "layer", "index"], var_name="quantity", value_name="value")
    return long.dropna(subset="value")


def largest(table: pd.DataFrame, count: int) -> Iterator[dict[str, Any]]:
    """The rows with the largest differences in size."""
    yield from table.loc[table["difference"].astype("float64").abs().nlargest(count).index].to_dict("records")


def named(compared: Compared, limit: int = 40) -> tuple[str, str]:
    """The names of both sides, cut for labels."""
    first, second = compared.names
    return shown(first, limit), shown(second, limit)
