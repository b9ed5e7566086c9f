"""One probe set, read before training and after every step: metric, KL, first-order causes, update shares, influence.

The reading after step t is the reading before step t + 1, so each is made once. Knows samples and readings; knows
nothing about the training batch or about files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from attribution.capture import evaluating
from attribution.causes import BATCH_SIZE, batches_with_values
from attribution.causes.ablation import ablate_each
from attribution.causes.reference import check_reference
from attribution.components import Components
from attribution.metrics import check_scorable, kl, metric_named
from attribution.samples import ProbeSet, batches, encode
from attribution.updates.share import PASSES, Path, Reading, Shares, read, shares


class Step(NamedTuple):
    """What one step did to one probe set.

    Attributes:
        metric, kl: after the step; mean over samples, KL to the start per response token.
        before, after: first-order cause of every component, Float64 [components], mean over samples.
        shares: of the step.
    """

    metric: float
    kl: float
    before: Tensor
    after: Tensor
    shares: Shares


class ProbeReader:
    """Reads one probe set.

    Args:
        probe: the set.
        components: of the model that is trained.
        tokenizer: of the model.
        metric: name of the metric.
        reference: what ablated activations are replaced by; values come from the model as it is at the time.
        passes: gradient evaluations allowed for one step's shares.

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
    ):
        self.name, self.components, self.reference, self.passes = probe.name, components, reference, passes
        context = getattr(components.parts.model.config, "max_position_embeddings", None)
        self._encoded = encode(tokenizer, probe.samples, context=context)
        self._others = encode(tokenizer, probe.counterfactuals, context=context) if probe.counterfactuals else None
        check_reference(reference, self._encoded, self._others)
        self.metric = metric_named(metric)
        device = next(components.parts.model.parameters()).device
        self.batches = batches(self._encoded, BATCH_SIZE, device)
        check_scorable(self.metric, self.batches, components.parts.vocabulary)
        self.reading: Reading | None = None
        self._start_logits: list[Tensor] = []
        self._causes = torch.empty(0)

    def start(self) -> float:
        """Read the model before training; returns the metric."""
        self.reading = read(self.components, self.batches, self.metric)
        self._start_logits = self.reading.logits
        self._causes = self._first_order(self.reading)
        return self.reading.metric

    @property
    def causes(self) -> Tensor:
        """First-order cause of every component at the last reading, Float64 [components]."""
        return self._causes

    def step(self, path: Path) -> Step:
        """Read the model after a step and attribute the change along the path it took."""
        assert self.reading is not None, "start() comes first"
        before, self.reading = self.reading, read(self.components, self.batches, self.metric)
        causes, self._causes = self._causes, self._first_order(self.reading)
        found = shares(path, self.batches, self.metric, before, self.reading, self.passes)
        return Step(self.reading.metric, self._kl(self.reading.logits), causes, self._causes, found)

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

    def _first_order(self, reading: Reading) -> Tensor:
        return self.components.first_order(reading.gradients)

    def _kl(self, logits: Sequence[Tensor]) -> float:
        total = sum(
            kl(now, start, batch).sum().item()
            for now, start, batch in zip(logits, self._start_logits, self.batches, strict=True)
        )
        return total / len(self._encoded)
