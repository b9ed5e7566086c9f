"""Every row describes its family, and a wrong row is refuted."""

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch

from attribution.architectures import ARCHITECTURES, Projection
from attribution.components import Components
from attribution.errors import ModelError
from attribution.models import IDENTITY_TOLERANCE, anatomy, check


def test_a_row_describes_its_family(tiny, family, tied):
    errors = check(tiny(family, tied))
    assert len(errors) == 4
    assert all(error < 1e-5 for error in errors.values())
    assert IDENTITY_TOLERANCE == 1e-5


WRONG = {
    "heads from the queries": ("mistral", {"attention_out": "self_attn.q_proj"}),
    "heads from the keys": ("mistral", {"attention_out": "self_attn.k_proj"}),
    "heads of another width": ("llama", {"attention_out": "self_attn.q_proj"}),
    "heads from a whole module": ("llama", {"attention_out": "self_attn"}),
    "heads from a list": ("llama", {"attention_out": "self_attn.nothing"}),
    "heads from the fused projection": ("gpt2", {"attention_out": "attn.c_attn"}),
    "neurons before the gate": ("llama", {"mlp_out": "mlp.up_proj"}),
    "neurons from attention": ("llama", {"mlp_out": "self_attn.o_proj"}),
    "neurons from the first linear": ("gpt2", {"mlp_out": "mlp.c_fc"}),
    "attention and mlp swapped": ("gpt2", {"attention_out": "mlp.c_proj", "mlp_out": "attn.c_proj"}),
    "a norm after attention": ("llama", {"attention_post_norm": "post_attention_layernorm"}),
    "a norm after the mlp": ("qwen2", {"mlp_post_norm": "input_layernorm"}),
    "a norm of heads": ("qwen3", {"attention_post_norm": "self_attn.q_norm"}),
    "a norm that is not there": ("llama", {"mlp_post_norm": "post_feedforward_layernorm"}),
    "weights as [in, out]": ("llama", {"transposed": True}),
    "square weights as [in, out]": ("mistral", {"transposed": True}),
    "weights as [out, in]": ("gpt2", {"transposed": False}),
    "another final norm": ("llama", {"final_norm": "model.layers.1.post_attention_layernorm"}),
    "a first norm as final": ("gpt2", {"final_norm": "transformer.h.0.ln_1"}),
    "an embedding as final norm": ("llama", {"final_norm": "model.embed_tokens"}),
    "no norm after attention": ("gemma2", {"attention_post_norm": None}),
    "no norm after the mlp": ("gemma3_text", {"mlp_post_norm": None}),
    "norms after the branches swapped": ("gemma2", {
        "attention_post_norm": "post_feedforward_layernorm", "mlp_post_norm": "post_attention_layernorm",
    }),
    "the norm before the mlp as one after it": ("gemma3_text", {"mlp_post_norm": "pre_feedforward_layernorm"}),
    "a norm after parallel attention": ("gpt_neox", {"attention_post_norm": "post_attention_layernorm"}),
    "the one norm of parallel branches after them": ("phi", {"mlp_post_norm": "input_layernorm"}),
    "heads from a wrapper": ("gpt_neo", {"attention_out": "attn.attention"}),
    "weights of GPT-Neo as those of GPT-2": ("gpt_neo", {"transposed": True}),
    "heads from what parallel attention reads": ("gpt_neox", {"attention_out": "attention.query_key_value"}),
    "neurons from the fused gate": ("phi3", {"mlp_out": "mlp.gate_up_proj"}),
    "heads of Phi by the name of Llama": ("phi", {"attention_out": "self_attn.o_proj"}),
    "parallel branches in turn": ("gpt_neox", {"parallel": False}),
    "branches in turn as parallel": ("gpt_neo", {"parallel": True}),
    "experts as one linear": ("mixtral", {"experts": False}),
    "one linear as experts": ("llama", {"experts": True}),
    "a router as experts": ("olmoe", {"mlp_out": "mlp.gate"}),
    "the block as experts": ("qwen3_moe", {"mlp_out": "mlp"}),
    "no such layers": ("llama", {"layers": "transformer.h"}),
    "layers that are no list": ("llama", {"layers": "model"}),
}  # fmt: skip


FUSED = {
    "gpt2": ("attn.c_attn", "q k v", False), "gpt_neox": ("attention.query_key_value", "q k v", True),
    "phi3": ("self_attn.qkv_proj", "q k v", False),
}  # fmt: skip
for family, (fused, right, per_head) in FUSED.items():
    for order in itertools.permutations(right.split()):
        for repeats in (False, True):
            if (" ".join(order), repeats) != (right, per_head) and not (family == "phi3" and repeats):
                name = f"{family}: {', '.join(order)} {'for each head' if repeats else 'in blocks'}"
                WRONG[name] = (family, {"projections": (Projection(fused, order, repeats),)})
WRONG |= {
    f"{family}: {part} as {other}": (family, {"projections": (Projection(path.format(part), (other,)),)})
    for family, path in (("qwen3", "self_attn.{}_proj"), ("gemma3_text", "self_attn.{}_proj"),
                         ("phi", "self_attn.{}_proj"), ("gpt_neo", "attn.attention.{}_proj"), ("olmo2", "self_attn.{}_proj"),
                         ("olmoe", "self_attn.{}_proj"))
    for part, other in itertools.permutations("qkv", 2)
}  # fmt: skip
WRONG |= {
    "keys and values of grouped heads swapped": ("phi3", {"projections": (Projection("self_attn.qkv_proj", ("q", "v", "k")),)}),
    "gates and inputs in turn": ("phi3", {"projections": (Projection("mlp.gate_up_proj", ("gate", "up"), True),)}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_refuted(monkeypatch, tiny, name):
    family, fields = WRONG[name]
    model = tiny(family)
    monkeypatch.setitem(ARCHITECTURES, family, dataclasses.replace(ARCHITECTURES[family], **fields))
    with pytest.raises(ModelError, match="row") as caught:
        check(model)
    assert "\n" not in str(caught.value)
    assert hooks(model) == 0


def test_a_config_may_put_parallel_branches_in_turn(tiny):
    model = tiny("gpt_neox")
    assert anatomy(model).parallel
    for layer in model.gpt_neox.layers:
        layer.use_parallel_residual = False
    with pytest.raises(ModelError, match="do not follow each other as the row says"):
        check(model)
    model.config.use_parallel_residual = False
    check(model)
    assert not anatomy(model).parallel


def test_gate_and_up_may_change_places(monkeypatch, tiny):
    """Both belong to the neuron whatever their order, so no result depends on it and nothing refutes it."""
    model = tiny("phi3")
    right = Components(model).reduce(lambda use: use.parameter.detach())
    fused = Projection("mlp.gate_up_proj", ("up", "gate"))
    row = dataclasses.replace(ARCHITECTURES["phi3"], projections=(ARCHITECTURES["phi3"].projections[0], fused))
    monkeypatch.setitem(ARCHITECTURES, "phi3", row)
    check(model)
    assert torch.equal(Components(model).reduce(lambda use: use.parameter.detach()), right)


@pytest.mark.parametrize("parts", [("q", "k"), ("q", "k", "v", "v"), ("gate",), ("q", "k", "w")])
def test_projections_that_do_not_add_up_are_refused(monkeypatch, tiny, parts):
    row = dataclasses.replace(ARCHITECTURES["gpt2"], projections=(Projection("attn.c_attn", parts),))
    monkeypatch.setitem(ARCHITECTURES, "gpt2", row)
    with pytest.raises(ModelError, match=r"architectures\.py|unknown part 'w'"):
        Components(tiny("gpt2"))


def test_the_table_is_data_without_torch():
    code = "import sys, attribution.architectures; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
