"""What a model has: components per layer, who owns how many parameters, and what a study of it cannot measure.

Knows the index of components and the recorder's rules; knows nothing about costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import nn
from transformers.pytorch_utils import Conv1D

from attribution.components import Components
from attribution.doctor.plan import Plan
from attribution.updates.recorder import ALL_UP_TO
from attribution.updates.rows import CHOSEN


@dataclass(frozen=True)
class Structure:
    """The sizes of one model.

    Attributes:
        architecture, row: its class, and its row of `architectures`.
        layers, heads, kv_heads, head_dim, neurons, rows, width: of the model; heads and neurons per layer.
        experts: of every layer of a mixture; 1 elsewhere.
        context: longest sample in tokens; None: the config names none.
        parameters: elements, a tied matrix once.
        largest: elements of the largest parameter.
        adapted, sides: of the linears of layers, which adapters stand on: elements, and inputs plus outputs.
        dtype: of the weights.
        bytes: of the weights.
        tied: whether the unembedding reads the embedding's matrix.
        owned: elements by owner, a tied matrix once for each of its two uses; components first.
        post_norms: whether branches pass a norm before they are added to the residual stream.
        caps: soft caps by name.
    """

    architecture: str
    row: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    rows: int
    width: int
    experts: int
    context: int | None
    parameters: int
    largest: int
    adapted: int
    sides: int
    dtype: str
    bytes: int
    tied: bool
    owned: dict[str, int]
    post_norms: bool
    caps: dict[str, float]

    @property
    def components(self) -> int:
        return self.layers * (self.heads + self.neurons) + self.rows

    @property
    def used(self) -> int:
        """Elements, a tied matrix once for each of its two uses."""
        return sum(self.owned.values())

    @property
    def small(self) -> bool:
        """Whether every component is written and ablated unless the config says otherwise."""
        return self.components <= ALL_UP_TO


def structure(components: Components) -> Structure:
    """The sizes of a model, loaded or on the meta device."""
    p = components.parts
    config, stored = p.model.config, list(components.stored.values())
    linears = [each.weight for layer in p.layers for each in layer.modules() if isinstance(each, (nn.Linear, Conv1D))]
    caps = ("final_logit_softcapping", "attn_logit_softcapping")
    return Structure(
        architecture=type(p.model).__name__,
        row=config.model_type,
        layers=p.depth,
        heads=p.heads,
        kv_heads=p.kv_heads,
        head_dim=p.head_dim,
        neurons=p.neurons,
        rows=p.vocabulary,
        width=config.hidden_size,
        experts=getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1,
        context=getattr(config, "max_position_embeddings", None),
        parameters=sum(each.numel() for each in stored),
        largest=max(each.numel() for each in stored),
        adapted=sum(each.numel() for each in linears),
        sides=sum(sum(each.shape) for each in linears),
        dtype=str(stored[0].dtype).removeprefix("torch."),
        bytes=sum(each.numel() * each.element_size() for each in stored),
        tied=p.tied,
        owned=owned(components),
        post_norms=p.row.attention_post_norm is not None or p.row.mlp_post_norm is not None,
        caps={name: float(value) for name in caps if (value := getattr(config, name, None))},
    )


def owned(components: Components) -> dict[str, int]:
    """Parameter elements by owner: a part of heads, neurons and rows, or a remainder group, summed over layers."""
    groups = components.groups
    named = groups["part"].where(groups["kind"] == "remainder", groups["kind"] + "s, " + groups["part"])
    owner, names = pd.factorize(named)
    counts = np.zeros(len(names), dtype=np.int64)
    for use in components.uses:
        features = np.bincount(owner[use.owners.numpy()], minlength=len(names))
        counts += features * (use.parameter.numel() // len(use.owners))
    return dict(zip(names, counts.tolist(), strict=True))


def not_measured(found: Structure, plan: Plan) -> list[str]:
    """What a study of this model will not measure, or not as one might think, in sentences."""
    return list(_limits(found, plan))


def _limits(found: Structure, plan: Plan) -> Iterator[str]:
    rest = [name for name in found.owned if ", " not in name]
    yield (
        f"No causes, no influence: {', '.join(rest)} belong to no component; their update shares are written as named groups "
        "of the remainder."
    )
    if found.post_norms:
        yield (
            "Post-norms: with a zero baseline first-order causes add up to zero in every layer and module, so they rank "
            "components within a layer only; layer totals mean nothing; use exact ablation, or a resample reference."
        )
    if "final_logit_softcapping" in found.caps:
        yield "Soft cap: rows are read, and ablated, before it; behind it direct effects do not add up over components."
    if found.experts > 1:
        yield f"Mixture of {found.experts} experts: routers belong to the remainder; a neuron is read on its tokens alone."
    if not plan.writes_all(found.small):
        yield (
            f"Single neurons and rows between milestones: {CHOSEN} of each kind by first-order cause and {CHOSEN} at random "
            f"are written, the others as sums per layer (by default above {ALL_UP_TO:,} components); the same ones are "
            "ablated at both ends."
        )
    if not plan.runs_again(found.small):
        yield "Causes on the training batch after a step: the batch is not run again (batch_after)."
    if len(plan.kinds) < 3 or plan.layers is not None:
        yield "Components outside kinds and layers are in the sums of their layer, and are not ablated one at a time."
    yield "Sizes of rows on the training batch: activations and gradients of rows are read on probe sets only."
    if not plan.probes:
        yield "Update shares and influence: they are read on probe sets, and there is none."
    if plan.share_passes == 0 and plan.probes:
        yield "Update shares and first-order causes on probe sets: share_passes is 0, they are read by forward passes alone."
    if plan.share_passes == 2 and plan.probes:
        yield "Update shares are not refined: steps whose residual is above 1 % stay unresolved, and say so."
    if found.dtype in ("bfloat16", "float16"):
        yield (
            f"{found.dtype} weights round small updates away: few changed elements are no evidence of a local change "
            "(intended_norm stands beside update_norm); train float32 weights for that."
        )
    if plan.lora:
        yield "Rows on the training batch before a step: under adapters the unembedding is frozen and gets no gradient there."
    if found.context is not None and plan.length > found.context:
        yield f"Samples of {plan.length} tokens are refused: the context window is {found.context}."
    yield (
        "Refused: DataParallel, DeepSpeed, FSDP version 1, tensor, pipeline and hybrid parallel models, optimizers that step "
        "inside the backward pass, and adapters other than LoRA on linear layers."
    )
