"""The step that an optimizer is about to take, computed before it takes it, in float32 or better.

A bf16 parameter has eight bits: a step below half of the last one is rounded away, and what the optimizer intended
cannot be read off the weights afterwards. And a forecast needs the step while the model is still at its start.

Knows the update rules of torch's SGD, Adam and AdamW; knows nothing about models or recording, and changes nothing.
Which of torch's implementations runs (one tensor at a time, foreach, fused, capturable) makes no difference but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import unwrap
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from attribution.errors import ConfigError

Rule = Callable[[Tensor, Tensor, Mapping[str, Any], Mapping[str, Any]], Tensor]  # of parameter, gradient, state, group
_KEPT = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # of a state, what is shaped like the parameter


class Plan(NamedTuple):
    """A step that is about to be taken, not yet computed.

    Attributes:
        arrays: what it depends on, each shaped like the parameter.
        step: makes it of them, element by element, so that a block of each gives a block of it; in their precision, which is
            to be float32 or better.
    """

    arrays: tuple[Tensor, ...]
    step: Callable[..., Tensor]


@torch.no_grad()
def planned_step(optimizer: Optimizer, parameter: Tensor, gradient: Tensor | None = None) -> Tensor:
    """Change of a parameter that `optimizer.step()` intends, from gradient and optimizer state as they are now.

    Args:
        optimizer, parameter, gradient: as `plan_of` takes them.

    Returns:
        Shaped like the parameter, float64 for a float64 parameter and float32 for any other; zeros where there is no
        gradient, since torch skips such a parameter, weight decay included.

    Raises:
        ConfigError: as `plan_of`.
    """
    plan, wide = plan_of(optimizer, parameter, gradient), torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=wide) if plan is None else plan.step(*(each.to(wide) for each in plan.arrays))


@torch.no_grad()
def plan_of(optimizer: Optimizer, parameter: Tensor, gradient: Tensor | None = None) -> Plan | None:
    """What a step will do to a parameter; None where there is no gradient.

    Args:
        optimizer: one that is `plannable`; what it does besides its rule, in hooks say, is not seen.
        parameter: one that it holds.
        gradient: take this instead of the parameter's own, after clipping and unscaling.

    Raises:
        ConfigError: an optimizer of another kind, one that does not hold the parameter, or a gradient of another shape.
    """
    rule = _rule(optimizer)
    if rule is None:
        raise ConfigError(
            f"the step of {type(optimizer).__name__} cannot be planned; expected SGD, Adam or AdamW of torch itself, or a "
            "subclass that keeps their step"
        )
    group = next((group for group in optimizer.param_groups if any(own is parameter for own in group["params"])), None)
    if group is None:
        raise ConfigError(
            f"a parameter of shape {tuple(parameter.shape)} is in no group of this {type(optimizer).__name__}, which leaves it "
            "as it is; ask only for parameters that the optimizer holds"
        )
    scale = None if gradient is not None else getattr(optimizer, "grad_scale", None)  # which a fused optimizer divides by
    consumed = _own_gradient(optimizer, parameter) if gradient is None else gradient
    if consumed is None:
        return None
    if consumed.shape != parameter.shape:
        raise ConfigError(
            f"a gradient of shape {tuple(consumed.shape)} was given for a parameter of shape {tuple(parameter.shape)}; give "
            "one of the same shape"
        )
    state = optimizer.state.get(parameter, {})  # [] would make an entry
    kept = {name: _dense(state[name]) for name in _KEPT if state.get(name) is not None}
    told = {"step": float(state.get("step", 0))}

    def step(here: Tensor, slope: Tensor, *values: Tensor) -> Tensor:
        slope = slope if scale is None else slope / scale.to(slope)
        return rule(here, slope, {**told, **dict(zip(kept, values, strict=True))}, group)

    return Plan((parameter.detach(), _dense(consumed), *kept.values()), step)


def plannable(optimizer: Any) -> bool:
    """Whether the step of this optimizer is known: torch's SGD, Adam or AdamW, or a subclass that keeps their step."""
    return _rule(optimizer) is not None


def _rule(optimizer: Any) -> Rule | None:
    for kind, rule in ((SGD, _sgd), (Adam, _adam)):  # an AdamW is an Adam whose groups decouple the decay
        # torch wraps the step of a class when it makes the first optimizer of it: compare what is inside
        if isinstance(optimizer, kind) and unwrap(type(optimizer).step) is unwrap(kind.step):
            return rule
    return None


def _own_gradient(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    """The gradient that the step will use; a loss scaler leaves it to a fused optimizer to skip the step."""
    overflow = getattr(optimizer, "found_inf", None)
    return None if overflow is not None and overflow.item() else parameter.grad


def _dense(array: Tensor) -> Tensor:
    return array.to_dense() if array.is_sparse else array


def _sgd(parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    step = _descent(gradient, group) + float(group["weight_decay"]) * parameter
    momentum = float(group["momentum"])
    if momentum:
        kept = state.get("momentum_buffer")
        # the first gradient enters undampened
        velocity = step if kept is None else momentum * kept + (1 - float(group["dampening"])) * step
        step = step + momentum * velocity if group["nesterov"] else velocity
    return -float(group["lr"]) * step


def _adam(parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    rate, decay = float(group["lr"]), float(group["weight_decay"])
    first, second = (float(beta) for beta in group["betas"])
    count = state["step"] + 1
    gradient = _descent(gradient, group)
    if not group["decoupled_weight_decay"]:
        gradient, decay = gradient + decay * parameter, 0.0
    nothing = torch.zeros_like(gradient)
    mean = state.get("exp_avg", nothing).lerp(gradient, 1 - first)
    square = second * state.get("exp_avg_sq", nothing) + (1 - second) * gradient.square()
    if group["amsgrad"]:
        square = torch.maximum(state.get("max_exp_avg_sq", nothing), square)
    spread = square.sqrt() / (1 - second**count) ** 0.5 + group["eps"]
    return -(rate / (1 - first**count)) * mean / spread - rate * decay * parameter


def _descent(gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
    return -gradient if group["maximize"] else gradient
