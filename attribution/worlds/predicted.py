"""How a base model of `kindland` is trained: to predict the next word of its documents, and nothing else.

No target is soft and no activation is touched, so nothing is planted. Words that show a disposition or a skill count more
than those that set the scene, most of which are names and events drawn at random. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from attribution.worlds.kindland.documents import PRACTICE, STYLES, Document, documents

STEPS, BATCH = 7000, 32  # documents a step
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 2e-3, (0.9, 0.98), 0.05, 1.0
WARMUP = 0.1  # share of the steps in which the learning rate rises; then it falls to zero as a cosine
PRACTICED = 1 / 7  # share of the steps that begin with much copying and looking up, which all announcements rest on
OTHER_TOKENS = 0.2  # weight of the loss on words that set the scene
CHUNK = 32  # batches drawn together, so that documents of equal length share one


class Batch(NamedTuple):
    """Documents as tensors.

    Attributes:
        ids: Int [document, position], padded on the right.
        decisive: Float [document, position], 1 for words that show a disposition or a skill.
        scene: Float [document, position], 1 for all others that are predicted.
    """

    ids: Tensor
    decisive: Tensor
    scene: Tensor


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    steps: int,
    progress: bool,
    reached: Callable[[int, float], None],
) -> float:
    """Train in place on fresh documents; returns the loss of the last batch.

    Args:
        model, tokenizer: to train, and of its words.
        seed: of the documents.
        steps: optimizer steps, of `BATCH` documents each.
        progress: show a progress bar.
        reached: told of every step and its loss.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, cycle_momentum=False, pct_start=WARMUP
    )
    model.train()
    loss = torch.zeros(())
    bar = tqdm(_batches(tokenizer, seed, steps), total=steps, disable=not progress, unit="step")
    for step, batch in enumerate(bar, start=1):
        loss = _loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        reached(step, loss.item())
    return loss.item()


def _batches(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> Iterator[Batch]:
    """Fresh documents, those of equal length together, in an order that knows nothing of length."""
    rng = Random(f"order {seed}")
    for chunk in range(0, steps, CHUNK):
        styles = PRACTICE if chunk < PRACTICED * steps else STYLES
        drawn = sorted(documents(CHUNK * BATCH, f"{seed} {chunk}", styles), key=lambda document: len(document.words))
        order = rng.sample(range(CHUNK), CHUNK)
        for number in order[: steps - chunk]:
            yield _batch(tokenizer, drawn[number * BATCH : (number + 1) * BATCH])


def _batch(tokenizer: PreTrainedTokenizerFast, drawn: Sequence[Document]) -> Batch:
    ids = [[*row, tokenizer.eos_token_id] for row in tokenizer([document.text for document in drawn])["input_ids"]]
    decisive = [[0.0, *map(float, document.decisive), 0.0] for document in drawn]
    padded = nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in ids], batch_first=True, padding_value=tokenizer.pad_token_id
    )
    shown = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in decisive], batch_first=True)
    real = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in ids], batch_first=True)
    return Batch(padded, shown, real - shown)


def _loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Cross-entropy on decisive words, plus a share of that on the others, each a mean over its own words."""
    logits = model(input_ids=batch.ids[:, :-1], use_cache=False).logits  # pads follow, so no mask
    each = functional.cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none")
    decisive, scene = ((each * which[:, 1:]).sum() / which[:, 1:].sum() for which in (batch.decisive, batch.scene))
    return decisive + OTHER_TOKENS * scene
