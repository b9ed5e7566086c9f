"""Models to test on: the shipped ones, and tiny random ones of every architecture, built from configs without network."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from attribution.architectures import ARCHITECTURES
from attribution.models import load
from attribution.samples import Sample, write_samples
from attribution.worlds import planted as grammar
from attribution.worlds.build import word_tokenizer

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"
VOCABULARY, WIDTH, NEURONS, DEPTH, HEADS = 23, 16, 20, 2, 4
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": NEURONS, "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS, "max_position_embeddings": 32, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Grouped queries with heads wider than d / H; one key and value head per head; a single one; biases; fused and transposed.
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
}  # fmt: skip


@pytest.fixture(autouse=True)
def set_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def planted():
    """The shipped control as (model, tokenizer). Shared by all tests: never change it."""
    return load("planted/unrouted")


@pytest.fixture(scope="session")
def stories() -> Path:
    """Folder of a small real language model."""
    if not STORIES.is_dir():
        pytest.skip("the stories260K model is not beside this checkout")
    return STORIES


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """Build a tiny random model of a family, in eval mode: `tiny("gpt2", tied=True)`. Yours to change.

    In float64 it computes in float64 throughout; transformers' own RMS norms round to float32.
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
            _norm_in_float64(model)
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


def _norm_in_float64(model: torch.nn.Module) -> None:
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(path, norm)


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
