"""From one number per base to a finding: what every claim with a statistic of its own shares.

Knows intervals and verdicts; knows nothing about what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from attribution.claims.claim import MeasuredClaim
from attribution.claims.finding import INTERVAL, Finding, failed_runs, interval_row
from attribution.claims.frames import Frames
from attribution.claims.recruitment import COLUMNS as RECRUITMENT
from attribution.claims.statistics import EQUIVALENCE, Interval, t_interval
from attribution.claims.verdict import Gate, Null, Verdict, decide, equivalent, gate_table
from attribution.errors import ConfigError

STATISTIC, PRIMARY = "statistic", "primary"  # a column, and the name of the reading that gives the verdict


class Measured(NamedTuple):
    """What a claim's own function measured.

    Attributes:
        bases: one row per base: model, statistic, and what else a reader wants to see of it.
        details: the rows behind them.
        beside: further readings of the statistic, by name: one value per base.
        nulls: the same statistic where nothing should show, by name.
        figures: what gates may name: the worst value, and where it was found.
        excluded: one sentence for what was left out.
        explored: further rows of `secondary`, to which no verdict belongs.
    """

    bases: pd.DataFrame
    details: pd.DataFrame
    beside: Mapping[str, pd.Series]
    nulls: Mapping[str, Null]
    figures: Mapping[str, tuple[float, str]]
    excluded: list[str]
    explored: pd.DataFrame | None = None


def measured_finding(claim: MeasuredClaim, measured: Measured, frames: Frames) -> Finding:
    """The verdict, by the rule, and every table.

    Raises:
        ConfigError: the claim names an unknown gate or null.
    """
    figures = {"organisms": (float(len(measured.bases)), ""), **measured.figures}
    for kind, names, known in (("gate", [gate.name for gate in claim.gates], figures), ("null", claim.nulls, measured.nulls)):
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(f"unknown {kind} {unknown[0]!r} of claim {claim.id!r}; expected {', '.join(known) or 'none'}")
    gates = [Gate(threshold, *figures[threshold.name]) for threshold in claim.gates]
    estimate = interval_of(claim, measured.bases[STATISTIC])
    nulls = {name: measured.nulls[name] for name in claim.nulls}
    verdict = _verdict(claim, estimate, nulls, gates)
    word = f"{verdict.word[0].upper()}{verdict.word[1:]}{', and ' + verdict.note if verdict.note else ''}"
    figure = f"{estimate} ({claim.unit}; δ {claim.delta:g})" if estimate.n else "not measured"
    return Finding(
        claim=claim,
        verdict=verdict.word,
        note=verdict.note,
        sentence=f"{word} ({verdict.why}). {claim.statistic}: {figure}.",
        estimate=estimate,
        nulls=nulls,
        gates=gate_table(gates),
        parts=measured.bases,
        pairs=measured.details,
        secondary=_secondary(claim, measured),
        null_table=_nulls(claim, nulls),
        partitions=pd.DataFrame(columns=["model", "partition"]),
        recruitment=pd.DataFrame(columns=RECRUITMENT),
        excluded=(failed_runs(frames["failed"]) if "failed" in frames else []) + measured.excluded,
    )


def interval_of(claim: MeasuredClaim, values: pd.Series) -> Interval:
    """Over bases: of 95 %, or of 90 % where the claim predicts no difference."""
    level = EQUIVALENCE if claim.prediction == "none" else 0.95
    return t_interval(values.astype("float64"), level=level, unit="base")


def _verdict(claim: MeasuredClaim, estimate: Interval, nulls: Mapping[str, Null], gates: list[Gate]) -> Verdict:
    if claim.prediction == "none":
        return equivalent(estimate, claim.delta, gates)
    return decide(estimate, claim.delta, nulls, gates, claim.nulls)


def _secondary(claim: MeasuredClaim, measured: Measured) -> pd.DataFrame:
    rows = []
    for name, values in measured.beside.items():
        found = interval_of(claim, values)
        verdict = _verdict(claim.model_copy(update={"nulls": ()}), found, {}, [])
        rows.append((name, "steps", claim.cell.reference, *interval_row(found), verdict.word, verdict.note, verdict.why))
    found = pd.DataFrame(rows, columns=["reading", "matching", "reference", *INTERVAL, "verdict", "note", "why"])
    if measured.explored is None or measured.explored.empty:
        return found
    return pd.concat([found, measured.explored[list(found)]], ignore_index=True)


def _nulls(claim: MeasuredClaim, nulls: Mapping[str, Null]) -> pd.DataFrame:
    rows = [(PRIMARY, name, *interval_row(null.interval), null.inside(claim.delta), null.void) for name, null in nulls.items()]
    return pd.DataFrame(rows, columns=["reading", "null", *INTERVAL, "inside", "void"])
