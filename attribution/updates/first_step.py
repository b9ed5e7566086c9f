"""The step that a training is about to take first: its own gradients, clipping, loss and optimizer, and no weight moved.

The training is run until an optimizer of the model steps for the first time, and left there. Knows optimizers, adapters
and how to leave a loop; knows nothing about what the step is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from attribution.components import Components
from attribution.errors import AttributionError, RecordError
from attribution.updates.planned import planned_step
from attribution.updates.seam import effective, overflowed, recordable


class _Stop(BaseException):
    """Leaves a training. No `Exception`, which a loop may catch to go on."""


def first_step(train: Callable[[], object], model: nn.Module) -> dict[str, Tensor]:
    """The change of weights that a training is about to make first. No weight of the model moves.

    Afterwards gradients, modes and random state (torch, numpy, python) are as before; what `train` does to the model before
    its first step, as putting adapters in, stays. Of several optimizers of one model, the step of the one that comes first.
    Where the learning rate warms up from 0, that step is 0.

    Args:
        train: runs the training, however it does; a trainer's `train`, or a loop that ends in `optimizer.step()`.
        model: the one that trains, or the base model into which `train` puts its LoRA adapters.

    Returns:
        Change of every parameter that the optimizer has a gradient for, by name in `Components.stored`, float32 or wider; of
        a model with adapters, of the effective weights of its plain twin (`Components(seam.plain(model))`).

    Raises:
        ConfigError: an optimizer whose step cannot be planned.
        RecordError: the training ends without a step or moves weights otherwise, or its steps cannot be seen.
        ModelError: an unknown architecture.
        Whatever `train` raises.
    """
    gradients = {parameter: None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()}
    weights = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    found: dict[str, Tensor] | AttributionError | None = None
    handles: list[Any] = []

    def about_to_step(optimizer: Optimizer, args: tuple, kwargs: Mapping[str, Any]) -> None:
        nonlocal found
        if found is None:
            try:
                found = _planned(optimizer, model, args, kwargs)
            except AttributionError as error:  # raised after the loop, which might catch it
                found = error
        raise _Stop

    def seen(optimizer: Optimizer, args: tuple, kwargs: Mapping[str, Any]) -> None:
        # The optimizer's own hooks run after those of all optimizers and may change gradients: come after the last of them.
        if held_by(optimizer, model) and not overflowed(optimizer):
            handles.append(optimizer.register_step_pre_hook(about_to_step))

    handles.append(register_optimizer_step_pre_hook(seen))
    moved = 0
    with _random_state_kept():
        try:
            train()
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in modes.items():
                module.training = mode
            for parameter in model.parameters():
                parameter.grad = gradients.get(parameter)
            moved = _put_back(weights)
    if isinstance(found, AttributionError):
        raise found
    if moved:
        raise RecordError(
            f"{moved} parameters changed before the first step that could be seen, and were put back; train with a plain torch "
            "optimizer that steps after the backward pass"
        )
    if found is None:
        raise RecordError(
            "the training ended without a step of an optimizer that holds a parameter of this model; let it make one, and pass "
            "the model that it trains"
        )
    return found


def held_by(optimizer: Any, model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model that an optimizer holds."""
    own = {id(parameter) for parameter in model.parameters()}
    groups = getattr(optimizer, "param_groups", ())
    return [parameter for group in groups for parameter in group["params"] if id(parameter) in own]


def in_stored(components: Components, twin: Any, changes: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """Changes by parameter as changes by name in `Components.stored`.

    Args:
        components: of the model, or of its plain twin.
        twin: an `adapters.Effective`; None where there are no adapters. An adapted matrix W + s B A changes by
            s ((B + dB)(A + dA) - B A), computed so that nothing cancels.
        changes: of the parameters that train.
    """
    found = {name: changes[parameter] for name, parameter in components.stored.items() if parameter in changes}
    if twin is None:
        return found
    for use in components.uses:
        layer = twin.originals[use.module]
        if use.attribute == "weight" and hasattr(layer, "lora_A"):  # of PEFT's layers a twin stands for these alone
            found[use.name] = _of_adapters(layer, changes)
    return found


def _of_adapters(layer: Any, changes: Mapping[Any, Tensor]) -> Tensor:
    base = layer.get_base_layer().weight
    total = changes.get(base, torch.zeros_like(base, dtype=torch.promote_types(base.dtype, torch.float32)))
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            da, db = (changes.get(matrix, torch.zeros_like(matrix)).to(total) for matrix in (a, b))
            a, b = (matrix.detach().to(total) for matrix in (a, b))
            product = (db @ (a + da) + b @ da) * layer.scaling[adapter]
            total = total + (product.T if layer.fan_in_fan_out else product)
    return total


def _planned(optimizer: Optimizer, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    recordable(model, optimizer)
    if any(given is not None for given in args[1:]) or kwargs.get("closure") is not None:
        raise RecordError(
            "step(closure) makes its gradient inside the step, where it cannot be seen; call backward first, then step()"
        )
    moving = [parameter for parameter in held_by(optimizer, model) if parameter.grad is not None]
    changes = {parameter: planned_step(optimizer, parameter) for parameter in moving}
    twin = effective(model)
    return in_stored(Components(model if twin is None else twin.model), twin, changes)


def _put_back(weights: Mapping[nn.Parameter, Tensor]) -> int:
    """Give parameters these values where they have others; how many had."""
    moved = [parameter for parameter, before in weights.items() if not torch.equal(parameter.detach().to(before), before)]
    with torch.no_grad():
        for parameter in moved:
            parameter.copy_(weights[parameter])
    return len(moved)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (trainers seed and draw from this one)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
