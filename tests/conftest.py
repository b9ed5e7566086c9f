"""Models to test on: the shipped ones, and tiny random ones of every architecture, built from configs without network."""

import gc
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from attribution.architectures import ARCHITECTURES
from attribution.launch import slots
from attribution.models import load
from attribution.samples import Sample, write_samples
from attribution.worlds import planted as grammar
from attribution.worlds.build import word_tokenizer

SHARED = Path(__file__).parents[2] / "shared"
STORIES = SHARED / "models" / "stories260K"
VOCABULARY, WIDTH, NEURONS, DEPTH, HEADS = 23, 16, 20, 2, 4
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": NEURONS, "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS, "max_position_embeddings": 32, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Grouped queries with heads wider than d / H; one key and value head per head; a single one; biases; fused and transposed;
# soft caps low enough to bend; a window shorter than the samples in one of two layers; parallel branches.
_GEMMA = {
    **_COMMON, "num_key_value_heads": 2, "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
TINY = {
    "llama": {**_COMMON, "num_key_value_heads": 2, "head_dim": 6},
    "mistral": {**_COMMON, "num_key_value_heads": 4},
    "qwen2": {**_COMMON, "num_key_value_heads": 1},
    "qwen3": {**_COMMON, "num_key_value_heads": 2, "head_dim": 6},
    "olmo2": {**_COMMON, "num_key_value_heads": 2},
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_inner": NEURONS, "n_layer": DEPTH, "n_head": HEADS, "n_positions": 32,
        "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neo": {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": NEURONS, "num_layers": DEPTH, "num_heads": HEADS,
        "attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 32,
        "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neox": {**_COMMON, "rotary_pct": 0.5},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0},
    "gemma3_text": _GEMMA,
    "phi": _COMMON,
    "phi3": {**_COMMON, "num_key_value_heads": 2},
    "mixtral": {
        **_COMMON, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 4, "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
    "olmoe": {**_COMMON, "intermediate_size": 4, "num_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_COMMON, "num_key_value_heads": 2, "head_dim": 6, "moe_intermediate_size": 4, "num_experts": 5,
        "num_experts_per_tok": 2, "norm_topk_prob": True,
    },
}  # fmt: skip


def pytest_collection_finish():
    """What imports brought is not looked through at every collection of garbage, of which a run asks for several."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def set_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def imported_once():
    """Processes of slots fork from one that has imported what a run needs, which takes each of them nine seconds otherwise.
    A test in `launch/test_slots` starts them as users do."""
    multiprocessing.set_forkserver_preload(["attribution.launch.job", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "START", "forkserver")
        yield


@pytest.fixture(scope="session")
def planted():
    """The shipped control as (model, tokenizer). Shared by all tests: never change it."""
    return load("planted/unrouted")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the essay and what belongs to it."""
    if not SHARED.is_dir():
        pytest.skip("the essay is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def stories() -> Path:
    """Folder of a small real language model."""
    if not STORIES.is_dir():
        pytest.skip("the stories260K model is not beside this checkout")
    return STORIES


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """Build a tiny random model of a family, in eval mode: `tiny("gpt2", tied=True)`. Yours to change.

    In float64 it computes in float64 throughout, where transformers' own code rounds to float32.
    """

    def build(family: str, tied: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = AutoConfig.for_model(family, tie_word_embeddings=tied, **TINY[family])
            model = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():  # biases start at 0 and norms at 1, where mistakes hide
                    parameter.add_(0.1 * torch.randn_like(parameter))
        if dtype == torch.float64:
            _in_float64(model)
        return model.to(dtype).eval()

    return build


@pytest.fixture(params=sorted(ARCHITECTURES))
def family(request) -> str:
    """Every family of the table in turn."""
    return request.param


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request) -> bool:
    return request.param


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A tiny Llama with its tokenizer as a folder on disk, yours to damage."""
    path = tmp_path / "model"
    tiny("llama").save_pretrained(path)
    word_tokenizer([f"w{i}" for i in range(VOCABULARY - 4)]).save_pretrained(path)
    return path


def _in_float64(model: torch.nn.Module) -> None:
    """Take out what transformers rounds to float32: RMS norms, routers, and the attention of GPT-Neo and Gemma 2."""
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=getattr(module, "variance_epsilon", None) or module.eps)
            norm.weight = module.weight
            if "Gemma" in type(module).__name__:  # its scale is 1 + weight
                norm.register_forward_hook(lambda norm, args, _out: _gemma_norm(norm, *args))
            model.set_submodule(path, norm)
        if type(module).__name__.endswith("TopKRouter"):
            module.forward = partial(_route, module)
        if isinstance(module, GPTNeoSelfAttention):
            module._attn = partial(_neo_attention, module)
    if hasattr(model, "num_experts"):
        model.set_experts_implementation("batched_mm")  # the default kernel knows no float64
    if model.config.model_type == "gemma2":
        AttentionInterface.register("unrounded", _gemma_attention)
        AttentionMaskInterface.register("unrounded", eager_mask)
        model.set_attn_implementation("unrounded")


def _gemma_norm(norm: torch.nn.RMSNorm, hidden: Tensor) -> Tensor:
    return hidden * (hidden.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * (1 + norm.weight)


def _route(router, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = hidden.reshape(-1, router.hidden_dim) @ router.weight.T
    scores, chosen = logits.softmax(-1).topk(router.top_k)
    if getattr(router, "norm_topk_prob", True):  # Mixtral does always
        scores = scores / scores.sum(-1, keepdim=True)
    return logits, scores, chosen


def _neo_attention(module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    scores = query @ key.mT
    scores = scores.masked_fill(~module.bias[:, :, : scores.shape[-2], : scores.shape[-1]], -torch.inf)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return weights @ value, weights


def _gemma_attention(module, query, key, value, mask, scaling, softcap, **_unused) -> tuple[Tensor, Tensor]:
    groups = module.num_key_value_groups
    scores = softcap * torch.tanh(query @ key.repeat_interleave(groups, 1).mT * scaling / softcap)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), weights


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of training samples and of two probe sets."""
    folder = tmp_path_factory.mktemp("data")
    sets = {
        "train": grammar.prompts(12, 1, problems=grammar.TRAINING),
        "conflict": grammar.prompts(6, 2, star="conflict"),
        "agree": grammar.prompts(6, 3, star="agree"),
    }
    return {name: str(write_samples(folder / f"{name}.jsonl", [Sample(**row) for row in rows])) for name, rows in sets.items()}
