"""Where each model family keeps its head outputs, neurons and unembedding. Data only: no logic, no torch.

A row is a set of claims about module paths and layouts. `models.load` refutes a wrong row before anything is computed
from it: shapes, the residual and logit identities, and causal checks (zeroing one head must change the logits; turning one
head's queries round must change what that head puts out, there and nowhere else).

| model_type                   | queries, keys, values | neurons           | branches | post-norms | else                |
|------------------------------|-----------------------|-------------------|----------|------------|---------------------|
| llama, mistral, qwen2, qwen3 | apart, grouped        | gated, apart      | in turn  |            |                     |
| olmo2                        | apart, grouped        | gated, apart      | in turn  | both       | no norms before     |
| gemma2, gemma3_text          | apart, grouped        | gated, apart      | in turn  | both       | soft caps (Gemma 2) |
| phi                          | apart                 | plain             | abreast  |            | unembedding bias    |
| phi3                         | one linear, in blocks | gated, one linear | in turn  |            |                     |
| gpt2                         | one linear, in blocks | plain             | in turn  |            | weights [in, out]   |
| gpt_neo                      | apart                 | plain             | in turn  |            |                     |
| gpt_neox                     | one linear, by heads  | plain             | abreast  |            |                     |
| mixtral, olmoe, qwen3_moe    | apart, grouped        | gated, in experts | in turn  |            | a router            |

Where gate and up features stand in one linear their order does not matter: both belong to the neuron. To add a family, add a
row. Paths of layer parts are relative to one layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Projection:
    """A linear that reads the residual stream, and who owns its output features.

    Attributes:
        module: path within the layer.
        parts: owners of the output features in order: "q" (one slice per head), "k", "v" (per key/value head),
            "gate", "up" (one feature per neuron).
        per_head: the parts repeat for every head (GPT-NeoX) instead of standing as whole blocks.
    """

    module: str
    parts: tuple[str, ...]
    per_head: bool = False


@dataclass(frozen=True)
class Architecture:
    """One family. A head is a slice of the *input* of `attention_out`, a neuron an entry of the *input* of `mlp_out`.

    Attributes:
        layers: path of the list of layers.
        attention_out, mlp_out: the linears that write to the residual stream.
        projections: the linears that read from it.
        final_norm: path of the norm before the unembedding.
        attention_post_norm, mlp_post_norm: norms between the linear and the residual stream, if any.
        parallel: attention and MLP of a layer both read its input, instead of one after the other, unless the config says
            otherwise.
        transposed: weights are stored [in, out] (transformers' Conv1D) instead of [out, in].
        experts: `mlp_out` is a module of experts, a mixture; a neuron is (expert, neuron), see `models.experts`.
    """

    layers: str
    attention_out: str
    mlp_out: str
    projections: tuple[Projection, ...]
    final_norm: str
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    parallel: bool = False
    transposed: bool = False
    experts: bool = False

    @property
    def mlp(self) -> str:
        """Path of the module around `mlp_out`."""
        return self.mlp_out.rpartition(".")[0]


_LLAMA = Architecture(
    layers="model.layers",
    attention_out="self_attn.o_proj",
    mlp_out="mlp.down_proj",
    projections=(
        Projection("self_attn.q_proj", ("q",)),
        Projection("self_attn.k_proj", ("k",)),
        Projection("self_attn.v_proj", ("v",)),
        Projection("mlp.gate_proj", ("gate",)),
        Projection("mlp.up_proj", ("up",)),
    ),
    final_norm="model.norm",
)

_MIXTURE = replace(_LLAMA, mlp_out="mlp.experts", projections=_LLAMA.projections[:3], experts=True)
_POST_NORMS = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "olmo2": replace(_LLAMA, **_POST_NORMS),
    "gemma2": replace(_LLAMA, **_POST_NORMS),
    "gemma3_text": replace(_LLAMA, **_POST_NORMS),
    "phi": replace(
        _LLAMA,
        attention_out="self_attn.dense",
        mlp_out="mlp.fc2",
        projections=(*_LLAMA.projections[:3], Projection("mlp.fc1", ("up",))),
        final_norm="model.final_layernorm",
        parallel=True,
    ),
    "phi3": replace(
        _LLAMA,
        projections=(
            Projection("self_attn.qkv_proj", ("q", "k", "v")),
            Projection("mlp.gate_up_proj", ("gate", "up")),
        ),
    ),
    "mixtral": _MIXTURE,
    "olmoe": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "gpt2": Architecture(
        layers="transformer.h",
        attention_out="attn.c_proj",
        mlp_out="mlp.c_proj",
        projections=(
            Projection("attn.c_attn", ("q", "k", "v")),
            Projection("mlp.c_fc", ("up",)),
        ),
        final_norm="transformer.ln_f",
        transposed=True,
    ),
    "gpt_neo": Architecture(
        layers="transformer.h",
        attention_out="attn.attention.out_proj",
        mlp_out="mlp.c_proj",
        projections=(
            Projection("attn.attention.q_proj", ("q",)),
            Projection("attn.attention.k_proj", ("k",)),
            Projection("attn.attention.v_proj", ("v",)),
            Projection("mlp.c_fc", ("up",)),
        ),
        final_norm="transformer.ln_f",
    ),
    "gpt_neox": Architecture(
        layers="gpt_neox.layers",
        attention_out="attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        projections=(
            Projection("attention.query_key_value", ("q", "k", "v"), per_head=True),
            Projection("mlp.dense_h_to_4h", ("up",)),
        ),
        final_norm="gpt_neox.final_layer_norm",
        parallel=True,
    ),
}
