"""What a training step did: the recorder, update shares, and grafts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def update_shares(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Update shares of a record, summed over its steps, of every component and remainder group.

    Returns:
        One row per probe set and component: probe, kind, layer, index, name (of a remainder group), share (metric
        units), steps (over how many recorded steps the sum runs). Of a record that holds a choice of components, rows of
        index -1 are sums over whole layers, those of single components among them.

    Raises:
        RunError: there is no run.
    """
    from attribution.store import read_run

    parts = read_run(path).components
    found = parts[parts["share"].notna()].astype({"probe": object, "kind": object, "name": object})
    grouped = found.groupby(["probe", "kind", "layer", "index", "name"], dropna=False, sort=False)["share"]
    return grouped.agg(share="sum", steps="count").reset_index()
