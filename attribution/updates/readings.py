"""All that is read of a model between steps, and written: probe sets, watched sets, named sets, single components.

Knows readers, the record and the rule of what is written; knows nothing about optimizers or the training batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from attribution.components import Components
from attribution.errors import ConfigError
from attribution.metrics import metric_named
from attribution.samples import ProbeSet
from attribution.store import BATCH, BESIDE, TRAINING
from attribution.updates.memory import reading
from attribution.updates.probes import ProbeReader, Step, Watch
from attribution.updates.record import Record
from attribution.updates.rows import Rows
from attribution.updates.selection import Schedule, Selection
from attribution.updates.share import Path
from attribution.updates.starts import Start

PRIMARY_ONLY = ("compared", "singles", "beside")  # what may be read on the first probe set alone


class Readings:
    """Reads a model at the start, after steps and at the end.

    Args:
        components: of the model.
        readers: of probe sets; the first is the primary one.
        watches: of sets of which only behaviour is read.
        sets, compared: named sets of components, as positions.
        settings: those of the `Recorder`.
    """

    def __init__(
        self,
        components: Components,
        readers: Sequence[ProbeReader],
        watches: Sequence[Watch],
        sets: Mapping[str, np.ndarray],
        compared: Mapping[str, np.ndarray],
        settings: Mapping[str, Any],
    ):
        self.components, self.readers, self.watches = components, readers, watches
        self.sets, self.compared, self.settings = dict(sets), dict(compared), settings
        self.first: dict[str, float] = {}
        self._milestones = Schedule(settings["milestones"])
        self._ablated: int | None = None
        self._begin: Start | None = None  # while the model before training is read

    @classmethod
    def of(
        cls,
        components: Components,
        tokenizer: PreTrainedTokenizerBase | None,
        probes: Sequence[ProbeSet],
        watched: Sequence[ProbeSet],
        sets: Mapping[str, np.ndarray],
        compared: Mapping[str, np.ndarray],
        settings: Mapping[str, Any],
    ) -> Readings:
        """Of sets of samples, encoded here; a tokenizer is needed where there are any. Raises DataError."""
        readers, watches = [], []
        if tokenizer is not None:
            for place, probe in enumerate(probes):
                beside = () if place and "beside" in settings["primary_only"] else settings["beside"]
                how = settings["metric"], settings["reference"], settings["share_passes"], beside
                readers.append(ProbeReader(probe, components, tokenizer, *how))
            watches = [Watch(each, components, tokenizer) for each in watched]
        return cls(components, readers, watches, sets, compared, settings)

    def start(self, record: Record, everything: bool, selection: Selection) -> None:
        """Read and write the model before training."""
        self.record, self._begin = record, Start(self.components)
        start = {}
        for reader in self.readers:
            with reading(f"probe set {reader.name!r}", record):
                start[reader.name] = reader.start()
        self.first = {name: found.metric for name, found in start.items()}
        for name, found in start.items():
            record.add("probes", {"step": 0, "probe": name, **found._asdict()})
        self._write_behaviour()
        self.rows = Rows(self.components, everything, [reader.causes for reader in self.readers if reader.passes], selection)
        self.milestone(ends=True)
        self._begin = None

    def state(self) -> dict[str, Any]:
        """What `restore` goes on from, beside `tensors`."""
        return {"first": self.first, "chosen": self.rows.chosen, "ablated": self._ablated}

    def tensors(self) -> dict[str, Tensor]:
        """What was read at the start and is compared with later."""
        return {
            f"{reader.name}\t{key}": value.contiguous()
            for reader in (*self.readers, *self.watches)
            for key, value in reader.state().items()
        }

    def restore(
        self, record: Record, everything: bool, selection: Selection, state: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """As `start`, with what was read then; the model is read as it is."""
        self.record, self.first, self._ablated = record, state["first"], state["ablated"]
        for reader in (*self.readers, *self.watches):
            prefix = f"{reader.name}\t"
            reader.restore({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})
        self.rows = Rows(self.components, everything, (), selection)
        if state["chosen"] is not None:
            self.rows.restore(np.array(state["chosen"], dtype=np.int64))

    def step(self, path: Path) -> None:
        """Read and write the weights as they are now, and the shares of a path that ends there."""
        for reader in self.readers:
            with reading(f"probe set {reader.name!r}", self.record):
                self._write_probe(reader.name, reader.step(path))
        self._write_behaviour()

    def milestone(self, *, ends: bool) -> None:
        """Ablate one at a time what has not been ablated at this step: heads, at both ends what else was asked for."""
        step, singles = self.record.steps, self.settings["singles"]
        done = self.rows.heads if self._ablated == step else []
        whole = ends and (singles == "all" or (singles == "end" and step > 0))
        for place, reader in enumerate(self.readers):
            exact = self.rows.exact if whole and not (place and "singles" in self.settings["primary_only"]) else self.rows.heads
            positions = np.setdiff1d(exact, done)
            if not len(positions):
                continue
            with reading(f"single components, ablated on {reader.name!r},", self.record):
                found = self._found(reader, reader.influence, positions)
                self.record.add("influence", found.assign(step=step, probe=reader.name))
        self._ablated = step

    def write(self, probe: str, columns: Mapping[str, Tensor]) -> None:
        """Columns per group, Float64 [groups] each, of this step."""
        step = self.record.steps
        self.record.add("components", self.rows.frame(step, probe, columns, whole=self._milestones.due(step)))

    @property
    def rules(self) -> list[str]:
        """What is left out, in words."""
        lean = any(not reader.passes for reader in self.readers)
        return [*self.rows.rules, *(["Probe sets were read without gradients: no causes, no update shares."] if lean else [])]

    def _write_probe(self, name: str, step: Step) -> None:
        row, found = {"step": self.record.steps, "probe": name, **step.behaviour._asdict()}, step.shares
        if found is None:
            self.record.add("probes", row)
            return
        columns = {column: self.rows.of_components(value) for column, value in step.columns.items()}
        self.write(name, {**columns, "share": found.share})
        self.record.add("probes", row | {
            "change": found.change, "share_sum": found.share.sum().item(), "residual": found.residual,
            "resolved": found.resolved, "passes": found.passes - 1,
        })  # fmt: skip

    def _write_behaviour(self) -> None:
        """What is read at the start and after every recorded step alike: watched sets, and named sets ablated jointly."""
        step = self.record.steps
        for watch in self.watches:
            with reading(f"watched set {watch.name!r}", self.record):
                self.record.add("probes", {"step": step, "probe": watch.name, **watch.read()._asdict()})
        due = step % self.settings["compared_every"] == 0
        for place, reader in enumerate(self.readers):
            named = self._here(reader.name)
            sets = {**named, **self._compared_here(reader.name, place)} if due else named
            with reading(f"named sets, ablated on {reader.name!r},", self.record):
                if sets:
                    found = self._found(reader, reader.influence_of_sets, sets)
                    self.record.add("sets", found.assign(step=step, probe=reader.name))
                if named and reader.beside and due:
                    found = self._found(reader, reader.influence_beside, named)
                    self.record.add("sets", found.assign(step=step, probe=reader.name))

    def _found(self, reader: ProbeReader, measure: Callable[[Any], pd.DataFrame], of: Any) -> pd.DataFrame:
        """What a reader measures of positions or sets; before training, what an earlier run may have found there."""
        if self._begin is None:
            return measure(of)
        sets = of if isinstance(of, Mapping) else {"": of}
        asked = measure.__name__, reader.asked, *((name, positions.tobytes()) for name, positions in sets.items())
        return self._begin.once(lambda: measure(of), *asked)

    def _here(self, probe: str) -> dict[str, np.ndarray]:
        """The named sets that are ablated on a probe set: all, unless it is said which."""
        sets_on = self.settings["sets_on"]
        return self.sets if sets_on is None else _of(self.sets, sets_on.get(probe, ()))

    def _compared_here(self, probe: str, place: int) -> dict[str, np.ndarray]:
        """The compared sets that are ablated on a probe set: all, unless it is said of any on which it is, or on the first."""
        named = {name for names in (self.settings["sets_on"] or {}).values() for name in names}
        if named & set(self.compared):
            return _of(self.compared, self.settings["sets_on"].get(probe, ()))
        return {} if place and "compared" in self.settings["primary_only"] else self.compared


def _of(sets: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: sets[name] for name in names if name in sets}


def only_primary(given: bool | Sequence[str]) -> tuple[str, ...]:
    """What is read on the first probe set alone. Raises ConfigError."""
    if isinstance(given, bool):
        return PRIMARY_ONLY if given else ()
    if unknown := [name for name in given if name not in PRIMARY_ONLY]:
        raise ConfigError(f"unknown reading {unknown[0]!r} in primary_only; expected {', '.join(PRIMARY_ONLY)}")
    return tuple(given)


def check_settings(
    settings: Mapping[str, Any], probes: Sequence[ProbeSet], watched: Sequence[ProbeSet], sets: Mapping[str, Any]
) -> None:
    """Refuse settings that no model could be read with. Raises ConfigError."""
    metric_named(settings["metric"])
    if settings["singles"] not in ("all", "heads", "end"):
        raise ConfigError(f"unknown singles {settings['singles']!r}; expected 'all', 'heads' or 'end'")
    if unknown := [name for name in settings["beside"] if name not in BESIDE]:
        raise ConfigError(f"unknown reading {unknown[0]!r} beside the reference; expected {', '.join(BESIDE)}")
    names = [probe.name for probe in (*probes, *watched)]
    if len(set(names)) < len(names) or {BATCH, TRAINING} & {probe.name for probe in probes}:
        raise ConfigError(
            f"probe sets are named {', '.join(names)}; give each its own name, and none {BATCH!r} or {TRAINING!r}"
        )
    passes = settings["share_passes"]
    if passes < 0 or passes == 1:
        raise ConfigError(f"share_passes is {passes}; expected at least 2, or 0 for no shares at all")
    for probe, chosen in (settings["sets_on"] or {}).items():
        if probe not in [each.name for each in probes]:
            raise ConfigError(f"sets_on names the probe set {probe!r}; expected {', '.join(each.name for each in probes)}")
        if missing := [name for name in chosen if name not in sets]:
            raise ConfigError(f"sets_on names the set {missing[0]!r} on {probe!r}; expected {', '.join(sets) or 'no set'}")
