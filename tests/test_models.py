"""Opening a model: what opens is untouched and checked, what does not says why in one sentence."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
)

from attribution.errors import ConfigError, ModelError
from attribution.models import EMBEDDED, anatomy, check, embedded, load


def refused(name, said, kind=ModelError, **options):
    """The one sentence of the error that `load` raises."""
    with pytest.raises(kind, match=said) as caught:
        load(str(name), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def resave(model, folder):
    """Put another model's weights and config into a folder, beside its tokenizer."""
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


# What opens


def test_embedded_models_are_listed_and_open_by_name_and_by_world():
    assert "planted/unrouted" in embedded()
    assert all((EMBEDDED / name / "config.json").is_file() for name in embedded())
    whole, first = load("planted/unrouted"), load("planted")
    assert first.model.dtype == torch.float32 and not first.model.training
    assert first.tokenizer("tom says :")["input_ids"][0] == first.tokenizer.bos_token_id
    world = next(name for name in embedded() if name.startswith("planted/"))
    for model, name in ((first.model, world), (whole.model, "planted/unrouted")):
        saved = load_file(EMBEDDED / name / "model.safetensors")
        assert torch.equal(model.model.norm.weight, saved["model.norm.weight"])


def test_a_world_by_its_bare_name_is_its_first_model(monkeypatch, folder):
    shutil.copytree(folder, folder.parent / "world" / "2")
    shutil.copytree(folder, folder.parent / "world" / "1")
    configure(folder.parent / "world" / "1", rms_norm_eps=0.25)
    monkeypatch.setattr("attribution.models.EMBEDDED", folder.parent)
    assert load("world").model.config.rms_norm_eps == 0.25
    assert embedded() == ["world/1", "world/2"]


def test_a_loaded_model_is_the_untouched_model(stories):
    model, tokenizer = load(str(stories))
    bare = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer("Once upon a time, there was a little")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, bare(ids).logits)
    assert type(model) is type(bare) and hooks(model) == hooks(bare)
    assert anatomy(model).tied and anatomy(model).kv_heads == 4 and anatomy(model).depth == 5


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_a_dtype_is_taken(folder, dtype):
    assert load(str(folder), dtype=dtype).model.dtype == getattr(torch, dtype)


def test_a_pickle_opens_only_when_trusted(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, r"only as pickle \(pytorch_model.bin\), which can run code.*allow_pickle=True")
    assert load(str(folder), allow_pickle=True).model.config.model_type == "llama"


class Flag:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_trusted_pickle_still_runs_no_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": Flag(folder / "ran")}, folder / "pytorch_model.bin")
    refused(folder, "cannot be opened", allow_pickle=True)
    assert not (folder / "ran").exists()


# What does not


def test_names_that_lead_nowhere(tmp_path):
    refused(tmp_path / "none", "no model folder at .*embedded models: .*planted/unrouted")
    refused("./none", "no model folder at ./none")
    refused(tmp_path, r"holds no config\.json; name a folder written by save_pretrained")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "no model folder")
    for name in ("nobody/nothing", "planted/none", "gpt2-that-is-not-cached", "two words"):
        refused(name, f"model '{name}' cannot be opened: .*; expected an embedded model .*, a folder or a hub id")
    refused("x" * 300, "cannot be looked for: .*too long")
    refused("~nobody-of-this-name/x", "cannot be looked for|no model folder")


DAMAGE = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds no weights; expected model\.safetensors"),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:2000]),
        "cannot be opened",
    ),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be opened"),
    "no tokenizer": (
        lambda f: [p.unlink() for p in f.glob("tokenizer*")],
        "tokenizer of model .* cannot be opened; save one beside",
    ),
    "wrong tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer of model .* cannot be opened"),
    "config not json": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
    "config of nothing": (lambda f: (f / "config.json").write_text("{}"), "model_type"),
    "wrong type in config": (lambda f: configure(f, hidden_size="wide"), "hidden_size"),
    "wrong name in config": (lambda f: configure(f, hidden_act="nothing"), "nothing"),
    "other sizes": (lambda f: configure(f, intermediate_size=24), "cannot be opened"),
    "more layers": (lambda f: configure(f, num_hidden_layers=3), r"lacks weights .*model\.layers\.2\..*, …\)"),
    "no layers": (lambda f: configure(f, num_hidden_layers=0), "has no layers at 'model.layers'"),
    "unknown to transformers": (lambda f: configure(f, model_type="zork"), "zork"),
    "code in the folder": (lambda f: configure(f, model_type="zork", auto_map={"AutoConfig": "code.Config"}), "custom code"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused(folder, name):
    damage, said = DAMAGE[name]
    damage(folder)
    refused(folder, said)


def test_weights_that_are_not_numbers_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "off by nan")


def test_what_is_not_a_causal_language_model_is_refused(tiny, folder):
    config = tiny("llama").config
    bert = BertConfig(vocab_size=23, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    resave(BertForMaskedLM(bert), folder)
    refused(folder, r"not a causal language model \(BertForMaskedLM\)")
    resave(LlamaForSequenceClassification(config), folder)
    refused(folder, r"not a causal language model \(LlamaForSequenceClassification\)")
    configure(folder, architectures=None)  # says nothing: the missing unembedding tells
    refused(folder, r"lacks weights of a causal language model \(missing: lm_head.weight\)")
    resave(LlamaModel(config), folder)
    refused(folder, r"not a causal language model \(LlamaModel\)")


def test_an_unknown_architecture_is_refused(folder):
    config = OPTConfig(vocab_size=23, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2)
    resave(OPTForCausalLM(config), folder)
    (folder / "model.safetensors").unlink()  # said before any weight is read
    refused(
        folder, "unknown architecture 'opt'; known: gemma2, gemma3_text, gpt2, .*, phi3, qwen2, qwen3, qwen3_moe; add a row"
    )


def test_a_dtype_or_device_that_is_not_there_is_refused(folder):
    for dtype in ("float33", "nn", "Tensor"):
        refused(folder, f"unknown dtype '{dtype}'", ConfigError, dtype=dtype)
    refused(folder, "device 'cudaa' cannot be used", ConfigError, device="cudaa")
    refused(folder, "device 'cuda:99' cannot be used", ConfigError, device="cuda:99")


# The check


def test_the_check_leaves_no_trace(tiny, family):
    model = tiny(family).train()
    frozen = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for module in frozen:
        module.eval()  # parts may be in another mode than the whole
    modes = {module: module.training for module in model.modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {module: module.training for module in model.modules()} == modes
    assert hooks(model) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_check_leaves_no_trace_when_it_fails(tiny):
    model = tiny("llama").train()
    nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    with pytest.raises(ModelError, match="zeroing a head leaves the logits unchanged"):
        check(model)
    assert hooks(model) == 0 and model.training


def test_a_dead_head_or_neuron_does_not_refute_the_row(tiny):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, :6] = 0
        model.model.layers[0].mlp.down_proj.weight[:, :3] = 0
    check(model)
    nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
    with pytest.raises(ModelError, match="zeroing a neuron leaves the logits unchanged"):
        check(model)


def test_the_check_sees_a_layer_that_writes_something_else(tiny):
    model = tiny("qwen2")
    model.model.layers[1].mlp.register_forward_hook(lambda _module, _args, output: 1.01 * output)
    with pytest.raises(ModelError, match=r"residual stream .* is off by"):
        check(model)


# Anatomy


def test_anatomy_knows_the_sizes(tiny, family, tied):
    parts = anatomy(tiny(family, tied))
    wide = family in ("llama", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe")
    assert (parts.depth, parts.heads, parts.head_dim, parts.neurons, parts.vocabulary) == (2, 4, 6 if wide else 4, 20, 23)
    one_each = family in ("mistral", "olmoe", "gpt2", "gpt_neo", "gpt_neox", "phi")
    assert parts.kv_heads == (4 if one_each else 1 if family == "qwen2" else 2)
    assert parts.tied == tied
    if family in ("olmo2", "gemma2", "gemma3_text"):  # what is added to the stream comes out of a norm
        layers = parts.model.model.layers
        assert parts.branch(1, "attention") is layers[1].post_attention_layernorm
        assert parts.branch(0, "mlp") is layers[0].post_feedforward_layernorm
        return
    assert parts.branch(1, "attention") is parts.attention_out[1]
    if family in ("mixtral", "olmoe", "qwen3_moe"):
        assert parts.experts == 5 and parts.branch(0, "mlp") is parts.layers[0].mlp
        return
    assert parts.experts == 1 and parts.branch(0, "mlp") is parts.mlp_out[0]


def test_anatomy_looks_inside_wrappers(tiny):
    model = tiny("llama")
    assert anatomy(nn.DataParallel(model)).model is model
    with pytest.raises(ModelError, match="adapters"):
        anatomy(get_peft_model(tiny("llama"), LoraConfig(target_modules=["o_proj"], r=2)))
    with pytest.raises(ModelError, match="Linear is not a transformers causal language model"):
        anatomy(nn.Linear(2, 2))


@torch.no_grad()
def test_unembed_gives_the_logits(tiny, family):
    model = tiny(family)
    parts, seen = anatomy(model), {}
    handle = parts.final_norm.register_forward_hook(lambda _module, _args, output: seen.update(normed=output))
    logits = model(torch.arange(8)[None]).logits
    torch.testing.assert_close(parts.unembed(seen["normed"]), logits)
    model.config.final_logit_softcapping = None
    logits = model(torch.arange(8)[None]).logits
    handle.remove()
    model.config.final_logit_softcapping = 2.0
    torch.testing.assert_close(parts.unembed(seen["normed"]), 2 * torch.tanh(logits / 2))


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
