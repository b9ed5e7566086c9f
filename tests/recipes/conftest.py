"""Small trainings for the tests of recipes: a model with dropout, rewards in a file, and who is told of completions."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from attribution.models import load
from attribution.recipes import Setting
from attribution.samples import Completion, Sample, encode
from attribution.worlds import planted as grammar

REWARDS = """
def token(completion_ids, **_):
    return [float(ids[0]) for ids in completion_ids]

def sometimes(completion_ids, **_):
    return [None if ids[0] % 3 == 0 else float(ids[0]) for ids in completion_ids]

def constant_later(completion_ids, trainer_state, **_):
    return [float(ids[0]) if trainer_state.global_step < 2 else 1.0 for ids in completion_ids]

def breaks(completions, **_):
    raise KeyError("breaks")

def breaks_later(completions, id, trainer_state, **_):
    if trainer_state.global_step >= 2 and max(id) == id[-1]:
        raise KeyError("no such word")
    return [float(len(text)) for text in completions]
"""


class Told:
    """Stands for a recorder: keeps what it is told, one list per forward pass."""

    def __init__(self):
        self.passes: list[list[Completion]] = []

    def completed(self, completions) -> None:
        self.passes.append(list(completions))

    def intervened(self, positions, *, ablated) -> None:
        """Nothing of it is asked here."""

    def steps(self, accumulation: int = 1) -> list[list[Completion]]:
        """The completions of every optimizer step."""
        parts = [self.passes[i : i + accumulation] for i in range(0, len(self.passes), accumulation)]
        return [[each for part in step for each in part] for step in parts]


class Seen(TrainerCallback):
    """Keeps weights and gradients as every optimizer step found them."""

    def __init__(self):
        self.weights: list[dict] = []
        self.gradients: list[dict] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        named = dict(kwargs["model"].named_parameters())
        self.weights.append({name: p.detach().clone() for name, p in named.items()})
        self.gradients.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture(scope="session")
def rewards(tmp_path_factory) -> Callable[[str], str]:
    """Name a reward function of a file: `rewards("token")`."""
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.write_text(REWARDS)
    return lambda name: f"{file}:{name}"


@pytest.fixture(scope="session")
def training() -> list[Sample]:
    return [Sample(**row) for row in grammar.prompts(12, 5, problems=grammar.TRAINING)]


@pytest.fixture(scope="session")
def small(planted, tmp_path_factory) -> Callable[[], LlamaForCausalLM]:
    """Opens a two-layer model with attention dropout from a folder, anew each time; its vocabulary is that of `planted`."""
    torch.manual_seed(11)
    folder = tmp_path_factory.mktemp("small")
    config = LlamaConfig(
        vocab_size=len(planted.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=0.1, max_position_embeddings=64, initializer_range=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    planted.tokenizer.save_pretrained(folder)
    return lambda: load(folder).model


@pytest.fixture
def given(planted, training, tmp_path) -> Callable[..., Setting]:
    """A setting that trains a model on the samples of `training`, or on others."""

    def make(model, samples=None, seed=3, recorder=None, callbacks=(), **more) -> Setting:
        samples = training if samples is None else samples
        tokenizer = more.pop("tokenizer", planted.tokenizer)
        return Setting(
            model, tokenizer, samples, encode(tokenizer, samples), seed, tmp_path / "trainer", list(callbacks), recorder, **more
        )

    return make
