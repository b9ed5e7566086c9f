"""Refute a row of `architectures` that does not describe its model: identities of the residual stream, and causal checks.

Knows what a right row implies; knows nothing about how models are opened.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attribution.architectures import Projection
from attribution.errors import ModelError
from attribution.models.anatomy import Anatomy, anatomy, output_weights
from attribution.models.experts import ExpertsOut

IDENTITY_TOLERANCE = 1e-5  # relative, float32; lower precisions are checked in float32 on a copy of the activations
COARSE_TOLERANCE = 0.05
POSITIONS = 8


@torch.no_grad()
def check(model: nn.Module) -> dict[str, float]:
    """Refute the model's row in `architectures` if it can be refuted.

    Runs eight tokens and requires: residual stream = embedding + what every branch wrote; each branch = sum of its
    heads or neurons (+ bias); logits = unembedding of the final norm; zeroing a head or neuron changes the logits (of the
    first layer, in the first one that does: some may be pruned); the MLP notices that attention is silent where it comes
    after it, and nowhere else; turning round the queries, keys, values, gate or up features that belong to a head, group of
    heads or neuron changes what that one puts out, where it can, and no other.

    Returns:
        Relative error of each identity.

    Raises:
        ModelError: an identity fails.
    """
    parts = anatomy(model)
    device = next(parts.model.parameters()).device
    tokens = (
        torch.arange(1, POSITIONS + 1, device=device).remainder(parts.vocabulary).view(1, POSITIONS)
    )  # 0 may be padding, which embeds as zero
    was_training = [module for module in parts.model.modules() if module.training]
    parts.model.eval()
    try:
        errors, logits, active = _identities(parts, tokens)
        tolerance = _tolerance(parts)
        for identity, error in errors.items():
            if not error <= tolerance:
                raise _refuted(parts, f"{identity} is off by {error:.1e} (allowed {tolerance:.0e})")
        first = (("head", parts.attention_out[0], parts.heads), ("neuron", parts.mlp_out[0], parts.neurons))
        for which, module, units in first:
            if all(torch.equal(_with_zeroed(parts, module, unit, units, tokens), logits) for unit in active[which]):
                raise _refuted(parts, f"zeroing a {which} leaves the logits unchanged")
        if _reads_its_layer_alone(parts, tokens) != parts.parallel:
            raise _refuted(parts, "attention and MLP do not follow each other as the row says")
        for projection in parts.row.projections:
            _check_owners(parts, projection, tokens)
    finally:
        for module in was_training:
            module.training = True
    return errors


def _refuted(parts: Anatomy, what: str) -> ModelError:
    return ModelError(
        f"{parts.model.config.model_type}: {what}; its row in attribution/architectures.py does not describe this model"
    )


def _tolerance(parts: Anatomy) -> float:
    return IDENTITY_TOLERANCE if parts.unembedding.weight.dtype.itemsize >= 4 else COARSE_TOLERANCE


def _identities(parts: Anatomy, tokens: Tensor) -> tuple[dict[str, float], Tensor, dict[str, list[int]]]:
    """Errors of the identities, the logits, and the heads and neurons of the first layer that are active at all."""
    seen: dict[str, Tensor] = {}
    handles = []

    def keep(name: str, module: nn.Module, inputs: bool) -> None:
        def hook(_module: nn.Module, args: tuple, output: Any) -> None:
            value = args[0] if inputs else (output[0] if isinstance(output, tuple) else output)
            seen[name] = value.detach().float()

        handles.append(module.register_forward_hook(hook))

    try:
        handles.append(
            parts.layers[0].register_forward_pre_hook(
                lambda _module, args, kwargs: seen.__setitem__("start", (args[0] if args else kwargs["hidden_states"]).float()),
                with_kwargs=True,
            )
        )
        for layer in range(parts.depth):
            for which, out in (("attention", parts.attention_out[layer]), ("mlp", parts.mlp_out[layer])):
                keep(f"{which} {layer} in", out, True)
                branch = parts.branch(layer, which)
                post_norm = getattr(parts.row, f"{which}_post_norm") is not None
                keep(f"{which} {layer} out", branch, post_norm)  # a norm after the linear reads what it writes
                keep(f"{which} {layer} branch", branch, False)
        keep("end", parts.final_norm, True)
        keep("normed", parts.final_norm, False)
        logits = parts.model(input_ids=tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()

    branches = [f"{which} {layer}" for layer in range(parts.depth) for which in ("attention", "mlp")]
    for name in (*(f"{branch} {end}" for branch in branches for end in ("out", "branch")), "end", "normed"):
        if name not in seen or seen[name].shape != seen["start"].shape:
            raise _refuted(parts, f"{name!r} has not the shape of the residual stream")
    residual = seen["start"] + sum(seen[f"{branch} branch"] for branch in branches)
    errors = {"the residual stream (embedding + branches)": _relative(residual, seen["end"])}
    for which, modules, units in (("attention", parts.attention_out, parts.heads), ("mlp", parts.mlp_out, parts.neurons)):
        worst = 0.0
        for layer, module in enumerate(modules):
            weight = output_weights(module, parts.row).float()  # [out, in]
            pieces = seen[f"{which} {layer} in"].unflatten(-1, (units, -1))
            if isinstance(module, ExpertsOut):
                pieces = pieces * module.scale.float().repeat_interleave(units // parts.experts, -1)[..., None]
            total = torch.einsum("btud,oud->bto", pieces, weight.unflatten(-1, (units, -1)))
            if getattr(module, "bias", None) is not None:
                total = total + module.bias.float()
            worst = max(worst, _relative(total, seen[f"{which} {layer} out"]))
        errors[f"the sum of {'heads' if which == 'attention' else 'neurons'}"] = worst
    unembedded = seen["normed"] @ parts.unembedding.weight.float().T
    if getattr(parts.unembedding, "bias", None) is not None:
        unembedded = unembedded + parts.unembedding.bias.float()
    if parts.cap:
        unembedded = parts.cap * torch.tanh(unembedded / parts.cap)
    errors["the logits (unembedding of the final norm)"] = _relative(unembedded, logits.float())
    active = {
        kind: seen[f"{which} 0 in"].unflatten(-1, (units, -1)).ne(0).any(-1).flatten(0, 1).any(0).nonzero()[:, 0].tolist()
        for kind, which, units in (("head", "attention", parts.heads), ("neuron", "mlp", parts.neurons))
    }
    return errors, logits, active


def _with_zeroed(parts: Anatomy, module: nn.Module, unit: int, units: int, tokens: Tensor) -> Tensor:
    def zero(_module: nn.Module, args: tuple) -> tuple:
        value = args[0].clone()
        value.unflatten(-1, (units, -1))[..., unit, :] = 0
        return (value, *args[1:])

    handle = module.register_forward_pre_hook(zero)
    try:
        return parts.model(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()


def _reads_its_layer_alone(parts: Anatomy, tokens: Tensor) -> bool:
    """Whether the MLP of the first layer does not notice that the attention beside it is silent."""
    seen: list[Tensor] = []
    handles = [
        parts.attention_out[0].register_forward_pre_hook(
            lambda _module, args: (torch.zeros_like(args[0]), *args[1:]) if seen else None
        ),
        parts.mlp_out[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0])),
    ]
    try:
        for _ in range(2):  # as it is, and without attention
            parts.model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.equal(*seen)


def _check_owners(parts: Anatomy, projection: Projection, tokens: Tensor) -> None:
    """Turn round what the row says is one owner's, in the first layer; see who notices, and at which positions.

    Each owner is turned in a copy of its own, at one position after the other until any of them notices. The sign alone is
    turned, since a norm over all heads would let every head notice a change of size.
    """
    part_of, unit_of = (each.to(tokens.device) for each in parts.owners(projection))
    for place, part in enumerate(projection.parts):
        neuron = part in ("gate", "up")
        out, units = (parts.mlp_out[0], parts.neurons) if neuron else (parts.attention_out[0], parts.heads)
        groups = parts.kv_heads if part in ("k", "v") else units
        turned = torch.tensor(sorted({0, 1 % units, units // 2, units - 1}) if neuron else range(groups), device=tokens.device)
        own = (part_of == place) & (unit_of == turned[:, None])  # [copy, feature]
        theirs = turned[:, None] == torch.arange(units, device=tokens.device) * groups // units  # [copy, head or neuron]
        for position in range(1 if part == "v" else POSITIONS):  # where there is one value to read, it is read
            may, must = (each.to(tokens.device) for each in _noticing(part, position))
            seen = _activations(parts, parts.projection(0, projection), own, position, out, tokens)
            off = (seen[:-1] - seen[-1]).abs().unflatten(-1, (units, -1)).amax(-1)  # [copy, position, head or neuron]
            if (off.masked_fill(theirs[:, None] & may[:, None], 0) > _tolerance(parts) * seen.abs().max()).any():
                raise _refuted(parts, f"turning round {part!r} of {projection.module} changes more than its owner")
            if (off * (theirs[:, None] & must[:, None])).any():
                break
        else:
            raise _refuted(parts, f"turning round {part!r} of {projection.module} changes nothing of its owner")


def _noticing(part: str, position: int) -> tuple[Tensor, Tensor]:
    """Bool [position]: where a change at a position may be noticed; and where it must be, somewhere, to tell the parts apart.

    A query is read at its own position alone; a key changes no pattern where there is one key to choose from, a value does.
    """
    here, at = torch.arange(POSITIONS), torch.arange(POSITIONS) == position
    if part == "k":
        return here >= max(position, 1), here > position
    return (here >= position, at) if part == "v" else (at, at)


def _activations(parts: Anatomy, projection: nn.Module, own: Tensor, position: int, out: nn.Module, tokens: Tensor) -> Tensor:
    """What an output linear reads, Float32 [copy, position, feature], when features are turned round; last, as it is.

    Args:
        parts: of the model.
        projection: whose output is edited.
        own: Bool [copy, feature], what is turned round in each copy.
        position: where.
        out: the output linear.
        tokens: Int [1, position].
    """
    seen: list[Tensor] = []

    def turn(_module: nn.Module, _args: tuple, found: Tensor) -> Tensor:
        found = found.clone()
        found[:-1, position] = torch.where(own, -found[:-1, position], found[:-1, position])
        return found

    handles = [
        projection.register_forward_hook(turn),
        out.register_forward_pre_hook(lambda _module, args: seen.append(args[0].float())),
    ]
    try:
        parts.model(input_ids=tokens.expand(len(own) + 1, -1), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0]


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
