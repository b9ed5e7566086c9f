"""LoRA in the space of the weights it makes: a plain twin of an adapted model, and the training gradient of its matrices.

An adapted linear computes with W + sum over active adapters of scaling * B A. Heads and neurons are slices of that matrix;
of A and B they share one or the other. So results live in its space, where LoRA and full finetuning compare.

Knows PEFT's layers, module trees and autograd; knows nothing about steps, probes or what a gradient is read for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from attribution.capture import Site, sites
from attribution.errors import RecordError
from attribution.models import anatomy
from attribution.updates.watcher import Watcher

# What trainers, compilers and PEFT put on a module from outside; a patched forward would run the original's.
_FROM_OUTSIDE = ("forward", "peft_config", "_hf_peft_config_loaded")
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def adapted(model: nn.Module) -> bool:
    """Whether a model holds layers of PEFT, in whatever wrapper it trains."""
    return any(_of_peft(module) for module in model.modules())


class _Adapted(NamedTuple):
    layer: LoraLinear
    weight: nn.Parameter  # the twin's
    active: tuple[str, ...]  # adapters at build


class Effective:
    """A plain twin of a model with LoRA layers, with the weights that the adapted model computes with.

    Parameters without an adapter are the original Parameter objects; adapted matrices are the twin's own and follow at
    `refresh`. The twin has modules, modes and hooks of its own, and none of the original's hooks.

    Args:
        model: a `PeftModel`, or a transformers causal LM with LoRA layers injected, bare or in a data-parallel wrapper.

    Attributes:
        original: the transformers model inside, with its adapters: the one that is trained.
        model: the twin, of the same class and with the same config.
        originals: for every module of the twin the module it stands for; for an adapted linear the LoRA layer.
        moving: names of the twin's parameters that training can change: adapted matrices and what was trainable at build.

    Raises:
        RecordError: adapters whose effective weights are not those of LoRA on plain linear layers, or do not train; a mixture
            of experts.
    """

    def __init__(self, model: nn.Module):
        self.original = _underlying(model)
        if isinstance(head := _in_use(cast(nn.Module, self.original.get_output_embeddings())), BaseTunerLayer):
            raise RecordError(
                f"the unembedding carries an adapter ({_kind(head)}), past which trainers with a fused head, such as TRL's, "
                "read lm_head.weight; leave it out of target_modules, or train it whole with modules_to_save"
            )
        self._adapted: dict[str, _Adapted] = {}
        twins: dict[nn.Module, nn.Module] = {}
        self.model = cast(PreTrainedModel, self._twin(self.original, "", twins))
        if anatomy(self.model).row.experts:
            raise RecordError(
                f"{type(self.model).__name__} is a mixture of experts, whose neurons are not recorded under adapters; train "
                "it whole"
            )
        self.originals = {twin: original for original, twin in twins.items()}
        trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.moving = frozenset(trainable)  # the twin's own matrices require gradients
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the twin up to date, in place: its own matrices from base weights and adapters, and every module's mode.

        Raises:
            RecordError: other adapters are active than at build, or they are merged or disabled.
        """
        for name, (layer, weight, active) in self._adapted.items():
            _check_state(layer, name)
            if tuple(layer.active_adapters) != active:
                raise RecordError(
                    f"{name}: the active adapters were {', '.join(active)} and are now {', '.join(layer.active_adapters)}, "
                    "which no training step does; record one set of adapters at a time"
                )
            weight.copy_(_effective_weight(layer))
        for twin, original in self.originals.items():
            twin.training = original.training

    @property
    def outputs(self) -> dict[Site, nn.Module]:
        """The output linears of the original, by site."""
        parts = anatomy(self.model)
        return {site: self.originals[site.module(parts)] for site in sites(parts)}

    @property
    def not_measured(self) -> list[str]:
        """What a record of this training cannot say, in sentences."""
        found = []
        if not anatomy(self.model).unembedding.weight.requires_grad:
            found.append(
                "Unembedding rows on the training batch before a step: under adapters the unembedding is frozen, and no "
                "gradient is formed there. On probe sets, and on the batch after a step, they are read."
            )
        layers = [adapted.layer for adapted in self._adapted.values()]
        if any(getattr(dropout, "p", 0) for layer in layers for dropout in layer.lora_dropout.values()):
            found.append(
                "Adapter dropout: causes on the batch before a step are with it, all else is read of the weights without it."
            )
        if any(adapted.weight.dtype.itemsize < 4 for adapted in self._adapted.values()):
            found.append(
                "Effective weights are rounded to the type of the base weights, below which changes by the adapters vanish."
            )
        return found

    def _twin(self, module: nn.Module, path: str, twins: dict[nn.Module, nn.Module]) -> nn.Module:
        module = _in_use(module)
        if module in twins:
            return twins[module]
        if _of_peft(module):
            layer = _lora(module, path)
            base = layer.get_base_layer()
            twin, weight = _alone(base), nn.Parameter(torch.empty_like(base.get_parameter("weight")))
            twin._parameters["weight"] = weight
            self._adapted[f"{path}.weight"] = _Adapted(layer, weight, tuple(layer.active_adapters))
        else:
            twin = _alone(module)
            for name, child in module._modules.items():  # named_children leaves out a module's second name
                twin._modules[name] = child if child is None else self._twin(child, f"{path}.{name}".lstrip("."), twins)
        twins[module] = twin
        return twin


class EffectiveGradients(Watcher):
    """Gradient of the training loss in effective weights, from the training passes themselves: sum over tokens of dy^T x.

    Read at every adapted linear, and at every attention-out and MLP-out linear, adapted or not. It is the gradient as
    autograd has it in the backward pass: before clipping, averaging over processes and the undoing of a loss scale. With
    dropout inside the adapter it is the gradient in the base weight.

    Start and stop between steps: a checkpointed pass must be recomputed under the hooks it was made with.

    Args:
        effective: of the model that is trained.
    """

    def __init__(self, effective: Effective):
        parts = anatomy(effective.model)
        outputs = {*parts.attention_out, *parts.mlp_out}
        self._watched: dict[str, nn.Module] = {}
        for path, twin in effective.model.named_modules():
            original = effective.originals[twin]
            if twin in outputs or isinstance(original, LoraLinear):
                self._watched[f"{path}.weight"] = original
        self.names = frozenset(self._watched)
        self._found: dict[str, Tensor] = {}

    def take(self) -> dict[str, Tensor]:
        """The sum since the last call, float32 or wider, by the weight's name in the effective model; starts anew.

        A matrix of `names` that no backward pass reached is left out.
        """
        found, self._found = self._found, {}
        return found

    def _hooks(self) -> Iterator[Any]:
        return (module.register_forward_hook(partial(self._watch, name)) for name, module in self._watched.items())

    def _watch(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.idle or not torch.is_grad_enabled():
            return
        if not output.requires_grad:  # nothing before it trains, so that the backward pass would end after it
            output.requires_grad_()
        kept = _Kept.apply(torch.empty((), requires_grad=True), args[0].detach())  # the tensor: without it its node goes

        def accumulate(gradient: Tensor) -> None:
            if not self._paused:
                self._add(name, module, gradient, kept.grad_fn.saved_tensors[0])

        # Of a pass and its recomputation only one graph is differentiated, so that only one hook fires.
        output.register_hook(accumulate)

    def _add(self, name: str, module: nn.Module, gradient: Tensor, inputs: Tensor) -> None:
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            dy, x = (value.flatten(0, -2).to(dtype) for value in (gradient, inputs))  # [token, out], [token, in]
            left, right = (x, dy) if isinstance(_base(module), Conv1D) else (dy, x)
            if name in self._found:
                self._found[name].addmm_(left.T, right)
            else:
                self._found[name] = left.T @ right


class _Kept(torch.autograd.Function):
    """A node that saves a tensor and computes nothing.

    A tensor that a hook holds survives activation checkpointing and its saving of memory; one that a node saves is
    dropped and recomputed with the rest.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None


def _effective_weight(layer: LoraLinear) -> Tensor:
    """W + sum of scaling * B A over active adapters, in float32 or wider."""
    base = cast(Tensor, layer.get_base_layer().weight)
    weight = base.to(torch.promote_types(base.dtype, torch.float32))
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            a, b = (matrices[adapter].get_parameter("weight").to(weight.dtype) for matrices in (layer.lora_A, layer.lora_B))
            product = (b @ a) * layer.scaling[adapter]
            weight = weight + (product.T if layer.fan_in_fan_out else product)
    return weight


def _underlying(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers of PEFT and of data-parallel training."""
    while not isinstance(model, PreTrainedModel):
        if isinstance(model, PeftModel):
            for name, config in model.peft_config.items():
                if config.is_prompt_learning:
                    raise RecordError(
                        f"adapter {name!r} is of a {type(config).__name__}, which changes the prompt and no weight; record "
                        "LoRA on linear layers, or full finetuning"
                    )
            inner = model.base_model
        else:
            inner = model.model if isinstance(model, BaseTuner) else getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise RecordError(
                f"{type(model).__name__} holds no transformers model to record; pass the PeftModel, or the model its adapters "
                "were injected into"
            )
        model = inner
    return model


def _of_peft(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _in_use(module: nn.Module) -> nn.Module:
    """The module itself; of a wrapper around copies of one that train whole (`modules_to_save`), the copy its forward runs."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    names = [] if module.disable_adapters else module.active_adapters
    return module.modules_to_save[names[0]] if names and names[0] in module.modules_to_save else module.original_module


def _alone(module: nn.Module) -> nn.Module:
    """A copy of one module: the same parameters, buffers and settings; none of its children, hooks and patches."""
    twin = copy.copy(module)
    settings = vars(twin)
    for name in [name for name in settings if "hook" in name or name in _FROM_OUTSIDE]:
        del settings[name]
    settings.update({name: value for name, value in vars(nn.Module()).items() if "hook" in name})
    settings.update(
        _parameters=dict(module._parameters),
        _buffers=dict(module._buffers),
        _non_persistent_buffers_set=set(module._non_persistent_buffers_set),
        _modules=dict.fromkeys(module._modules),
    )
    return twin


def _lora(module: nn.Module, path: str) -> LoraLinear:
    """The module, if it is LoRA on a plain linear.

    Raises:
        RecordError: it is something else of PEFT's.
    """
    if type(module) is not LoraLinear:
        raise RecordError(
            f"{path} is {_kind(module)}, whose effective weight is not known here; record LoRA on linear layers, or full "
            "finetuning"
        )
    base = module.get_base_layer()
    weight = getattr(base, "weight", None)
    if type(base) not in (nn.Linear, Conv1D) or type(weight) is not nn.Parameter or weight.dtype not in _PLAIN_DTYPES:
        raise RecordError(
            f"{path} is LoRA on {_kind(base)} with a weight of {_kind(weight)}, {getattr(weight, 'dtype', None)}; expected "
            "a linear with a plain floating point weight: load the model neither quantized nor sharded"
        )
    for adapter in module.active_adapters:
        if adapter in module.lora_variant:
            raise RecordError(
                f"adapter {adapter!r} at {path} is {_kind(module.lora_variant[adapter])}, which is not W + scaling * B A; "
                "record plain LoRA (no use_dora, nor another variant)"
            )
        if module.lora_bias.get(adapter):
            raise RecordError(f"adapter {adapter!r} at {path} trains a bias beside B; record LoRA with lora_bias=False")
    _check_state(module, path)
    return module


def _check_state(layer: LoraLinear, path: str) -> None:
    if layer.merged:
        raise RecordError(
            f"adapter {layer.merged_adapters[0]!r} at {path} is merged into the base weight, where training does not reach "
            "it; call unmerge_adapter() first"
        )
    if layer.disable_adapters:
        raise RecordError(f"the adapters at {path} are disabled, so that they do not train; call enable_adapters() first")


def _kind(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
