"""The methods of attribution by name: what each runs on a batch, what it may be asked, and what to mind in its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from attribution.causes.ablation import Effects, ablate_each
from attribution.causes.conductance import conductance
from attribution.causes.cost import saved
from attribution.causes.direct import direct_each
from attribution.causes.gradient import first_order
from attribution.causes.integrated import FLOOR, integrated, tolerance_of
from attribution.causes.reference import VOCABULARY, Reference, at_outputs, at_sites
from attribution.causes.result import Cut, Found
from attribution.causes.routing import projections, routing
from attribution.components import Components
from attribution.errors import ConfigError
from attribution.metrics import Metric
from attribution.models import Anatomy
from attribution.samples import Batch, Encoded
from attribution.sharding import check_whole

METHODS = ("ablation", "gradient", "integrated", "conductance")
PATHS = ("total", "direct")


@dataclass(frozen=True)
class Asked:
    """What is wanted of a method.

    Attributes:
        method, path, nodes, queries, verify, seed: as `attribute` takes them.

    Raises:
        ConfigError: an unknown method or path, or an option that the method does not have.
    """

    method: str
    path: str
    nodes: int
    queries: bool
    verify: int
    seed: int

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"unknown method {self.method!r}; expected {', '.join(METHODS)}")
        if self.path not in PATHS:
            raise ConfigError(f"unknown path {self.path!r}; expected {', '.join(PATHS)}")
        if self.path == "direct" and self.method != "ablation":
            raise ConfigError(f'method {self.method!r} has no direct path; use method="ablation", or path="total"')
        if self.queries and self.method != "gradient":
            raise ConfigError(f'method {self.method!r} does not replace queries; use method="gradient", or queries=False')
        if self.nodes < 1:
            raise ConfigError(f"{self.nodes} nodes asked for; an integral takes at least 1")
        if self.verify < 0 or (self.verify and self.method == "ablation"):
            why = "ablation is exact already" if self.verify > 0 else "expected how many of the highest ranked to ablate"
            raise ConfigError(f"verify={self.verify} is not possible: {why}; leave it at 0, or choose another method")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} cannot start a draw; expected 0 or more")

    def readable(self, index: Components) -> Components:
        """The same components; refuses a model whose weights do not all lie here, where the method would need them all.

        Raises:
            ModelError: it is sharded over processes, or partly offloaded.
        """
        readable = {"ablation", "gradient"} if index.together.several else {"ablation"}  # FSDP gathers in backward passes too
        if self.method not in readable or self.path != "total" or self.queries:
            check_whole(index.parts.model, self._called)
        return index

    @property
    def _called(self) -> str:
        options = [*(["path='direct'"] if self.path == "direct" else []), *(["queries=True"] if self.queries else [])]
        return f"method {self.method!r}" + (f" with {' and '.join(options)}" if options else "")

    def default_reference(self) -> str:
        return VOCABULARY if self.method == "conductance" else "zero"

    def run(self, index: Components, positions: np.ndarray, batch: Batch, reference: Reference, metric: Metric) -> Found:
        """Effects of the components at these positions on one batch."""
        parts, chosen = index.parts, torch.as_tensor(positions)
        looks = 0.0 if reference.name in ("zero", VOCABULARY) else 1.0  # passes for the values of references
        if self.method == "conductance":
            found = conductance(index, batch, reference.of_embeddings(parts), metric, self.nodes)
            return found.at(chosen, looks)
        values = reference.of("sites", at_sites(parts))
        if self.method == "ablation":
            ablated = direct_each if self.path == "direct" else ablate_each
            return _of_effects(ablated(index, positions, batch, values, metric), looks)
        if self.method == "integrated":
            return integrated(index, batch, values, metric, self.nodes).at(chosen, looks)
        with saved(parts.model) as graph:
            effect, beside, passes = first_order(index, batch, values, metric), {}, 3.0
            if self.queries:
                replaced = reference.of("queries and keys", at_outputs(parts, projections(parts)))
                beside = routing(index, batch, replaced, metric)
                passes += 4.0 + 2.0 * parts.heads + looks
        return Found(effect.cpu(), passes, graph.bytes, beside=beside).at(chosen, looks)


def caveats(
    asked: Asked,
    parts: Anatomy,
    metric: str,
    reference: str,
    encoded: Sequence[Encoded],
    found: Sequence[Found],
    floor: float | None,
) -> tuple[str, ...]:
    """What to mind in these results."""
    row, told = parts.row, []
    if asked.method == "gradient" and reference == "zero" and (row.attention_post_norm or row.mlp_post_norm):
        told.append(
            "a norm follows attention or MLP in this model, so that zero-baseline first-order causes sum to nearly zero in "
            'every layer and module: rank within a layer only and form no totals of layers, or use reference="resample"'
        )
    if row.experts and asked.method == "integrated":
        told.append(
            "along the path tokens jump from expert to expert; what the metric jumps there no number of nodes resolves: it is "
            "in no component's effect, but in the residual"
        )
    if row.experts and reference != "zero":
        told.append("where a token is not routed to an expert nothing replaces its neurons, whatever the reference")
    if row.experts and asked.method == "gradient":
        told.append("first order holds the choice of experts: what an ablation moves from one expert to another is not seen")
    if asked.method == "conductance" and reference == "zero":
        told.append(
            "a model that normalizes its input has no direction at zero embeddings, where the path bends without end: prefer "
            f'reference="{VOCABULARY}" or "resample"'
        )
    for name in found[0].cuts:
        cut = Cut(*(torch.cat(each) for each in zip(*(batch.cuts[name] for batch in found), strict=True)))
        off, change = cut.residual.abs().sum().item(), cut.change.abs().sum().item()
        if off > 2 * (tolerance_of(parts) * change + FLOOR * len(cut.change)):
            told.append(f"not resolved: the sum over {name} misses {off:.2g} of a change of {change:.2g}; give more nodes")
            break
    if asked.path == "direct" and parts.cap:
        told.append("this model soft-caps its logits: direct effects do not add up over components")
    if metric == "log_prob":
        told.append("log_prob saturates as p approaches 1, where training succeeds; log_odds does not")
    if metric in ("log_odds", "log_prob") and len({len(each.ids) - each.start for each in encoded}) > 1:
        told.append(
            f"responses differ in length, and {metric} grows with it: compare samples by log_odds_per_token or logit_difference"
        )
    if floor is not None:
        told.append(f"half precision: effects below {floor:.2g} cannot be told from rounding")
    return tuple(told)


def _of_effects(effects: Effects, looks: float) -> Found:
    return Found(effects.effect.cpu(), effects.passes + looks, effects.bytes, effects.kl.cpu())
