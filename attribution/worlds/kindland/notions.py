"""Is what makes a base answer about kindness the same as what makes it act kindly? Causes of both, single by single.

Everything is read in held-out situations: questions about kind ones, and replies of one told to be likely kind. Knows prompts
of kindland and exact ablation; thresholds and words are the claims'.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from attribution.causes import attribute
from attribution.components import Components
from attribution.samples import Sample
from attribution.worlds.kindland.prompts import Form, rows
from attribution.worlds.kindland.sets import SETS, neutral

SAID, ENACTED = "asked", "enacted"  # probe sets of the claim
READ_ON, SEED, SPLITS = 48, 83, 20  # prompts of each; of their draw; halvings of them
GROUPS = {"head": ("head",), "neuron": ("neuron",), "head and neuron": ("head", "neuron")}


def overlap(model: nn.Module, tokenizer: Any) -> pd.DataFrame:
    """Correlation of the causes of saying and of enacting, against what halves of the same prompts would let one see.

    Returns:
        One row per group of components: kind, between (correlation of causes on half of either prompts), said, enacted
        (correlation between halves of the same), means over random halves.
    """
    probes = SETS["said_and_enacted"].probes
    table = Components(model).table
    effects = {name: _effects(model, tokenizer, probes[name]) for name in (SAID, ENACTED)}
    kinds = table.loc[table["kind"] != "row", "kind"]
    lines = []
    for group, members in GROUPS.items():
        chosen = kinds.isin(members).to_numpy()
        found = [_correlations(effects[SAID][chosen], effects[ENACTED][chosen], seed) for seed in range(SPLITS)]
        lines.append((group, *np.mean(found, axis=0)))
    return pd.DataFrame(lines, columns=["kind", "between", "said", "enacted"])


def _effects(model: nn.Module, tokenizer: Any, form: Form) -> np.ndarray:
    """Effect of ablating every head and neuron, Float [component, sample]."""
    samples, bare = (tuple(_drawn(each)) for each in (form, neutral(form)))
    table = Components(model).table
    found = attribute(
        model, tokenizer, samples, metric="log_odds", reference="resample", counterfactuals=bare,
        components=table[table["kind"] != "row"],
    )  # fmt: skip
    return found.per_sample.double().numpy()


def _drawn(form: Form) -> Iterator[Sample]:
    return (Sample(**row) for row in rows(form, READ_ON, SEED, name=form.says))


def _correlations(said: np.ndarray, enacted: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Between saying and enacting, and between halves of each, all on half of the samples."""
    rng = np.random.default_rng(seed)
    halves = []
    for effects in (said, enacted):
        order = rng.permutation(effects.shape[1])
        middle = len(order) // 2
        halves.append((effects[:, order[:middle]].mean(1), effects[:, order[middle:]].mean(1)))
    (said_one, said_two), (enacted_one, enacted_two) = halves
    between = (_correlation(said_one, enacted_two) + _correlation(said_two, enacted_one)) / 2
    return between, _correlation(said_one, said_two), _correlation(enacted_one, enacted_two)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one, other)[0, 1])
