"""Run a batch and look inside it: logits at scored positions, taps on activations, edits of activations, replays.

Hooks live only inside the context managers of this file. Knows modules and batches; knows nothing about what a tap is
read for or why an activation is edited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attribution.models import Anatomy
from attribution.samples import Batch

Edit = Callable[[Tensor], Tensor]


class Site(NamedTuple):
    """Where components of one kind and layer are active: the input of an output linear.

    Activations there are Float [sample, position, feature]: heads x head_dim features for "head", one per neuron for
    "neuron".
    """

    kind: str
    layer: int

    def module(self, parts: Anatomy) -> nn.Module:
        return (parts.attention_out if self.kind == "head" else parts.mlp_out)[self.layer]


def sites(parts: Anatomy) -> list[Site]:
    """Every site of a model, in the order of a forward pass."""
    return [Site(kind, layer) for layer in range(parts.depth) for kind in ("head", "neuron")]


def scored_logits(parts: Anatomy, batch: Batch) -> Tensor:
    """Logits at scored positions, [token, vocabulary]; the unembedding is applied nowhere else.

    No attention mask is given: padding is on the right, where a causal model does not look. They are where the batch is,
    wherever the model's layers are.
    """
    hidden = parts.model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    return parts.unembed(hidden[batch.scored.to(hidden.device)]).to(batch.ids.device)


@contextmanager
def tapped(parts: Anatomy, where: Iterable[Site], *, differentiable: bool = False) -> Iterator[dict[Site, Tensor]]:
    """Keep the activations of these sites from every pass inside the block; the last pass stays.

    Args:
        parts: of the model that runs inside.
        where: the sites.
        differentiable: keep the tensors in the graph, so that `torch.autograd.grad(scalar, tensors)` works, with frozen
            weights too; otherwise they are detached.
    """
    seen: dict[Site, Tensor] = {}

    def keep(site: Site) -> Edit:
        def look(value: Tensor) -> Tensor:
            if differentiable and not value.requires_grad:
                value = value.detach().requires_grad_()
            seen[site] = value if differentiable else value.detach()
            return value

        return look

    with edited({site.module(parts): keep(site) for site in where}):
        yield seen


@contextmanager
def edited(edits: Mapping[nn.Module, Edit]) -> Iterator[None]:
    """Pass the first input of each module through its edit, in every pass inside the block."""

    def hook(edit: Edit) -> Callable[..., tuple]:
        return lambda _module, args: (edit(args[0]), *args[1:])

    handles = [module.register_forward_pre_hook(hook(edit)) for module, edit in edits.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rewritten(edits: Mapping[nn.Module, Edit]) -> Iterator[None]:
    """Pass the (first) output of each module through its edit, in every pass inside the block."""

    def hook(edit: Edit) -> Callable[..., Any]:
        return lambda _module, _args, out: (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

    handles = [module.register_forward_hook(hook(edit)) for module, edit in edits.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def streamed(parts: Anatomy, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Pass the residual stream before each of these layers through its edit; the model's depth is before the final norm."""

    def hook(edit: Edit) -> Callable[..., tuple[tuple, dict[str, Any]]]:
        def look(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        return look

    places = [*parts.layers, parts.final_norm]
    handles = [places[layer].register_forward_pre_hook(hook(edit), with_kwargs=True) for layer, edit in edits.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def only_at(modules: Iterable[nn.Module], positions: Tensor) -> Iterator[None]:
    """Run modules that treat positions alike at these ones only, inside the block; elsewhere their output is zero.

    Args:
        modules: each takes and returns one tensor [sample, position, feature].
        positions: Bool [sample, position].
    """

    def select(_module: nn.Module, args: tuple) -> tuple:
        return (args[0][positions.to(args[0].device)][None], *args[1:])

    def spread(_module: nn.Module, _args: tuple, out: Tensor) -> Tensor:
        whole = out.new_zeros(*positions.shape, out.shape[-1])
        whole[positions.to(out.device)] = out[0]
        return whole

    handles = [hook for module in modules for hook in (module.register_forward_pre_hook(select),
                                                       module.register_forward_hook(spread))]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block, and give every module its own mode back, whatever it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def not_checkpointing(model: nn.Module) -> Iterator[None]:
    """Keep activations inside the block instead of recomputing them: `autograd.grad` finds none in reentrant segments."""
    switched = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in switched:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True  # type: ignore[assignment]


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
        logits: of the pass, at scored positions.
    """

    @torch.no_grad()
    def __init__(self, parts: Anatomy, batch: Batch):
        self.parts, self.batch = parts, batch
        needed = int(batch.scored.any(0).nonzero().max()) + 1
        self.scored = batch.scored[:, :needed]
        self.hidden: list[Tensor] = []
        self._calls: list[tuple[tuple, dict[str, Any]]] = []
        handles = [layer.register_forward_pre_hook(self._keep, with_kwargs=True) for layer in parts.layers]
        handles.append(parts.final_norm.register_forward_pre_hook(lambda _module, args: self.hidden.append(args[0])))
        try:
            with tapped(parts, sites(parts)) as self.activations:
                hidden = parts.model.base_model(input_ids=batch.ids[:, :needed], use_cache=False).last_hidden_state
                self.logits = parts.unembed(hidden[self.scored.to(hidden.device)]).to(batch.ids.device)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def run(self, hidden: Tensor, first: int, edits: Mapping[nn.Module, Edit] | None = None) -> Tensor:
        """Run copies of the batch from the input of layer `first` to the logits.

        Args:
            hidden: Float [copies * sample, position, width], copy after copy.
            first: the first layer to run; the model's depth to run none.
            edits: as `edited` takes them.

        Returns:
            Float [copies, token, vocabulary] at scored positions.
        """
        copies = len(hidden) // len(self.batch)
        scored = self.scored.repeat(copies, 1)
        with edited(edits or {}):
            for number in range(first, self.parts.depth):
                last = self._read_by_logits_alone(edits or {}) if number == self.parts.depth - 1 else ()
                with only_at(last, scored):
                    hidden = self._layer(number, hidden)
        return self.read(hidden[scored.to(hidden.device)].unflatten(0, (copies, -1)))

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

    def _read_by_logits_alone(self, edits: Mapping[nn.Module, Edit]) -> list[nn.Module]:
        """Modules of the last layer whose output matters at scored positions alone, and of whose parts none is edited."""
        parts, layer = self.parts, self.parts.depth - 1
        mlp = parts.row.mlp_out.rpartition(".")[0]
        queries = [parts.projection(layer, each) for each in parts.row.projections if each.parts == ("q",)]
        found = [*queries, parts.attention_out[layer], parts.layers[layer].get_submodule(mlp)]
        return [module for module in found if module in edits or not any(part in edits for part in module.modules())]

    def _keep(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        self.hidden.append(args[0] if args else kwargs.pop("hidden_states"))
        self._calls.append((args[1:], kwargs))

    def _tiled(self, value: Any, copies: int) -> Any:
        """Repeat what has one entry per sample (masks, positions, rotations); leave the rest to broadcasting."""
        if isinstance(value, tuple):
            return tuple(self._tiled(item, copies) for item in value)
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(self.batch) > 1:
            return value.repeat(copies, *[1] * (value.ndim - 1))
        return value
