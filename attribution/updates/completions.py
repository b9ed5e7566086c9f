"""The completions behind a step: what was said, its reward and advantage, and which components brought it about.

The first-order cause of the response metric, one completion at a time, before the step. It comes from a pass of its own,
not from the training loss, which mixes in penalties, clipping and what is pushed down. Knows completions and taps; knows
nothing about trainers or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from attribution.capture import evaluating
from attribution.causes import BATCH_SIZE
from attribution.causes.gradient import first_order
from attribution.causes.reference import zeros
from attribution.components import Components
from attribution.metrics import metric_named
from attribution.samples import Completion, batches
from attribution.updates.selection import Schedule

EVERY = 10  # steps between causes of completions where the model is large


class Completions:
    """Collects the completions of one step after the other.

    Args:
        components: of the model.
        metric: of a response; the log-odds stand for the logit difference, since a completion has no contrast.
        every: at every how many steps causes are read; 0: never.
    """

    def __init__(self, components: Components, metric: str, every: int):
        self.components = components
        self._metric = metric_named("log_odds" if metric == "logit_difference" else metric)
        self._due = Schedule(every) if every else None
        self._waiting: list[Completion] = []

    def add(self, completions: Iterable[Completion]) -> None:
        self._waiting.extend(completions)

    def take(self) -> list[Completion]:
        """Those of the step that is about to be made; the next one starts empty."""
        taken, self._waiting = self._waiting, []
        return taken

    def causes(self, completions: Sequence[Completion], step: int) -> dict[str, Tensor]:
        """Columns of the frame `components`, Float64 [components] each; none where there is nothing to read at this step."""
        if not completions or self._due is None or not self._due.due(step):
            return {}
        device = next(self.components.parts.model.parameters()).device
        values, encoded = zeros(self.components.parts), [completion.encoded for completion in completions]
        with evaluating(self.components.parts.model):
            found = [
                first_order(self.components, batch, values, self._metric) for batch in batches(encoded, BATCH_SIZE, device)
            ]
        causes = torch.cat(found, dim=1).double().cpu()  # [component, completion]
        advantage = torch.tensor([completion.advantage for completion in completions], dtype=torch.float64)
        return {
            "cause_rewarded": causes @ advantage / len(advantage),
            "cause_high": causes[:, advantage > 0].mean(1),  # NaN where there is none
            "cause_low": causes[:, advantage < 0].mean(1),
        }


def told(completions: Sequence[Completion]) -> dict[str, float | None]:
    """What the row of a step says of its completions."""
    if not completions:
        return {}
    rewards = [completion.reward for completion in completions if completion.reward is not None]
    return {
        "reward": sum(rewards) / len(rewards) if rewards else None,
        "advantage": sum(abs(completion.advantage) for completion in completions) / len(completions),
    }


def lines(completions: Sequence[Completion], step: int) -> list[dict[str, Any]]:
    """As samples.jsonl holds them, see `store.SAMPLES`."""
    return [
        {
            "step": step,
            "sample": each.sample,
            "prompt": each.prompt,
            "completion": each.text,
            "tokens": len(each.encoded.ids) - each.encoded.start,
            "reward": each.reward,
            "advantage": each.advantage,
            "ratio": each.ratio,
        }
        for each in completions
    ]
