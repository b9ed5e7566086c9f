"""Cross-model activation patching (CMAP, Prakash et al. 2024): what does a part of the tuned model do inside the base model?

Both models read the same samples. An activation of the one is pasted over the same activation of the other, which then runs
on: a head (its slice of the attention-out linear's input, at all positions), the neurons of a layer together (the whole input
of the MLP-out linear), the residual stream before a layer at one position, or a set of heads and neurons. Interventions are
nnsight's; what it leaves on the models it wraps is taken off again. Its import, which waits for the first paste, gives every
object of the process a method `save`.

Knows two models of one shape; knows nothing about how the one became the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from attribution.capture import Edit, Site, evaluating, sites
from attribution.causes.ablation import edits_without
from attribution.causes.cost import size
from attribution.causes.given import BATCH_SIZE, encoded_for
from attribution.components import Component, Components
from attribution.errors import ConfigError, ModelError
from attribution.metrics import Metric, check_scorable, metric_named
from attribution.models import Anatomy
from attribution.samples import Batch, Encoded, Sample, batches

KINDS = ("head", "mlp", "residual")
STREAM = "residual"  # kind of the site before a layer; layer = depth is before the final norm
_Edits = list[tuple[Site, Edit]]  # in the order of a forward pass


@dataclass(frozen=True)
class Patched:
    """Effects of pasting.

    Attributes:
        table: into ("base" or "tuned"), kind, layer, index, effect: metric(receiver with the part of the other model pasted
            in) - metric(receiver), mean over samples, each times its weight, so that a positive effect raises the metric; and
            share: effect / (metric(other model) - metric(receiver)), 1 where the part alone carries all of the difference. Of
            "mlp" the index is -1. Of "residual" the layer is that which reads the stream (the depth: the final norm), and
            the index is the position counted from the last token of the prompt; effect and share are of the samples that
            have it.
        sets: into, set, size, effect, share, of sets pasted jointly; empty where none were given.
        per_sample: Float [row, sample], effects before weighting, in the order of `table`, NaN where a sample has no such
            position.
        metric: its name.
        gap: metric(tuned) - metric(base), weighted mean.
        passes: cost in forward passes over all samples.
        bytes: most of what is kept at once beyond both models.
        complete: what effects add up to.
    """

    table: pd.DataFrame
    sets: pd.DataFrame
    per_sample: Tensor
    metric: str
    gap: float
    passes: float
    bytes: int
    complete: str = (
        "exact for each part alone; effects do not add up; the residual stream before one layer at all positions together "
        "carries the whole difference that arises before that layer"
    )


def patch(
    base: nn.Module,
    tuned: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    kinds: Sequence[str] = KINDS,
    sets: Mapping[str, Iterable[Component] | pd.DataFrame] | None = None,
    metric: str = "log_odds",
) -> Patched:
    """Paste activations of the tuned model into the base model, and back. Both models are left as they were.

    Args:
        base, tuned: causal language models of one architecture and shape, such as before and after a finetuning.
        tokenizer: of both.
        samples: prompts with responses.
        kinds: "head", "mlp" and "residual"; each head, each MLP, and each layer and position is a run in both directions.
        sets: heads and neurons to paste jointly, by name.
        metric: one of `metrics.METRICS`.

    Raises:
        ConfigError: unknown kind, metric or component, or a set with rows.
        DataError: samples that cannot be encoded or scored.
        ModelError: an architecture without a row, models that differ in shape, or weights that are not in memory.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"unknown kind {kind!r} to paste; expected {', '.join(KINDS)}")
    models = {"base": Components(base), "tuned": Components(tuned)}
    _check_pair(models["base"].parts, models["tuned"].parts)
    chosen = {name: models["base"].positions(members) for name, members in (sets or {}).items()}
    for name, positions in chosen.items():
        if (models["base"].table["kind"].to_numpy()[positions] == "row").any():
            raise ConfigError(f"set {name!r} holds rows, which are not pasted; give heads and neurons")
    read = metric_named(metric)
    encoded, _ = (encoded_for(each.parts, tokenizer, samples) for each in models.values())  # the same, but both must run it
    check_scorable(read, batches(encoded, BATCH_SIZE), models["base"].parts.vocabulary)
    units = _units(models["base"], kinds, encoded)
    found, most, own = {}, 0, {}
    for into, donor in (("base", "tuned"), ("tuned", "base")):
        parts = []
        for batch, start in _batches(encoded, models):
            effects, before, held = _of_batch(models[into], models[donor], batch, encoded[start:], units, chosen, read)
            parts.append((effects, before))
            most = max(most, held)
        found[into] = torch.cat([effects for effects, _ in parts], dim=1)
        own[into] = torch.cat([before for _, before in parts])
    return _result(units, chosen, found, own, encoded, metric, most)


def _result(
    units: pd.DataFrame,
    sets: Mapping[str, np.ndarray],
    found: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    encoded: Sequence[Encoded],
    metric: str,
    most: int,
) -> Patched:
    weights = torch.tensor([each.weight for each in encoded], dtype=torch.float64)
    gap = (own["tuned"] - own["base"]).double() * weights
    tables, joint = [], []
    for into, effects in found.items():
        effect = (effects.double() * weights).nanmean(1).numpy()
        towards = gap if into == "base" else -gap
        over = towards.expand(effects.shape).masked_fill(effects.isnan(), torch.nan).nanmean(1).numpy()  # the same samples
        share = np.divide(effect, over, where=abs(over) > 1e-6, out=np.full_like(effect, np.nan))
        tables.append(units.assign(effect=effect[: len(units)], share=share[: len(units)]))
        tables[-1].insert(0, "into", into)
        sizes = [len(positions) for positions in sets.values()]
        joint.append(pd.DataFrame({"into": into, "set": list(sets), "size": sizes, "effect": effect[len(units) :],
                                   "share": share[len(units) :]}))  # fmt: skip
    per_sample = torch.cat([effects[: len(units)] for effects in found.values()])
    passes = float(sum(1 + len(effects) for effects in found.values()) + 2)
    both = [pd.concat(each, ignore_index=True) for each in (tables, joint)]
    return Patched(both[0], both[1], per_sample, metric, gap.mean().item(), passes, most)


def _units(components: Components, kinds: Sequence[str], encoded: Sequence[Encoded]) -> pd.DataFrame:
    """What is pasted one by one: kind, layer, index."""
    depth, rows = components.parts.depth, []
    for kind in kinds:
        layers = range(depth + 1) if kind == "residual" else range(depth)
        first = min(1 - each.start for each in encoded)
        last = max(len(each.ids) - each.start for each in encoded)
        indices = {"head": range(components.parts.heads), "mlp": [-1], "residual": range(first, last)}[kind]
        rows += [(kind, layer, index) for layer in layers for index in indices]
    return pd.DataFrame(rows, columns=["kind", "layer", "index"])


@torch.no_grad()
def _of_batch(
    receiver: Components,
    donor: Components,
    batch: Batch,
    encoded: Sequence[Encoded],
    units: pd.DataFrame,
    sets: Mapping[str, np.ndarray],
    metric: Metric,
) -> tuple[Tensor, Tensor, int]:
    """Effects [unit, then set; sample], the receiver's own metric [sample], and bytes kept."""
    parts = receiver.parts
    theirs = {site: value.to(batch.ids.device) for site, value in _activations(donor.parts, batch).items()}
    last = torch.tensor([each.start - 1 for each in encoded[: len(batch)]], device=batch.ids.device)
    effects = []
    with wrapped(parts) as places, evaluating(parts.model):

        def read(edits: _Edits) -> Tensor:
            hidden = _run(places, batch, edits)
            return metric(parts.unembed(hidden[batch.scored.to(hidden.device)]).to(batch.ids.device), batch)

        before = read([])
        for kind, layer, index in units.itertuples(index=False, name=None):
            if kind == STREAM:
                site, where = Site(STREAM, layer), last + index
                effect = read([(site, _paste_at(theirs[site], where))]) - before
                absent = (where < 0) | (where >= batch.mask.sum(1))
                effects.append(effect.masked_fill(absent, torch.nan))
            else:
                members = [Component("head", layer, index)]
                if kind == "mlp":
                    members = [Component("neuron", layer, neuron) for neuron in range(parts.neurons)]
                effects.append(read(_jointly(receiver, receiver.positions(members), theirs)) - before)
        effects += [read(_jointly(receiver, positions, theirs)) - before for positions in sets.values()]
    found = torch.stack(effects).cpu() if effects else torch.zeros(0, len(batch))
    return found, before.cpu(), size(theirs.values())


def _jointly(receiver: Components, positions: np.ndarray, theirs: Mapping[Site, Tensor]) -> _Edits:
    edits = edits_without(receiver, positions, theirs)
    return [(site, edits[site]) for site in sites(receiver.parts) if site in edits]


def _paste_at(value: Tensor, where: Tensor) -> Edit:
    """Paste each sample's own position, where it has it."""

    def edit(stream: Tensor) -> Tensor:
        here = torch.arange(stream.shape[1], device=stream.device) == where.to(stream.device)[:, None]
        return torch.where(here[..., None], value.to(stream), stream)

    return edit


@torch.no_grad()
def _activations(parts: Anatomy, batch: Batch) -> dict[Site, Tensor]:
    """What can be pasted, of one model: by site, [sample, position, feature]."""
    with wrapped(parts) as places, evaluating(parts.model):
        seen: dict[Site, Tensor] = {}
        _run(places, batch, [(site, lambda value, site=site: seen.setdefault(site, value.clone())) for site in places.sites])
    return seen


@dataclass(frozen=True)
class _Wrapped:
    """A model under nnsight: the wrapped model, and the wrapped module that reads each site, in the order of a pass."""

    model: Any
    modules: Mapping[Site, Any]
    device: torch.device

    @property
    def sites(self) -> list[Site]:
        return list(self.modules)


@contextmanager
def wrapped(parts: Anatomy) -> Iterator[_Wrapped]:
    """The model under nnsight, for as long as the block lasts; afterwards every module is as it was."""
    from nnsight import NNsight

    if parts.row.experts:
        raise ModelError(
            f"{type(parts.model).__name__} is a mixture of experts, into which neurons are not pasted: two models send a token "
            "to experts of their own; use ablate on each"
        )
    inner = parts.model.base_model
    paths = {module: path for path, module in inner.named_modules()}
    before = {module: dict(module.__dict__) for module in inner.modules()}
    try:
        model: Any = NNsight(inner)
        found = {}
        for layer, module in enumerate(parts.layers):
            found[Site(STREAM, layer)] = module
            found |= {site: site.module(parts) for site in (Site("head", layer), Site("neuron", layer))}
        found[Site(STREAM, parts.depth)] = parts.final_norm
        modules = {site: model.get(paths[module]) for site, module in found.items()}
        yield _Wrapped(model, modules, next(inner.parameters()).device)
    finally:
        for module, attributes in before.items():  # it leaves a forward of its own on every module
            for name in set(module.__dict__) - set(attributes):
                del module.__dict__[name]
            module.__dict__.update(attributes)


@torch.no_grad()
def _run(places: _Wrapped, batch: Batch, edits: _Edits) -> Tensor:
    """The last hidden states, with edits of what modules read."""
    with places.model.trace(input_ids=batch.ids.to(places.device), use_cache=False):
        for site, edit in edits:
            places.modules[site].input = edit(places.modules[site].input)
        hidden = places.model.output.last_hidden_state.save()
    return hidden  # noqa: RET504 (it is there when the block has run)


def _batches(encoded: Sequence[Encoded], models: Mapping[str, Components]) -> Iterator[tuple[Batch, int]]:
    device = next(models["base"].parts.model.parameters()).device
    for number, batch in enumerate(batches(encoded, BATCH_SIZE, device)):
        yield batch, number * BATCH_SIZE


def _check_pair(base: Anatomy, tuned: Anatomy) -> None:
    """Refuse models whose activations do not fit into each other."""

    def shape(parts: Anatomy) -> dict[str, Any]:
        return {
            "architecture": parts.model.config.model_type, "layers": parts.depth, "heads": parts.heads,
            "head width": parts.head_dim, "neurons": parts.neurons, "width": parts.model.config.hidden_size,
            "vocabulary": parts.vocabulary,
        }  # fmt: skip

    for what, (one, other) in {name: (value, shape(tuned)[name]) for name, value in shape(base).items()}.items():
        if one != other:
            raise ModelError(
                f"the models differ in {what} ({one} and {other}), so that activations of one do not fit into the other; give "
                "two models of one shape"
            )
