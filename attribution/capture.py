"""Run a batch and look inside it: logits at scored positions, taps on activations, edits of activations.

Hooks live only inside the context managers of this file and of `replay`. Knows modules and batches; knows nothing about
what a tap is read for or why an activation is edited.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attribution.models import Anatomy, ExpertsOut
from attribution.samples import Batch
from attribution.sharding import usable

Edit = Callable[[Tensor], Tensor]
Places = tuple[Tensor, ...]  # samples and positions, each Int [token]


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


def scored_logits(parts: Anatomy, batch: Batch, until: int | None = None) -> Tensor:
    """Logits at scored positions, [token, vocabulary]; the unembedding is applied nowhere else.

    No attention mask is given: padding is on the right, where a causal model does not look. They are where the batch is,
    wherever the model's layers are.

    Args:
        parts: of the model.
        batch: what to run.
        until: positions to run, as many as are `needed`; None: all.
    """
    hidden = parts.model.base_model(input_ids=batch.ids[:, :until], use_cache=False).last_hidden_state
    return parts.unembed(hidden[places_on(batch.scored_at, hidden)]).to(batch.ids.device)


def logits_alone(parts: Anatomy, batch: Batch, edited: Collection[nn.Module] = ()) -> Tensor:
    """As `scored_logits`, where nothing else of the pass is looked at: what only they depend on is run nowhere else either.

    Args:
        parts, batch: as there.
        edited: as `read_by_logits_alone` takes them.
    """
    with only_at(read_by_logits_alone(parts, edited), batch.scored_at):
        return scored_logits(parts, batch, needed(parts, batch))


def needed(parts: Anatomy, batch: Batch) -> int:
    """How many positions have to be run for logits at scored ones."""
    return batch.ids.shape[1] if parts.length_matters else batch.needed


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
def tapped_for_logits(parts: Anatomy, batch: Batch) -> Iterator[tuple[dict[Site, Tensor], dict[Site, Tensor]]]:
    """Keep the activations of every site in the graph of a pass that ends in `scored_logits` and is differentiated there.

    What of the last layer reaches no logit is run as far as activations are, and without a graph, unless it is part of a module
    that is run whole: a mixture of experts, projections in one.

    Yields:
        Activations by site, as `tapped` keeps them; and by site those of which the former hold scored positions alone, at the
        other tokens, Float [1, token, feature].
    """
    site, mlp = Site("neuron", parts.depth - 1), _mlp(parts)
    beside: dict[Site, Tensor] = {}

    def look(module: nn.Module, args: tuple) -> None:
        inputs = args[0][places_on(batch.others_at, args[0])][None]
        known = {site.module(parts): torch.zeros_like(inputs)}
        with _aside(inputs), tapped(parts, [site]) as found, supplied(known):
            module.forward(inputs)  # not called: it is in its hooks
        beside.update(found)

    with tapped(parts, sites(parts), differentiable=True) as seen:
        narrow = read_by_logits_alone(parts)
        handles = [mlp.register_forward_pre_hook(look)] if mlp in narrow else []
        try:
            with (
                only_at([module for module in narrow if module is not mlp], batch.scored_at, batch.others_at),
                only_at([module for module in narrow if module is mlp], batch.scored_at),
            ):
                yield seen, beside
        finally:
            for handle in handles:
                handle.remove()


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


def read_by_logits_alone(
    parts: Anatomy, edited: Collection[nn.Module] = (), known: Collection[nn.Module] = ()
) -> list[nn.Module]:
    """Modules of the last layer whose output matters at scored positions alone, for `only_at`.

    Args:
        parts: of the model.
        edited: modules whose input is edited position by position, by hooks that are on already.
        known: modules whose output is supplied.
    """
    layer = parts.depth - 1
    if torch.is_grad_enabled() and any(type(module).__name__ == "CheckpointWrapper" for module in parts.model.modules()):
        return []  # it runs layers again in the backward pass, when hooks are off
    queries = [parts.projection(layer, each) for each in parts.row.projections if each.parts == ("q",)]
    found = [*queries, parts.attention_out[layer], _mlp(parts)]
    if isinstance(out := parts.mlp_out[layer], ExpertsOut) and out.watched:  # whoever looks there looks at all positions
        found.pop()
    touched = {*edited, *known}
    found = [module for module in found if module in edited or not any(part in touched for part in module.modules())]
    return [module for module in found if not any(map(_watched_by_others, module.modules()))]


def _watched_by_others(module: nn.Module) -> bool:
    """Whether a hook is on that is not of this package, and may count on every position."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    makers = (str(getattr(getattr(hook, "func", hook), "__module__", "")) for hook in hooks)
    return any(maker.split(".")[0] != __name__.split(".")[0] for maker in makers)


def _mlp(parts: Anatomy) -> nn.Module:
    return parts.layers[parts.depth - 1].get_submodule(parts.row.mlp)


@contextmanager
def only_at(modules: Iterable[nn.Module], places: Places, elsewhere: Places | None = None) -> Iterator[None]:
    """Run modules that treat positions alike at these places only, inside the block; at others their output is zero.

    Args:
        modules: each takes and returns one tensor [sample, position, feature].
        places: where.
        elsewhere: other places, at which they are run without a graph.
    """
    shapes: dict[nn.Module, torch.Size] = {}
    without: dict[nn.Module, Tensor] = {}

    def select(module: nn.Module, args: tuple) -> tuple:
        shapes[module] = args[0].shape[:-1]
        if elsewhere is not None:
            with _aside(args[0]):
                without[module] = module.forward(args[0][places_on(elsewhere, args[0])][None])  # not called: it is in its hooks
        return (args[0][places_on(places, args[0])][None], *args[1:])

    def spread(module: nn.Module, _args: tuple, out: Tensor) -> Tensor:
        whole = out.new_zeros(*shapes.pop(module), out.shape[-1])
        whole[places_on(places, out)] = out[0]
        if elsewhere is not None:
            whole[places_on(elsewhere, out)] = without.pop(module)[0]
        return whole

    handles = [hook for module in modules for hook in (module.register_forward_pre_hook(select),
                                                       module.register_forward_hook(spread))]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _aside(tensor: Tensor) -> Iterator[None]:
    """Without a graph, within a pass that has one: autocast must not keep weights that were cast here for the rest of it."""
    kind = tensor.device.type
    cast = torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False)
    with torch.no_grad(), cast:
        yield


def places_on(places: Places, tensor: Tensor) -> Places:
    """Places as they index this tensor, wherever it is."""
    return tuple(each.to(tensor.device) for each in places)


@contextmanager
def supplied(outputs: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Have modules of one input put out what is known already, without running, in every pass inside the block."""
    handles = [hook for module, out in outputs.items() for hook in (
        module.register_forward_pre_hook(lambda _module, args: (args[0][:0],)),
        module.register_forward_hook(lambda _module, _args, _out, known=out: known),
    )]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block, and give every module its own mode back, whatever it was.

    Parts of a sharded model can be called one by one inside, see `sharding.usable`.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with usable(model):
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
