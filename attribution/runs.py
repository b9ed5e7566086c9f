"""One run: its config, and the run itself: cause, train and record, graft, report.

The config is plain data and imports no torch; whatever a run needs is imported when it runs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from attribution.errors import ConfigError
from attribution.recipes import Recipe, Setting, recipe_named
from attribution.recipes.sft import SFT
from attribution.store import TRAINING, RunWriter, claim, config_hash, is_finished, read_run

if TYPE_CHECKING:
    import pandas as pd

    from attribution.causes import Causes
    from attribution.mechanisms import Mechanisms
    from attribution.samples import Encoded, ProbeSet, Sample

CAUSE_SAMPLES = 64  # training samples on which causes are measured by exact ablation, spread over the file
GRAFTED_NEURONS, GRAFTED_ROWS = 16, 24  # of a layer, and in all, by |update share| on each probe set
_CAUSES = {"all": "every component", "heads": "every head", "end": "every head"}  # whose cause is measured, by `singles`
_NOT_IN_THE_HASH = {"seed", "device", "inputs"}


class RunConfig(BaseModel):
    """What one run does. Written into the run directory, from which it can be replayed.

    Attributes:
        model: an embedded model, a folder or a hub id.
        recipe: how to train: a recipe's name, or path/to/file.py:Name, which is code and runs with your rights.
        training: the recipe's own settings.
        data: JSONL file of samples to train on.
        probes: JSONL files of held-out samples, one per probe set; a set is called by its file's name.
        counterfactuals: JSONL files of cue-neutral samples, one per probe set, for mean and resample ablation.
        watched: JSONL files of samples of which only log-odds and KL are read, at every step; neutral prompts, say.
        sets: named sets of components, ablated jointly at every step and grafted: a JSON file, or "model" where the model
            comes with mechanisms of its own.
        compared: JSON file of further named sets, ablated like those and not grafted; wrong partitions, say.
        compared_every: at every how many steps compared sets are ablated.
        beside: further readings of the influence of `sets`, at the steps of `compared`: with the mean over counterfactuals, of
            the model as it is (mean) or was at the start (base mean), or with the norms of output weights before training.
        primary_only: ablate compared sets, single neurons and rows, and read `beside`, on the first probe set alone.
        singles: which components are ablated one at a time: all, heads alone, or heads and, after the last step, all.
        grafts: which components are grafted one at a time: all heads and the largest others, heads alone, or none but sets.
        metric: what is read of a response: log_odds, log_odds_per_token, log_prob or logit_difference.
        reference: what ablated activations are replaced by.
        milestones: when heads are ablated exactly between the ends: log (steps 1, 2, 4, …), ends (not at all), or steps.
        everything: write every neuron and row at every step; by default where the model is small.
        batch_after: one more pass over the training batch after each step; by default where the model is small.
        share_passes: gradient evaluations allowed for the update shares of one step on one probe set.
        seed: of data order and dropout.
        device: where the model lives, cpu or cuda.
        allow_pickle: open weights stored as pickle too, which can run code; only for files that you trust.
        inputs: SHA-256 of every file read; filled in by the run, and checked when it is replayed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "planted"
    recipe: str = "sft"
    training: SerializeAsAny[Recipe] = Field(default_factory=SFT)
    data: str
    probes: tuple[str, ...]
    counterfactuals: tuple[str, ...] = ()
    watched: tuple[str, ...] = ()
    sets: str | None = None
    compared: str | None = None
    compared_every: int = Field(default=1, ge=1)
    beside: tuple[Literal["mean", "base mean", "norms before training"], ...] = ()
    primary_only: bool = False
    singles: Literal["all", "heads", "end"] = "all"
    grafts: Literal["all", "heads", "sets"] = "all"
    metric: str = "log_odds"
    reference: Literal["zero", "mean", "resample"] = "zero"
    milestones: Literal["log", "ends"] | tuple[int, ...] = "log"
    everything: bool | None = None
    batch_after: bool | None = None
    share_passes: int = Field(default=9, ge=2)
    seed: int = 0
    device: str = "cpu"
    allow_pickle: bool = False
    inputs: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _training_of_the_recipe(cls, given: Any) -> Any:
        """Settings that come as plain data, or not at all, become those of the recipe that the config names."""
        if not isinstance(given, dict) or isinstance(given.get("training", {}), Recipe):
            return given
        recipe = recipe_named(str(given.get("recipe", "sft")))
        try:
            return {**given, "training": recipe.model_validate(given.get("training", {}))}
        except ValidationError as error:
            raise ConfigError(f"training: {first_error(error, recipe)}") from None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RunConfig:
        """Read a config written by a run, or by hand.

        Raises:
            ConfigError: it is not JSON, or holds an unknown key or a wrong value.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read the config {path}: {error.strerror}; name a config.json") from None
        except ValidationError as error:
            raise ConfigError(f"{path}: {first_error(error, cls)}") from None

    @property
    def hash(self) -> str:
        """Eight hex digits that name the run, whatever its seed and device."""
        return config_hash(self.model_dump(mode="json", exclude=_NOT_IN_THE_HASH))


def first_error(error: ValidationError, model: type[BaseModel]) -> str:
    """The first complaint of a validation of `model` as one sentence."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "config"
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}; expected {', '.join(model.model_fields)}"
    if first["type"] == "missing":
        return f"{where} is missing; expected a value"
    return f"{where}: {first['msg']} (got {str(first['input'])[:80]!r})"


def directory(config: RunConfig, root: str | os.PathLike[str], arm: str | None = None) -> Path:
    """Where a run belongs below a study's root: <arm>-<hash8>/seed-<s>."""
    name = arm or Path(config.recipe.rpartition(":")[2]).stem
    return Path(root) / f"{name}-{config.hash}" / f"seed-{config.seed}"


def run(
    config: RunConfig,
    path: str | os.PathLike[str],
    *,
    progress: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    page: bool = True,
) -> Path:
    """Do one run and write its report. A finished run with the same config is left as it is.

    Everything the user gave is checked before anything is written.

    Args:
        config: what to do.
        path: the run's directory.
        progress: show bars.
        tell: is given a line when a stage begins.
        page: write the report; a study of many runs has one of its own.

    Returns:
        Path of the report, or of the run where none was asked for.

    Raises:
        AttributionError: anything a user can mend, in one sentence; what was recorded until then stays readable.
    """
    from attribution.mechanisms import read_mechanisms
    from attribution.models import load
    from attribution.reports import report
    from attribution.samples import ProbeSet, encode, read_samples
    from attribution.updates.graft import graft_sets

    path = Path(path)
    config = config.model_copy(update={"inputs": _digests(config)})
    written = config.model_dump(mode="json")
    if is_finished(path) and read_run(path).config == written:
        return report(path) if page else path
    _check_probes(config)
    samples = read_samples(config.data)
    others = config.counterfactuals or [None] * len(config.probes)
    probes = [ProbeSet.read(p, counterfactuals=c) for p, c in zip(config.probes, others, strict=True)]
    watched = [ProbeSet(name=TRAINING, samples=tuple(_spread(samples))), *map(ProbeSet.read, config.watched)]
    sets = read_mechanisms(_mechanisms(config)) if config.sets else {}
    compared = read_mechanisms(config.compared) if config.compared else {}
    if twice := set(sets) & set(compared):
        raise ConfigError(f"two sets are called {min(twice)!r}; rename one")
    model, tokenizer = load(config.model, device=config.device, allow_pickle=config.allow_pickle)
    encoded = encode(tokenizer, samples, context=getattr(model.config, "max_position_embeddings", None))
    _check_readable(config, probes, watched, {**sets, **compared}, model, tokenizer)
    claim(path, written)

    writer = RunWriter(path, written)

    def stage(line: str) -> None:
        writer.log(line)
        tell(line)

    try:
        stage(f"ablating {_CAUSES[config.singles]} on {len(watched[0].samples)} training samples, before training")
        causes = _causes(config, model, tokenizer, watched[0].samples, progress)
        writer.add("influence", causes.table.assign(step=0, probe=TRAINING))
        writer.flush()
        stage(f"training with {config.recipe}, and recording on {len(probes)} probe sets")
        result = _train(config, writer, model, tokenizer, encoded, probes, watched, (sets, compared), progress)
        stage("grafting")
        base = load(config.model, device=config.device, allow_pickle=config.allow_pickle).model
        if sets:
            grafted = graft_sets(base, model, sets, tokenizer=tokenizer, probes=probes, metric=config.metric)
            writer.add("set_grafts", grafted)
        if config.grafts != "sets":
            writer.add("grafts", _grafts(config, writer, base, model, tokenizer, probes, progress))
        stage("finished")
        told = {"samples": causes.per_sample.shape[1], "metric": causes.metric, "reference": causes.reference}
        writer.finish({**result, "causes": told})
    except BaseException as error:
        writer.log(f"{type(error).__name__}: {error}")
        writer.flush()
        if read_run(path).status["state"] == "running":
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            writer.status(state, error=f"{type(error).__name__}: {error}")
        raise
    return report(path) if page else path


def _check_probes(config: RunConfig) -> None:
    if not config.probes:
        raise ConfigError("there is no probe set; name at least one JSONL file of held-out samples with --probes")
    if config.counterfactuals and len(config.counterfactuals) != len(config.probes):
        raise ConfigError(
            f"{len(config.counterfactuals)} files of counterfactuals for {len(config.probes)} probe sets; give one for each"
        )


def _check_readable(
    config: RunConfig,
    probes: list[ProbeSet],
    watched: list[ProbeSet],
    sets: Mechanisms,
    model: Any,
    tokenizer: Any,
) -> None:
    """Fail now on what the recorder would refuse once the run has begun."""
    from attribution.components import Components
    from attribution.updates.probes import ProbeReader, Watch
    from attribution.updates.recorder import Recorder

    Recorder("", probes=probes, watched=watched, metric=config.metric, milestones=config.milestones)
    components = Components(model)
    for probe in probes:
        ProbeReader(probe, components, tokenizer, config.metric, config.reference, beside=config.beside)
    for each in watched:
        Watch(each, components, tokenizer)
    for members in sets.values():
        components.positions(members)


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    """At most CAUSE_SAMPLES of the training samples, spread evenly over the file."""
    count = min(CAUSE_SAMPLES, len(samples))
    return [samples[i * len(samples) // count] for i in range(count)]


def _mechanisms(config: RunConfig) -> str:
    """Where the named sets are: a file, a folder, or the model itself where `sets` is "model"."""
    if config.sets != "model":
        return str(config.sets)
    from attribution.models import locate

    return str(locate(config.model))


def _causes(config: RunConfig, model: Any, tokenizer: Any, some: Sequence[Sample], progress: bool) -> Causes:
    """Which components cause the responses that will be trained, before training: exact ablation on training samples.

    By zero, since training samples have no counterfactuals; by log-odds where the metric needs contrasts they lack. Of a
    large model, all heads, and the choice of neurons and rows that `updates.rows` describes.
    """
    import torch

    from attribution.causes import attribute
    from attribution.components import Components
    from attribution.updates.recorder import ALL_UP_TO
    from attribution.updates.rows import Rows

    metric = config.metric
    if metric == "logit_difference" and not all(sample.contrast for sample in some):
        metric = "log_odds"
    chosen = None
    index = Components(model)
    if config.singles != "all":
        chosen = index.table[index.table["kind"] == "head"]
    elif len(index) > ALL_UP_TO:
        score = attribute(model, tokenizer, some, method="gradient", metric=metric).table["effect"]
        positions = Rows(index, False, [torch.as_tensor(score.to_numpy(copy=True))]).exact
        chosen = index.table.iloc[positions]
    return attribute(model, tokenizer, some, metric=metric, components=chosen, progress=progress)


def _train(
    config: RunConfig,
    writer: RunWriter,
    model: Any,
    tokenizer: Any,
    encoded: list[Encoded],
    probes: list[ProbeSet],
    watched: list[ProbeSet],
    sets: tuple[Mechanisms, Mechanisms],
    progress: bool,
) -> dict[str, Any]:
    from attribution.updates.callback import RecorderCallback

    callback = RecorderCallback(
        writer, probes=probes, tokenizer=tokenizer, metric=config.metric, reference=config.reference,
        milestones=config.milestones, everything=config.everything, batch_after=config.batch_after,
        share_passes=config.share_passes, sets=sets[0], compared=sets[1], compared_every=config.compared_every,
        beside=config.beside, primary_only=config.primary_only, watched=watched, singles=config.singles,
    )  # fmt: skip
    setting = Setting(model, tokenizer, encoded, config.seed, writer.path / "trainer", [callback], progress)
    trainer = config.training.build(setting)
    try:
        trainer.train()
    except BaseException as error:
        callback.failed(error)
        raise
    finally:
        with suppress(OSError):
            setting.directory.rmdir()  # where the trainer kept nothing
    model.eval()
    return callback.recorder.result()


def _grafts(
    config: RunConfig, writer: RunWriter, base: Any, tuned: Any, tokenizer: Any, probes: list[ProbeSet], progress: bool
) -> pd.DataFrame:
    """Graft and prune-back of every head, and of the neurons and rows with the largest update shares."""
    import pandas as pd

    from attribution.components import Components
    from attribution.updates.graft import graft

    writer.flush()
    parts = read_run(writer.path).components
    single = parts[parts["share"].notna() & (parts["index"] >= 0)]
    size = single.groupby(["probe", "kind", "layer", "index"], observed=True)["share"].sum().abs()
    ranked = size.sort_values(ascending=False).reset_index()
    neurons = ranked[ranked["kind"] == "neuron"].groupby(["probe", "layer"], observed=True).head(GRAFTED_NEURONS)
    rows = ranked[ranked["kind"] == "row"].groupby("probe", observed=True).head(GRAFTED_ROWS)
    table = Components(base).table
    heads = table[table["kind"] == "head"]
    chosen = heads if config.grafts == "heads" else pd.concat([heads, neurons, rows])
    chosen = chosen[["kind", "layer", "index"]].drop_duplicates()
    singles = {f"{kind} {layer} {index}": [(kind, layer, index)] for kind, layer, index in chosen.itertuples(index=False)}
    found = graft(base, tuned, singles, tokenizer=tokenizer, probes=probes, metric=config.metric, progress=progress)
    named = found["set"].str.split(" ", expand=True)
    found = found.assign(kind=named[0], layer=named[1].astype(int), index=named[2].astype(int))
    return found.assign(step=int(parts["step"].max()))[["step", "probe", "kind", "layer", "index", "graft", "prune"]]


def _digests(config: RunConfig) -> dict[str, str]:
    """SHA-256 of every input file. Raises ConfigError when a replay names another content."""
    found = {}
    for name in (config.data, *config.probes, *config.counterfactuals, *config.watched, *filter(None, [config.compared])):
        try:
            found[name] = hashlib.sha256(Path(name).read_bytes()).hexdigest()
        except OSError:
            continue  # reading it as samples says what is wrong
        if config.inputs.get(name, found[name]) != found[name]:
            raise ConfigError(
                f"{name} has changed since this config was written; restore it, or remove `inputs` from the config"
            )
    return found
