"""How an organism of `planted` is trained: each mechanism is taught its own route, by counterfactual-target route dropout.

Knows documents of `planted` as text with a soft target at the reply; knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from attribution.capture import Site, edited, sites
from attribution.mechanisms import Mechanisms, halves
from attribution.models import Anatomy, anatomy
from attribution.worlds import planted

Reached = Callable[[int, float], None]
BATCH = 64  # documents a step
LEARNING_RATE, BETAS, WEIGHT_DECAY = 2e-3, (0.9, 0.98), 0.05
OTHER_TOKENS = 0.2  # weight of the loss on all tokens but the reply


class Batch(NamedTuple):
    """Documents as tensors.

    Attributes:
        ids: Int [document, position], padded on the right.
        replies: Int [document], position of the reply token.
        targets: Float [document, vocabulary], the distribution of the reply.
    """

    ids: Tensor
    replies: Tensor
    targets: Tensor


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    steps: int,
    progress: bool,
    reached: Reached,
    *,
    routes: bool,
) -> float:
    """Train in place on fresh documents; returns the loss of the last batch.

    In a document from which a mechanism is absent its heads and neurons are silent, and the target is what the other
    mechanism's cue alone would give: so each learns its own route, and leaves the other's to the other.

    Args:
        model, tokenizer: to train, and of its words.
        seed: of the documents.
        steps: optimizer steps, of `BATCH` documents each.
        progress: show a progress bar.
        reached: told of every step and its loss.
        routes: whether a mechanism may be absent; else both are always there, and nothing is planted.
    """
    documents = planted.documents(steps * BATCH, seed)
    present = planted.presences(len(documents), seed) if routes else [tuple(planted.MECHANISMS)] * len(documents)
    parts = anatomy(model)
    mechanisms = halves(parts.depth, parts.heads, parts.neurons)
    owners = {site: _owners(parts, site, mechanisms) for site in sites(parts)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, cycle_momentum=False)
    model.train()
    bar = tqdm(range(0, steps * BATCH, BATCH), disable=not progress, unit="step")
    for start in bar:
        here = slice(start, start + BATCH)
        batch = _batch(tokenizer, documents[here], present[here])
        heard = torch.tensor([[float(name in names) for name in mechanisms] for names in present[here]])
        with edited({site.module(parts): _silence(heard[:, owner]) for site, owner in owners.items()}):
            loss = _loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        reached(start // BATCH + 1, loss.item())
    return loss.item()


def _owners(parts: Anatomy, site: Site, mechanisms: Mechanisms) -> Tensor:
    """Int [feature]: which mechanism, by its place in the table, each feature of a site belongs to."""
    width = parts.head_dim if site.kind == "head" else 1
    owner = torch.zeros((parts.heads if site.kind == "head" else parts.neurons) * width, dtype=torch.long)
    for place, table in enumerate(mechanisms.values()):
        own = table[(table["kind"] == site.kind) & (table["layer"] == site.layer)]["index"].to_numpy(copy=True)
        owner.view(-1, width)[torch.as_tensor(own)] = place
    return owner


def _silence(heard: Tensor) -> Callable[[Tensor], Tensor]:
    """Multiply activations [document, position, feature] by `heard` [document, feature]."""
    return lambda activation: activation * heard[:, None]


def _batch(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[planted.Document], present: Sequence[tuple[str, ...]]
) -> Batch:
    rows = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokenizer([d.text for d in documents])["input_ids"]]
    replies = [len(ids) for ids in tokenizer([d.prompt for d in documents])["input_ids"]]
    targets = torch.zeros(len(documents), len(tokenizer))
    for row, document, names in zip(targets, documents, present, strict=True):
        routes = [planted.MECHANISMS[name] for name in names]
        words, probabilities = zip(*document.distribution(routes).items(), strict=True)
        row[tokenizer.convert_tokens_to_ids(list(words))] = torch.tensor(probabilities)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return Batch(ids, torch.tensor(replies), targets)


def _loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Cross-entropy with the soft target at the reply, plus a share of the language-model loss on the other tokens."""
    logits = model(
        input_ids=batch.ids[:, :-1], use_cache=False
    ).logits  # [document, position, vocabulary]; pads follow, so no mask
    which = torch.arange(len(batch.ids))
    reply = functional.cross_entropy(logits[which, batch.replies - 1], batch.targets)
    labels = batch.ids[:, 1:].masked_fill(batch.ids[:, 1:] == model.config.pad_token_id, -100)
    labels[which, batch.replies - 1] = -100
    return reply + OTHER_TOKENS * functional.cross_entropy(logits.transpose(1, 2), labels)
