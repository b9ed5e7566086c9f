"""Record every optimizer step of any training loop, before and after it, without changing the training.

The seam is the torch optimizer: its pre-hook sees exactly the gradients it consumes, its post-hook exactly the weights
it made. Everything the recorder runs itself leaves weights, gradients, modes and random state as they were, so trained
weights are bit-identical with and without it.

Knows when something is read; what is read of a batch and between steps is `updates.batch_step` and `updates.readings`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from attribution.components import KINDS, Component, Components
from attribution.errors import ConfigError, RecordError, RunError
from attribution.samples import Completion, ProbeSet
from attribution.sharding import copy_all, local, processes, same_everywhere
from attribution.store import BATCH, RunWriter, read_json, write_atomic, write_json
from attribution.updates.batch import BatchWatch
from attribution.updates.batch_step import BatchStep, Before
from attribution.updates.completions import EVERY, Completions, lines, told
from attribution.updates.provenance import shape
from attribution.updates.readings import Readings, check_settings, only_primary
from attribution.updates.record import Record, opened
from attribution.updates.seam import effective, elsewhere, overflowed, recordable, refuse_closure
from attribution.updates.selection import Schedule, Selection
from attribution.updates.share import PASSES, Path

STATE, SINCE = "recorder.json", "since.safetensors"  # in a checkpoint: what the record needs, weights when last read
START = "start.safetensors"  # in the run directory: what the model said at the start
ALL_UP_TO = 4096  # components; of a model with more, neurons and rows are recorded in part, see `updates.rows`


class Recorder:
    """Records a training into a run directory.

        with Recorder("runs/mine", probes=[probes], tokenizer=tokenizer).attach(model, optimizer):
            train()

    A model with LoRA adapters is recorded in the space of its effective weights, see `updates.adapters`.

    Args:
        path: a new directory, or an open `RunWriter`, whose owner then finishes the run.
        probes: held-out sets, read before training and after every recorded step.
        tokenizer: of the model; needed with probes, and for the words of unembedding rows.
        metric: what is read of a probe set, one of `metrics.METRICS`.
        reference: what ablated activations are replaced by: "zero", "mean" or "resample".
        milestones: steps after which heads are ablated exactly and everything is written, as `selection.Schedule` takes
            them. At the start and after the last step every component is ablated (of a large model, a choice).
        everything: write every neuron and row at every step; None: where the model has at most 4,096 components.
        batch_after: run the training batch once more after each step; None: as `everything`.
        share_passes: gradient evaluations allowed for the shares of one step on one probe set; 0: neither shares nor causes
            are read there, and probe sets take forward passes alone.
        sets: named sets of components, ablated jointly on every probe set before training and after every recorded step.
        sets_on: names of those that are ablated on a probe set, by its name; None: all of them on each. Of compared sets too,
            if it names any of them.
        watched: further sets of samples, of which only log-odds and KL are read.
        compared: further named sets, ablated like `sets`; wrong partitions, say.
        compared_every: at every how many steps; the start is always among them.
        beside: further readings of the influence of `sets`, with the same steps as `compared`: of `store.BESIDE`.
        primary_only: what is read on the first probe set alone: True: all of compared, singles (neurons and rows) and beside.
        singles: which components are ablated one at a time: at both ends "all"; "heads" alone; or "end", heads at the
            start and all at the end.
        kinds, layers, heads: which components are written and ablated one at a time, see `selection.Selection`.
        steps: which steps are recorded whole; of the others only the row in `steps`. Shares run from one recorded step to
            the next along the straight line between them.
        completions: at every how many steps first-order causes of the step's completions are read, where it is told of any
            (see `completed`); None: each where the model is small, every tenth of a larger one; 0: never.
        resume: a folder that `save` wrote into, to go on from there; the training must go on from the same place.

    Raises:
        ConfigError: an unknown metric, steps that are none, probe sets without names of their own or a tokenizer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | RunWriter,
        *,
        probes: Sequence[ProbeSet] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        metric: str = "log_odds",
        reference: str = "zero",
        milestones: str | int | Sequence[int] = "log",
        everything: bool | None = None,
        batch_after: bool | None = None,
        share_passes: int = PASSES,
        sets: Mapping[str, Iterable[Component] | pd.DataFrame] | None = None,
        sets_on: Mapping[str, Sequence[str]] | None = None,
        watched: Sequence[ProbeSet] = (),
        compared: Mapping[str, Iterable[Component] | pd.DataFrame] | None = None,
        compared_every: int = 1,
        beside: Sequence[str] = (),
        primary_only: bool | Sequence[str] = False,
        singles: str = "all",
        kinds: Sequence[str] = KINDS,
        layers: Sequence[int] | None = None,
        heads: Sequence[tuple[int, int]] | None = None,
        steps: str | int | Sequence[int] = "all",
        completions: int | None = None,
        resume: str | os.PathLike[str] | None = None,
    ):
        self._path, self._probe_sets, self._watched_sets = path, tuple(probes), tuple(watched)
        self.tokenizer = tokenizer
        self._sets, self._compared = dict(sets or {}), dict(compared or {})
        self._milestones, self._recorded = Schedule(milestones), Schedule(steps)
        layers = None if layers is None else tuple(map(int, layers))
        heads = None if heads is None else tuple((int(layer), int(head)) for layer, head in heads)
        self._selection = Selection(tuple(kinds), layers, heads)
        self._folder = FilePath(resume or "")
        self._resume = None if resume is None else read_json(self._folder / STATE)
        self._settings: dict[str, Any] = {  # as they are written into the config of a loop of its own
            "metric": metric, "reference": reference, "milestones": self._milestones.of, "everything": everything,
            "batch_after": batch_after, "share_passes": share_passes, "compared_every": compared_every,
            "beside": tuple(beside), "primary_only": only_primary(primary_only), "singles": singles, "kinds": tuple(kinds),
            "layers": layers, "heads": heads, "steps": self._recorded.of, "completions": completions,
            "sets_on": None if sets_on is None else {probe: tuple(names) for probe, names in sets_on.items()},
        }  # fmt: skip
        check_settings(self._settings, probes, watched, {**self._sets, **self._compared})
        self._record = cast(Record, None)  # until begin
        self._hooks: list[Any] = []
        self._control: dict[str, Any] = {}  # over the training passes

    # Life cycle

    @contextmanager
    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any = None) -> Iterator[Recorder]:
        """Record every step of this optimizer inside the block.

        An exception inside leaves what was recorded readable, and passes on.

        Args:
            model, optimizer: that train; of accelerate, the prepared ones.
            scaler: the `torch.amp.GradScaler` of a loop in float16. Without it the loss and the factor of clipping are
                recorded as scaled.

        Raises:
            ModelError: unknown architecture.
            RecordError: a training that cannot be recorded truthfully.
            RunError: the directory cannot be used.
            DataError: probe samples that cannot be encoded or scored.
        """
        self.begin(model, optimizer, scaler)
        try:
            yield self
        except BaseException as error:
            self.end(error)
            raise
        self.end()

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any = None) -> None:
        """What `attach` does on entry, for seams without a block; `end` must follow."""
        self._scaler = scaler if scaler is not None else getattr(optimizer, "scaler", None)  # accelerate's optimizer has it
        if self._hooks:
            raise RecordError("this recorder is recording already; end it first, or make another for another training")
        self._optimizer = recordable(model, optimizer)
        if (self._probe_sets or self._watched_sets) and self.tokenizer is None:
            raise ConfigError("probe sets are text; give the recorder the model's tokenizer")
        self._before: Before | None = None
        self._depth, self._current = 0, True
        self._prepare(model)
        self._record = self._open()
        try:
            with self._record.timed():
                self._read_start()
        except BaseException as error:
            self._record.close(error)
            raise
        self._hooks = [
            self._optimizer.register_step_pre_hook(lambda _, args, kwargs: self._step_begins(args, kwargs)),
            self._optimizer.register_step_post_hook(lambda *_: self._step_ends()),
        ]
        self._watch.start()
        self._expect()

    def end(self, error: BaseException | None = None) -> None:
        """Detach and close the record: finished, or failed or interrupted with what was recorded."""
        for handle in self._hooks:
            handle.remove()
        record = self._record
        if self._watch.pending and error is None:
            self.skipped()
        self._watch.stop()
        self._hooks = []
        record.settle()
        try:
            if error is None and self.steps:
                with record.timed():
                    self._read_end()
            self._describe()
        except BaseException as broken:
            record.close(error or broken)
            if error is None or not isinstance(broken, RunError):
                raise
            return  # the disk is full, say: what broke off the training is the one to be told
        if error is not None:
            record.close(error)
        else:
            record.finish(self.result())

    @property
    def resumable(self) -> bool:
        """Whether one process trains the model, so that the record can go on from a checkpoint."""
        return not self._among.several

    @property
    def steps(self) -> int:
        """Optimizer steps seen so far."""
        return self._record.steps if self._record is not None else 0

    def result(self) -> dict[str, Any]:
        """What the record ends with: steps, seconds, and the metric of every probe set before and after."""
        after = {reader.name: reader.reading.metric for reader in self._readings.readers if reader.reading}
        probes = {name: {"before": before, "after": after[name]} for name, before in self._readings.first.items()}
        return {"steps": self.steps, "seconds": self._record.seconds, "probes": probes}

    def note(self, sentence: str) -> None:
        """Say on the record what could not be measured."""
        self._record.note(sentence)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write into a checkpoint of the training what a resumed recording needs; call it between steps.

        The rows so far are flushed, and the folder's `recorder.json`, written last, says that the checkpoint is whole.

        Raises:
            RecordError: several processes train the model.
        """
        if not self.resumable:
            raise RecordError("several processes train this model, whose recording cannot go on from a checkpoint")
        start = self._record.writer.path / START
        if not start.exists():
            write_atomic(start, save(self._readings.tensors()))
        if self._since is not self._start:
            write_atomic(FilePath(folder) / SINCE, save({name: copy.contiguous() for name, copy in self._since.items()}))
        state = {**self._record.state(FilePath(folder), STATE), **self._readings.state(), "current": self._current}
        write_json(FilePath(folder) / STATE, state)

    def logged(self, values: Mapping[str, Any]) -> None:
        """What is known of the last step besides: `reward`, `advantage`, and `loss` where the pass does not tell it.

        Call it after the optimizer's step and before the next; the callback hands on what its trainer logs.
        """
        self._record.logged(values)

    def completed(self, completions: Iterable[Completion]) -> None:
        """The completions that the next step trains on, or some of them, each with reward and advantage.

        They go into samples.jsonl, and their causes into the columns `cause_rewarded`, `cause_high` and `cause_low`.

        Raises:
            RecordError: several processes train the model, each on completions of its own.
        """
        if not self.resumable:
            raise RecordError("several processes train this model: completions are recorded of one; leave them out, or use one")
        self._completions.add(completions)

    def intervened(self, positions: np.ndarray, *, ablated: bool) -> None:
        """Components, by position in `Components.table`, that updates ablate, or else keep from their own gradient."""
        self._control = {"ablated": True} if ablated else {"stopped": torch.as_tensor(positions)}

    def skipped(self) -> None:
        """Count a step whose update was dropped, as a loss scaler does on overflow without calling the optimizer."""
        self._record.settle()
        self._record.steps += 1
        self._step_made(self._step.row(self._step.look()), self._completions.take(), skipped=True)

    def _prepare(self, model: nn.Module) -> None:
        """Everything that can be refused before the directory is touched."""
        given, twin = self._settings, effective(model)
        self._among = processes(next(model.parameters()).device)
        self._model, self._twin = model, twin
        self.components = Components(model if twin is None else twin.model)
        if not self.components.together.several:
            squares = self.components.reduce(lambda use: use.values, torch.square).sum().item()
            same_everywhere(self._among, squares, "weights")
        small = len(self.components) <= ALL_UP_TO
        self._after, self._everything = (small if given[n] is None else given[n] for n in ("batch_after", "everything"))
        position = self.components.positions
        sets, compared = ({name: position(of) for name, of in named.items()} for named in (self._sets, self._compared))
        probes, watched = self._probe_sets, self._watched_sets
        self._readings = Readings.of(self.components, self.tokenizer, probes, watched, sets, compared, given)
        self._selection.mask(self.components)
        self._held = {parameter for group in self._optimizer.param_groups for parameter in group["params"]}
        if twin is None:
            self._watch = BatchWatch(self.components, model, held=self._held, **self._control)
        else:
            from attribution.updates.adapters import EffectiveGradients

            gradients = EffectiveGradients(twin)
            self._watch = BatchWatch(self.components, model, gradients, twin.outputs, self._held, **self._control)
        self._watch.discarded = self.skipped
        every = given["completions"]
        self._completions = Completions(self.components, given["metric"], (1 if small else EVERY) if every is None else every)
        self._step = BatchStep(self.components, self._watch, self._optimizer, self._scaler)

    def _open(self) -> Record:
        model, readings = self.components.parts.model, self._readings
        config = {
            "model": model.config.name_or_path or type(model).__name__,
            "recipe": "a loop of its own",
            "probes": [{"name": probe.name, "samples": len(probe.samples)} for probe in self._probe_sets],
            "watched": [{"name": watched.name, "samples": len(watched.samples)} for watched in self._watched_sets],
            "sets": {name: len(positions) for name, positions in {**readings.sets, **readings.compared}.items()},
            **self._settings,
        }
        record = opened(self._path, config, self._resume and self._resume["parts"], self._among)
        if self.tokenizer is not None:
            record.writer.vocabulary([str(self.tokenizer.decode([i])) for i in range(self.components.parts.vocabulary)])
        return record

    def _read_start(self) -> None:
        """The model before training, or, where a recording goes on, as its checkpoint left it."""
        state, record = self._resume, self._record
        self._start = self._copies()
        # where steps are left out, shares run from the weights last read, and what the batch did from the step before
        self._since = self._start if self._recorded.of == "all" else self._copies()
        if state is None:
            self._readings.start(record, self._everything, self._selection)
        else:
            record.restore(state)
            self._current = state["current"]
            if self._since is not self._start:
                for name, copy in load((self._folder / SINCE).read_bytes()).items():
                    self._since[name].copy_(copy)
            tensors = load((record.writer.path / START).read_bytes())
            with Path(self.components, self._since).at(0.0):
                self._readings.restore(record, self._everything, self._selection, state, tensors)
        self._describe()

    def _describe(self) -> None:
        self._record.note(*self._readings.rules, *elsewhere(self._model, self._optimizer))
        if self._twin is not None:
            self._record.note(*self._twin.not_measured)
        told = {"processes": self._among.size, "sharded": self.components.together.several} if self._among.several else {}
        self._record.describe(model=shape(self.components), adapters=self._twin is not None, **told)

    # One step

    def _step_begins(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        refuse_closure(args, kwargs)
        if self._watch.seen:  # a pass since the last step began: whatever step was under way has broken off
            self._depth = 0
        self._depth += 1  # an optimizer whose step calls its parent's fires the hooks for both
        if self._depth > 1:
            return
        self._record.settle()
        with self._record.timed(), torch.no_grad():
            self._overflow = overflowed(self._optimizer)
            seen, self._trained_on = self._step.look(), self._completions.take()
            if not (self._overflow or seen.grad_norm < float("inf")):
                self._depth = 0
                raise RecordError(
                    f"step {self.steps + 1}: the gradient is not finite (norm {seen.grad_norm}, loss {seen.watched.loss}); "
                    f"lower the learning rate or check the samples; {self.steps} steps are recorded in "
                    f"{self._record.writer.path}"
                )
            if self._due and not self._overflow:
                self._refresh()
                self._copies(self._start)
                seen = self._step.before(seen)
                with self._watch.paused():
                    seen.columns.update(self._completions.causes(self._trained_on, self.steps + 1))
            self._before = seen

    def _step_ends(self) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        before, self._before = self._before, None
        if before is None:
            raise RecordError("the optimizer ended a step that the recorder did not see begin; attach it between steps")
        self._record.steps += 1
        self._current = bool(before.squares)
        row = self._step.row(before)
        if before.squares:
            with self._record.timed(), self._watch.paused():
                row |= self._write_step(before)
        self._step_made(row, self._trained_on, skipped=self._overflow)

    def _step_made(self, row: Mapping[str, Any], trained_on: Sequence[Completion], *, skipped: bool) -> None:
        self._record.samples(lines(trained_on, self.steps))
        self._record.step({**row, **told(trained_on), "skipped": skipped})
        self._expect()

    def _expect(self) -> None:
        """Of the coming step the whole, or only its row in `steps`."""
        self._due = self._recorded.due(self.steps + 1) or self._milestones.due(self.steps + 1)
        self._watch.expect(self._due)

    def _write_step(self, before: Before) -> dict[str, Any]:
        """The whole of one step, after it; returns what it adds to the row in `steps`."""
        self._refresh()
        path = Path(self.components, self._start)
        again = self._watch.again(before.watched) if self._after else None
        length, groups, notes = self._step.after(before, path)
        self._write_batch(before, groups, again)
        self._read()
        if self._milestones.due(self.steps):
            self._readings.milestone(ends=False)
        self._record.note(*notes)
        return {
            "update_norm": length,
            "grad_dot_update": groups["grad_dot_update"].sum().item(),
            "batch_after": again[0] if again else None,
        }

    def _write_batch(self, before: Before, groups: Mapping[str, Tensor], again: tuple[float, Tensor] | None) -> None:
        rows = self._readings.rows
        rows.choose(before.columns["cause_before"].nan_to_num())
        found = dict(before.columns)
        if again is not None:
            found["cause_after"] = again[1]
        self._readings.write(BATCH, {**groups, **{name: rows.of_components(value) for name, value in found.items()}})

    def _read(self) -> None:
        """The weights as they are now, and the way since they were last read."""
        self._readings.step(Path(self.components, self._since))
        if self._since is not self._start:
            self._copies(self._since)

    def _read_end(self) -> None:
        self._refresh()
        if not self._current:  # the last step is one of those that were left out
            self._read()
        self._readings.milestone(ends=True)

    def _refresh(self) -> None:
        if self._twin is not None:
            self._twin.refresh()

    def _copies(self, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights that training can change, as they are now."""
        stored = self.components.stored
        if into is None:
            moving = frozenset() if self._twin is None else self._twin.moving
            return {name: local(p).clone() for name, p in stored.items() if p in self._held or name in moving}
        copy_all([local(stored[name]) for name in into], [*into.values()])
        return into
