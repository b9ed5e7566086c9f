"""Recipes: how to train. One file is one recipe; each builds an unchanged trainer from a model and samples.

A recipe is found by its name here, by an entry point in the group `attribution.recipes`, or as `path/to/file.py:Name`.
A recipe file is code and runs with your rights: name only files that you trust.

Imports neither torch nor a trainer; a recipe's own file does so inside `build`.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationInfo, field_validator

from attribution.errors import ConfigError
from attribution.recipes.files import defined as defined

if TYPE_CHECKING:
    from attribution.mechanisms import Mechanisms
    from attribution.samples import Encoded, Sample
    from attribution.updates.recorder import Recorder

GROUP = "attribution.recipes"
BUILT_IN = {
    "sft": "attribution.recipes.sft:SFT",
    "context_distillation": "attribution.recipes.contexts:ContextDistillation",
    "inoculation": "attribution.recipes.contexts:Inoculation",
    "dpo": "attribution.recipes.dpo:DPO",
    "rloo": "attribution.recipes.rl:RLOO",
    "grpo": "attribution.recipes.rl:GRPO",
    "reinforce": "attribution.recipes.rl:REINFORCE",
}
_registered: dict[str, type[Recipe]] = {}


@dataclass(frozen=True)
class Setting:
    """What a recipe trains on.

    Attributes:
        model: to be trained in place.
        tokenizer: of the model.
        samples: as the recipe's `prepare` gave them, in order.
        encoded: the same as tokens.
        seed: of data order, dropout and sampling.
        directory: where the trainer may keep files of its own.
        callbacks: to be given to the trainer as they are.
        recorder: to be told what gradients do not say, completions and their rewards; None where nothing is recorded.
        sets: named sets of components, for interventions.
        neutral: cue-neutral samples, for the means that may replace ablated activations.
        progress: show bars.
    """

    model: Any
    tokenizer: Any
    samples: list[Sample]
    encoded: list[Encoded]
    seed: int
    directory: Path
    callbacks: list[Any]
    recorder: Recorder | None = None
    sets: Mechanisms = field(default_factory=dict)
    neutral: list[Encoded] = field(default_factory=list)
    progress: bool = False


class Settings(BaseModel):
    """Settings as a config holds them: unknown ones are refused, and so are numbers that JSON or a seed cannot hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _sane(cls, given: Any, info: ValidationInfo) -> Any:
        annotation = str(cls.model_fields[info.field_name or ""].annotation)
        _check_numbers(given, truths="bool" in annotation or "Any" in annotation)
        return given


def _check_numbers(given: Any, truths: bool) -> None:
    """Raise ValueError for a number that is none, however deep it stands; `truths`: whether true and false belong there."""
    if isinstance(given, Mapping):  # of settings, which check their own, or of anything
        given, truths = list(given.values()), True
    if isinstance(given, list | tuple):
        for each in given:
            _check_numbers(each, truths)
    if isinstance(given, bool) and not truths:
        raise ValueError("true and false are no numbers")
    if isinstance(given, float) and not math.isfinite(given):
        raise ValueError("expected a finite number")
    if isinstance(given, int) and abs(given) >= 2**63:
        raise ValueError("expected a number of at most 64 bits")


class Lora(Settings):
    """Adapters of low rank on linear layers (Hu et al. 2021): W + alpha / rank * B A, with A and B trained.

    Attributes:
        rank: of every adapter; 0: there are none, and the weights themselves are trained.
        alpha: the scale, times the rank.
        dropout: inside the adapter, while training.
        targets: which linears carry one: names of modules, or "all-linear" for all but the unembedding.
    """

    rank: int = Field(default=0, ge=0)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"

    def build(self) -> Any:
        """The configuration of PEFT; None for rank 0."""
        if not self.rank:
            return None
        from peft import LoraConfig

        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        return LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets, task_type="CAUSAL_LM"
        )


class Recipe(Settings, ABC):
    """A recipe's settings, in plain types; `build` makes the trainer."""

    @property
    def boundary(self) -> int:
        """After how many steps, and their multiples, a training may be stopped and resumed; 1: after each."""
        return 1

    def prepare(self, samples: Sequence[Sample], model: Any, tokenizer: Any, seed: int) -> list[Sample]:
        """The samples that are trained on, made of those that were given. The model is left as it is."""
        return list(samples)

    def check(self, setting: Setting) -> None:
        """Refuse, before anything is written, what `build` or the training would refuse of this setting.

        Raises:
            ConfigError: settings that do not fit.
            DataError: samples that this recipe cannot train on.
        """

    @abstractmethod
    def build(self, setting: Setting) -> Any:
        """A trainer with a `train()` method whose optimizer is a torch optimizer.

        Raises:
            ConfigError: settings that the trainer refuses.
            DataError: samples that this recipe cannot train on.
        """


def register(name: str) -> Callable[[type[Recipe]], type[Recipe]]:
    """Make a recipe available under a name in this process.

    Raises:
        ConfigError: the name is taken by another recipe, or is none.
    """
    if not isinstance(name, str):
        raise ConfigError(f'{name!r} is no name; say @register("my_recipe") above the class')

    def keep(recipe: type[Recipe]) -> type[Recipe]:
        taken = _registered.get(name)
        if name in BUILT_IN or (taken is not None and taken is not recipe):
            raise ConfigError(f"there is a recipe {name!r} already; register yours under another name")
        _registered[name] = recipe
        return recipe

    return keep


def names() -> dict[str, str]:
    """Every recipe that can be named, with where it lives. Imports none of them."""
    found = {point.name: f"{point.value} (installed)" for point in entry_points(group=GROUP)}
    found.update({name: f"{recipe.__module__}:{recipe.__qualname__}" for name, recipe in _registered.items()})
    return found | BUILT_IN


def recipe_named(name: str) -> type[Recipe]:
    """The recipe of this name, of an entry point, or of `path/to/file.py:Name`.

    Raises:
        ConfigError: there is none, or it cannot be imported.
    """
    if name in _registered:
        return _registered[name]
    if name in BUILT_IN:
        return _imported(name, BUILT_IN[name])
    if ".py:" in name:
        return _checked(name, defined(name, "recipe"))
    for point in entry_points(group=GROUP):
        if point.name == name:
            try:
                return _checked(name, point.load())
            except (ImportError, AttributeError) as error:
                raise ConfigError(
                    f"recipe {name!r} cannot be imported from {point.value} ({error}); install it anew"
                ) from error
    raise ConfigError(f"unknown recipe {name!r}; expected {', '.join(sorted(names()))}, or path/to/file.py:Name")


def _imported(name: str, target: str) -> type[Recipe]:
    module, _, attribute = target.partition(":")
    return _checked(name, getattr(importlib.import_module(module), attribute))


def _checked(name: str, recipe: Any) -> type[Recipe]:
    if not (isinstance(recipe, type) and issubclass(recipe, Recipe)):
        raise ConfigError(f"recipe {name!r} is {str(recipe)[:80]}; expected a subclass of attribution.recipes.Recipe")
    if lacks := sorted(recipe.__abstractmethods__):
        raise ConfigError(f"recipe {name!r} has no method {lacks[0]!r}; define it")
    try:
        recipe.model_rebuild()  # settings may be of types that its file defines below it
    except PydanticUserError as error:
        raise ConfigError(f"recipe {name!r}: {error.message.splitlines()[0]}; correct its settings") from None
    except NameError as error:
        raise ConfigError(f"recipe {name!r}: {str(error).splitlines()[0]}; define it in the recipe's file") from None
    return recipe
