"""Which pass of a trainer is running, and the set of components that is switched off in it.

A trainer runs its model to sample, to say how probable a completion was to the sampler (old), to compare with the model
before training (reference), and to update. All but the last are without gradient and all are in train mode, so the phase
is told by the trainer's own methods, never guessed. Knows trainers and edits; knows nothing about losses or rewards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from attribution.capture import Edit, edited, evaluating
from attribution.causes import BATCH_SIZE
from attribution.causes.ablation import edits_without
from attribution.causes.reference import Values, mean_activations, zeros
from attribution.components import Components
from attribution.recipes import Setting
from attribution.recipes.trainer import Intervention
from attribution.samples import batches
from attribution.updates.seam import effective

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # a trainer of TRL stands behind it, see `phased`

PHASES = ("sample", "old", "reference", "update")


class Phases:
    """The phase of a training that is running, and an intervention in some phases.

    Args:
        intervention: what is switched off, and when.
        setting: what is trained; its model is still as it was before training.

    Attributes:
        now: one of PHASES; None outside of the trainer's passes.
        seen: by phase and whether the set was ablated in it, how many activations passed a place of intervention.
    """

    def __init__(self, intervention: Intervention, setting: Setting):
        self.now: str | None = None
        self.seen: Counter[tuple[str | None, bool]] = Counter()
        self._intervention, self._recorder = intervention, setting.recorder
        index = Components(setting.model)
        self._positions = index.positions(setting.sets[intervention.components] if intervention.components else ())
        self._values: Values = zeros(index.parts)
        if intervention.reference == "mean" and intervention.components:
            device = next(setting.model.parameters()).device
            with evaluating(setting.model):
                self._values = mean_activations(index.parts, batches(setting.neutral, BATCH_SIZE, device))
        self._adapters: list[Any] = []

    @contextmanager
    def during(self, phase: str | None) -> Iterator[None]:
        """The block is of this phase."""
        before, self.now = self.now, phase
        try:
            yield
        finally:
            self.now = before

    @property
    def without_adapters(self) -> bool:
        """Whether adapters are off, which makes an adapted model its own reference."""
        return any(layer.disable_adapters or list(layer.active_adapters) != on for layer, on in self._adapters)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Intervene in the passes of this model, with or without adapters, inside the block."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._adapters = [(layer, list(layer.active_adapters)) for layer in layers]
        if self._intervention.idle:
            yield
            return
        twin = effective(model)
        index = Components(model if twin is None else twin.model)
        edits: dict[nn.Module, Edit] = {}
        for site, edit in edits_without(index, self._positions, self._values).items():
            edits[site.module(index.parts) if twin is None else twin.outputs[site]] = self._where_ablated(edit)
        with ExitStack() as stack:
            stack.enter_context(edited(edits))
            updating = self._intervention.updating
            if updating == "stopped":
                stack.enter_context(_stopped(self, index, self._positions))
            if updating != "intact" and self._recorder is not None:
                self._recorder.intervened(self._positions, ablated=updating == "ablated")
            yield

    def ablates(self) -> bool:
        """Whether the set is ablated in the pass that is running."""
        match self.now:
            case "sample" | "old":
                return self._intervention.sampling == "ablated"
            case "update":
                return self._intervention.updating == "ablated" and not self.without_adapters
        return False

    def _where_ablated(self, edit: Edit) -> Edit:
        def conditional(activation: Tensor) -> Tensor:
            ablated = self.ablates()
            self.seen["reference" if self.now == "update" and self.without_adapters else self.now, ablated] += 1
            return edit(activation) if ablated else activation

        return conditional


class PhasedTrainer(_Trainer):
    """Stands before a trainer of TRL and tells `phases` when it updates; see `phased`."""

    phases: Phases

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases.on(self.model):
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.phases.during(None):
            return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases.during(None):
            return super().prediction_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.phases.now = "update"  # and so it stays through the backward pass, in which checkpoints are recomputed
        return super().compute_loss(*args, **kwargs)


def phased(trainer: type, phases: Phases, over: type[PhasedTrainer] = PhasedTrainer, **attributes: Any) -> type:
    """A trainer of TRL that tells its phases, otherwise unchanged.

    Args:
        trainer: the class.
        phases: to be told.
        over: what stands before it.
        attributes: of `over`.
    """
    return type(trainer.__name__, (over, trainer), {"phases": phases, **attributes})


@contextmanager
def _stopped(phases: Phases, index: Components, positions: np.ndarray) -> Iterator[None]:
    """No gradient for the parameters of these components, in updates inside the block."""
    mask, handles = index.group_mask(positions), []
    for use in index.uses:
        chosen = mask[use.owners]
        if not chosen.any():
            continue
        here = use.spread(chosen)

        def stop(gradient: Tensor, here: Tensor = here) -> Tensor:
            return gradient.masked_fill(here, 0) if phases.now == "update" else gradient

        if use.parameter.requires_grad:
            handles.append(use.parameter.register_hook(stop))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
