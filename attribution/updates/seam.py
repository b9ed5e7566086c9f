"""The torch optimizer as the place where every step can be seen: which trainings have it, and which steps did nothing.

Knows optimizers, trainers' wrappers of them, adapters and processes; knows nothing about what is recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attribution.errors import RecordError
from attribution.sharding import check_trainable

if TYPE_CHECKING:
    from attribution.updates.adapters import Effective

REPLICAS = "DataParallel runs replicas that cannot be recorded; use one device (CUDA_VISIBLE_DEVICES=0)"
# Optimizers whose `step` is empty because they update inside the backward pass.
_INSIDE_BACKWARD = ("lomo", "adalomo", "layerwisedummyoptimizer")


def recordable(model: nn.Module, optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer whose hooks show every step of this model.

    Raises:
        RecordError: a training that cannot be recorded truthfully, with the reason.
    """
    while type(optimizer).__name__ == "AcceleratedOptimizer":  # never initialised as a torch optimizer: it has no hooks
        optimizer = optimizer.optimizer
    name = type(optimizer).__name__
    if name.lower() in _INSIDE_BACKWARD:
        raise RecordError(
            f"{name} updates layer by layer inside the backward pass, so no step can be seen; train with a plain torch "
            "optimizer, and for memory with LoRA"
        )
    if "deepspeed" in type(optimizer).__module__ or not isinstance(optimizer, torch.optim.Optimizer):
        raise RecordError(
            f"{name} is no torch optimizer, so its steps cannot be seen; train with one, and to shard the model with FSDP2, "
            "not DeepSpeed"
        )
    if isinstance(model, nn.DataParallel):
        raise RecordError(REPLICAS)
    check_trainable(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise RecordError("this optimizer holds no parameter of this model; attach the recorder to the one that trains it")
    if trained and all(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in trained):
        raise RecordError(
            "every parameter has a hook that runs when its gradient is ready, as optimizers that step inside the backward "
            "pass do; step after it (in torchtune: optimizer_in_bwd=False)"
        )
    return optimizer


def elsewhere(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """A sentence where parameters train that this optimizer does not hold."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    count = sum(parameter not in held for parameter in model.parameters() if parameter.requires_grad)
    told = f"{count} trainable parameters are not in the optimizer that is recorded: if another one moves them, shares of that "
    return [f"{told}change are in the residual."] if count else []


def refuse_closure(args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Raise RecordError where a step was called with a closure, from these arguments of its hook."""
    if any(given is not None for given in args[1:]) or kwargs.get("closure") is not None:
        raise RecordError(
            "step(closure) makes its gradient inside the step, where it cannot be seen; call backward first, then step()"
        )


def overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a loss scaler told a fused optimizer to leave the parameters as they are in the step under way."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def effective(model: nn.Module) -> Effective | None:
    """The plain twin of a model with adapters; None for a model without. PEFT is not imported for the latter.

    Raises:
        RecordError: adapters that are not recorded.
    """
    if "peft" not in sys.modules:
        return None
    from attribution.updates.adapters import Effective, adapted

    if not adapted(model):
        return None
    twin = Effective(model)
    embedding, head = twin.model.get_input_embeddings(), twin.model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight and head.weight.requires_grad:
        raise RecordError(
            "the embedding, tied to the unembedding, trains beside adapters, where its two uses cannot be told apart; freeze "
            "it, or untie the two (tie_word_embeddings=False)"
        )
    return twin


def plain(model: nn.Module) -> nn.Module:
    """The model itself, or under adapters a plain model with their effective weights as they are now."""
    twin = effective(model)
    return model if twin is None else twin.model
