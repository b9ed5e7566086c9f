"""What a claim came to on a study: the verdict, the sentence, and every table a report shows beside it. Computes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from attribution.claims.claim import Claim, MeasuredClaim
from attribution.claims.statistics import Interval
from attribution.claims.terms import ContrastClaim
from attribution.claims.verdict import Null

INTERVAL = ["mean", "low", "high", "n", "unit"]


@dataclass(frozen=True)
class Finding:
    """What a claim came to on a study.

    Attributes:
        claim: as declared; its hash is `claim.hash`.
        verdict: the word of the rule.
        note: "reversed", "relatively spared" or "".
        sentence: the verdict in plain words, with its figures.
        estimate: of the primary statistic, over organisms.
        nulls: by name, of the primary statistic.
        gates: one row per gate.
        parts: one row per organism, and part where the claim has several.
        pairs: one row per organism and seed.
        secondary: one row per other reading of the statistic, with the word the same rule would give it.
        null_table: one row per reading and null.
        partitions: one row per organism and wrong partition.
        recruitment: cross-grafts.
        excluded: sentences.
    """

    claim: Claim | ContrastClaim | MeasuredClaim
    verdict: str
    note: str
    sentence: str
    estimate: Interval
    nulls: dict[str, Null]
    gates: pd.DataFrame
    parts: pd.DataFrame
    pairs: pd.DataFrame
    secondary: pd.DataFrame
    null_table: pd.DataFrame
    partitions: pd.DataFrame
    recruitment: pd.DataFrame
    excluded: list[str]

    def to_tables(self) -> dict[str, pd.DataFrame]:
        """Every table by name; `verdict` has one row, `excluded` one sentence a row."""
        row = {"claim": self.claim.id, "hash": self.claim.hash, "verdict": self.verdict, "note": self.note}
        row |= {"sentence": self.sentence, **self.estimate.to_dict(), "delta": self.claim.delta}
        return {
            "verdict": pd.DataFrame([row]),
            "gates": self.gates,
            "nulls": self.null_table,
            "parts": self.parts,
            "pairs": self.pairs,
            "secondary": self.secondary,
            "partitions": self.partitions,
            "recruitment": self.recruitment,
            "excluded": pd.DataFrame({"sentence": pd.Series(self.excluded, dtype="str")}),
        }

    def to_dict(self) -> dict[str, Any]:
        """The finding as strict JSON: the claim, and every table as a list of rows; what is not finite becomes null."""
        tables = {name: [_plain(row) for row in table.to_dict("records")] for name, table in self.to_tables().items()}
        return {"claim": self.claim.model_dump(mode="json"), "hash": self.claim.hash, **tables}


def interval_row(interval: Interval) -> tuple:
    """The values of `INTERVAL`."""
    return tuple(getattr(interval, name) for name in INTERVAL)


def failed_runs(failed: pd.DataFrame) -> list[str]:
    """One sentence per run that failed."""
    return [
        f"The run of {row.model}, arm {row.arm}, seed {row.seed}, failed: {row.reason}."
        for row in failed.itertuples(index=False)
    ]


def left_out(by_reading: Iterable[tuple[str, Iterable[tuple[str, str]]]]) -> list[str]:
    """One sentence for what was left out and each reason, with the readings where it was.

    Args:
        by_reading: name of each reading, with what it left out and why.
    """
    where: dict[tuple[str, str], list[str]] = {}
    readings = [(name, list(left)) for name, left in by_reading]
    for name, left in readings:
        for each in left:
            where.setdefault(each, []).append(name)
    return [
        f"{what} is left out ({'every reading' if 1 < len(readings) == len(names) else '; '.join(names)}): {why}."
        for (what, why), names in where.items()
    ]


def _plain(row: Mapping) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {str(key): plain(value) for key, value in row.items()}
