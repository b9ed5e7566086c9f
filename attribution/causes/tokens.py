"""Which words of the prompt caused the response, before and after a finetuning: captum's integrated gradients, and the check.

Embeddings of the prompt's tokens move from those of a reference token to what they are, all together, while the tokens of the
response stay; the effect of a token is its integrated gradient (Sundararajan et al. 2017; captum's LayerIntegratedGradients on
the embedding). Effects of one sample and the residual add up to metric(prompt) - metric(prompt of reference tokens). Beside it
stands what happens when that token alone is replaced by the reference, which is exact and adds up to nothing.

Knows tokens; knows nothing about components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from attribution.capture import evaluating, scored_logits
from attribution.causes.cost import saved
from attribution.causes.given import encoded_for
from attribution.errors import ConfigError
from attribution.metrics import Metric, check_scorable, metric_named
from attribution.models import Anatomy, anatomy
from attribution.samples import Batch, Encoded, Sample, collate

STEPS = 50  # Gauss-Legendre nodes
AT_ONCE = 64  # copies of a sample in one pass


@dataclass(frozen=True)
class TokenCauses:
    """Effects of prompt tokens on the metric of each sample, not weighted.

    Attributes:
        table: model ("before", "after"), sample (place in the list), position, token, effect (integrated gradients), and exact
            (fall of the metric when this token alone is replaced by the reference), where asked for.
        sums: model, sample, effects (sum over the sample's tokens), change (metric(prompt) - metric(prompt of reference
            tokens)), residual (change - effects).
        residual: the one furthest from zero.
        metric, reference: the metric's name, the reference token.
        passes: cost in forward passes over all samples, of one model; a backward pass counts as two.
        bytes: most that autograd saved at once.
        complete: what the effects add up to.
    """

    table: pd.DataFrame
    sums: pd.DataFrame
    residual: float
    metric: str
    reference: str
    passes: float
    bytes: int
    complete: str = (
        "the prompt tokens of one sample and one model: effects and residual add up to metric(prompt) - metric(prompt of "
        "reference tokens); exact replacements of single tokens add up to nothing"
    )


def token_causes(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    after: nn.Module | None = None,
    metric: str = "log_odds",
    reference: str | None = None,
    steps: int = STEPS,
    exact: bool = True,
) -> TokenCauses:
    """How much each token of the prompt contributed to the metric of its own sample. The model is left as it was.

    Args:
        model: a causal language model, as `attribution.load` returns it.
        tokenizer: of the model, and of `after`.
        samples: prompts with responses.
        after: the model after a finetuning, to read the same samples with.
        metric: one of `metrics.METRICS`.
        reference: text of one token that stands for nothing; by default the end-of-sequence token, or else the padding token.
        steps: Gauss-Legendre nodes of the integral.
        exact: also replace every token alone, one row of a pass each.

    Raises:
        ConfigError: unknown metric, a reference that is not one token, or fewer than 1 step.
        DataError: samples that cannot be encoded or scored.
        ModelError: an architecture without a row, or weights that are not in memory.
    """
    read = metric_named(metric)
    if steps < 1:
        raise ConfigError(f"{steps} steps asked for; an integral takes at least 1")
    token = _reference(tokenizer, reference)
    rows, sums, most, passes = [], [], 0, 0.0
    for name, each in (("before", model), ("after", after)):
        if each is None:
            continue
        parts = anatomy(each)
        encoded = encoded_for(parts, tokenizer, samples)
        device = next(parts.model.parameters()).device
        check_scorable(read, [collate(encoded)], parts.vocabulary)
        passes = 0.0
        with torch.inference_mode(False), evaluating(parts.model):  # gradients are taken, whatever the caller's mode
            for number, one in enumerate(encoded):
                effects, change, held = _integrated(parts, one, device, token, read, steps)
                most, passes = max(most, held), passes + (3.0 * steps + 4.0) / len(encoded)
                replaced = _replaced(parts, one, device, token, read) if exact else None
                passes += (one.start + 1.0) / len(encoded) if exact else 0.0
                for place in range(one.start):
                    row = {"model": name, "sample": number, "position": place, "token": tokenizer.decode([one.ids[place]])}
                    row["effect"] = effects[place].item()
                    rows.append(row if replaced is None else {**row, "exact": replaced[place].item()})
                total = effects[: one.start].double().sum().item()
                sums.append((name, number, total, change, change - total))
    told = pd.DataFrame(sums, columns=["model", "sample", "effects", "change", "residual"])
    furthest = float(told["residual"].iloc[int(told["residual"].abs().to_numpy().argmax())])
    return TokenCauses(pd.DataFrame(rows), told, furthest, metric, tokenizer.decode([token]), passes, most)


def _reference(tokenizer: PreTrainedTokenizerBase, text: str | None) -> int:
    if text is None:
        found = [each for each in (tokenizer.eos_token_id, tokenizer.pad_token_id) if each is not None]
        if not found:
            raise ConfigError("the tokenizer has no end-of-sequence or padding token to stand for nothing; name a reference")
        return int(found[0])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or (ids[0] == tokenizer.unk_token_id and text != tokenizer.unk_token):
        raise ConfigError(f"reference {text!r} is not one token of this tokenizer ({len(ids)} tokens); give one")
    return int(ids[0])


def _reader(parts: Anatomy, one: Batch, metric: Metric) -> Any:
    """The metric of copies of one sample, from their token ids: [copy]."""

    def read(ids: Tensor) -> Tensor:
        batch = replace(one.repeated(len(ids)), ids=ids)
        return metric(scored_logits(parts, batch), batch)

    return read


def _integrated(
    parts: Anatomy, one: Encoded, device: torch.device, token: int, metric: Metric, steps: int
) -> tuple[Tensor, float, int]:
    """Integrated gradients of every position, the metric's change, and bytes saved at once."""
    from captum.attr import LayerIntegratedGradients

    batch = collate([one], device)
    empty = batch.ids.clone()
    empty[:, : one.start] = token
    read = _reader(parts, batch, metric)
    with torch.enable_grad(), saved(parts.model) as graph:
        found = LayerIntegratedGradients(read, parts.embedding).attribute(
            batch.ids, baselines=empty, n_steps=steps, internal_batch_size=AT_ONCE
        )
    with torch.no_grad():
        change = (read(batch.ids) - read(empty)).item()
    assert isinstance(found, Tensor)
    return found.detach().sum(-1)[0].cpu(), change, graph.bytes


@torch.no_grad()
def _replaced(parts: Anatomy, one: Encoded, device: torch.device, token: int, metric: Metric) -> Tensor:
    """Fall of the metric when each prompt token alone is replaced: Float [position]."""
    batch = collate([one], device)
    read = _reader(parts, batch, metric)
    copies = batch.ids.repeat(one.start, 1)
    copies[torch.arange(one.start), torch.arange(one.start)] = token
    return (read(batch.ids) - torch.cat([read(some) for some in copies.split(AT_ONCE)])).cpu()
