"""Train an embedded model from its world's documents, and save it as an ordinary Hugging Face folder.

Knows worlds as rows of a table: their words, the shape of their models and how these are trained; knows nothing about a
grammar, and nothing about attribution. The same world, seed and number of steps give the same bytes on the same machine
and libraries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attribution.errors import ConfigError
from attribution.mechanisms import FILE, Mechanisms, halves, write_mechanisms
from attribution.worlds import kindland, planted, predicted, routed
from attribution.worlds.kindland import circuits

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


class World(NamedTuple):
    """How the models of a world are made.

    Attributes:
        words: of its tokenizer.
        grammar: version of it.
        context: tokens, more than the longest document has.
        shape: sizes of the model, as `LlamaConfig` takes them.
        steps: of training.
        train: (model, tokenizer, seed, steps, progress, reached) -> loss; trains in place, and tells `reached` of every step.
        mechanisms: (model, tokenizer, progress) -> named sets of components, which are written beside the weights.
        discovered: they are found in the model, which takes minutes and needs one that was trained to the end; else known.
    """

    words: Sequence[str]
    grammar: int
    context: int
    shape: Mapping[str, int]
    steps: int
    train: Callable[..., float]
    mechanisms: Callable[..., Mechanisms]
    discovered: bool = False


def _halves(model: LlamaForCausalLM, *_: Any, **__: Any) -> Mechanisms:
    shape = model.config
    return halves(shape.num_hidden_layers, shape.num_attention_heads, shape.intermediate_size)


_PLANTED = World(
    planted.WORDS,
    planted.VERSION,
    context=64,
    shape={"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    steps=700,
    train=partial(routed.train, routes=True),
    mechanisms=_halves,
)
WORLDS = {
    "planted": _PLANTED,  # each mechanism is taught its own route
    "planted/unrouted": _PLANTED._replace(train=partial(routed.train, routes=False)),  # the same documents without routes
    "kindland": World(
        kindland.WORDS,
        kindland.VERSION,
        context=128,
        shape={"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
        steps=predicted.STEPS,
        train=predicted.train,
        mechanisms=circuits.mechanisms,
        discovered=True,
    ),
}


def build(
    world: str,
    seed: int,
    out: str | Path,
    steps: int | None = None,
    progress: bool = True,
    early: Sequence[int] = (),
) -> Path:
    """Train one embedded model and write it to a folder: weights, config, tokenizer, and world.json about its making.

    Args:
        world: of `WORLDS`.
        seed: of the documents and of the initial weights.
        out: folder to write, made if it is not there.
        steps: optimizer steps; as many as the world's own models took if None.
        progress: show a progress bar of the training.
        early: steps after which the model is written too, each to the folder beside `out` named OUT-step.

    Raises:
        ConfigError: unknown world, no steps, or an early step that is not reached.
    """
    if world not in WORLDS:
        raise ConfigError(f"unknown world {world!r}; expected {', '.join(WORLDS)}")
    row, out = WORLDS[world], Path(out)
    total = row.steps if steps is None else steps
    if total < 1:
        raise ConfigError(f"{total} training steps asked for; expected at least 1")
    beyond = [step for step in early if not 0 < step < total]
    if beyond:
        raise ConfigError(f"early steps {beyond} are not between the first and the last of {total}; name others")
    tokenizer = word_tokenizer(row.words, row.context)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in parallel are not reproducible
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _model(tokenizer, row)

            def write(folder: Path, step: int, loss: float) -> None:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                about = {"world": world, "seed": seed, "steps": step, "loss": round(loss, 4), "grammar": row.grammar}
                if step < total:
                    about["of"] = total
                if not row.discovered:
                    write_mechanisms(folder / FILE, row.mechanisms(model, tokenizer))
                (folder / "world.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

            def reached(step: int, loss: float) -> None:
                if step in early:
                    write(out.with_name(f"{out.name}-{step}"), step, loss)

            loss = row.train(model, tokenizer, seed, total, progress, reached)
    finally:
        torch.set_num_threads(threads)
    model.eval()
    write(out, total, loss)
    if row.discovered and total >= row.steps:
        write_mechanisms(out / FILE, row.mechanisms(model, tokenizer, progress=progress))
    return out


def word_tokenizer(words: Sequence[str], context: int = 64) -> PreTrainedTokenizerFast:
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
        model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,  # "fell ." must not come back as "fell."
        **SPECIAL,
    )


def _model(tokenizer: PreTrainedTokenizerFast, world: World) -> LlamaForCausalLM:
    special: dict[str, Any] = {
        f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("pad_token", "bos_token", "eos_token")
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=world.context,
        tie_word_embeddings=False,
        dtype="float32",
        **world.shape,
        **special,
    )
    return LlamaForCausalLM(config)
