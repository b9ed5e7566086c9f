"""The study whose cost is asked for, in the words of `RunConfig` and of the recipes' settings. Data and plain rules."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional

from attribution.components import KINDS
from attribution.errors import ConfigError
from attribution.updates.selection import Schedule


@dataclass(frozen=True)
class Plan:
    """A run with AdamW.

    Attributes:
        max_steps: optimizer steps.
        batch_size: samples of one forward pass.
        accumulation: forward passes of one optimizer step.
        length: tokens of a sample, prompt and response.
        response: tokens of its response.
        probes: number of probe sets.
        probe_samples: samples of each.
        samples: to train on; the causes of at most 64 of them are read, and their log-odds at every step.
        kinds: of components that are written and ablated one at a time.
        layers: of those; by default all.
        everything: write every neuron and row at every step; by default where the model is small.
        batch_after: run the training batch again after each step; by default where the model is small.
        singles: which components are ablated one at a time at both ends: all, or heads alone.
        milestones: when heads are ablated between the ends: log, ends, or every k-th step.
        share_passes: gradient evaluations allowed for the shares of a step; 2: they are never refined; 0: there are none.
        lora: rank of adapters on all linears; 0: all weights are trained.
        checkpointing: the trainer recomputes activations (trainer.gradient_checkpointing).
    """

    max_steps: int = 100
    batch_size: int = 32
    accumulation: int = 1
    length: int = 64
    response: int = 8
    probes: int = 1
    probe_samples: int = 64
    samples: int = 64
    kinds: tuple[Literal["head", "neuron", "row"], ...] = KINDS
    layers: tuple[int, ...] | None = None
    everything: bool | None = None
    batch_after: bool | None = None
    singles: Literal["all", "heads"] = "all"
    milestones: Literal["log", "ends"] | int = "log"
    share_passes: int = 9
    lora: int = 0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        least = {"probes": 0, "lora": 0, "share_passes": 0}
        for each in fields(self):
            value, low = getattr(self, each.name), least.get(each.name, 1)
            if each.type == "int" and value < low:
                raise ConfigError(f"{each.name} is {value}; expected at least {low}")
        if self.share_passes == 1:
            raise ConfigError("share_passes is 1; expected at least 2, or 0 for no shares at all")
        if self.response >= self.length:
            raise ConfigError(f"a response of {self.response} tokens in samples of {self.length}; leave some for the prompt")
        if self.singles not in ("all", "heads"):
            raise ConfigError(f"unknown singles {self.singles!r}; expected all or heads")
        Schedule(self.milestones)

    @property
    def tokens(self) -> int:
        """Of one optimizer step."""
        return self.batch_size * self.accumulation * self.length

    @property
    def ablated_at(self) -> int:
        """How many times heads are ablated: at the start, at milestones, at the end."""
        due = Schedule(self.milestones).due
        return 2 + sum(due(step) for step in range(1, self.max_steps))

    def whole_at(self, step: int) -> bool:
        """Whether every selected component is written at this step, however large the model."""
        return Schedule(self.milestones).due(step)

    def writes_all(self, small: bool) -> bool:
        return small if self.everything is None else self.everything

    def runs_again(self, small: bool) -> bool:
        return small if self.batch_after is None else self.batch_after


@dataclass(frozen=True)
class Asked:
    """What a model has, what a study of it would cost, and what it will not measure.

    Attributes:
        model: an embedded model, a folder or a hub id. A folder that holds only config.json is not loaded.
        plan: the study.
        meta: read the config alone; nothing is loaded, checked or timed.
        dtype: of the weights.
        device: where the model lives, cpu or cuda.
        memory: GiB of the device that the study must fit.
        tflops: 1e12 operations per second of the machine that will run it; by default measured here.
        bandwidth: GB per second of its memory; by default measured here, or not counted where tflops is given.
        json: print plain data, in bytes and seconds.
        allow_pickle: open weights stored as pickle too, which can run code; only for files that you trust.
    """

    model: Positional[str]
    plan: OmitArgPrefixes[Plan] = field(default_factory=Plan)
    meta: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    memory: float | None = None
    tflops: float | None = None
    bandwidth: float | None = None
    json: bool = False
    allow_pickle: bool = False
