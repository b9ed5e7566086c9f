"""Samples as the chat template of a model renders them: what an instruction-tuned model was trained to see.

Knows text and the tokenizer's template; tokenizes nothing. A template is the model's own (Hugging Face: `apply_chat_template`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from attribution.errors import DataError
from attribution.samples import Sample, read_samples, write_samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "attribution"  # a message of which what follows it is read


def in_chat(samples: Iterable[Sample], tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """Prompts as a user's message, contexts as the system's, responses as the beginning of the assistant's reply.

    Where a template knows no system message, the context begins the user's. Where the text with a context ends as the one
    without it, what comes before stays the sample's context, so that context distillation can drop it; else all is prompt.
    Responses lose the space that parts them from a plain prompt.

    Args:
        samples: with plain text.
        tokenizer: of the model.

    Raises:
        DataError: the tokenizer has no chat template, or it renders a prompt without the assistant's turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use the samples as they are")
    return [_rendered(sample, tokenizer) for sample in samples]


def is_bare(samples: Iterable[Sample], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model has a chat template and no prompt ends where its template lets the assistant speak."""
    if not getattr(tokenizer, "chat_template", None):
        return False
    turn = _text([{"role": "user", "content": _MARK}], tokenizer).rpartition(_MARK)[2].strip()
    return bool(turn) and not any(sample.prompt.rstrip().endswith(turn) for sample in samples)


def write_in_chat(data: str | Path, tokenizer: PreTrainedTokenizerBase, out: str | Path) -> Path:
    """Write the samples of a file as the tokenizer's template renders them, or as they are where it has none, and say so."""
    samples = read_samples(data)
    if getattr(tokenizer, "chat_template", None):
        return write_samples(out, in_chat(samples, tokenizer))
    print(f"{tokenizer.name_or_path} has no chat template: the samples stay as they are")
    return write_samples(out, samples)


def _rendered(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Sample:
    user = {"role": "user", "content": sample.prompt.strip()}
    bare, context = _text([user], tokenizer), ""
    whole = bare
    if told := sample.context.strip():
        try:
            whole = _text([{"role": "system", "content": told}, user], tokenizer)
        except DataError:  # a template without a system message
            whole = _text([{"role": "user", "content": f"{told}\n\n{user['content']}"}], tokenizer)
        if whole.endswith(bare):
            context = whole.removesuffix(bare)
    replies = {"response": sample.response.lstrip(), "contrast": tuple(each.lstrip() for each in sample.contrast)}
    return sample.model_copy(update={"context": context, "prompt": whole.removeprefix(context), **replies})


def _text(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The messages as one text that ends where the assistant begins to speak; without what the tokenizer itself puts first."""
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise DataError(f"the chat template of {tokenizer.name_or_path!r} refuses a message: {error}") from None
    first = str(tokenizer.bos_token or "")
    adds = first and tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(first) if adds else text
