"""What a run says, as small tables: causes, four quantities per component, behaviour, shares by place, what is missing.

Knows the frames of `store`; knows nothing about figures, HTML or Markdown, which all read the same tables from here.
All quantities are changes or levels of the study's metric in nats: causes as means over training samples, before training,
the others as means over a held-out probe set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from attribution.store import BATCH, TRAINING, Run
from attribution.store.quantities import causes, kept, per_component, plain

KINDS = {"head": "heads", "neuron": "neurons", "row": "unembedding rows", "remainder": "remainder"}
QUANTITIES = {
    "influence": "influence before",  # at the start: exact ablation
    "strengthening": "strengthening",  # influence at the last milestone minus at the start
    "share": "update share",  # summed over steps
    "graft": "graft",
}
METRICS = {
    "log_odds": "log-odds",
    "log_odds_per_token": "log-odds per token",
    "log_prob": "log-probability",
    "logit_difference": "logit difference",
}
NO_CAUSES = (
    "What caused the trained responses was not measured: no component was ablated on the training samples before training "
    "(“attribution run” does so, a recorder in a loop of your own does not)."
)


@dataclass(frozen=True)
class Balance:
    """The sum rule over the whole run: change = shares + residual (nats; NaN where not recorded)."""

    change: float
    shares: float
    residual: float
    resolved: float  # fraction of steps whose residual is within the bound
    steps: int


@kept
def probe_sets(run: Run) -> list[str]:
    """Names of the held-out probe sets anything was recorded for, in order of appearance.

    Not among them: what was trained on, and sets that were only watched, of which no change is attributed.
    """
    names: dict[str, None] = {}
    attributed = run.probes[(run.probes["step"] == 0) | run.probes["change"].notna()]
    for frame in (attributed, run.influence, run.grafts, run.parts):
        names.update(dict.fromkeys(str(name) for name in frame["probe"].dropna().unique()))
    later = run.probes[run.probes["step"] > 0].groupby("probe", observed=True)["change"].count()
    watched = {str(name) for name, count in later.items() if count == 0}
    names = {name: None for name in names if name not in watched}
    names.update(dict.fromkeys((run.result or {}).get("probes", {})))
    return [name for name in names if name not in (BATCH, TRAINING)]


def meta(run: Run) -> dict[str, Any]:
    """`meta.json`, or nothing where the run stopped before it was written."""
    return run.meta if (run.path / "meta.json").exists() else {}


def metric_name(run: Run) -> str:
    """The study's metric in words, or as config.json names it."""
    name = str(run.config.get("metric", "metric"))
    return METRICS.get(name, shown(name, 40))


def shown(value: Any, limit: int = 120) -> str:
    """Any value from data as one line of printable text, cut at `limit` characters. Not escaped for any markup."""
    text = value if isinstance(value, str) else str(value)
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:limit])
    return line + "…" if len(text) > limit else line


def word(run: Run, token: int, limit: int = 32) -> str:
    """A token as a quoted word in which spaces and newlines show; its id where the run holds no vocabulary."""
    if not 0 <= token < len(run.vocabulary):
        return f"token {token}"
    text = run.vocabulary[token]
    return repr(text[:limit]) + ("…" if len(text) > limit else "")


def signed(value: float | None, digits: int = 3) -> str:
    """A number with its sign and `digits` significant digits; a dash where there is none."""
    return "–" if value is None or not np.isfinite(value) else f"{value:+.{digits}g}".replace("-", "−")


def listed(items: list[str]) -> str:
    """Items as a sentence lists them: a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def percent(fraction: float) -> str:
    """A fraction in per cent."""
    return f"{100 * fraction:.0f} %".replace("-", "−")


def cause_samples(run: Run) -> str:
    """The samples on which causes were measured, in words: with their number where the run's result holds it."""
    count = (run.result or {}).get("causes", {}).get("samples")
    return f"{shown(count, 12)} training samples" if count else "training samples"


@kept
def with_causes(run: Run, kind: str) -> pd.DataFrame:
    """`per_component` with the cause of each component on training samples beside it (NaN where not recorded)."""
    found = causes(run)
    found = found.loc[found["kind"] == kind, ["layer", "index", "cause"]]
    return per_component(run, kind).merge(found, on=["layer", "index"], how="left")


@kept
def rank_correlations(run: Run) -> pd.DataFrame:
    """Spearman's rank correlation between cause and strengthening, per probe set and kind: it describes one run.

    Returns:
        One row per probe set and kind with both: probe, kind, spearman (NaN where undefined), n (components).
    """
    rows = []
    for kind in ("head", "neuron"):
        table = with_causes(run, kind).dropna(subset=["cause", "strengthening"])
        for probe in probe_sets(run):
            both = table.loc[table["probe"] == probe, ["cause", "strengthening"]]
            if both.empty:
                continue
            varied = len(both) > 2 and (both.nunique() > 1).all()
            found = float(spearmanr(both["cause"], both["strengthening"]).statistic) if varied else float("nan")
            rows.append({"probe": probe, "kind": kind, "spearman": found, "n": len(both)})
    return pd.DataFrame(rows, columns=["probe", "kind", "spearman", "n"])


def by_place(run: Run, probe: str) -> pd.DataFrame:
    """Update share summed over steps by kind, layer and part; whole-layer rows stand in for the components below them."""
    rows = run.parts[(run.parts["probe"] == probe) & run.parts["share"].notna()]
    if rows.empty:
        return pd.DataFrame(columns=["kind", "layer", "part", "share"])
    rows = plain(rows).assign(whole=rows["index"] < 0, share=rows["share"].astype("float64"))
    totals = rows.groupby(["step", "kind", "layer", "part", "whole"])["share"].sum().unstack("whole")
    totals = totals.reindex(columns=[True, False])
    share = totals[True].fillna(totals[False]).rename("share")
    return share.groupby(["kind", "layer", "part"]).sum().reset_index()


def place_name(kind: str, part: str) -> str:
    """How a kind of component and a part of it are called together: `heads, writing`."""
    return f"{KINDS[kind]}, {part}" if kind in ("head", "neuron") else KINDS.get(kind, kind)


def balance(run: Run, probe: str) -> Balance:
    """Change, shares and residual of one probe set, summed over the steps."""
    rows = run.probes[(run.probes["probe"] == probe) & (run.probes["step"] > 0)]
    sums = rows[["change", "share_sum", "residual"]].astype("float64").sum(min_count=1)
    resolved = rows["resolved"].dropna()
    fraction = float(resolved.astype(bool).mean()) if len(resolved) else float("nan")
    change, share, residual = (float(value) for value in sums)
    return Balance(change, share, residual, fraction, int(rows["step"].nunique()))


def agreement(run: Run, probe: str) -> str:
    """How well the shares of random sets of components rank their measured grafts, in a sentence; "" where not asked for."""
    scores = (run.result or {}).get("linear_graft", {}).get(probe)
    if not scores or scores.get("spearman") is None:
        return ""
    both = scores.get("spearman_both_ends")
    ends = "" if both is None else f", and {both:.2f} with the mean of graft and prune-back"
    return (
        f"Over {scores['n']} random sets of components, as large in every kind and layer, the summed shares have a Spearman "
        f"correlation of {scores['spearman']:.2f} with the measured graft{ends}."
    )


def behaviour(run: Run) -> pd.DataFrame:
    """Metric before and after, its change, and the KL to the start, per probe set (index: probe)."""
    table = {}
    for probe in probe_sets(run):
        rows = run.probes[run.probes["probe"] == probe].sort_values("step")
        metric, kl = (rows[column].astype("float64").dropna() for column in ("metric", "kl"))
        told = (run.result or {}).get("probes", {}).get(probe, {})
        before, after = (metric.iloc[0], metric.iloc[-1]) if len(metric) else (told.get("before"), told.get("after"))
        table[probe] = {"before": before, "after": after, "kl": kl.iloc[-1] if len(kl) else told.get("kl")}
    frame = pd.DataFrame.from_dict(table, orient="index", columns=["before", "after", "kl"]).astype("float64")
    frame.insert(2, "change", frame["after"] - frame["before"])
    return frame


def last_milestone(run: Run) -> int | None:
    """The step of the last exact ablation after the start, None where there is none."""
    steps = run.influence["step"]
    return int(steps.max()) if len(steps) and steps.max() > 0 else None


@kept
def not_measured(run: Run) -> list[str]:
    """What the record lacks, one sentence each: what the run itself says, then what its frames show."""
    found = [str(line) for line in meta(run).get("not_measured", [])]
    if run.result is None:
        state = run.status.get("state", "of unknown state")
        found.insert(0, f"The run is not finished (status: {state}); what follows is the part that was recorded.")
    if run.steps["loss"].isna().all():
        found.append("Training loss: not recorded.")
    if run.probes["metric"].isna().all():
        found.append("Behaviour on probe sets: not recorded.")
    elif run.probes["kl"].isna().all():
        found.append("KL to the start: not recorded.")
    if not run.vocabulary:
        found.append("Words of the unembedding rows: the run holds no vocabulary, so tokens are given by number.")
    found += _without_causes(run)
    for kind in ("head", "neuron"):
        table = per_component(run, kind)
        found += [line for quantity in QUANTITIES for line in _gaps(run, table, kind, quantity)]
    if per_component(run, "row")["share"].isna().all():
        found.append("Update share of unembedding rows: not recorded.")
    return found


def _without_causes(run: Run) -> list[str]:
    table = causes(run)
    if table.empty:
        return [NO_CAUSES]
    lines = []
    for kind in ("head", "neuron", "row"):
        count = int((table["kind"] == kind).sum())
        total = max(count, len(per_component(run, kind)[["layer", "index"]].drop_duplicates()))
        if not count:
            lines.append(f"Causes of {KINDS[kind]} on training samples: not recorded.")
        elif count < total:
            lines.append(f"Causes of {KINDS[kind]} on training samples: recorded for {count} of {total} in this record.")
    return lines


def _gaps(run: Run, table: pd.DataFrame, kind: str, quantity: str) -> list[str]:
    """What one quantity of one kind lacks: everywhere, on some probe sets, for some components, or in some steps."""
    name, kinds = QUANTITIES[quantity].capitalize(), KINDS[kind]
    probes = probe_sets(run)
    counts = {probe: int(table.loc[table["probe"] == probe, quantity].notna().sum()) for probe in probes}
    if not any(counts.values()):
        return [f"{name} of {kinds}: not recorded."]
    lines = []
    if without := [shown(probe) for probe, count in counts.items() if not count]:
        lines.append(f"{name} of {kinds}: not recorded for probe set {', '.join(without)}.")
    total = len(table[["layer", "index"]].drop_duplicates())
    if (fewest := min(count for count in counts.values() if count)) < total:
        lines.append(f"{name} of {kinds}: recorded for {fewest} of {total} in this record; the others are drawn grey.")
    steps = balance(run, probes[0]).steps
    if quantity == "share" and (partial := int((table["share_steps"] < steps).sum())):
        lines.append(f"{name} of {kinds}: {partial} of {len(table)} sums leave out steps in which they were not recorded.")
    return lines
