"""Do update shares add up? The sum of the shares of a random set of components, against the measured graft of the set.

Linear graft score of a probe set: the rank correlation, over random sets S, of sum_{c in S} U_c with the graft
metric(theta_0 + dtheta_S) - metric(theta_0); after the linear datamodelling score (Park et al. 2023). A share is an average
over the path on which all else changes too, and a graft of few components is read where nothing else has: so the score is
given against the mean of graft and prune-back as well, which reads each set from both ends. Every set has as many members
of each kind and layer as any other, since of sets that differ in size the bigger one does more whatever its members are.
The remainder, which belongs to no component, stays as it is.

Knows two models, the partition and a table of shares; knows nothing about how shares are measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import pearsonr, spearmanr
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from attribution.components import KINDS, Components
from attribution.errors import ConfigError
from attribution.metrics import metric_named
from attribution.samples import ProbeSet
from attribution.updates.graft import check_same_parameters, level, readable, swapped

FEWEST = 3  # sets; through two points any score is perfect
_COMPONENT = ["kind", "layer", "index"]


@dataclass(frozen=True)
class LinearGraft:
    """The score and what it was computed from.

    Attributes:
        table: one row per probe set and random set: probe, number (of the set), predicted, graft, prune (metric units, mean
            over samples).
        scores: one row per probe set: probe, spearman, pearson (with the graft), spearman_both_ends, pearson_both_ends (with
            the mean of graft and prune-back), n (sets); NaN where one side is the same for all sets.
    """

    table: pd.DataFrame
    scores: pd.DataFrame


def linear_graft(
    base: nn.Module,
    tuned: nn.Module,
    shares: pd.DataFrame,
    *,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[ProbeSet],
    metric: str = "log_odds",
    sets: int = 200,
    fraction: float = 0.5,
    seed: int = 0,
    progress: bool = False,
) -> LinearGraft:
    """Graft random sets of components, and compare with the sums of their update shares.

    Args:
        base, tuned: the model before and after training.
        shares: columns probe, kind, layer, index, share, as `update_shares` returns them or as recorded; rows of the same
            component (its parts, its steps) are added up.
        tokenizer: of the models.
        probes: what is read; each has its shares in the table.
        metric: that of the shares, one of `metrics.METRICS`.
        sets: how many random sets.
        fraction: of the components of each kind and layer that a set takes.
        seed: of the choice.
        progress: show a bar.

    Raises:
        ModelError: two models whose parameters do not correspond.
        ConfigError: shares that are not there for every component, no probe set, too few sets, a fraction that is none, an
            unknown metric.
        DataError: samples that cannot be encoded or scored.
    """
    check_request(sets, fraction)
    before, after = Components(base), Components(tuned)
    check_same_parameters(before, after)
    read, found = metric_named(metric), readable(before, tokenizer, probes)
    share = {probe: _of_components(before, shares, probe) for probe in found}
    ends = {probe: (level(before, batches, read), level(after, batches, read)) for probe, batches in found.items()}
    chosen = tqdm(
        random_sets(before, sets, fraction, seed), total=sets, disable=not progress, unit="set", desc="sets", leave=False
    )
    rows = []
    for number, positions in enumerate(chosen):
        mask = before.group_mask(positions)
        with swapped(before, after, mask):
            graft = {probe: level(before, batches, read) - ends[probe][0] for probe, batches in found.items()}
        with swapped(after, before, mask):
            prune = {probe: ends[probe][1] - level(after, batches, read) for probe, batches in found.items()}
        rows += [(probe, number, share[probe][positions].sum(), graft[probe], prune[probe]) for probe in found]
    table = pd.DataFrame(rows, columns=["probe", "number", "predicted", "graft", "prune"])
    return LinearGraft(table, scores(table))


def check_request(sets: int, fraction: float = 0.5) -> None:
    """Raise ConfigError unless a score can be had of that many sets of that fraction."""
    if sets < FEWEST:
        raise ConfigError(f"{sets} random sets asked for; a correlation needs at least {FEWEST}, and 200 make it sharp")
    if not 0 < fraction < 1:
        raise ConfigError(f"sets of a fraction {fraction} of the components asked for; expected one between 0 and 1")


def random_sets(components: Components, sets: int, fraction: float = 0.5, seed: int = 0) -> Iterator[np.ndarray]:
    """Positions in `Components.table` of each random set, sorted.

    Of the n components of a kind and layer, each set draws `fraction` n, rounded, without replacement; where n > 1, at
    least one and not all, so that no kind and layer is without a say.
    """
    strata = list(components.table.groupby(["kind", "layer"], sort=False).indices.values())
    generator = np.random.default_rng(seed)
    for _ in range(sets):
        drawn = [generator.choice(each, _members(len(each), fraction), replace=False) for each in strata]
        yield np.sort(np.concatenate(drawn))


def scores(table: pd.DataFrame) -> pd.DataFrame:
    """Rank and linear correlation of predicted and measured grafts, per probe set, in the order they first appear.

    Args:
        table: columns probe, predicted, graft, prune.

    Returns:
        One row per probe set, as in `LinearGraft.scores`.
    """
    rows = []
    for probe, own in table.groupby("probe", sort=False, observed=True):
        predicted, graft, prune = (own[name].to_numpy(float) for name in ("predicted", "graft", "prune"))
        from_start, from_both = _correlations(predicted, graft), _correlations(predicted, (graft + prune) / 2)
        rows.append((probe, *from_start, *from_both, len(own)))
    columns = ["probe", "spearman", "pearson", "spearman_both_ends", "pearson_both_ends", "n"]
    return pd.DataFrame(rows, columns=columns)


def _correlations(predicted: np.ndarray, measured: np.ndarray) -> list[float]:
    """Of ranks, and linear; NaN where there is none."""
    if len(predicted) < FEWEST or not (np.ptp(predicted) > 0 and np.ptp(measured) > 0):
        return [np.nan] * 2
    return [float(f(predicted, measured).statistic) for f in (spearmanr, pearsonr)]


def _members(count: int, fraction: float) -> int:
    return min(max(1, round(fraction * count)), count - 1)


def _of_components(components: Components, shares: pd.DataFrame, probe: str) -> np.ndarray:
    """Summed shares of one probe set, Float64 [components], in the order of the components' table.

    Raises:
        ConfigError: columns, the probe set or components are missing, or are none of this model.
    """
    if missing := {"probe", *_COMPONENT, "share"} - set(shares.columns):
        raise ConfigError(f"the shares have no column {min(missing)!r}; give what update_shares returns")
    own = shares[(shares["probe"] == probe) & shares["kind"].isin(KINDS)]
    if own.empty:
        there = ", ".join(map(str, shares["probe"].unique())) or "none"
        raise ConfigError(f"there are no shares of components on probe set {probe!r}; the table has those on {there}")
    single = own[own["index"] >= 0].astype({"kind": str, "share": float})
    index = pd.MultiIndex.from_frame(components.table[_COMPONENT])
    summed = single.groupby(_COMPONENT)["share"].sum()
    if odd := sorted(set(summed.index) - set(index)):
        components.positions(odd[:1])  # says what the model has instead
    missing, summarised = len(index) - len(summed), len(own) - len(single)
    if missing or summarised or single["share"].isna().any():
        reason = "sums per layer stand for single neurons and rows" if summarised else f"{missing} components have none"
        raise ConfigError(
            f"the shares on probe set {probe!r} are not those of all {len(index):,} components ({reason}); record the run with "
            "everything=True"
        )
    return summed.reindex(index).to_numpy()
