"""One optimizer step on the training batch: what the pre-hook can see, and what the step made of it, per group.

Knows the batch, the gradients as consumed and the path of the weights; knows nothing about probe sets or files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from attribution.components import Components
from attribution.sharding import local, rounded_to, same_everywhere, settle
from attribution.updates.batch import BatchWatch, Watched
from attribution.updates.planned import plan_of, plannable
from attribution.updates.share import Path


@dataclass(frozen=True)
class Before:
    """One step as the pre-hook saw it.

    Attributes:
        watched: the batch.
        grad_norm: of the gradient as consumed.
        gradients: as consumed, by use; these and all below empty at steps of which only the row in `steps` is kept.
        versions: of the gradients, to notice an optimizer that writes into them.
        columns: by name, Float64 [components], of the frame `components`.
        squares: by name, Float64 [groups].
    """

    watched: Watched
    grad_norm: float
    gradients: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[nn.Parameter, int] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)


class BatchStep:
    """Reads the batch around the optimizer's step.

    Args:
        components: of the model; under adapters, of its plain twin.
        watch: of the training passes.
        optimizer: that steps.
        scaler: the loss scaler, where there is one.
    """

    def __init__(self, components: Components, watch: BatchWatch, optimizer: torch.optim.Optimizer, scaler: Any = None):
        self.components, self.watch, self.optimizer, self.scaler = components, watch, optimizer, scaler
        rounded = any(parameter.dtype.itemsize < 4 for parameter in self._trained())
        self._plans = rounded and plannable(optimizer) and watch.effective is None

    def look(self) -> Before:
        """The batch and the norm of its gradient, which takes next to nothing.

        Raises:
            RecordError: processes that hold the same model have different gradients.
        """
        settle(self.components.parts.model)
        handed = getattr(self.optimizer, "grad_scale", None)  # to a fused optimizer, which divides by it itself
        consumed_scale = 1.0 if handed is None else float(handed)
        scale = float(self.scaler.get_scale()) if self.scaler is not None else consumed_scale
        watched = self.watch.take(scale, consumed_scale)
        gradients = [local(parameter.grad) for parameter in self._trained() if parameter.grad is not None]
        norm = get_total_norm(gradients).item()
        if (together := self.components.together).several:
            norm = together.sums(norm**2)[0] ** 0.5
        else:
            same_everywhere(self.watch.among, norm, "gradients")
        return Before(watched, norm / consumed_scale)

    def before(self, seen: Before) -> Before:
        """The same with causes, sizes and norms."""
        watched = seen.watched
        gradients, sizes = self.watch.gradients(watched), watched.sizes.measured()
        weights, consumed, causes = self.components.norms_and_causes(gradients)
        squares = {"weight_norm": weights, "grad_norm": consumed}
        if self._plans:
            squares["intended_norm"] = self._intended()
        return Before(
            watched,
            seen.grad_norm,
            gradients,
            {p: local(p.grad)._version for p in self._trained() if p.grad is not None},
            {
                "cause_before": self.watch.causes(watched, gradients, causes),
                "activation_before": sizes.activation,
                "gradient_before": sizes.gradient * ((watched.normalizer or 1.0) / watched.scale),
            },
            squares,
        )

    def after(self, before: Before, path: Path) -> tuple[float, dict[str, Tensor], list[str]]:
        """Norm of the change, columns per group, and notes.

        Columns are squared norms of weights, gradient and change, <g, dtheta>, and the fraction changed.
        """
        moved, notes = path.moved(before.gradients), []
        products = moved.products
        now = {p: None if p.grad is None else local(p.grad)._version for p in before.versions}
        if now != before.versions:
            notes.append("<g, dtheta>: this optimizer writes into the gradients, which cannot be read after its step.")
            products = torch.full_like(products, float("nan"))
        if self.watch.ablated:
            notes.append(
                "The batch after a step: updates ran with a set ablated; before a step the batch is read so, after it not."
            )
        if before.watched.normalizer is None:
            notes.append(
                "Causes on the training batch are those of minus the loss as optimized, which is no mean log-probability."
            )
        if before.watched.autocast is not None:
            notes.append(
                f"Training ran under autocast in {before.watched.autocast}: causes on the batch are no more precise than that."
            )
        if (rounded := rounded_to(self.components.parts.model)) is not None:
            notes.append(f"FSDP rounds weights to {rounded} in every pass: all that passes tell is no more precise than that.")
        if before.watched.clip_factor is None:
            notes.append(
                "Clip factor: no single factor explains the consumed gradient in some step; there, batch causes contain it."
            )
        groups = {
            **before.squares,
            "update_norm": moved.squares,
            "grad_dot_update": products,
            "changed": moved.changed / self.components.sizes,
        }
        return moved.length, groups, notes

    def row(self, before: Before) -> dict[str, Any]:
        """Columns of the frame `steps` that the pre-hook knows."""
        watched, clip = before.watched, before.watched.clip_factor
        return {
            "loss": watched.loss,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "grad_norm": before.grad_norm,
            "grad_norm_raw": before.grad_norm / clip if clip else None,
            "clip_factor": clip,
            "normalizer": watched.normalizer,
            "batch_before": watched.log_prob,
        }

    def _intended(self) -> Tensor:
        """Squared norm of the step that is planned, Float64 [groups]: a block of a parameter at a time, see `uses`."""
        held, sums = set(self._trained()), {}
        for use in self.components.uses:
            plan = plan_of(self.optimizer, use.parameter) if use.parameter in held else None
            if plan is not None:
                made = plan.step
                sums[use.name] = use.sums(*map(local, plan.arrays), of=lambda *blocks, made=made: [made(*blocks).square()])
        return self.components.grouped(sums)[0]

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
