"""Every row describes its family, and a wrong row is refuted."""

import dataclasses
import subprocess
import sys

import pytest

from attribution.architectures import ARCHITECTURES, Projection
from attribution.components import Components
from attribution.errors import ConfigError, ModelError
from attribution.models import IDENTITY_TOLERANCE, check


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
    "no such layers": ("llama", {"layers": "transformer.h"}),
    "layers that are no list": ("llama", {"layers": "model"}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_refuted(monkeypatch, tiny, name):
    family, fields = WRONG[name]
    model = tiny(family)
    monkeypatch.setitem(ARCHITECTURES, family, dataclasses.replace(ARCHITECTURES[family], **fields))
    with pytest.raises(ModelError, match="row") as caught:
        check(model)
    assert "\n" not in str(caught.value)
    assert hooks(model) == 0


@pytest.mark.parametrize("parts", [("q", "k"), ("q", "k", "v", "v"), ("gate",), ("q", "k", "w")])
def test_projections_that_do_not_add_up_are_refused(monkeypatch, tiny, parts):
    row = dataclasses.replace(ARCHITECTURES["gpt2"], projections=(Projection("attn.c_attn", parts),))
    monkeypatch.setitem(ARCHITECTURES, "gpt2", row)
    with pytest.raises(ConfigError, match=r"architectures\.py|unknown part 'w'"):
        Components(tiny("gpt2"))


def test_the_table_is_data_without_torch():
    code = "import sys, attribution.architectures; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
