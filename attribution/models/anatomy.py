"""Resolve a model's row of `architectures` to modules, sizes, and the owners of every output feature.

Knows how a model is built; knows nothing about whether its row is right, see `identities`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attribution.architectures import ARCHITECTURES, Architecture, Projection
from attribution.errors import ModelError
from attribution.models.experts import ExpertsOut, experts_out


@dataclass(frozen=True)
class Anatomy:
    """The modules of one model that matter here, and their sizes. Built by `anatomy`, never by hand."""

    model: PreTrainedModel
    row: Architecture
    layers: tuple[nn.Module, ...]
    attention_out: tuple[nn.Module, ...]
    mlp_out: tuple[nn.Module, ...]
    final_norm: nn.Module
    embedding: nn.Embedding
    unembedding: nn.Linear
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    vocabulary: int

    @property
    def experts(self) -> int:
        """Experts of a layer, 1 where there is no mixture: neuron n of expert e has the index e x (neurons / experts) + n."""
        return self.mlp_out[0].experts.num_experts if isinstance(self.mlp_out[0], ExpertsOut) else 1

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def tied(self) -> bool:
        """Whether the unembedding reads the embedding's matrix."""
        return self.unembedding.weight is self.embedding.weight

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a layer both read its input."""
        return self.row.parallel and getattr(self.model.config, "use_parallel_residual", True)

    @cached_property
    def length_matters(self) -> bool:
        """Whether rotations are chosen by how long a pass is (longrope, dynamic): a shorter one then gives other logits."""
        told = [getattr(module, "rope_type", None) for module in self.model.modules()]  # one, or one for each type of layer
        kinds = [kind for each in told for kind in (each.values() if isinstance(each, dict) else [each])]
        return any(kind == "longrope" or "dynamic" in kind for kind in kinds if kind is not None)

    @property
    def embedding_scale(self) -> Tensor:
        """What an embedded token is multiplied by (Gemma), a scalar."""
        weight = self.embedding.weight
        return getattr(self.embedding, "embed_scale", torch.ones((), device=weight.device)).to(weight.dtype)

    def branch(self, layer: int, which: str) -> nn.Module:
        """The module whose output is added to the residual stream. `which`: "attention" or "mlp"."""
        post_norm = getattr(self.row, f"{which}_post_norm")
        if which == "mlp" and self.row.experts:
            return child(self.layers[layer], self.row.mlp)
        return child(self.layers[layer], post_norm) if post_norm else getattr(self, f"{which}_out")[layer]

    def projection(self, layer: int, projection: Projection) -> nn.Module:
        return child(self.layers[layer], projection.module)

    def owners(self, projection: Projection) -> tuple[Tensor, Tensor]:
        """Who owns the output features of a projection, in their order.

        Returns:
            Int [feature]: the place of its part in `projection.parts`; and the head, key and value head, or neuron, that it
            belongs to.

        Raises:
            ModelError: a part that there is none of, or parts that do not fill the projection.
        """
        counts = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads, "gate": self.neurons, "up": self.neurons}
        pieces = []
        for place, part in enumerate(projection.parts):
            if part not in counts:
                raise ModelError(f"unknown part {part!r} in an architecture row; expected {', '.join(counts)}")
            width = 1 if part in ("gate", "up") else self.head_dim
            unit = torch.arange(counts[part]).repeat_interleave(width)
            pieces.append(torch.stack([torch.full_like(unit, place), unit]))
        if projection.per_head:
            if any(piece.shape[1] % self.heads for piece in pieces):
                raise ModelError(
                    f"the parts of {projection.module} do not repeat for each of {self.heads} heads; the row is wrong"
                )
            pieces = [torch.cat([piece.view(2, self.heads, -1) for piece in pieces], dim=2).flatten(1)]
        part_of, unit_of = torch.cat(pieces, dim=1)
        width = self.projection(0, projection).get_parameter("weight").shape[1 if self.row.transposed else 0]
        if len(unit_of) != width:
            raise ModelError(
                f"{projection.module} has {width} output features, its architecture row accounts for {len(unit_of)}; correct "
                "the row in attribution/architectures.py"
            )
        return part_of, unit_of

    def unembed(self, normed: Tensor) -> Tensor:
        """Logits from outputs of the final norm, soft-capped where the model caps them; in float32 or wider.

        Metrics subtract numbers of like size, which half precision would round away.
        """
        logits = self.unembedding(normed)
        return self._capped(logits.float() if logits.dtype.itemsize < 4 else logits)

    def rows_of(self, logits: Tensor) -> Tensor:
        """What the rows of the unembedding put out where these are the logits: before a bias and a soft cap, [..., vocabulary].

        These are the activations of rows. Where a model has neither, they are the logits themselves.
        """
        cap, bias = self.cap, self._row_bias(logits)
        rows = cap * torch.atanh(logits / cap) if cap else logits
        return rows if bias is None else rows - bias

    def logits_of(self, rows: Tensor) -> Tensor:
        """The logits that what rows put out becomes; undoes `rows_of`."""
        bias = self._row_bias(rows)
        return self._capped(rows if bias is None else rows + bias)

    @property
    def cap(self) -> float | None:
        """Soft cap of the logits, where the model has one."""
        return getattr(self.model.config, "final_logit_softcapping", None)

    def _capped(self, logits: Tensor) -> Tensor:
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits

    def _row_bias(self, like: Tensor) -> Tensor | None:
        bias = self.unembedding.bias
        return None if bias is None else bias.detach().to(like)


def anatomy(model: nn.Module) -> Anatomy:
    """Resolve a model (or a trainer's wrapper around it) to its parts.

    Raises:
        ModelError: unknown architecture, no unembedding, or sizes that contradict the row.
    """
    base = _unwrap(model)
    row = row_of(base.config.model_type)
    unembedding: Any = base.get_output_embeddings()
    if unembedding is None:
        raise ModelError(
            f"{type(base).__name__} has no unembedding, so that it is no causal language model; open one with attribution.load"
        )
    layers = tuple(child(base, row.layers).children())
    if not layers:
        raise ModelError(f"{type(base).__name__} has no layers at {row.layers!r}; attribution needs at least one")
    config = base.config
    attention_out = tuple(child(layer, row.attention_out) for layer in layers)
    mlp_out = tuple(_mlp_out(layer, row, base) for layer in layers)
    heads = config.num_attention_heads
    width = _in_features(attention_out, row.attention_out, base, row)
    features = _in_features(mlp_out, row.mlp_out, base, row)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if width != heads * head_dim:
        raise ModelError(f"{row.attention_out} reads {width} features, expected {heads} heads x {head_dim}; the row is wrong")
    return Anatomy(
        model=base,
        row=row,
        layers=layers,
        attention_out=attention_out,
        mlp_out=mlp_out,
        final_norm=child(base, row.final_norm),
        embedding=base.get_input_embeddings(),
        unembedding=unembedding,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        neurons=features,
        vocabulary=unembedding.weight.shape[0],
    )


def output_weights(module: nn.Module, row: Architecture) -> Tensor:
    """Weights of an attention-out or MLP-out linear as [residual width, inputs], a view; of experts, a copy.

    What an expert's neuron writes is scaled by the routing weight of its token, `ExpertsOut.scale`.
    """
    if isinstance(module, ExpertsOut):
        return module.weight
    weight = module.get_parameter("weight")
    return weight.T if row.transposed else weight


def row_of(model_type: str) -> Architecture:
    """The row of a family.

    Raises:
        ModelError: there is none.
    """
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"unknown architecture {model_type!r}; known: {known}; add a row to attribution/architectures.py")
    return ARCHITECTURES[model_type]


def child(module: nn.Module, path: str) -> nn.Module:
    """The part of a module at a path of its row."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise ModelError(
            f"{type(module).__name__} has no part {path!r}; its row in attribution/architectures.py is wrong"
        ) from None


def _unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside data-parallel wrappers."""
    if hasattr(model, "peft_config"):
        raise ModelError("components of a model with adapters are not resolved; merge the adapters, or use the base model")
    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "module", None)
        if inner is None:
            raise ModelError(
                f"{type(model).__name__} is not a transformers causal language model; open one with attribution.load"
            )
        model = inner
    return model


def _mlp_out(layer: nn.Module, row: Architecture, base: PreTrainedModel) -> nn.Module:
    if not row.experts:
        return child(layer, row.mlp_out)
    block = child(layer, row.mlp)
    if not hasattr(block, row.mlp_out.rpartition(".")[2]):
        raise ModelError(
            f"a layer of {type(base).__name__} has no experts (mlp_only_layers or decoder_sparse_step in its config); layers "
            "with and without experts in one model are not supported"
        )
    return experts_out(block, child(layer, row.mlp_out))


def _in_features(modules: tuple[nn.Module, ...], path: str, base: PreTrainedModel, row: Architecture) -> int:
    """Input features of linears that write to the residual stream, the same in every layer."""
    width = base.config.hidden_size
    shapes = {tuple(output_weights(module, row).shape) if hasattr(module, "weight") else () for module in modules}
    if len(shapes) > 1 or len(shape := shapes.pop()) != 2 or shape[0] != width:
        raise ModelError(
            f"{path} of {type(base).__name__} is not one linear per layer that writes to a residual stream of width {width}; "
            f"the row {base.config.model_type!r} in attribution/architectures.py is wrong"
        )
    return shape[1]
