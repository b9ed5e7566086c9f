"""Before any training: what would this training strengthen, and where would its gain sit? Two forecasts, never confused.

*Of strengthening*: <grad I_S, planned step> over all parameters, with I_S = metric(intact) - metric(S ablated): by how much
the influence of a mechanism or of a component would change. *Of update share*: <grad_c metric, planned step_c>: how much
of the metric's change would come through the parameters of component c. A component whose weights carry much of the
gain need not be the one that becomes more influential.

Both are of first order and of one step. The values that replace ablated activations ("mean", "resample") are held at what
they are before training, while a measured influence takes them anew from the trained model.

Knows a model, probe sets and a planned change of weights; knows nothing about recipes. The step that a training of its own
would take is `first_step`; how a forecast turned out, in a recorded run, is `compare`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from attribution.capture import evaluating, scored_logits
from attribution.causes import BATCH_SIZE, batches_with_values
from attribution.causes.ablation import rows_at_mean, without
from attribution.causes.reference import check_reference
from attribution.components import Component, Components
from attribution.errors import ConfigError
from attribution.metrics import Metric, check_scorable, log_prob, metric_named
from attribution.models import Anatomy
from attribution.samples import Batch, ProbeSet, Sample, batches, encode
from attribution.sharding import check_whole
from attribution.updates.compare import compare
from attribution.updates.first_step import first_step, held_by, in_stored
from attribution.updates.planned import planned_step
from attribution.updates.seam import effective
from attribution.updates.share import read
from attribution.uses import Use

__all__ = ["Forecast", "compare", "first_step", "forecast", "from_step"]

Sets = Mapping[str, Iterable[Component] | pd.DataFrame]


@dataclass(frozen=True)
class Forecast:
    """What a planned step would do to each probe set, to first order.

    Attributes:
        sets: one row per probe set and named set: probe, set, influence (now: metric(intact) - metric(set ablated)),
            strengthening (the forecast of its change), metric units, mean over samples.
        components: one row per probe set and component or remainder group: probe, kind, layer, index, name (of a remainder
            group; of a top row its word), share (the forecast of its update share, metric units); and, of the top components
            alone, influence and strengthening as above, NaN elsewhere.
        probes: one row per probe set: probe, metric (now), change (forecast: the sum of all shares).
        planned_norm: norm of the planned step.
        metric, reference: as asked.
    """

    sets: pd.DataFrame
    components: pd.DataFrame
    probes: pd.DataFrame
    planned_norm: float
    metric: str
    reference: str


def forecast(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    probes: Sequence[ProbeSet],
    optimizer: Any,
    *,
    sets: Sets | None = None,
    top: int = 0,
    metric: str = "log_odds",
    reference: str = "zero",
    progress: bool = False,
) -> Forecast:
    """Forecast one step of an optimizer on these samples. Weights, gradients, modes and random state stay as they are.

    The loss is -(sum over samples of weight x log p(response)) / (number of response tokens), without dropout and in one
    step: with all weights 1 that of the `sft` recipe on these samples as one batch. A weight is an advantage: a policy
    gradient is this loss on sampled responses, and a preference loss, at its start, this loss on chosen responses with
    positive and rejected ones with negative weights. The gradient is not clipped, see `first_step` for one that is.

    Args:
        model: a causal language model, or one with LoRA adapters, whose step is that of the effective weights.
        tokenizer: of the model.
        samples: what would be trained on.
        probes: held-out sets to read, with counterfactuals where the reference needs them.
        optimizer: SGD, Adam or AdamW over parameters of the model, fresh or in the middle of a training.
        sets: named sets of components, ablated jointly.
        top: how many single components are forecast too: those with the largest |first-order cause|, summed over the
            probe sets, the same ones on every probe set.
        metric: one of `metrics.METRICS`.
        reference: what ablated activations are replaced by: "zero", "mean" or "resample"; an ablated row's logit becomes
            the mean over the vocabulary.
        progress: show a bar.

    Raises:
        ConfigError: another optimizer, or one that holds no parameter that trains here; no probe sets, or two of one name;
            an unknown metric, reference or component.
        DataError: samples that cannot be encoded, scored or aligned.
        ModelError, RecordError: an unknown architecture; adapters other than LoRA.
    """
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    check_whole(model, "a forecast")
    twin = effective(model)
    components = Components(model if twin is None else twin.model)
    parts = components.parts if twin is None else replace(components.parts, model=twin.original)
    held = [parameter for parameter in held_by(optimizer, model) if parameter.requires_grad]
    if not held:
        raise ConfigError(
            f"this {type(optimizer).__name__} holds no parameter of this model that requires a gradient; give the optimizer "
            "that would train it"
        )
    planned_step(optimizer, held[0], torch.zeros_like(held[0]))  # refuses an optimizer of another kind before any pass
    encoded = encode(tokenizer, samples, context=getattr(parts.model.config, "max_position_embeddings", None))
    gradients = _of_the_loss(parts, batches(encoded, BATCH_SIZE, held[0].device), held)
    changes = {parameter: planned_step(optimizer, parameter, gradient) for parameter, gradient in gradients.items()}
    return from_step(
        components, in_stored(components, twin, changes), tokenizer, probes,
        sets=sets, top=top, metric=metric, reference=reference, progress=progress,
    )  # fmt: skip


def from_step(
    components: Components,
    step: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[ProbeSet],
    *,
    sets: Sets | None = None,
    top: int = 0,
    among: Iterable[Component] | pd.DataFrame | None = None,
    metric: str = "log_odds",
    reference: str = "zero",
    progress: bool = False,
) -> Forecast:
    """Forecast what a change of the weights would do, wherever it comes from.

    Costs a forward and a backward pass over each probe set for the shares, and one more for each set and each top component.

    Args:
        components: of the model before the step; of one with adapters, of its plain twin (`seam.plain`).
        step: change of every parameter that changes, by its name in `Components.stored`, shaped like it.
        among: components of which the top ones are taken; all by default.
        tokenizer, probes, sets, top, metric, reference, progress: as `forecast`.

    Raises:
        ConfigError, DataError: as `forecast`, and a step of other parameters or shapes.
    """
    _check(components, step, probes, top)
    chosen = {name: components.positions(members) for name, members in (sets or {}).items()}
    candidates = np.arange(len(components)) if among is None else components.positions(among)
    readers = [_Reader(probe, components, tokenizer, metric, reference, step) for probe in probes]
    intact = [reader.along() for reader in readers]
    score = torch.stack([along.causes.abs() for along in intact]).sum(0).numpy()
    singles = np.sort(candidates[np.argsort(-score[candidates], kind="stable")[:top]])
    ablated = {**{("set", name): each for name, each in chosen.items()}, **{("top", p): np.array([p]) for p in singles}}
    bar = tqdm(total=len(ablated) * len(readers), disable=not progress, unit="ablation", desc="forecast", leave=False)
    of_sets, of_components = [], []
    for reader, start in zip(readers, intact, strict=True):
        shares = _frame(components, start.products)
        for (what, key), positions in ablated.items():
            found = reader.along(positions)
            influence, strengthening = start.metric - found.metric, (start.products - found.products).sum().item()
            if what == "set":
                of_sets.append((reader.name, key, influence, strengthening))
            else:
                shares.loc[key, ["influence", "strengthening"]] = influence, strengthening
                if shares.loc[key, "kind"] == "row":
                    shares.loc[key, "name"] = str(tokenizer.decode([int(shares.loc[key, "index"])]))
            bar.update()
        of_components.append(shares.assign(probe=reader.name))
    bar.close()
    levels = [(reader.name, along.metric, along.products.sum().item()) for reader, along in zip(readers, intact, strict=True)]
    table = pd.DataFrame(of_sets, columns=["probe", "set", "influence", "strengthening"])
    columns = ["probe", "kind", "layer", "index", "name", "share", "influence", "strengthening"]
    return Forecast(
        table.astype({"influence": float, "strengthening": float}),  # also where there are no sets
        pd.concat(of_components, ignore_index=True)[columns],
        pd.DataFrame(levels, columns=["probe", "metric", "change"]),
        sum(change.double().square().sum().item() for change in step.values()) ** 0.5,
        metric,
        reference,
    )


class _Along(NamedTuple):
    """One probe set along a step: the metric now, <gradient_c, step_c> per group, first-order cause per component."""

    metric: float
    products: Tensor
    causes: Tensor


class _Reader:
    """Reads the metric of one probe set and its gradient along a step, with any components ablated."""

    def __init__(
        self,
        probe: ProbeSet,
        components: Components,
        tokenizer: PreTrainedTokenizerBase,
        metric: str,
        reference: str,
        step: Mapping[str, Tensor],
    ):
        self.name, self._components, self._reference, self._step = probe.name, components, reference, step
        context = getattr(components.parts.model.config, "max_position_embeddings", None)
        self._encoded = encode(tokenizer, probe.samples, context=context)
        self._others = encode(tokenizer, probe.counterfactuals, context=context) if probe.counterfactuals else None
        check_reference(reference, self._encoded, self._others)
        self._metric = metric_named(metric)
        check_scorable(self._metric, batches(self._encoded, BATCH_SIZE), components.parts.vocabulary)

    def along(self, ablated: np.ndarray | None = None) -> _Along:
        """The model as it is, or with the components at these positions of `Components.table` ablated."""
        index, total = self._components, 0.0
        products = torch.zeros(index.group_count, dtype=torch.float64)
        causes = torch.zeros(len(index), dtype=torch.float64)
        nothing = np.array([], dtype=np.int64)
        for batch, reading in self._readings(nothing if ablated is None else ablated):
            part = len(batch) / len(self._encoded)
            total += part * reading.metric
            products += part * index.reduce(lambda use, read=reading.gradients: self._factors(use, read), torch.mul)
            if ablated is None:
                causes += part * index.first_order(reading.gradients)
        return _Along(total, products, causes)

    def _readings(self, ablated: np.ndarray) -> Iterator[tuple[Batch, Any]]:
        index, metric = self._components, _of_rows_at_mean(self._components, ablated, self._metric)
        reference = self._reference if len(ablated) else "zero"  # whose values cost nothing
        with evaluating(index.parts.model):
            for batch, values in batches_with_values(index.parts, self._encoded, reference, self._others):
                with without(index, ablated, values) as apart:
                    reading = read(index, [batch], metric, edited=apart)
                yield batch, reading

    def _factors(self, use: Use, gradients: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        change = self._step.get(self._components.source[use.name])
        return None if change is None else (gradients[use.name], change)


def _of_rows_at_mean(components: Components, positions: np.ndarray, metric: Metric) -> Metric:
    """The metric, read where the rows of a set are at the vocabulary mean; differentiable."""
    chosen = components.table.iloc[positions]
    tokens = chosen.loc[chosen["kind"] == "row", "index"].tolist()
    return lambda logits, batch: metric(rows_at_mean(components.parts, logits, tokens), batch)


def _of_the_loss(parts: Anatomy, found: Sequence[Batch], held: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Gradient of the loss of `forecast` in each parameter that it depends on; `.grad` is left alone."""
    tokens = sum(len(batch.tokens) for batch in found)
    gradients: dict[nn.Parameter, Tensor] = {}
    with torch.enable_grad(), evaluating(parts.model):
        for batch in found:
            loss = -(batch.weights * log_prob(scored_logits(parts, batch), batch)).sum() / tokens
            for parameter, gradient in zip(held, torch.autograd.grad(loss, held, allow_unused=True), strict=True):
                if gradient is not None:
                    gradients[parameter] = gradients[parameter] + gradient if parameter in gradients else gradient
    return gradients


def _frame(components: Components, products: Tensor) -> pd.DataFrame:
    """Shares of components, in the order of `Components.table`, their parts put together; then those of the remainder."""
    groups = components.groups.assign(share=products.numpy())
    rest = groups["kind"] == "remainder"
    single = groups[~rest].groupby(["kind", "layer", "index"], sort=False)["share"].sum().reset_index()
    found = pd.concat([single, groups[rest].rename(columns={"part": "name"})], ignore_index=True)
    return found.assign(influence=np.nan, strengthening=np.nan)


def _check(components: Components, step: Mapping[str, Tensor], probes: Sequence[ProbeSet], top: int) -> None:
    names = [probe.name for probe in probes]
    if not names:
        raise ConfigError("there is no probe set to forecast; give at least one")
    if len(set(names)) < len(names):
        raise ConfigError(f"probe sets are named {', '.join(names)}; give each its own name")
    if top < 0:
        raise ConfigError(f"the top {top} components asked for; expected 0 or more")
    for name, change in step.items():
        if name not in components.stored:
            raise ConfigError(f"the step moves {name!r}, which this model does not have; name parameters as Components.stored")
        if change.shape != components.stored[name].shape:
            raise ConfigError(
                f"the step of {name} has shape {tuple(change.shape)}, the parameter {tuple(components.stored[name].shape)}; "
                "give a change of the same shape"
            )
