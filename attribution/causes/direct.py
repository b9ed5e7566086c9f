"""Direct effects: what a component writes into the logits itself, taken out of the last residual stream, with nothing run anew.

The total effect of an ablation contains what later layers make of it. Where they make up for the loss, the total effect is
smaller than the direct one: self-repair, or the Hydra effect (McGrath et al. 2023; Rushing & Nanda 2024). The scale of every
norm between the component and the logits is held at its value in the intact model, so that direct effects on logits before a
soft-cap are linear and add up over components.

Knows norms and the last residual stream; knows nothing about the layers between.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from attribution.capture import Site, scored_logits, sites, streamed, tapped
from attribution.causes.ablation import LOGITS_AT_ONCE, Effects, Reader, features, rows_at_mean, without_rows
from attribution.causes.cost import size
from attribution.causes.reference import Values, like
from attribution.components import Components
from attribution.errors import ModelError
from attribution.metrics import Metric
from attribution.models import ExpertsOut, output_weights
from attribution.samples import Batch

_FIT = {torch.float32: 1e-4, torch.float64: 1e-4}  # of a norm as a scale times a linear map, relative
_LARGE = 64.0  # beside which a norm's epsilon is nothing


class FrozenNorm:
    """A norm as the linear map it is once its scale is held: change -> scale x gain x (change, less its mean if it centres).

    Scale, gain and centring are found by probing, so that no name of an attribute is relied on; a norm that is no such map
    is refused.

    Args:
        norm: of the last dimension: an RMS norm or a layer norm, whatever its parameters are called.
        inputs: Float [..., width], where the scale is held.

    Raises:
        ModelError: it is not a scale times a linear map.
    """

    def __init__(self, norm: nn.Module, inputs: Tensor):
        ones = torch.ones_like(inputs.flatten(0, -2)[:1])
        probe = ones.clone()  # of mean zero, and nowhere zero
        probe[..., 1::2] = -1
        if inputs.shape[-1] % 2:
            probe[..., -2:] = torch.tensor([1, -2]).to(probe)
        bias = norm(torch.zeros_like(ones))
        self.gain = (norm(_LARGE * probe) - bias) * probe.square().mean().sqrt() / probe
        self.centred = bool((norm(_LARGE * ones) - bias).abs().max() < 0.1 * self.gain.abs().max())
        self.scale = torch.ones((), device=inputs.device, dtype=inputs.dtype)
        unscaled, found = self(inputs), norm(inputs) - bias
        self.scale = (unscaled * found).sum(-1, keepdim=True) / unscaled.square().sum(-1, keepdim=True).clamp_min(1e-30)
        off = ((self(inputs) - found).norm() / found.norm().clamp_min(1e-30)).item()
        if off > _FIT.get(inputs.dtype, 0.05):
            raise ModelError(
                f"{type(norm).__name__} is not a scale times a linear map (off by {off:.0e}), so that direct effects are not "
                'defined; use path="total"'
            )

    def __call__(self, change: Tensor) -> Tensor:
        if self.centred:
            change = change - change.mean(-1, keepdim=True)
        return self.scale * (self.gain * change)


class LastStream:
    """The residual stream before the final norm at scored positions, and what every component writes into it.

    Args:
        components: of the model.
        batch: what to run.
        values: what replaces the activations, see `causes.reference`.

    Attributes:
        logits: of the model as it is, at scored positions.
        bytes: kept while it is made.
    """

    @torch.no_grad()
    def __init__(self, components: Components, batch: Batch, values: Values):
        self.components, self.parts = components, components.parts
        parts, self._norms, last = self.parts, {}, {}

        def keep(value: Tensor) -> Tensor:
            last["stream"] = value
            return value

        with tapped(parts, sites(parts)) as seen, streamed(parts, {parts.depth: keep}):
            self.logits = scored_logits(parts, batch)
        scored = batch.scored.to(last["stream"].device)
        stream = last["stream"][scored]
        self.normed, self.norm = parts.final_norm(stream), FrozenNorm(parts.final_norm, stream)
        self.bytes = size([*seen.values(), self.logits])
        self.activations = {site: value[batch.scored.to(value.device)] for site, value in seen.items()}  # [token, feature]
        self.changes = {
            site: self._routed(site, like(values[site], value) - value)[batch.scored.to(value.device)]
            for site, value in seen.items()
        }

    def _routed(self, site: Site, change: Tensor) -> Tensor:
        """As the output weights take it: what experts put out is scaled by the routing, as it is."""
        place = site.module(self.parts)
        if isinstance(place, ExpertsOut):
            return change * place.scale.repeat_interleave(self.parts.neurons // self.parts.experts, -1)
        return change

    @torch.no_grad()
    def written(self, site: Site, groups: np.ndarray) -> Tensor:
        """What replacing each group of units together changes in the stream: Float [group, token, width].

        Args:
            site: of all of them.
            groups: Int [group, unit].
        """
        parts, module = self.parts, site.module(self.parts)
        own = features(parts, site, groups.flatten()).view(len(groups), -1)  # [group, feature]
        weights = output_weights(module, parts.row)[:, own]  # [width, group, feature]
        write = torch.einsum("tgf,wgf->gtw", self.changes[site][:, own], weights)
        which = "attention" if site.kind == "head" else "mlp"
        if getattr(parts.row, f"{which}_post_norm"):
            if site not in self._norms:
                self._norms[site] = FrozenNorm(parts.branch(site.layer, which), module(self.activations[site]))
            write = self._norms[site](write)
        return write.to(self.normed.device)

    @torch.no_grad()
    def without(self, write: Tensor) -> Tensor:
        """Logits [..., token, vocabulary] when this is added to the stream, the final norm's scale held."""
        return self.parts.unembed(self.normed + self.norm(write)).to(self.logits.device)


@torch.no_grad()
def direct_each(components: Components, positions: np.ndarray, batch: Batch, values: Values, metric: Metric) -> Effects:
    """Direct effect of ablating components one at a time. Arguments as `ablate_each`."""
    stream = LastStream(components, batch, values)
    read = Reader(metric, batch, stream.logits)
    effect = stream.logits.new_zeros(len(positions), len(batch))
    divergence = torch.zeros_like(effect)
    chosen = components.table.iloc[positions].reset_index(drop=True)
    at_once = max(1, LOGITS_AT_ONCE // 4 // stream.logits.numel())
    for (kind, layer), group in chosen.groupby(["kind", "layer"], sort=False):
        for start in range(0, len(group), at_once):
            some = group.iloc[start : start + at_once]
            if kind == "row":
                found = without_rows(stream.parts, stream.logits, some["index"].to_numpy(copy=True))
            else:
                found = stream.without(stream.written(Site(str(kind), int(layer)), some[["index"]].to_numpy(copy=True)))
            effect[some.index], divergence[some.index] = read(found)
    copies = 3 * min(at_once, len(positions)) * size([stream.logits])
    return Effects(effect, divergence, 1.0, stream.bytes + copies)


@torch.no_grad()
def direct_sets(
    components: Components, sets: Mapping[str, np.ndarray], batch: Batch, values: Values, metric: Metric
) -> Effects:
    """Direct effect of ablating whole sets jointly; rows of the result in the order of `sets`."""
    stream = LastStream(components, batch, values)
    read = Reader(metric, batch, stream.logits)
    found = []
    for positions in sets.values():
        chosen = components.table.iloc[positions]
        write = torch.zeros_like(stream.normed)
        for (kind, layer), group in chosen[chosen["kind"] != "row"].groupby(["kind", "layer"]):
            write = write + stream.written(Site(str(kind), int(layer)), group[["index"]].to_numpy(copy=True).T)[0]
        rows = chosen.loc[chosen["kind"] == "row", "index"].tolist()
        found.append(read(rows_at_mean(components.parts, stream.without(write), rows)[None]))
    effect, divergence = (torch.cat(each) for each in zip(*found, strict=True))
    return Effects(effect, divergence, 1.0)
