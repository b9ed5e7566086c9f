"""Which components caused a response: one face, `attribute`, for every method, and `ablate` for whole sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from attribution.capture import evaluating
from attribution.causes.ablation import Effects, ablate_each, ablate_sets
from attribution.causes.gradient import first_order
from attribution.causes.reference import Values, aligned_activations, check_reference, mean_activations, zeros
from attribution.causes.result import Causes
from attribution.components import Component, Components
from attribution.errors import ConfigError
from attribution.metrics import Metric, check_scorable, metric_named
from attribution.models import Anatomy
from attribution.samples import Batch, Encoded, Sample, batches, collate, encode

METHODS = ("ablation", "gradient")
BATCH_SIZE = 64  # samples of one pass


def attribute(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    method: str = "ablation",
    metric: str = "log_odds",
    reference: str = "zero",
    counterfactuals: Sequence[Sample] | None = None,
    components: Iterable[Component] | pd.DataFrame | None = None,
    progress: bool = False,
) -> Causes:
    """How much each component contributed to the metric on these samples. The model is left as it was.

    Args:
        model: a causal language model, as `attribution.load` returns it.
        tokenizer: of the model.
        samples: prompts with responses.
        method: "ablation" (exact: fall of the metric when the component is replaced by its reference) or "gradient"
            (first order: gradient x (activation - reference)).
        metric: one of `metrics.METRICS`.
        reference: "zero"; "mean", over all tokens of the counterfactuals; or "resample", the activations on the
            counterfactual of the same place in the list, position by position.
        counterfactuals: cue-neutral samples for the last two.
        components: restrict the result to these, in the order of the model; all by default. Every row costs a metric over
            the vocabulary, so of a large one name those you mean.
        progress: show a bar.

    Raises:
        ConfigError: unknown method, metric, reference or component.
        DataError: samples that cannot be encoded, or counterfactuals that cannot be aligned.
        ModelError: an architecture without a row.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; expected {', '.join(METHODS)}")
    index = Components(model)
    positions = np.arange(len(index)) if components is None else index.positions(components)
    found, divergence, passes = [], [], 0.0
    with evaluating(index.parts.model):
        read = metric_named(metric)
        for batch, values in _batches(index.parts, tokenizer, samples, read, reference, counterfactuals, progress):
            passes += 0.0 if reference == "zero" else len(batch)  # for the values
            if method == "gradient":
                found.append(first_order(index, batch, values, read)[torch.as_tensor(positions)])
                passes += 3.0 * len(batch)
            else:
                effects = ablate_each(index, positions, batch, values, read)
                found.append(effects.effect)
                divergence.append(effects.kl)
                passes += effects.passes * len(batch)
    per_sample = torch.cat(found, dim=1).cpu()
    table = index.table.iloc[positions].reset_index(drop=True)
    table["effect"] = _mean(per_sample, samples)
    if divergence:
        table["kl"] = torch.cat(divergence, dim=1).double().mean(1).cpu().numpy()
    return Causes(table, per_sample, method, metric, reference, None, passes / len(samples))


def ablate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    sets: Mapping[str, Iterable[Component] | pd.DataFrame],
    *,
    metric: str = "log_odds",
    reference: str = "zero",
    counterfactuals: Sequence[Sample] | None = None,
) -> pd.DataFrame:
    """Ablate whole sets of components, each jointly. Arguments and errors as `attribute`.

    Returns:
        One row per set: set, size, effect, kl, as in `Causes.table`.
    """
    if not sets:
        raise ConfigError("there are no sets to ablate; give at least one, as name: components")
    index = Components(model)
    chosen = {name: index.positions(members) for name, members in sets.items()}
    found: list[Effects] = []
    with evaluating(index.parts.model):
        read = metric_named(metric)
        for batch, values in _batches(index.parts, tokenizer, samples, read, reference, counterfactuals, False):
            found.append(ablate_sets(index, chosen, batch, values, read))
    return pd.DataFrame({
        "set": list(sets),
        "size": [len(positions) for positions in chosen.values()],
        "effect": _mean(torch.cat([each.effect for each in found], dim=1), samples),
        "kl": torch.cat([each.kl for each in found], dim=1).double().mean(1).cpu().numpy(),
    })  # fmt: skip


def _batches(
    parts: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    metric: Metric,
    reference: str,
    counterfactuals: Sequence[Sample] | None,
    progress: bool,
) -> Iterator[tuple[Batch, Values]]:
    """Batches of samples, each with the values that replace its activations."""
    context = getattr(parts.model.config, "max_position_embeddings", None)
    encoded = encode(tokenizer, samples, context=context)
    others = encode(tokenizer, counterfactuals, context=context) if counterfactuals else None
    check_reference(reference, encoded, others)
    check_scorable(metric, batches(encoded, BATCH_SIZE), parts.vocabulary)
    yield from batches_with_values(parts, encoded, reference, others, progress)


def batches_with_values(
    parts: Anatomy, encoded: Sequence[Encoded], reference: str, others: Sequence[Encoded] | None, progress: bool = False
) -> Iterator[tuple[Batch, Values]]:
    """Batches of encoded samples, each with the values that replace its activations; checked beforehand."""
    device = next(parts.model.parameters()).device
    values = zeros(parts)
    if reference == "mean" and others:
        values = mean_activations(parts, batches(others, BATCH_SIZE, device))
    for start in tqdm(range(0, len(encoded), BATCH_SIZE), disable=not progress, unit="batch", desc="attribution", leave=False):
        if reference == "resample" and others:
            values = aligned_activations(parts, others[start : start + BATCH_SIZE])
        yield collate(encoded[start : start + BATCH_SIZE], device), values


def _mean(per_sample: Tensor, samples: Sequence[Sample]) -> np.ndarray:
    weights = torch.tensor([sample.weight for sample in samples], dtype=torch.float64)
    return (per_sample.double().cpu() * weights).mean(1).numpy()


__all__ = ["METHODS", "Causes", "ablate", "attribute"]
