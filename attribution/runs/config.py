"""The config of one run: plain data, which imports no torch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, SerializeAsAny, ValidationError, model_validator

from attribution.errors import ConfigError
from attribution.recipes import Recipe, Settings, recipe_named
from attribution.recipes.files import named
from attribution.recipes.sft import SFT
from attribution.store import config_hash
from attribution.texts import content

_NOT_IN_THE_HASH = {"seed", "device", "inputs", "checkpoint_seconds"}
_Kind = Literal["head", "neuron", "row"]


def _folder(name: str) -> str:
    """A name that becomes a directory's: one, in the directory where it belongs, and no longer than file systems take."""
    if name.strip() in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\") or len(name.encode()) > 200:
        raise ValueError("expected a name of at most 200 bytes that can be a directory's, without / and \\")
    return name


FolderName = Annotated[str, AfterValidator(_folder)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # as numpy takes them


class RunConfig(Settings):
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
        sets_on: which of them are ablated on a probe set, by its name; by default all on each. Of compared sets too, if it
            names any of them.
        compared: JSON file of further named sets, ablated like those and not grafted; wrong partitions, say.
        compared_every: at every how many steps compared sets are ablated.
        beside: further readings of the influence of `sets`, at the steps of `compared`: with the mean over counterfactuals, of
            the model as it is (mean) or was at the start (base mean), or with the norms of output weights before training.
        primary_only: what is read on the first probe set alone: all of compared (sets), singles (neurons and rows) and beside,
            or some of these.
        singles: which components are ablated one at a time: all, heads alone, or heads and, after the last step, all.
        grafts: which components are grafted one at a time: all heads and the largest others, heads alone, or none but sets;
            none: nothing is grafted; depth: rows, the last layer, and both, from which what is shallow of a change follows.
        linear_grafts: number of random sets whose measured graft is compared with the sum of their shares; 0: none.
        metric: what is read of a response: log_odds, log_odds_per_token, log_prob or logit_difference.
        reference: what ablated activations are replaced by.
        milestones: when heads are ablated exactly between the ends: log (steps 1, 2, 4, …), ends (not at all), every k-th
            step, or a list of steps.
        steps: which steps are recorded whole, in the same words, or all; shares run from one to the next.
        kinds: of components that are written and ablated one at a time; the others are in the sums of their layer.
        layers: of those; by default all.
        heads: of those, as pairs of layer and head; by default all.
        everything: write every neuron and row at every step; by default where the model is small.
        batch_after: one more pass over the training batch after each step; by default where the model is small.
        completions: at every how many steps the causes of sampled or preferred completions are read; 0: never; by default at
            each where the model is small, at every tenth of a larger one.
        share_passes: gradient evaluations allowed for the update shares of one step on one probe set, at least 2; 0: neither
            shares nor first-order causes are read on probe sets.
        seed: of data order and dropout.
        device: where the model lives, cpu or cuda.
        allow_pickle: open weights stored as pickle too, which can run code; only for files that you trust.
        forecast: write before training what its first step would strengthen of the named sets.
        keep: write the trained model too, as a folder that any other run can begin from.
        checkpoint_seconds: a run that is killed loses at most what it did in this time; its checkpoints are removed when it is
            finished. None: none are asked for, and those that the recipe asks for are kept.
        inputs: SHA-256 of every file of samples and sets, and of code (recipe, reward); filled in by the run, and
            checked when it is replayed.
    """

    model: str = "planted"
    recipe: str = "sft"
    training: SerializeAsAny[Recipe] = Field(default_factory=SFT)
    data: str
    probes: tuple[str, ...]
    counterfactuals: tuple[str, ...] = ()
    watched: tuple[str, ...] = ()
    sets: str | None = None
    sets_on: dict[str, tuple[str, ...]] | None = None
    compared: str | None = None
    compared_every: int = Field(default=1, ge=1)
    beside: tuple[Literal["mean", "base mean", "norms before training"], ...] = ()
    primary_only: bool | tuple[Literal["compared", "singles", "beside"], ...] = False
    singles: Literal["all", "heads", "end"] = "all"
    grafts: Literal["all", "heads", "sets", "depth", "none"] = "all"
    linear_grafts: int = Field(default=0, ge=0)
    metric: str = "log_odds"
    reference: Literal["zero", "mean", "resample"] = "zero"
    milestones: Literal["log", "ends"] | int | tuple[int, ...] = "log"
    steps: Literal["all", "log", "ends"] | int | tuple[int, ...] = "all"
    kinds: tuple[_Kind, ...] = ("head", "neuron", "row")
    layers: tuple[int, ...] | None = None
    heads: tuple[tuple[int, int], ...] | None = None
    everything: bool | None = None
    batch_after: bool | None = None
    completions: int | None = Field(default=None, ge=0)
    share_passes: int = Field(default=9, ge=0)
    seed: Seed = 0
    device: str = "cpu"
    allow_pickle: bool = False
    forecast: bool = False
    keep: bool = False
    checkpoint_seconds: float | None = Field(default=60.0, ge=0)
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
            return cls.model_validate_json(content(path))
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
    if first["type"] == "json_invalid":
        return (
            f"it holds no JSON ({first['msg'].removeprefix('Invalid JSON: ')}); write {model.__name__} as an object in braces"
        )
    return f"{where}: {first['msg']} (got {_short(first['input'])!r})"


def _short(value: Any) -> str:
    try:
        return str(value)[:80]
    except ValueError:  # Python writes no number this long
        return "a number of thousands of digits"


def directory(config: RunConfig, root: str | os.PathLike[str], arm: str | None = None) -> Path:
    """Where a run belongs below a study's root: <arm>-<hash8>/seed-<s>. Raises ConfigError: an arm that names no directory."""
    name = arm or Path(config.recipe.rpartition(":")[2]).stem
    try:
        _folder(name)
    except ValueError as error:
        raise ConfigError(f"arm {name!r} cannot be a directory: {error}") from None
    return Path(root) / f"{name}-{config.hash}" / f"seed-{config.seed}"


def digests(config: RunConfig) -> dict[str, str]:
    """SHA-256 of every input file. Raises ConfigError when a replay names another content."""
    found = {}
    for name in (
        config.data,
        *config.probes,
        *config.counterfactuals,
        *config.watched,
        *filter(None, [config.sets, config.compared]),
        *named([config.recipe, config.training.model_dump(mode="json")]),
    ):
        try:
            found[name] = hashlib.sha256(content(name)).hexdigest()
        except OSError:
            continue  # reading it as samples says what is wrong
        if config.inputs.get(name, found[name]) != found[name]:
            raise ConfigError(
                f"{name} has changed since this config was written; restore it, or remove `inputs` from the config"
            )
    return found
