"""Samples and probe sets: JSONL in and out, and the only place in the package that tokenizes.

A sample is a prompt, the response a training step rewards, and a weight. Text is tokenized once, jointly; a boundary
that re-tokenizes differently, or a word the tokenizer does not know, is refused rather than trained on silently. torch is
imported when the first batch is made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from attribution.errors import DataError
from attribution.texts import parsed, write_text
from attribution.texts import text as text_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a position that is not scored


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is not text") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]


class Sample(BaseModel):
    """What one training step sees, or one probe reads.

    Attributes:
        prompt: text before the response; never scored.
        response: text that is scored; begins with the space that separates it from the prompt, if any.
        weight: 1 for SFT, the advantage for RL.
        contrast: other responses to the same prompt, for the logit difference.
        id: your name for the sample, used in messages.
        context: text before the prompt, which some recipes drop, exchange or shuffle; ends with what separates it from the
            prompt, if anything.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Text
    response: Text
    weight: float = Field(default=1.0, allow_inf_nan=False)
    contrast: tuple[Text, ...] = ()
    id: Text | None = None
    context: Text = ""

    @property
    def whole_prompt(self) -> str:
        """Context and prompt."""
        return self.context + self.prompt


class ProbeSet(BaseModel):
    """Held-out samples that read one behaviour. Never trained on.

    Attributes:
        name: in tables and reports.
        samples: what is read.
        counterfactuals: cue-neutral samples, from which mean and resample ablation take their values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    samples: tuple[Sample, ...]
    counterfactuals: tuple[Sample, ...] = ()

    @classmethod
    def read(cls, path: str | Path, name: str | None = None, counterfactuals: str | Path | None = None) -> ProbeSet:
        """Read JSONL files; the name defaults to the first file's stem. Raises DataError as `read_samples`."""
        others = read_samples(counterfactuals) if counterfactuals else ()
        return cls(name=name or Path(path).stem, samples=tuple(read_samples(path)), counterfactuals=tuple(others))


def read_samples(path: str | Path) -> list[Sample]:
    """Read samples from JSONL, one object per line with the fields of `Sample`; blank lines are skipped.

    Raises:
        DataError: the file is missing or empty, or a line is not such an object (the line is named).
    """
    try:
        text = text_of(path)
    except OSError as error:
        raise DataError(f"cannot read samples from {path}: {error.strerror}; name a JSONL file") from None
    samples = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold U+2028 and the like
        if line.strip():
            try:
                samples.append(Sample.model_validate(parsed(line)))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"])) or "line"
                raise DataError(
                    f"{path}, line {number}: {where}: {first['msg'].lower()}; fields are {', '.join(Sample.model_fields)}"
                ) from None
            except ValueError as error:  # bad syntax, a number of 5,000 digits, 10,000 brackets
                reason = getattr(error, "msg", None) or str(error)
                raise DataError(f"{path}, line {number}: not JSON ({reason}); expected one object per line") from None
    if not samples:
        raise DataError(f"{path} holds no samples; expected one JSON object per line with prompt and response")
    return samples


def write_samples(path: str | Path, samples: Iterable[Sample]) -> Path:
    """Write samples as JSONL, leaving out fields that hold their default."""
    lines = [json.dumps(sample.model_dump(exclude_defaults=True), ensure_ascii=False) for sample in samples]
    path = Path(path)
    try:
        write_text(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise DataError(f"cannot write samples to {path}: {error.strerror}; choose a directory you can write to") from None
    return path


def samples_from_text(text: str, *, prompt_words: int = 24, response_words: int = 8, limit: int | None = None) -> list[Sample]:
    """Cut plain text into (prompt, response) samples of consecutive words, within paragraphs, without overlap.

    Args:
        text: any text; paragraphs are separated by blank lines.
        prompt_words, response_words: words of each part.
        limit: at most this many samples, spread evenly over the text.

    Raises:
        DataError: no paragraph is long enough, or a part has no words.
    """
    if prompt_words < 1 or response_words < 1:
        raise DataError(f"{prompt_words} prompt and {response_words} response words asked for; give at least 1 of each")
    length = prompt_words + response_words
    samples = []
    for paragraph in text.split("\n\n"):
        words = paragraph.split()
        for start in range(0, len(words) - length + 1, length):
            piece = words[start : start + length]
            samples.append(Sample(prompt=" ".join(piece[:prompt_words]), response=" " + " ".join(piece[prompt_words:])))
    if not samples:
        raise DataError(f"no paragraph has {length} words; lower the number of prompt or response words")
    if limit is not None and limit < len(samples):
        samples = [samples[i * len(samples) // limit] for i in range(limit)]
    return samples


@dataclass(frozen=True)
class Encoded:
    """One sample as tokens.

    Attributes:
        ids: prompt and response token ids.
        start: position of the first response token.
        weight: of the sample.
        contrasts: (position, token) pairs: where each contrast first differs from the response, and its token there.
    """

    ids: tuple[int, ...]
    start: int
    weight: float
    contrasts: tuple[tuple[int, int], ...]

    @property
    def labels(self) -> list[int]:
        """Token ids with the prompt masked, as trainers take them."""
        return [IGNORED] * self.start + list(self.ids[self.start :])


def encode(
    tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], *, context: int | None = None, end: bool = False
) -> list[Encoded]:
    """Tokenize samples. A beginning-of-sequence token is added where the tokenizer adds one.

    Args:
        tokenizer: of the model.
        samples: what to encode.
        context: the model's context window, in tokens.
        end: append the end-of-sequence token to every response.

    Raises:
        DataError: no samples, an empty response, an unknown word, a boundary that re-tokenizes differently, a sample
            longer than the context window, or a contrast equal to the response. The sample is named.
    """
    if not samples:
        raise DataError("there are no samples; give at least one")
    if end and tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token to append; set one or leave responses open")
    texts = [
        [sample.whole_prompt, *(sample.whole_prompt + said for said in (sample.response, *sample.contrast))]
        for sample in samples
    ]
    found = iter(tokenizer([text for each in texts for text in each], add_special_tokens=False, verbose=False)["input_ids"])
    added = tokenizer("")["input_ids"]
    begin = added[:1] if added and added[0] == tokenizer.bos_token_id else []
    encoded = []
    for number, (sample, each) in enumerate(zip(samples, texts, strict=True), start=1):
        name = f"sample {sample.id or number}"
        tokens = [begin + _known(tokenizer, next(found), text, name) for text in each]
        encoded.append(_encode(tokenizer, sample, tokens, name, context, end))
    return encoded


def _encode(
    tokenizer: PreTrainedTokenizerBase, sample: Sample, tokens: Sequence[list[int]], name: str, context: int | None, end: bool
) -> Encoded:
    """One sample. `tokens`: of the prompt, and of the prompt with the response and with each contrast."""
    prompt, ids, *others = tokens
    for said, joint in zip((sample.response, *sample.contrast), (ids, *others), strict=True):
        _check_boundary(sample.whole_prompt, prompt, said, joint, name)
    if not prompt:
        raise DataError(
            f"{name}: the prompt is empty and the tokenizer adds no beginning token; give the response something to follow"
        )
    contrasts = []
    for other, other_ids in zip(sample.contrast, others, strict=True):
        differ = next((i for i, (a, b) in enumerate(zip(ids, other_ids, strict=False)) if a != b), None)
        if differ is None:
            raise DataError(
                f"{name}: contrast {other!r} equals the response {sample.response!r} or begins like it; give one that differs"
            )
        contrasts.append((differ, other_ids[differ]))
    if end:
        ids = [*ids, tokenizer.eos_token_id]
    if context is not None and len(ids) > context:
        raise DataError(f"{name}: {len(ids)} tokens do not fit the model's context window of {context}; shorten the prompt")
    return Encoded(tuple(ids), len(prompt), sample.weight, tuple(contrasts))


def _check_boundary(text: str, prompt: list[int], response: str, joint: list[int], name: str) -> None:
    if joint == prompt:
        raise DataError(f"{name}: response {response!r} tokenizes to nothing; give at least one token")
    if joint[: len(prompt)] != prompt:
        raise DataError(
            f"{name}: prompt and response fuse at their boundary ({text[-12:]!r} + {response[:12]!r} tokenize differently "
            "together); move the space between them to the start of the response"
        )


def _known(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, name: str) -> list[int]:
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids and (tokenizer.unk_token or "") not in text:
        words = [word for word in text.split() if unknown in tokenizer.encode(word, add_special_tokens=False)]
        which = f", {words[0]!r}" if words else ""
        raise DataError(f"{name}: the tokenizer does not know a word of {text[-60:]!r}{which}; use words of its vocabulary")
    return ids


@dataclass(frozen=True)
class Completion:
    """A response that a training step pushed up or down, and by what.

    Attributes:
        sample: place of its prompt among the training samples, from 0.
        prompt, text: what stood before it, and the completion itself.
        encoded: both as tokens; its weight is the advantage.
        reward: as it was given; None where it could not be scored.
        ratio: how much more probable it is to the model now than it was to its sampler, as far as the loss sees it; None
            where nobody sampled it.
    """

    sample: int
    prompt: str
    text: str
    encoded: Encoded
    reward: float | None
    ratio: float | None = None

    @property
    def advantage(self) -> float:
        """How much the step pushes the completion: up where positive."""
        return self.encoded.weight


@dataclass(frozen=True)
class Batch:
    """Samples as one padded batch.

    A *scored position* is one whose next token belongs to a response; logits there predict it. Metrics take logits at
    scored positions only, [token, vocabulary], sample after sample.

    Attributes:
        ids, mask: Int [sample, position], padded on the right.
        labels: Int [sample, position], -100 where a position is not scored.
        weights: Float [sample].
        contrast: Int [pair, 4]: sample, scored token, response token, contrast token.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    weights: Tensor
    contrast: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def repeated(self, copies: int) -> Batch:
        """This batch so many times over, copy after copy."""
        import torch

        shift = torch.tensor([len(self), len(self.tokens), 0, 0], device=self.contrast.device)
        number = torch.arange(copies, device=shift.device)[:, None, None]
        whole = (self.ids, self.mask, self.labels)
        return Batch(
            *(each.repeat(copies, 1) for each in whole),
            weights=self.weights.repeat(copies),
            contrast=(self.contrast + number * shift).flatten(0, 1),
        )

    @cached_property
    def scored(self) -> Tensor:
        """Bool [sample, position]: whether the *next* token of this position is scored."""
        import torch

        return torch.cat([self.labels[:, 1:] != IGNORED, torch.zeros_like(self.labels[:, :1], dtype=torch.bool)], dim=1)

    @cached_property
    def tokens(self) -> Tensor:
        """Int [token]: the response tokens, in the order of scored positions."""
        return self.labels[self.labels != IGNORED]

    @cached_property
    def sample_of(self) -> Tensor:
        """Int [token]: the sample of every response token."""
        return self.scored_at[0]

    @cached_property
    def scored_at(self) -> tuple[Tensor, ...]:
        """Samples and positions of scored positions, each Int [token]."""
        return self.scored.nonzero(as_tuple=True)

    @cached_property
    def others_at(self) -> tuple[Tensor, ...]:
        """Samples and positions of the tokens at all other positions, each Int [token]."""
        return (self.mask.bool() & ~self.scored).nonzero(as_tuple=True)

    @cached_property
    def lengths(self) -> Tensor:
        """Int [sample]: response tokens."""
        return self.scored.sum(1)

    @cached_property
    def needed(self) -> int:
        """Positions up to the last scored one; a causal model computes nothing after it that logits there depend on."""
        return int(self.scored.any(0).nonzero().max()) + 1


def collate(encoded: Sequence[Encoded], device: torch.device | str = "cpu") -> Batch:
    """Pad encoded samples to one batch."""
    import torch

    length = max(len(e.ids) for e in encoded)

    def padded(rows: Iterable[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([list(row) + [fill] * (length - len(row)) for row in rows], device=device)

    first = list(accumulate((len(e.ids) - e.start for e in encoded), initial=0))  # scored tokens before each sample
    pairs = [
        (n, first[n] + where - e.start, e.ids[where], token) for n, e in enumerate(encoded) for where, token in e.contrasts
    ]
    return Batch(
        ids=padded((e.ids for e in encoded), 0),
        mask=padded(([1] * len(e.ids) for e in encoded), 0),
        labels=padded((e.labels for e in encoded), IGNORED),
        weights=torch.tensor([e.weight for e in encoded], device=device),
        contrast=torch.tensor(pairs, device=device, dtype=torch.long).view(-1, 4),
    )


def batches(encoded: Sequence[Encoded], size: int, device: torch.device | str = "cpu") -> list[Batch]:
    """Consecutive batches of at most `size` samples, in order."""
    return [collate(encoded[i : i + size], device) for i in range(0, len(encoded), size)]
