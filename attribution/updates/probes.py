"""One probe set, read before training and after every step: metric, KL, first-order causes, update shares, influence.

The reading after step t is the reading before step t + 1, so each is made once. Knows samples and readings; knows
nothing about the training batch or about files.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from attribution.capture import evaluating, logits_alone
from attribution.causes import BATCH_SIZE, batches_with_values
from attribution.causes.ablation import ablate_each, ablate_sets
from attribution.causes.reference import Values, check_reference, mean_activations
from attribution.components import Components
from attribution.metrics import check_scorable, kl, log_odds, log_prob, metric_named
from attribution.samples import Batch, ProbeSet, batches, encode
from attribution.store import BASE_MEAN, NORMS_KEPT, OWN_MEAN
from attribution.updates.norms import OutputNorms
from attribution.updates.share import PASSES, Path, Reading, Shares, glance, read, shares


class Behaviour(NamedTuple):
    """How a model responds to a set of samples, means over them.

    Attributes:
        metric: of the responses.
        kl: KL(model now || model at the start) per response token.
        probability: of the whole responses.
    """

    metric: float
    kl: float
    probability: float


class Step(NamedTuple):
    """What one step did to one probe set.

    Attributes:
        behaviour: after the step.
        columns: Float64 [components] by name: first-order causes, mean over samples, and sizes, before and after.
        shares: of the step; None where the set is read without gradients.
    """

    behaviour: Behaviour
    columns: dict[str, Tensor]
    shares: Shares | None


class Watch:
    """A set of samples of which only behaviour is read: log-odds, and KL to the start. No gradients.

    Args:
        samples: the set.
        components: of the model that is trained.
        tokenizer: of the model.
    """

    def __init__(self, samples: ProbeSet, components: Components, tokenizer: PreTrainedTokenizerBase):
        self.name, self._parts = samples.name, components.parts
        context = getattr(components.parts.model.config, "max_position_embeddings", None)
        device = next(components.parts.model.parameters()).device
        self._batches = batches(encode(tokenizer, samples.samples, context=context), BATCH_SIZE, device)
        self._start: list[Tensor] = []

    @torch.no_grad()
    def read(self) -> Behaviour:
        """With log-odds as metric; the start is the model at the first call."""
        with evaluating(self._parts.model):
            logits = [logits_alone(self._parts, batch) for batch in self._batches]
        self._start = self._start or logits
        values = torch.cat([log_odds(found, batch) for found, batch in zip(logits, self._batches, strict=True)])
        return _behaviour(values.double().mean().item(), logits, self._start, self._batches)

    def state(self) -> dict[str, Tensor]:
        """What was read at the start, for `restore`."""
        return {f"logits {number}": logits for number, logits in enumerate(self._start)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        device = next(self._parts.model.parameters()).device
        self._start = [state[f"logits {number}"].to(device) for number in range(len(self._batches))]


class ProbeReader:
    """Reads one probe set.

    Args:
        probe: the set.
        components: of the model that is trained.
        tokenizer: of the model.
        metric: name of the metric.
        reference: what ablated activations are replaced by; values come from the model as it is at the time.
        passes: gradient evaluations allowed for one step's shares; 0: the set is read by forward passes alone, without causes
            or shares.
        beside: further readings of the influence of sets, of `store.BESIDE`.

    Raises:
        DataError: samples that cannot be encoded, scored or aligned.
    """

    def __init__(
        self,
        probe: ProbeSet,
        components: Components,
        tokenizer: PreTrainedTokenizerBase,
        metric: str,
        reference: str = "zero",
        passes: int = PASSES,
        beside: Sequence[str] = (),
    ):
        self.name, self.components, self.reference, self.passes = probe.name, components, reference, passes
        self.beside = tuple(beside)
        context = getattr(components.parts.model.config, "max_position_embeddings", None)
        self._encoded = encode(tokenizer, probe.samples, context=context)
        self._others = encode(tokenizer, probe.counterfactuals, context=context) if probe.counterfactuals else None
        check_reference(reference, self._encoded, self._others)
        if {OWN_MEAN, BASE_MEAN} & {*beside}:
            check_reference("mean", self._encoded, self._others)
        self.metric = metric_named(metric)
        device = next(components.parts.model.parameters()).device
        self.batches = batches(self._encoded, BATCH_SIZE, device)
        check_scorable(self.metric, self.batches, components.parts.vocabulary)
        self.reading: Reading | None = None
        self._start_logits: list[Tensor] = []
        self._causes = torch.empty(0)

    def start(self) -> Behaviour:
        """Read the model before training."""
        self.reading = self._read()
        self._start_logits = self.reading.logits
        self._causes = self._first_order(self.reading)
        self._base_mean = self._mean_activations() if BASE_MEAN in self.beside else {}
        self._norms = OutputNorms(self.components) if NORMS_KEPT in self.beside else None
        return self._behaviour(self.reading)

    def state(self) -> dict[str, Tensor]:
        """What was read at the start, for `restore`."""
        state = {f"logits {number}": logits for number, logits in enumerate(self._start_logits)}
        state |= {f"mean {site.kind} {site.layer}": value for site, value in self._base_mean.items()}
        return state if self._norms is None else {**state, "norms": self._norms.norms}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Read the model as it is now, where `start` was called at another time."""
        self.start()
        device = next(self.components.parts.model.parameters()).device
        self._start_logits = [state[f"logits {number}"].to(device) for number in range(len(self.batches))]
        self._base_mean = {site: state[f"mean {site.kind} {site.layer}"].to(device) for site in self._base_mean}
        if self._norms is not None:
            self._norms = OutputNorms(self.components, state["norms"])

    @property
    def asked(self) -> Hashable:
        """All that the influence of components depends on, beside the model and which they are."""
        others = None if self._others is None else tuple(self._others)
        by_gradients = self.passes > 0  # the intact model is then read at every position, which rounds otherwise
        return self.metric, self.reference, self.beside, by_gradients, tuple(self._encoded), others

    @property
    def causes(self) -> Tensor:
        """First-order cause of every component at the last reading, Float64 [components]; empty without gradients."""
        return self._causes

    def step(self, path: Path) -> Step:
        """Read the model after a step and attribute the change along the path it took."""
        assert self.reading is not None, "start() comes first"
        if not self.passes:
            self.reading = self._read()
            return Step(self._behaviour(self.reading), {}, None)
        start, before = path.node(0.0, self.reading), self.reading.sizes
        self.reading = None  # its gradients go before the next ones come: a model's worth of memory
        self.reading = self._read()
        causes, self._causes = self._causes, self._first_order(self.reading)
        columns = {"cause_before": causes, "cause_after": self._causes}
        for when, sizes in (("before", before), ("after", self.reading.sizes)):
            assert sizes is not None
            columns |= {f"{what}_{when}": value for what, value in sizes._asdict().items()}
        found = shares(path, self.batches, self.metric, start, path.node(1.0, self.reading), self.passes)
        return Step(self._behaviour(self.reading), columns, found)

    def influence(self, positions: np.ndarray) -> pd.DataFrame:
        """Exact ablation of these components in the model as it is: kind, layer, index, effect, kl."""
        parts = self.components.parts
        effects, divergences = [], []
        with evaluating(parts.model):
            for batch, values in batches_with_values(parts, self._encoded, self.reference, self._others):
                found = ablate_each(self.components, positions, batch, values, self.metric)
                effects.append(found.effect)
                divergences.append(found.kl)
        table = self.components.table.iloc[positions].reset_index(drop=True)
        for column, values in (("effect", effects), ("kl", divergences)):
            table[column] = torch.cat(values, dim=1).double().mean(1).cpu().numpy()
        return table

    def influence_of_sets(self, sets: Mapping[str, np.ndarray]) -> pd.DataFrame:
        """Joint ablation of each set in the model as it was last read: columns as the frame `sets`, without step and probe."""
        assert self.reading is not None, "start() comes first"
        with evaluating(self.components.parts.model):
            run = batches_with_values(self.components.parts, self._encoded, self.reference, self._others)
            return self._of_sets(sets, self.reference, run, self.reading.logits)

    def influence_beside(self, sets: Mapping[str, np.ndarray]) -> pd.DataFrame:
        """The same in the readings `beside`."""
        assert self.reading is not None, "start() comes first"
        parts, found = self.components.parts, []
        with evaluating(parts.model):
            for name in self.beside:
                if name == NORMS_KEPT and self._norms is not None:
                    with self._norms.restored():
                        run = batches_with_values(parts, self._encoded, self.reference, self._others)
                        found.append(self._of_sets(sets, name, run, [None] * len(self.batches)))
                else:
                    values = self._base_mean if name == BASE_MEAN else self._mean_activations()
                    found.append(self._of_sets(sets, name, ((batch, values) for batch in self.batches), self.reading.logits))
        return pd.concat(found, ignore_index=True)

    def _of_sets(
        self,
        sets: Mapping[str, np.ndarray],
        reference: str,
        run: Iterable[tuple[Batch, Values]],
        intact: Sequence[Tensor | None],
    ) -> pd.DataFrame:
        found = [
            ablate_sets(self.components, sets, batch, values, self.metric, logits)
            for (batch, values), logits in zip(run, intact, strict=True)
        ]
        effect, divergence = (torch.cat(each, dim=1).double().cpu() for each in list(zip(*found, strict=True))[:2])
        return pd.DataFrame({
            "set": list(sets),
            "reference": reference,
            "effect": effect.mean(1).numpy(),
            "effect_even": effect[:, ::2].mean(1).numpy(),
            "effect_odd": effect[:, 1::2].mean(1).numpy(),
            "kl": divergence.mean(1).numpy(),
        })  # fmt: skip

    def _mean_activations(self) -> Values:
        """Over the counterfactuals, of the model as it is."""
        parts = self.components.parts
        device = next(parts.model.parameters()).device
        with evaluating(parts.model):
            return mean_activations(parts, batches(self._others or [], BATCH_SIZE, device))

    def _read(self) -> Reading:
        if self.passes:
            return read(self.components, self.batches, self.metric, sized=True)
        return glance(self.components, self.batches, self.metric)

    def _behaviour(self, reading: Reading) -> Behaviour:
        return _behaviour(reading.metric, reading.logits, self._start_logits, self.batches)

    def _first_order(self, reading: Reading) -> Tensor:
        return self.components.first_order(reading.gradients) if self.passes else torch.empty(0)


def _behaviour(metric: float, logits: Sequence[Tensor], start: Sequence[Tensor], found: Sequence[Batch]) -> Behaviour:
    samples = sum(len(batch) for batch in found)
    total = sum(kl(now, then, batch).sum().item() for now, then, batch in zip(logits, start, found, strict=True))
    likely = sum(log_prob(now, batch).exp().sum().item() for now, batch in zip(logits, found, strict=True))
    return Behaviour(metric, total / samples, likely / samples)
