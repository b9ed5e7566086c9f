"""Where tests look for the modules of each family: written by hand from the sources of transformers, apart from the package."""

from typing import NamedTuple

import torch

from attribution.architectures import ARCHITECTURES
from attribution.models import anatomy

MIXTURES = ("mixtral", "olmoe", "qwen3_moe")
DENSE = sorted(set(ARCHITECTURES) - set(MIXTURES))


class Names(NamedTuple):
    """Paths of modules; {} is the layer."""

    layers: str
    head: str
    neuron: str
    queries: str
    keys: str
    final: str


LLAMA = Names(
    "model.layers", "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.q_proj",
    "model.layers.{}.self_attn.k_proj", "model.norm",
)  # fmt: skip
NAMES = {
    "gpt2": Names(
        "transformer.h", "transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj", "transformer.h.{}.attn.c_attn",
        "transformer.h.{}.attn.c_attn", "transformer.ln_f",
    ),
    "gpt_neo": Names(
        "transformer.h", "transformer.h.{}.attn.attention.out_proj", "transformer.h.{}.mlp.c_proj",
        "transformer.h.{}.attn.attention.q_proj", "transformer.h.{}.attn.attention.k_proj", "transformer.ln_f",
    ),
    "gpt_neox": Names(
        "gpt_neox.layers", "gpt_neox.layers.{}.attention.dense", "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "gpt_neox.layers.{}.attention.query_key_value", "gpt_neox.layers.{}.attention.query_key_value",
        "gpt_neox.final_layer_norm",
    ),
    "phi": LLAMA._replace(
        head="model.layers.{}.self_attn.dense", neuron="model.layers.{}.mlp.fc2", final="model.final_layernorm"
    ),
    "phi3": LLAMA._replace(queries="model.layers.{}.self_attn.qkv_proj", keys="model.layers.{}.self_attn.qkv_proj"),
}  # fmt: skip


def names(model) -> Names:
    """Those of a model's family."""
    return NAMES.get(model.config.model_type, LLAMA)


def module(model, name: str, layer: int = 0):
    """The module of a name of `Names`; of a mixture's neurons, the package's own place, whose truth test_experts.py shows."""
    if name == "neuron" and model.config.model_type in MIXTURES:
        return anatomy(model).mlp_out[layer]
    return model.get_submodule(getattr(names(model), name).format(layer))


def put_out(model, logits):
    """What the rows of the unembedding put out, before a bias and a soft cap, where these are the logits [..., vocabulary]."""
    cap, bias = model.config.to_dict().get("final_logit_softcapping"), model.lm_head.bias
    plain = cap / 2 * torch.log((cap + logits) / (cap - logits)) if cap else logits
    return plain if bias is None else plain - bias.detach()


def with_row(model, logits, row: int, value):
    """The logits where one row puts out this instead."""
    cap, bias = model.config.to_dict().get("final_logit_softcapping"), model.lm_head.bias
    value = value if bias is None else value + bias[row].detach()
    changed = logits.clone()
    changed[..., row] = cap * torch.tanh(value / cap) if cap else value
    return changed
