"""Record every optimizer step of any training loop, before and after it, without changing the training.

The seam is the torch optimizer: its pre-hook sees exactly the gradients it consumes, its post-hook exactly the weights
it made. Everything the recorder runs itself leaves weights, gradients, modes and random state as they were, so trained
weights are bit-identical with and without it.

Knows optimizers, steps and files; what is read of a batch and of a probe set is `updates.batch` and `updates.probes`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import PreTrainedTokenizerBase

from attribution.components import Component, Components
from attribution.errors import ConfigError, RecordError
from attribution.metrics import metric_named
from attribution.samples import ProbeSet
from attribution.store import BATCH, BESIDE, TRAINING, RunWriter
from attribution.updates.batch import BatchWatch, Watched
from attribution.updates.probes import ProbeReader, Step, Watch
from attribution.updates.provenance import shape, versions
from attribution.updates.rows import Rows
from attribution.updates.share import PASSES, Path

ALL_UP_TO = 4096  # components; of a model with more, neurons and rows are recorded in part, see `updates.rows`
FLUSH_SECONDS = 5.0


@dataclass(frozen=True)
class _Before:
    """One step as the pre-hook saw it: the batch, its causes, and per group the squared norms of weights and gradient."""

    watched: Watched
    gradients: dict[str, Tensor]
    versions: dict[str, int]  # of the gradients, to notice an optimizer that writes into them
    causes: Tensor
    squares: dict[str, Tensor]
    grad_norm: float


class Recorder:
    """Records a training into a run directory.

        with Recorder("runs/mine", probes=[probes], tokenizer=tokenizer).attach(model, optimizer):
            train()

    Args:
        path: a new directory, or an open `RunWriter`, whose owner then finishes the run.
        probes: held-out sets, read before training and after every step.
        tokenizer: of the model; needed with probes, and for the words of unembedding rows.
        metric: what is read of a probe set, one of `metrics.METRICS`.
        reference: what ablated activations are replaced by: "zero", "mean" or "resample".
        milestones: steps after which heads are ablated exactly: "log" (1, 2, 4, 8, …), "ends", or a list. At the start
            and after the last step every component is (of a large model, a choice).
        everything: write every neuron and row at every step; None: where the model has at most 4,096 components.
        batch_after: run the training batch once more after each step; None: as `everything`.
        share_passes: gradient evaluations allowed for the shares of one step on one probe set.
        sets: named sets of components, ablated jointly on every probe set before training and after every step.
        watched: further sets of samples, of which only log-odds and KL are read, before training and after every step.
        compared: further named sets, ablated like `sets`; wrong partitions, say.
        compared_every: at every how many steps; the start is always among them.
        beside: further readings of the influence of `sets`, with the same steps as `compared`: of `store.BESIDE`.
        primary_only: ablate compared sets, and single neurons and rows, and read `beside`, on the first probe set alone.
        singles: which components are ablated one at a time: at both ends "all"; "heads" alone; or "end", heads at the
            start and all at the end.

    Raises:
        ConfigError: an unknown metric, milestones that are none, probe sets without names of their own or a tokenizer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | RunWriter,
        *,
        probes: Sequence[ProbeSet] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        metric: str = "log_odds",
        reference: str = "zero",
        milestones: str | Sequence[int] = "log",
        everything: bool | None = None,
        batch_after: bool | None = None,
        share_passes: int = PASSES,
        sets: Mapping[str, Iterable[Component] | pd.DataFrame] | None = None,
        watched: Sequence[ProbeSet] = (),
        compared: Mapping[str, Iterable[Component] | pd.DataFrame] | None = None,
        compared_every: int = 1,
        beside: Sequence[str] = (),
        primary_only: bool = False,
        singles: str = "all",
    ):
        metric_named(metric)
        if singles not in ("all", "heads", "end"):
            raise ConfigError(f"unknown singles {singles!r}; expected 'all', 'heads' or 'end'")
        if unknown := [name for name in beside if name not in BESIDE]:
            raise ConfigError(f"unknown reading {unknown[0]!r} beside the reference; expected {', '.join(BESIDE)}")
        names = [probe.name for probe in (*probes, *watched)]
        if len(set(names)) < len(names) or {BATCH, TRAINING} & {probe.name for probe in probes}:
            raise ConfigError(
                f"probe sets are named {', '.join(names)}; give each its own name, and none {BATCH!r} or {TRAINING!r}"
            )
        if isinstance(milestones, str) and milestones not in ("log", "ends"):
            raise ConfigError(f"unknown milestones {milestones!r}; expected 'log', 'ends' or a list of steps")
        self._path, self._probe_sets, self.tokenizer = path, tuple(probes), tokenizer
        self._milestones = milestones if isinstance(milestones, str) else tuple(sorted(milestones))
        self._metric, self._reference, self._share_passes = metric, reference, share_passes
        self._everything, self._batch_after = everything, batch_after
        self._sets, self._compared, self._primary_only = dict(sets or {}), dict(compared or {}), primary_only
        self._watched_sets, self._singles, self._compared_every = tuple(watched), singles, compared_every
        self._beside = tuple(beside)
        self._notes: dict[str, None] = {}
        self.steps = 0

    # Life cycle

    @contextmanager
    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Recorder]:
        """Record every step of this optimizer inside the block.

        An exception inside leaves what was recorded readable, and passes on.

        Raises:
            ModelError: unknown architecture.
            RecordError: a training that cannot be recorded truthfully.
            RunError: the directory cannot be used.
            DataError: probe samples that cannot be encoded or scored.
        """
        self.begin(model, optimizer)
        try:
            yield self
        except BaseException as error:
            self.end(error)
            raise
        self.end()

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """What `attach` does on entry, for seams without a block; `end` must follow."""
        self._optimizer = recordable(model, optimizer)
        if (self._probe_sets or self._watched_sets) and self.tokenizer is None:
            raise ConfigError("probe sets are text; give the recorder the model's tokenizer")
        self._started, self._seconds = time.time(), 0.0
        with self._timed():
            self.components = Components(model)
            small = len(self.components) <= ALL_UP_TO
            self._after = small if self._batch_after is None else self._batch_after
            self._readers = [
                ProbeReader(
                    probe,
                    self.components,
                    self.tokenizer,
                    self._metric,
                    self._reference,
                    self._share_passes,
                    () if place and self._primary_only else self._beside,
                )
                for place, probe in enumerate(self._probe_sets)
                if self.tokenizer is not None
            ]
            self._watches = [
                Watch(watched, self.components, self.tokenizer) for watched in self._watched_sets if self.tokenizer is not None
            ]
            position = self.components.positions
            self._positions = {name: position(members) for name, members in self._sets.items()}
            self._others = {name: position(members) for name, members in self._compared.items()}
            self._open()
            self._watch = BatchWatch(self.components)
            self._start = {name: parameter.detach().clone() for name, parameter in self.components.stored.items()}
            self._first = {reader.name: reader.start() for reader in self._readers}
            self._write("probes", [{"step": 0, "probe": name, "metric": m, "kl": 0.0} for name, m in self._first.items()])
            self._write_behaviour()
            everything = small if self._everything is None else self._everything
            self._rows = Rows(self.components, everything, [reader.causes for reader in self._readers])
            self._milestone(0, ends=True)
            self._describe()
        self._before: _Before | None = None
        self._depth = 0
        self._last, self._seconds_at_last = time.perf_counter(), self._seconds
        self._hooks = [
            self._optimizer.register_step_pre_hook(lambda *_: self._step_begins()),
            self._optimizer.register_step_post_hook(lambda *_: self._step_ends()),
        ]
        self._watch.start()

    def end(self, error: BaseException | None = None) -> None:
        """Detach and close the record: finished, or failed or interrupted with what was recorded."""
        for handle in self._hooks:
            handle.remove()
        self._watch.stop()
        with self._timed():
            if error is None and self.steps:
                self._milestone(self.steps, ends=True)
        self._describe()
        self.writer.flush()
        if error is not None:
            state = "interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
            self.writer.status(state, step=self.steps, error=f"{type(error).__name__}: {error}")
        elif not isinstance(self._path, RunWriter):
            self.writer.finish(self.result())

    def result(self) -> dict[str, Any]:
        """What the record ends with: steps, seconds, and the metric of every probe set before and after."""
        after = {reader.name: reader.reading.metric for reader in self._readers if reader.reading}
        probes = {name: {"before": before, "after": after[name]} for name, before in self._first.items()}
        return {"steps": self.steps, "seconds": round(time.time() - self._started, 2), "probes": probes}

    # One step

    def _step_begins(self) -> None:
        self._depth += 1  # an optimizer whose step calls its parent's fires the hooks for both
        if self._depth > 1:
            return
        with self._timed(), torch.no_grad():
            watched = self._watch.take()
            gradients = self._watch.gradients(watched)
            stored = self.components.stored
            consumed = {name: parameter.grad for name, parameter in stored.items() if parameter.grad is not None}
            norm = get_total_norm(list(consumed.values())).item()
            if not norm < float("inf"):
                raise RecordError(
                    f"step {self.steps + 1}: the gradient is not finite (norm {norm}, loss {watched.loss}); lower the learning "
                    f"rate or check the samples; {self.steps} steps are recorded in {self.writer.path}"
                )
            for name, parameter in stored.items():
                self._start[name].copy_(parameter)
            reduce = self.components.reduce
            self._before = _Before(
                watched=watched,
                gradients=gradients,
                versions={name: gradient._version for name, gradient in consumed.items()},
                causes=self._watch.causes(watched, gradients),
                squares={
                    "weight_norm": reduce(lambda use: use.parameter.square()),
                    "grad_norm": reduce(lambda use: gradients[use.name].square() if use.name in gradients else None),
                },
                grad_norm=norm,
            )

    def _step_ends(self) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        before, self._before = self._before, None
        if before is None:
            raise RecordError("the optimizer ended a step that the recorder did not see begin; attach it between steps")
        self.steps += 1
        with self._timed(), self._watch.paused():
            path = Path(self.components, self._start)
            again = self._watch.again(before.watched) if self._after else None
            groups = self._batch_groups(before, path)
            self._write_batch(before, groups, again)
            for reader in self._readers:
                self._write_probe(reader.name, reader.step(path))
            self._write_behaviour()
            if self._due(self.steps):
                self._milestone(self.steps, ends=False)
            update_norm = get_total_norm(list(path.delta.values())).item()
        self._write_step(before, update_norm, groups["grad_dot_update"].sum().item(), again)
        if time.perf_counter() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def _batch_groups(self, before: _Before, path: Path) -> dict[str, Tensor]:
        """Per group: squared norms of weights, gradient and change, <g, dtheta>, and the fraction of changed elements."""
        reduce, source, gradients = self.components.reduce, self.components.source, before.gradients
        stored = self.components.stored
        products = reduce(lambda use: gradients[use.name] * path.delta[source[use.name]] if use.name in gradients else None)
        if any(getattr(stored[name].grad, "_version", None) != version for name, version in before.versions.items()):
            self.note("<g, dtheta>: this optimizer writes into the gradients, which cannot be read after its step.")
            products = torch.full_like(products, float("nan"))
        changed = reduce(lambda use: (path.delta[source[use.name]] != 0).float())
        return {
            **before.squares,
            "update_norm": reduce(lambda use: path.delta[source[use.name]].square()),
            "grad_dot_update": products,
            "changed": changed / self.components.sizes,
        }

    def _write_batch(self, before: _Before, groups: Mapping[str, Tensor], again: tuple[float, Tensor] | None) -> None:
        self._rows.choose(before.causes)
        columns = {**groups, "cause_before": self._rows.of_components(before.causes)}
        if again is not None:
            columns["cause_after"] = self._rows.of_components(again[1])
        self._add_components(BATCH, columns)

    def _write_probe(self, name: str, step: Step) -> None:
        found = step.shares
        self._add_components(name, {
            "cause_before": self._rows.of_components(step.before),
            "cause_after": self._rows.of_components(step.after),
            "share": found.share,
        })  # fmt: skip
        self._write("probes", [{
            "step": self.steps, "probe": name, "metric": step.metric, "kl": step.kl, "change": found.change,
            "share_sum": found.share.sum().item(), "residual": found.residual, "resolved": found.resolved,
            "passes": found.passes - 1,
        }])  # fmt: skip

    def _write_step(self, before: _Before, update_norm: float, products: float, again: tuple[float, Tensor] | None) -> None:
        watched, clip = before.watched, before.watched.clip_factor
        if watched.normalizer is None:
            self.note(
                "Causes on the training batch are those of minus the loss as optimized, which is no mean log-probability."
            )
        if clip is None:
            self.note(
                "Clip factor: no single factor explains the consumed gradient in some step; there, batch causes contain it."
            )
        now, seconds = time.perf_counter(), self._seconds
        self._write("steps", [{
            "step": self.steps, "loss": watched.loss, "learning_rate": self._optimizer.param_groups[0]["lr"],
            "grad_norm": before.grad_norm, "grad_norm_raw": before.grad_norm / clip if clip else None, "clip_factor": clip,
            "update_norm": update_norm, "grad_dot_update": products, "normalizer": watched.normalizer,
            "batch_before": watched.log_prob, "batch_after": again[0] if again else None,
            "seconds": now - self._last, "recorder_seconds": seconds - self._seconds_at_last,
        }])  # fmt: skip
        self._last, self._seconds_at_last = now, seconds

    def _write_behaviour(self) -> None:
        """What is read at the start and after every step alike: watched sets, and named sets ablated jointly."""
        for watch in self._watches:
            metric, divergence = watch.read()
            self._write("probes", [{"step": self.steps, "probe": watch.name, "metric": metric, "kl": divergence}])
        for place, reader in enumerate(self._readers):
            due = self.steps % self._compared_every == 0
            others = due and not (place and self._primary_only)
            sets = {**self._positions, **self._others} if others else self._positions
            if sets:
                self.writer.add("sets", reader.influence_of_sets(sets).assign(step=self.steps, probe=reader.name))
            if self._positions and reader.beside and due:
                beside = reader.influence_beside(self._positions)
                self.writer.add("sets", beside.assign(step=self.steps, probe=reader.name))

    # Milestones

    def _due(self, step: int) -> bool:
        if isinstance(self._milestones, tuple):
            return step in self._milestones
        return self._milestones == "log" and step & (step - 1) == 0

    def _milestone(self, step: int, *, ends: bool) -> None:
        """Ablate exactly what has not been ablated at this step."""
        done = self._rows.heads if self._ablated == step else []
        whole = ends and (self._singles == "all" or (self._singles == "end" and step > 0))
        for place, reader in enumerate(self._readers):
            exact = self._rows.exact if whole and not (place and self._primary_only) else self._rows.heads
            positions = np.setdiff1d(exact, done)
            if len(positions):
                self.writer.add("influence", reader.influence(positions).assign(step=step, probe=reader.name))
        self._ablated = step

    # The run directory

    def note(self, sentence: str) -> None:
        """Say on the record what could not be measured."""
        self._notes[sentence] = None

    def _open(self) -> None:
        if isinstance(self._path, RunWriter):
            self.writer = self._path
        else:
            config = {
                "model": self.components.parts.model.config.name_or_path or type(self.components.parts.model).__name__,
                "recipe": "a loop of its own",
                "probes": [{"name": probe.name, "samples": len(probe.samples)} for probe in self._probe_sets],
                "metric": self._metric,
                "reference": self._reference,
                "milestones": self._milestones,
                "everything": self._everything,
                "batch_after": self._batch_after,
                "share_passes": self._share_passes,
                "sets": {name: len(positions) for name, positions in {**self._positions, **self._others}.items()},
                "compared_every": self._compared_every,
                "beside": self._beside,
                "primary_only": self._primary_only,
                "watched": [{"name": watched.name, "samples": len(watched.samples)} for watched in self._watched_sets],
                "singles": self._singles,
            }
            self.writer = RunWriter(self._path, config)
        if self.tokenizer is not None:
            self.writer.vocabulary([str(self.tokenizer.decode([i])) for i in range(self.components.parts.vocabulary)])
        self._flushed, self._ablated = time.perf_counter(), None

    def _describe(self) -> None:
        if not self._rows.everything:
            self.note(f"Neurons and rows: {self._rows.rule}")
        self.writer.meta({
            "started": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(self._started)),
            "versions": versions(),
            "model": shape(self.components),
            "seconds": {"total": round(time.time() - self._started, 2), "recorder": round(self._seconds, 2)},
            "not_measured": list(self._notes),
        })  # fmt: skip

    def _add_components(self, probe: str, columns: Mapping[str, Tensor]) -> None:
        self.writer.add("components", self._rows.frame(self.steps, probe, columns, whole=self._due(self.steps)))

    def _write(self, frame: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            self.writer.add(frame, pd.DataFrame(rows))

    def _flush(self) -> None:
        self.writer.flush()
        self.writer.status("running", step=self.steps)
        self._flushed = time.perf_counter()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - begun


def recordable(model: nn.Module, optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer whose hooks show every step of this model.

    Raises:
        RecordError: a training that cannot be recorded truthfully, with the reason.
    """
    while type(optimizer).__name__ == "AcceleratedOptimizer":  # never initialised as a torch optimizer: it has no hooks
        optimizer = optimizer.optimizer
    if "deepspeed" in type(optimizer).__module__ or not isinstance(optimizer, torch.optim.Optimizer):
        raise RecordError(
            f"{type(optimizer).__name__} is no torch optimizer, so its steps cannot be seen; train with one (under several "
            "processes with FSDP2 instead of DeepSpeed)"
        )
    if isinstance(model, nn.DataParallel):
        raise RecordError(
            "DataParallel runs replicas that cannot be recorded; launch with `accelerate launch`, or use one device"
        )
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise RecordError("this optimizer holds no parameter of this model; attach the recorder to the one that trains it")
    return optimizer
