"""From a claim and a study's frames to a finding: the verdict, the sentence, and every table a report shows beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from attribution.claims.boost import BOOST
from attribution.claims.claim import Claim
from attribution.claims.crossover import Crossover, View
from attribution.claims.frames import Frames, checked
from attribution.claims.recruitment import recruitment
from attribution.claims.statistics import Interval, over_organisms
from attribution.claims.verdict import (
    INCONCLUSIVE,
    REVERSED,
    SPARED,
    SUPPORTED,
    Gate,
    Null,
    Verdict,
    across_matchings,
    across_references,
    decide,
    gate_table,
    spared,
)  # fmt: skip
from attribution.errors import ConfigError
from attribution.store import NORMS_KEPT, OWN_MEAN

_INTERVAL = ["mean", "low", "high", "n", "unit"]


@dataclass(frozen=True)
class Reading:
    """The statistic in one view, with its own gates, nulls and verdict. Only the primary one gives the claim's verdict."""

    view: View
    crossover: Crossover
    estimate: Interval
    gates: list[Gate]
    nulls: dict[str, Null]
    verdict: Verdict

    @property
    def lacks_only_nulls(self) -> bool:
        """Whether nothing stands in the way of support but nulls that say nothing here, unmeasured ones first of all."""
        delta = self.crossover.claim.delta
        open_ = self.verdict.word == INCONCLUSIVE and self.estimate.low > delta
        return open_ and all(null.void or null.inside(delta) for null in self.nulls.values())


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
        parts: one row per organism.
        pairs: one row per organism and seed.
        secondary: one row per other reading of the statistic, with the word the same rule would give it.
        null_table: one row per reading and null.
        partitions: one row per organism and wrong partition.
        recruitment: cross-grafts.
        excluded: sentences.
    """

    claim: Claim
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


def evaluate(claim: Claim, frames: Frames) -> Finding:
    """Test a claim on the frames of a study.

    Args:
        claim: one of the ledger, or one with another cell or delta.
        frames: by the names of `frames.COLUMNS`: sets, probes, and where there are any grafts and failed.

    Raises:
        ConfigError: no test belongs to the claim, or it names an unknown gate, null or probe set.
        RunError: frames that lack what the claim needs.
    """
    if claim.id not in TESTS:
        raise ConfigError(f"unknown claim {claim.id!r}; expected {', '.join(TESTS)}")
    return TESTS[claim.id](claim, frames)


def crossover_finding(claim: Claim, frames: Frames) -> Finding:
    """The test of claims about a crossover; arguments and errors as `evaluate`."""
    cell = claim.cell
    study = checked(frames, cell.reference)
    primary = _read(claim, study, View(cell.probes, cell.matching, cell.reference))
    others = [_read(claim, study, view) for view in _other_views(claim, study, primary.view)]
    by_view = {reading.view: reading for reading in others}
    verdict = primary.verdict
    if by_gain := by_view.get(View(cell.probes, "gain", cell.reference)):
        verdict = across_matchings(verdict, by_gain.verdict)
    if own_mean := by_view.get(View(cell.probes, cell.matching, OWN_MEAN)):
        verdict = across_references(verdict, primary.estimate, own_mean.estimate)
    sentence = _sentence(claim, primary, verdict)
    norms = by_view.get(View(cell.probes, cell.matching, NORMS_KEPT))
    if norms and verdict.word == SUPPORTED and not norms.estimate.low > claim.delta:
        sentence += f" It rests on growth of norms: with the norms before training it is {norms.estimate}."
    sentence += _other_words(primary, others)
    return Finding(
        claim=claim,
        verdict=verdict.word,
        note=verdict.note,
        sentence=sentence,
        estimate=primary.estimate,
        nulls=primary.nulls,
        gates=gate_table(primary.gates),
        parts=primary.crossover.organisms(),
        pairs=primary.crossover.pairs,
        secondary=_secondary(others),
        null_table=_null_table([primary, *others], claim.delta),
        partitions=primary.crossover.partitions(),
        recruitment=recruitment(claim, study["grafts"]),
        excluded=_failed(study["failed"]) + [line for reading in [primary, *others] for line in reading.crossover.excluded],
    )


LEDGER: dict[str, Claim] = {claim.id: claim for claim in (BOOST,)}
TESTS: dict[str, Callable[[Claim, Frames], Finding]] = {"boost": crossover_finding}


def _read(claim: Claim, study: Mapping[str, pd.DataFrame], view: View) -> Reading:
    crossover = Crossover(claim, study, view)
    estimate, gates, nulls = crossover.estimate(), crossover.gates(), crossover.nulls()
    verdict = decide(estimate, claim.delta, nulls, gates, claim.nulls)
    verdict = spared(verdict, over_organisms(crossover.pairs, "strengthening"))
    return Reading(view, crossover, estimate, gates, nulls, verdict)


def _other_views(claim: Claim, study: Mapping[str, pd.DataFrame], primary: View) -> list[View]:
    """The other matchings, the other probes, the other references: each differs from the primary view in one thing."""
    sets, cell = study["sets"], claim.cell
    views = [View(cell.probes, matching, cell.reference) for matching in ("kl", "gain", "steps")]
    views += [View(name, cell.matching, cell.reference) for name in cell.signs if (sets["probe"] == name).any()]
    views += [View(cell.probes, cell.matching, reference) for reference in sorted(sets["reference"].unique())]
    return [view for view in dict.fromkeys(views) if view != primary]


def _sentence(claim: Claim, primary: Reading, verdict: Verdict) -> str:
    """The verdict in plain words. The four changes stand beside it, because the contrast alone hides what moved."""
    n = primary.estimate.n
    text = f"{verdict.word[0].upper()}{verdict.word[1:]}"
    if verdict.note == REVERSED:
        text += ", and reversed: each mechanism gained less in its own arm than in the other's"
    elif verdict.note == SPARED:
        text += ", as relatively spared: each mechanism lost less in its own arm than in the other's"
    elif verdict.word == SUPPORTED:
        text += ": each mechanism was strengthened more in its own arm than in the other's"
    text += f" ({verdict.why}). "
    if not n:
        return text + "No pair of arms could be matched."
    text += f"The contrast is {primary.estimate} ({claim.unit}{f'; 95 % interval over {n} organisms' if n > 1 else ''})"
    means = primary.crossover.organisms().mean(numeric_only=True)
    first, second = claim.cell.mechanisms
    arm, other = claim.cell.arms
    return text + (
        f"; mean changes of influence (nats): {first} {means['A_in_A']:+.2f} in arm {arm} and {means['A_in_B']:+.2f} in arm "
        f"{other}, {second} {means['B_in_B']:+.2f} in arm {other} and {means['B_in_A']:+.2f} in arm {arm}."
    )


def _other_words(primary: Reading, others: list[Reading]) -> str:
    """The readings to which the same rule gives another word than to the primary one: they belong beside the verdict."""
    differing = [r for r in others if r.verdict.word != primary.verdict.word]
    bare = [r for r in differing if r.lacks_only_nulls]
    words = [f"{r.verdict.word} ({r.estimate}) on {r.view.name}" for r in differing if r not in bare]
    text = f" The same rule says: {'; '.join(words)}." if words else ""
    if bare:
        named = "; ".join(f"{r.estimate} on {r.view.name}" for r in bare)
        text += f" Above δ too, but without nulls of its own, is the contrast {named}."
    return text


def _secondary(readings: list[Reading]) -> pd.DataFrame:
    columns = ["reading", "probes", "matching", "reference", *_INTERVAL, "verdict", "note", "why"]
    rows = [
        (r.view.name, r.view.probes, r.view.matching, r.view.reference, *_interval(r.estimate), r.verdict.word, r.verdict.note,
         r.verdict.why)
        for r in readings
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _null_table(readings: list[Reading], delta: float) -> pd.DataFrame:
    rows = [
        (reading.view.name, name, *_interval(null.interval), null.inside(delta), null.void)
        for reading in readings
        for name, null in reading.nulls.items()
    ]
    return pd.DataFrame(rows, columns=["reading", "null", *_INTERVAL, "inside", "void"])


def _interval(interval: Interval) -> tuple:
    return tuple(getattr(interval, name) for name in _INTERVAL)


def _failed(failed: pd.DataFrame) -> list[str]:
    return [
        f"The run of {row.model}, arm {row.arm}, seed {row.seed}, failed: {row.reason}."
        for row in failed.itertuples(index=False)
    ]


def _plain(row: Mapping) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {str(key): plain(value) for key, value in row.items()}
