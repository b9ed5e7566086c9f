"""How compact an update is: the fewest components whose change alone brings about so much of what was gained.

Components are ranked on one set of prompts and their changes grafted together on another, so that the number is not the best
of many on the prompts that it was chosen on. Ranked by their share of the change along the straight path, read at both ends
(trapezoid, as `updates.share`). Knows two models and the partition of their parameters; knows nothing about how one became
the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from attribution.components import Components
from attribution.errors import ConfigError
from attribution.metrics import Metric, metric_named
from attribution.samples import Batch, ProbeSet
from attribution.updates.graft import check_same_parameters, level, readable, swapped
from attribution.updates.share import along, read


@dataclass(frozen=True)
class Compactness:
    """What was found.

    Attributes:
        fewest: smallest number of components of those tried that reached the fraction; None where not even all did, or
            nothing was gained.
        gain: of the metric by training, on the prompts that are read.
        table: one row per number tried, ascending: count, graft (metric units), fraction (of the gain).
    """

    fewest: int | None
    gain: float
    table: pd.DataFrame


def compactness(
    base: nn.Module,
    tuned: nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase,
    chosen_on: ProbeSet,
    read_on: ProbeSet,
    metric: str = "log_odds",
    fraction: float = 0.8,
) -> Compactness:
    """Graft the first 1, 2, 4, … components in the order of their shares, then halve the gap in which they reach the fraction.

    What belongs to no component (embeddings, norms, keys and values) stays as it was before training, so that all components
    together may not reach it. A set may also bring about more than everything does.

    Args:
        base, tuned: the model before and after training.
        tokenizer: of the models.
        chosen_on, read_on: prompts on which components are ranked, and on which grafts are read.
        metric: one of `metrics.METRICS`.
        fraction: of the gain, above 0.

    Raises:
        ConfigError: a fraction that is not above 0, or an unknown metric.
        ModelError: two models whose parameters do not correspond.
        DataError: samples that cannot be encoded or scored.
    """
    if not fraction > 0:
        raise ConfigError(f"the fraction of the gain is {fraction}; expected a number above 0")
    before, after = Components(base), Components(tuned)
    check_same_parameters(before, after)
    score = metric_named(metric)
    ranked = _ranked(before, after, next(iter(readable(before, tokenizer, [chosen_on]).values())), score)
    found = next(iter(readable(before, tokenizer, [read_on]).values()))
    start = level(before, found, score)
    gain = level(after, found, score) - start
    grafts: dict[int, float] = {}

    def reaches(count: int) -> bool:
        with swapped(before, after, before.group_mask(ranked[:count])):
            grafts[count] = level(before, found, score) - start
        return gain > 0 and grafts[count] >= fraction * gain

    fewest = _first(reaches, len(ranked)) if len(ranked) else None
    table = pd.DataFrame(sorted(grafts.items()), columns=["count", "graft"])
    return Compactness(fewest, gain, table.assign(fraction=table["graft"] / gain if gain else np.nan))


def _first(reaches: Callable[[int], bool], most: int) -> int | None:
    """The first of 1, 2, 4, … up to `most` that reaches, or one before it and after the last that does not."""
    low, high = 0, 1
    while not reaches(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def _ranked(before: Components, after: Components, found: Sequence[Batch], metric: Metric) -> np.ndarray:
    """Positions of all components, the one with the largest share of the change first; ties in the order of the table."""
    ends = {use.name: (use.values, other.values) for use, other in zip(before.uses, after.uses, strict=True)}
    total = torch.zeros(before.group_count, dtype=torch.float64)
    for components in (before, after):
        gradients = read(components, found, metric).gradients
        total += components.reduce(lambda use, read=gradients: (read[use.name], *ends[use.name]), along) / 2
    groups = before.groups.assign(share=total.numpy())
    keys = ["kind", "layer", "index"]
    shares = groups[groups["kind"] != "remainder"].groupby(keys)["share"].sum()
    table = before.table
    values = shares.reindex(pd.MultiIndex.from_frame(table[keys])).to_numpy(dtype="float64")
    return np.argsort(-values, kind="stable")
