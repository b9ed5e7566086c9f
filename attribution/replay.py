"""Run a batch once, and copies of it on from any layer, with parts of them edited.

Knows layers, batches and what has to be computed; knows nothing about why an activation is edited.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attribution.capture import (
    Edit,
    edited,
    needed,
    only_at,
    places_on,
    read_by_logits_alone,
    rewritten,
    sites,
    supplied,
    tapped,
)
from attribution.models import Anatomy
from attribution.samples import Batch


class _Reached(Exception):
    """A pass came as far as it was wanted to."""

    def __init__(self, value: Tensor):
        self.value = value


class Replay:
    """One pass kept layer by layer, from any of which copies of the batch can be run on again.

    A component's ablation changes nothing before its layer, so only the layers after it are run, for many ablations in
    one batch; positions after the last scored one are not run at all, and in the last layer only keys and values are needed
    elsewhere than at scored positions. No gradients.

    Attributes:
        scored: Bool [sample, position], up to the last scored position; all that follows has as many positions.
        activations: Float [sample, position, feature] per site.
        hidden: inputs of every layer, and of the final norm: [sample, position, width], depth + 1 of them.
        through: of every layer, the projections that read its input through a norm, and that norm.
        logits: of the pass, at scored positions.
    """

    @torch.no_grad()
    def __init__(self, parts: Anatomy, batch: Batch):
        self.parts, self.batch = parts, batch
        until = needed(parts, batch)
        self.scored = batch.scored[:, :until]
        self.hidden: list[Tensor] = []
        self.through: list[dict[nn.Module, nn.Module]] = []
        self._calls: list[tuple[tuple, dict[str, Any]]] = []
        handles = [layer.register_forward_pre_hook(self._keep, with_kwargs=True) for layer in parts.layers]
        for number, layer in enumerate(parts.layers):
            norms = [module for module in layer.modules() if "norm" in type(module).__name__.lower()]
            handles += [norm.register_forward_hook(self._normed) for norm in norms]
            projections = [parts.projection(number, projection) for projection in parts.row.projections]
            handles += [projection.register_forward_pre_hook(self._projects) for projection in projections]
        handles.append(parts.final_norm.register_forward_pre_hook(lambda _module, args: self.hidden.append(args[0])))
        try:
            with tapped(parts, sites(parts)) as self.activations:
                hidden = parts.model.base_model(input_ids=batch.ids[:, :until], use_cache=False).last_hidden_state
                self.logits = parts.unembed(hidden[self.scored.to(hidden.device)]).to(batch.ids.device)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def run(
        self,
        hidden: Tensor,
        first: int,
        edits: Mapping[nn.Module, Edit] | None = None,
        known: Mapping[nn.Module, Tensor] | None = None,
    ) -> Tensor:
        """Run copies of the batch from the input of layer `first` to the logits.

        Args:
            hidden: Float [copies * sample, position, width], copy after copy.
            first: the first layer to run; the model's depth to run none.
            edits: as `edited` takes them.
            known: outputs in layer `first`, as `supplied` takes them.

        Returns:
            Float [copies, token, vocabulary] at scored positions.
        """
        copies = len(hidden) // len(self.batch)
        scored = self.scored.repeat(copies, 1).nonzero(as_tuple=True)
        with edited(edits or {}), supplied(known or {}):
            for number in range(first, self.parts.depth):
                last = read_by_logits_alone(self.parts, edits or (), known or ()) if number == self.parts.depth - 1 else ()
                with only_at(last, scored):
                    hidden = self._layer(number, hidden)
        return self.read(hidden[places_on(scored, hidden)].unflatten(0, (copies, -1)))

    @torch.no_grad()
    def read(self, hidden: Tensor) -> Tensor:
        """Logits [copies, token, vocabulary] from inputs of the final norm at scored positions, [copies, token, width]."""
        return self.parts.unembed(self.parts.final_norm(hidden)).to(self.batch.ids.device)

    @torch.no_grad()
    def heads_with(self, layer: int, edits: Mapping[nn.Module, Edit], copies: int) -> Tensor:
        """What the heads of a layer put out, [copies * sample, position, feature], when outputs inside it are edited.

        Args:
            layer: run from its input in the pass, and no further than to the attention's output linear.
            edits: of outputs, as `rewritten` takes them.
            copies: of the batch.
        """

        def stop(_module: nn.Module, args: tuple) -> None:
            raise _Reached(args[0])

        handle = self.parts.attention_out[layer].register_forward_pre_hook(stop)
        try:
            with rewritten(edits):
                self._layer(layer, self.hidden[layer].repeat(copies, 1, 1))
        except _Reached as reached:
            return reached.value
        finally:
            handle.remove()
        raise AssertionError("a layer ran without its attention's output linear")

    def _layer(self, number: int, hidden: Tensor) -> Tensor:
        copies = len(hidden) // len(self.batch)
        args, kwargs = self._calls[number]
        args, kwargs = [self._tiled(a, copies) for a in args], {k: self._tiled(v, copies) for k, v in kwargs.items()}
        out = self.parts.layers[number](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _keep(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        self.hidden.append(args[0] if args else kwargs.pop("hidden_states"))
        self._calls.append((args[1:], kwargs))
        self.through.append({})
        self._outputs: list[tuple[nn.Module, Tensor]] = []  # of norms of this layer's input

    def _normed(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        if args[0] is self.hidden[-1]:
            self._outputs.append((module, out))

    def _projects(self, module: nn.Module, args: tuple) -> None:
        for norm, out in self._outputs:
            if args[0] is out:
                self.through[-1][module] = norm

    def _tiled(self, value: Any, copies: int) -> Any:
        """Repeat what has one entry per sample (masks, positions, rotations); leave the rest to broadcasting."""
        if isinstance(value, tuple):
            return tuple(self._tiled(item, copies) for item in value)
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(self.batch) > 1:
            return value.repeat(copies, *[1] * (value.ndim - 1))
        return value
