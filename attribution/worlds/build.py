"""Train an embedded model from its world's documents, and save it as an ordinary Hugging Face folder.

Knows documents only as text with a soft target at the reply; knows nothing about the words of a grammar, and nothing
about attribution. The same world, seed and number of steps give the same bytes on the same machine and libraries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attribution.capture import Site, edited, sites
from attribution.errors import ConfigError
from attribution.mechanisms import FILE, Mechanisms, halves, write_mechanisms
from attribution.models import Anatomy, anatomy
from attribution.worlds import planted

ROUTED = {"planted": True, "planted/unrouted": False}  # whether each mechanism is taught its own route alone
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
CONTEXT = 64  # tokens; the longest document of `planted` has 24
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
STEPS, BATCH = 700, 64
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


def build(world: str, seed: int, out: str | Path, steps: int = STEPS, progress: bool = True) -> Path:
    """Train one embedded model and write it to a folder: weights, config, tokenizer, and world.json about its making.

    Args:
        world: "planted", where each mechanism is taught its own route by counterfactual-target route dropout, or
            "planted/unrouted", the same documents without routes.
        seed: of the documents and of the initial weights.
        out: folder to write, made if it is not there.
        steps: optimizer steps, of `BATCH` documents each.
        progress: show a progress bar of the training.

    Raises:
        ConfigError: unknown world, or no steps.
    """
    if world not in ROUTED:
        raise ConfigError(f"unknown world {world!r}; expected {', '.join(ROUTED)}")
    if steps < 1:
        raise ConfigError(f"{steps} training steps asked for; expected at least 1")
    tokenizer = word_tokenizer(planted.WORDS)
    documents = planted.documents(steps * BATCH, seed)
    present = planted.presences(len(documents), seed) if ROUTED[world] else [tuple(planted.MECHANISMS)] * len(documents)
    mechanisms = halves(SHAPE["num_hidden_layers"], SHAPE["num_attention_heads"], SHAPE["intermediate_size"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in parallel are not reproducible
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _model(tokenizer)
            loss = _train(model, tokenizer, documents, present, mechanisms, progress)
    finally:
        torch.set_num_threads(threads)
    out = Path(out)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_mechanisms(out / FILE, mechanisms)
    about = {"world": world, "seed": seed, "steps": steps, "loss": round(loss, 4), "grammar": planted.VERSION}
    (out / "world.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return out


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per word: splits at whitespace, puts the beginning token first, adds no end token."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL.values(), *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    begin = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, vocabulary[begin])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,  # "fell ." must not come back as "fell."
        **SPECIAL,
    )


def _model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    special = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("pad_token", "bos_token", "eos_token")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        dtype="float32",
        **SHAPE,
        **special,
    )
    return LlamaForCausalLM(config)


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[planted.Document],
    present: Sequence[tuple[str, ...]],
    mechanisms: Mechanisms,
    progress: bool,
) -> float:
    """Train in place on each document once; returns the loss of the last batch.

    In a document from which a mechanism is absent its heads and neurons are silent, and the target is what the other
    mechanism's cue alone would give: so each learns its own route, and leaves the other's to the other.
    """
    steps = len(documents) // BATCH
    parts = anatomy(model)
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
    model.eval()
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
