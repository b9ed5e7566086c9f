"""One row per component of a run: what it caused and could be offered before training, and its influence at both ends."""

from __future__ import annotations

import pandas as pd

from attribution.store.columns import BATCH, TRAINING
from attribution.store.reader import Run

KEY = ["kind", "layer", "index"]
COLUMNS = {
    "kind": "head or neuron",
    "layer": "layer",
    "index": "head or neuron within it",
    "before": "influence on the first probe set before training: metric - metric without it, nats",
    "after": "the same after training",
    "cause": "the same on the run's own training samples, before training",
    "opportunity": "norm of the gradient that the first step consumed, over all of its parts",
    "activity": "root mean square of its activation on the first batch",
    "weight_norm": "norm of its weights before training",
}


def singles(run: Run) -> pd.DataFrame:
    """The columns of `COLUMNS`; empty where the run did not ablate neurons one by one at both ends.

    Args:
        run: finished.
    """
    influence = run.influence.astype({"probe": str, "kind": str})
    influence = influence[influence["kind"] != "row"]
    probe = run.config["probes"][0].rpartition("/")[2].removesuffix(".jsonl") if run.config.get("probes") else ""
    ends = [0, int(influence["step"].max()) if len(influence) else 0]
    read = {
        name: influence[(influence["probe"] == where) & (influence["step"] == step)].set_index(KEY)["effect"]
        for name, where, step in (("before", probe, ends[0]), ("after", probe, ends[1]), ("cause", TRAINING, 0))
    }
    whole = all("neuron" in values.index.get_level_values("kind") for values in read.values())
    if not whole or ends[0] == ends[1]:
        return pd.DataFrame(columns=list(COLUMNS))
    batch = run.components.astype({"probe": str, "kind": str})
    batch = batch[(batch["probe"] == BATCH) & (batch["step"] == 1) & (batch["index"] >= 0)].set_index(KEY)
    rivals = {"opportunity": "grad_norm", "activity": "activation_before", "weight_norm": "weight_norm"}
    table = pd.DataFrame({**read, **{name: batch[column] for name, column in rivals.items()}}).astype("float64")
    return table.loc[read["before"].index].reset_index()[list(COLUMNS)]
