"""Which components caused a response: one face, `attribute`, for every method; `ablate` and `self_repair` for whole sets.

| method | what | passes over the samples | adds up |
|---|---|---|---|
| ablation | replace each component, run again | about half of one for each head and neuron | no |
| ablation, path="direct" | the same, but only for what it writes into the logits | 1 | over components, before a soft-cap |
| gradient | gradient x (activation - reference) | 3 | no |
| gradient, queries=True | also: replace queries, keys; recompute the pattern | 7 + 2 for each head of a layer | no |
| integrated | gradients in unit masks, from all ablated to none | 3 for each node, 10 to a piece | heads and neurons; rows |
| conductance | along a path of the input embeddings | 5 for each node | heads, or neurons, of a layer, and what passes by |

A backward pass counts as two forward ones. The unembedding of each ablation's logits is not counted: it is all that a direct
effect, a row or a neuron of the last layer costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from attribution.capture import evaluating
from attribution.causes.ablation import Effects, ablate_sets
from attribution.causes.direct import direct_sets
from attribution.causes.floor import floor_of, rounds
from attribution.causes.given import BATCH_SIZE, Given, batches_with_values
from attribution.causes.integrated import NODES
from attribution.causes.methods import METHODS, Asked, caveats
from attribution.causes.reference import REFERENCES, VOCABULARY
from attribution.causes.result import COMPLETE, Causes, Found, Verified, largest, mean, sums_of
from attribution.causes.verified import verified_ranking
from attribution.components import Component, Components
from attribution.errors import ConfigError
from attribution.metrics import metric_named
from attribution.samples import Sample


def attribute(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    method: str = "ablation",
    metric: str = "log_odds",
    reference: str | None = None,
    counterfactuals: Sequence[Sample] | None = None,
    components: Iterable[Component] | pd.DataFrame | None = None,
    path: str = "total",
    nodes: int = NODES,
    queries: bool = False,
    verify: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> Causes:
    """How much each component contributed to the metric on these samples. The model is left as it was.

    Args:
        model: a causal language model, as `attribution.load` returns it.
        tokenizer: of the model.
        samples: prompts with responses.
        method: "ablation" (exact: fall of the metric when the component is replaced by its reference), "gradient" (first order:
            gradient x (activation - reference)), "integrated" (gradients integrated from all components ablated to none) or
            "conductance" (integrated along a path of the input embeddings). What each is complete for is in the result.
        metric: one of `metrics.METRICS`.
        reference: "zero"; "mean", over all tokens of the counterfactuals; or "resample", the activations on the
            counterfactual of the same place in the list, position by position. Zero by default; only "conductance" starts its
            path at input embeddings of that kind, and by default at "vocabulary", their mean over the vocabulary.
        counterfactuals: cue-neutral samples for "mean" and "resample".
        components: restrict the result to these, in the order of the model; all by default. Every row costs a metric over
            the vocabulary, so of a large one name those you mean.
        path: of "ablation": "total", or "direct" for what the component writes into the logits itself, norms held.
        nodes: Gauss-Legendre nodes of each piece of an integral; pieces are split where the sum rule does not hold to 0.1 %.
        queries: with "gradient": also the columns queries and keys, the effect of replacing a head's queries, or the keys that
            it reads, with its attention pattern recomputed exactly (AtP*, Kramár et al. 2024). The effect of a head itself
            needs no such correction: it is taken behind the softmax.
        verify: also ablate exactly so many components that a method other than ablation ranks highest, and as many others.
        seed: of the draw of those others.
        progress: show a bar.

    Raises:
        ConfigError: unknown method, metric, reference, path or component, or an option that the method does not have.
        DataError: samples that cannot be encoded, or counterfactuals that cannot be aligned.
        ModelError: an architecture without a row, weights that are not in memory, or a model that the method cannot run.
    """
    asked = Asked(method, path, nodes, queries, verify, seed)
    reference = asked.default_reference() if reference is None else reference
    index = asked.readable(Components(model))
    positions = np.arange(len(index)) if components is None else index.positions(components)
    read = metric_named(metric)
    accepted = (*REFERENCES, VOCABULARY) if method == "conductance" else REFERENCES
    given = Given.encoded(index.parts, tokenizer, samples, read, reference, counterfactuals, accepted, whole=False)
    with torch.inference_mode(False), evaluating(index.parts.model):  # gradients are taken, whatever the caller's mode
        found = [asked.run(index, positions, *each, read) for each in given.batches(progress)]
        floor = floor_of(asked, index, positions, given, found[0], read) if rounds(index.parts) else None
    table, checked = _table(index, positions, found, given.weights), None
    if verify:
        exact = partial(
            attribute, model, tokenizer, samples, metric=metric, counterfactuals=counterfactuals,
            reference="zero" if reference == VOCABULARY else reference, progress=progress,
        )  # fmt: skip
        checked = verified_ranking(table, verify, seed, lambda chosen: exact(components=chosen))
    sums = sums_of(found, given.weights)
    return Causes(
        table=table,
        per_sample=torch.cat([each.effect for each in found], dim=1),
        method=method,
        metric=metric,
        reference=reference,
        residual=None if sums is None else largest(sums["residual"]),
        passes=sum(each.passes * each.effect.shape[1] for each in found) / len(samples) + (checked.passes if checked else 0),
        path=path,
        sums=sums,
        bytes=max(each.bytes for each in found),
        complete=COMPLETE["direct" if path == "direct" else method],
        caveats=caveats(asked, index.parts, metric, reference, given.samples, found, floor),
        floor=floor,
        verified=checked,
    )


def _table(index: Components, positions: np.ndarray, found: Sequence[Found], weights: Tensor) -> pd.DataFrame:
    """`Causes.table`, of the batches together."""
    table = index.table.iloc[positions].reset_index(drop=True)
    table["effect"] = mean(torch.cat([each.effect for each in found], dim=1), weights)
    for name in found[0].beside:
        table[name] = mean(torch.cat([each.beside[name] for each in found], dim=1), weights)
    if found[0].kl is not None:
        table["kl"] = torch.cat([each.kl for each in found if each.kl is not None], dim=1).double().mean(1).numpy()
    return table


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
    read = metric_named(metric)
    given = Given.encoded(index.parts, tokenizer, samples, read, reference, counterfactuals, whole=False)
    with evaluating(index.parts.model):
        found = [ablate_sets(index, chosen, batch, values, read) for batch, values in given.with_values()]
    return pd.DataFrame({
        "set": list(sets),
        "size": [len(positions) for positions in chosen.values()],
        "effect": _means(found, given.weights),
        "kl": torch.cat([each.kl for each in found], dim=1).double().mean(1).cpu().numpy(),
    })  # fmt: skip


def self_repair(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    sets: Mapping[str, Iterable[Component] | pd.DataFrame],
    *,
    metric: str = "log_odds",
    reference: str = "zero",
    counterfactuals: Sequence[Sample] | None = None,
) -> pd.DataFrame:
    """How much of a set's loss later components make up for (McGrath et al. 2023, Hydra effect; Rushing & Nanda 2024).

    Arguments and errors as `ablate`.

    Returns:
        One row per set: set, size; direct (fall of the metric when only what the set writes into the logits is replaced,
        norms held); total (fall when it is ablated and all that follows is computed anew); compensation = total - direct,
        negative where others stand in for the set, positive where others depend on it; complement (fall when all heads and
        neurons but these are ablated).
    """
    if not sets:
        raise ConfigError("there are no sets to compare; give at least one, as name: components")
    index = Components(model)
    chosen = {name: index.positions(members) for name, members in sets.items()}
    units = np.flatnonzero(index.table["kind"] != "row")
    others = {name: np.setdiff1d(units, positions) for name, positions in chosen.items()}
    read = metric_named(metric)
    given = Given.encoded(index.parts, tokenizer, samples, read, reference, counterfactuals)
    direct, total, complement = [], [], []
    with evaluating(index.parts.model):
        for batch, values in given.with_values():
            direct.append(direct_sets(index, chosen, batch, values, read))
            total.append(ablate_sets(index, chosen, batch, values, read))
            complement.append(ablate_sets(index, others, batch, values, read))
    table = pd.DataFrame({
        "set": list(sets),
        "size": [len(positions) for positions in chosen.values()],
        "direct": _means(direct, given.weights),
        "total": _means(total, given.weights),
    })  # fmt: skip
    return table.assign(compensation=table["total"] - table["direct"], complement=_means(complement, given.weights))


def _means(found: Sequence[Effects], weights: Tensor) -> np.ndarray:
    return mean(torch.cat([each.effect.cpu() for each in found], dim=1), weights)


__all__ = ["BATCH_SIZE", "METHODS", "Causes", "Verified", "ablate", "attribute", "batches_with_values", "self_repair"]
