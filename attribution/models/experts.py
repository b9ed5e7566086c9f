"""Mixtures of experts: a place in the pass where the neurons of all experts of a layer can be seen and edited.

transformers keeps the experts of a layer as 3-D matrices of one module, `gate_up_proj` [expert, 2 x neuron, width] and
`down_proj` [expert, width, neuron], and calls no module between them. Knows that layout and the kernels that run it; knows
nothing about why an activation is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from attribution.errors import ModelError

KERNELS = ("grouped_mm", "batched_mm")  # that pass all neurons through one method, in an order that is known


class ExpertsOut(nn.Module):
    """Stands for the linear by which the neurons of all experts of a layer write to the residual stream.

    Its input is Float [sample, position, expert x neuron], act(gate) x up of every neuron, zero where a token is not routed
    to the expert; it gives the input back, and the experts go on with that. What is put where a token is not routed is
    written nowhere. The experts pass through it only while a hook is on it; the model is as it was before and after, and
    computes the same bits in between.

    Attributes:
        scale: Float [sample, position, expert], the routing weights of the last pass under a hook, 0 where not routed.
    """

    scale: Tensor

    def __init__(self, block: nn.Module, experts: nn.Module):
        super().__init__()
        self._of = ref(block), ref(experts)  # they are the model's, not this module's
        self._open: list[Any] = []

    @property
    def experts(self) -> Any:
        return self._of[1]()

    @property
    def watched(self) -> bool:
        """Whether a hook is on it."""
        return bool(self._open)

    @property
    def weight(self) -> Tensor:
        """Float [residual width, expert x neuron], a copy."""
        return self.experts.down_proj.permute(1, 0, 2).flatten(1)

    def forward(self, neurons: Tensor) -> Tensor:
        return neurons

    def register_forward_pre_hook(self, hook: Callable[..., Any], **given: Any) -> Any:
        return self._opened(super().register_forward_pre_hook(hook, **given))

    def register_forward_hook(self, hook: Callable[..., Any], **given: Any) -> Any:
        return self._opened(super().register_forward_hook(hook, **given))

    def _opened(self, handle: Any) -> _Handle:
        if not self._open:
            kernel = self.experts.config._experts_implementation
            if kernel not in KERNELS:
                handle.remove()
                raise ModelError(
                    f"experts run by {kernel!r} show no single neurons; call model.set_experts_implementation"
                    f"({KERNELS[0]!r}) first"
                )
            block: Any = self._of[0]()
            self._open = [
                block.register_forward_pre_hook(self._see_tokens),
                self.experts.register_forward_pre_hook(self._see_routing),
            ]
            self.experts._apply_gate = self._through
        return _Handle(handle, self)

    def _close(self) -> None:
        if self._open and not self._forward_pre_hooks and not self._forward_hooks:
            for handle in self._open:
                handle.remove()
            self._open = []
            del self.experts._apply_gate

    def _see_tokens(self, _block: nn.Module, args: tuple) -> None:
        self._shape = args[0].shape[:-1]

    def _see_routing(self, experts: Any, args: tuple) -> None:
        _, self._routed, weights = args  # [token, slot]
        scale = weights.detach().new_zeros(len(weights), experts.num_experts).scatter(1, self._routed, weights.detach())
        self.scale = scale.view(*self._shape, experts.num_experts)

    def _through(self, gate_up: Tensor) -> Tensor:
        """Activations of routed neurons [token and slot, neuron], in the order of the kernel, through this module."""
        experts = self.experts
        neurons = type(experts)._apply_gate(experts, gate_up)
        tokens, slots = self._routed.shape
        routed = self._routed.reshape(-1)
        order = torch.arange(len(routed), device=routed.device)
        if experts.config._experts_implementation == "grouped_mm":  # expert by expert
            order = torch.sort(routed).indices
        places = order // slots * experts.num_experts + routed[order]
        spread = neurons.new_zeros(tokens * experts.num_experts, neurons.shape[-1]).index_copy(0, places, neurons)
        return self(spread.view(*self._shape, experts.num_experts * neurons.shape[-1])).reshape(spread.shape)[places]


class _Handle:
    """Takes a hook off, and with the last one the way through the place."""

    def __init__(self, handle: Any, place: ExpertsOut):
        self._handle, self._place = handle, place

    def remove(self) -> None:
        self._handle.remove()
        self._place._close()


_PLACES: WeakKeyDictionary[nn.Module, ExpertsOut] = WeakKeyDictionary()


def experts_out(block: nn.Module, experts: nn.Module) -> ExpertsOut:
    """The place of these experts, one for as long as they live.

    Args:
        block: the module around them, which takes [sample, position, width].
        experts: of one layer.
    """
    if experts not in _PLACES:
        _PLACES[experts] = ExpertsOut(block, experts)
    return _PLACES[experts]
