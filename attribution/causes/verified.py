"""Rank cheaply, verify exactly: what the top of a ranking does when it is really ablated, and what others do.

Kramár et al. (2024) rank all components by attribution patching, verify the first of them by patching, and bound what the
ranking misses with a random sample of the rest. Knows tables of effects; knows nothing about how they are computed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import stats

from attribution.causes.result import Causes, Verified

_NAMES = ["kind", "layer", "index"]


def verified_ranking(table: pd.DataFrame, count: int, seed: int, exact: Callable[[pd.DataFrame], Causes]) -> Verified:
    """Ablate the components whose effect is largest in size, and as many others drawn at random.

    Args:
        table: kind, layer, index, effect: the ranking.
        count: how many of each; fewer where there are no more.
        seed: of the draw.
        exact: exact ablation of the components in a table.
    """
    order = np.argsort(-table["effect"].abs().to_numpy(), kind="stable")
    top, rest = order[:count], order[count:]
    drawn = np.random.default_rng(seed).choice(rest, min(count, len(rest)), replace=False)
    chosen = table.iloc[np.concatenate([top, drawn])].reset_index(drop=True)
    found = exact(chosen)
    listed = chosen[[*_NAMES, "effect"]].rename(columns={"effect": "first_order"})
    listed = listed.merge(found.table[[*_NAMES, "effect"]].rename(columns={"effect": "exact"}), on=_NAMES, how="left")
    listed["chosen"] = ["top"] * len(top) + ["random"] * len(drawn)
    sizes = {which: each["exact"].abs() for which, each in listed.groupby("chosen")}
    missed = float((sizes["random"] > sizes["top"].median()).mean()) if len(drawn) else 0.0
    spearman = {which: _spearman(listed[listed["chosen"] == which]) for which in ("top", "random")}
    return Verified(listed, spearman, missed, found.passes)


def _spearman(table: pd.DataFrame) -> float:
    if len(table) < 3 or table["exact"].nunique() < 2 or table["first_order"].nunique() < 2:
        return float("nan")
    return float(stats.spearmanr(table["first_order"], table["exact"]).statistic)
