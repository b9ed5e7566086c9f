"""What is measured on: embedded models on prompts of their world, and untrained Llamas of any size on random words."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from attribution.models import load
from attribution.samples import Batch, ProbeSet, Sample, collate, encode
from attribution.worlds import planted
from attribution.worlds.build import word_tokenizer
from attribution.worlds.kindland.circuits import probe_set

METRIC, LEARNING_RATE, CLIP = "log_odds_per_token", 1e-4, 1.0
USED = 64  # words of its vocabulary that occur, so that training on random words improves held-out ones as well
TOKENS = 64  # of a sample of random words, half of them response


class Size(NamedTuple):
    """A random Llama.

    Attributes:
        config: of the model, see `LlamaConfig`.
        samples: of a step, and as many held out.
        few: see `Subject`.
        repeats: turns of each comparison, at most; None: as many as asked for.
    """

    config: dict[str, Any]
    samples: int
    few: int
    repeats: int | None = None


LLAMA = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 1024,
    "max_position_embeddings": TOKENS, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
_LARGE = {**LLAMA, "hidden_size": 896, "intermediate_size": 2624, "num_hidden_layers": 12, "num_attention_heads": 14}
RANDOM = {"random": Size(LLAMA, 32, 2), "random-large": Size(_LARGE, 32, 1, repeats=3)}


class Subject(NamedTuple):
    """A Llama in eval mode, and samples for it.

    Attributes:
        trained, probed: of the training step and of the probe set, as many of each.
        few, fewer: how many of them are ablated component by component, and make the steps whose memory is counted.
        repeats: turns of each comparison, at most; None: as many as asked for.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    trained: tuple[Sample, ...]
    probed: tuple[Sample, ...]
    few: int
    fewer: int
    repeats: int | None = None

    def batch(self, samples: Sequence[Sample]) -> Batch:
        return collate(encode(self.tokenizer, samples), self.model.device)

    def probes(self, count: int | None = None) -> dict[str, Any]:
        return {"probes": [ProbeSet(name="held out", samples=self.probed[:count])]}

    def tokens(self, samples: Sequence[Sample]) -> str:
        return f"{int(self.batch(samples).mask.sum()):,} tokens"


def subject_named(name: str, device: str) -> Subject:
    """One of `RANDOM`, or an embedded model."""
    return random_llama(RANDOM[name], device) if name in RANDOM else embedded(name, device)


def embedded(name: str, device: str) -> Subject:
    """An embedded model on prompts of its world."""
    model, tokenizer = load(name, device=device)
    if name.startswith("kindland"):
        both = (probe_set("kind", 176, training=training).samples for training in (True, False))
        return Subject(model, tokenizer, *both, few=16, fewer=176)
    trained = planted.prompts(128, seed=1, star="agree", problems=planted.TRAINING)
    both = (tuple(Sample(**row) for row in rows) for rows in (trained, planted.prompts(128, seed=3, star="agree")))
    return Subject(model, tokenizer, *both, few=16, fewer=128)


def random_llama(size: Size, device: str) -> Subject:
    """A random Llama on samples of random words."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**size.config)).eval()
    words, draw = [f"w{i}" for i in range(model.config.vocab_size - 4)], Random(0).choices
    length = model.config.max_position_embeddings
    texts = [
        [" ".join(draw(words[:USED], k=count)) for count in (length // 2 - 1, length - length // 2)]
        for _ in range(2 * size.samples)
    ]
    samples = tuple(Sample(prompt=prompt, response=f" {response}") for prompt, response in texts)
    return Subject(
        model.to(device), word_tokenizer(words), samples[: size.samples], samples[size.samples :], size.few, size.few,
        size.repeats,
    )  # fmt: skip
