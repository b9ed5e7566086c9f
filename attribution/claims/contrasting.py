"""The test of claims that are sums of readings: from frames to a finding, with every other reading of each part beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from attribution.claims.claim import Matching
from attribution.claims.contrast import Contrast, Recorded, gates
from attribution.claims.finding import INTERVAL, Finding, failed_runs, interval_row, left_out
from attribution.claims.frames import Frames, checked
from attribution.claims.recruitment import COLUMNS as RECRUITMENT
from attribution.claims.statistics import Interval
from attribution.claims.terms import ContrastClaim, Part
from attribution.claims.verdict import (
    DEPENDS,
    NOT_TESTABLE,
    REVERSED,
    Gate,
    Null,
    Verdict,
    across_matchings,
    across_references,
    conjunction,
    decide,
    equivalent,
    gate_table,
)  # fmt: skip
from attribution.store import OWN_MEAN


@dataclass(frozen=True)
class Reading:
    """One part in one way of matching, with one reference."""

    contrast: Contrast
    estimate: Interval
    nulls: dict[str, Null]
    verdict: Verdict


def contrast_finding(claim: ContrastClaim, frames: Frames) -> Finding:
    """The test; arguments and errors as `evaluate`."""
    influences = any(term.set for part in claim.parts for term in (*part.terms, *part.over))
    study = checked(frames, claim.cell.reference, ("sets", "probes") if influences else ("probes",))
    recorded = Recorded(study, claim.cell.reference)
    primaries = [Contrast(claim, part, recorded, part.matching) for part in claim.parts]
    found_gates = gates(claim, primaries, recorded)
    readings = [_read(contrast, found_gates) for contrast in primaries]
    others = {reading.contrast.part.name: _others(reading, study, found_gates) for reading in readings}
    verdicts = {reading.contrast.part.name: _across(reading, others[reading.contrast.part.name]) for reading in readings}
    first = readings[0]
    verdict = verdicts[first.contrast.part.name] if len(verdicts) == 1 else _all(verdicts)
    further = [_read(Contrast(claim, part, recorded, part.matching), found_gates) for part in claim.beside]
    every = [each for reading in readings for each in (reading, *others[reading.contrast.part.name])]
    return Finding(
        claim=claim,
        verdict=verdict.word,
        note=verdict.note,
        sentence=_sentence(verdict, readings, others),
        estimate=first.estimate,
        nulls=first.nulls,
        gates=gate_table(found_gates),
        parts=_of_parts({reading.contrast.part.name: reading.contrast.organisms() for reading in readings}),
        pairs=_of_parts({reading.contrast.part.name: reading.contrast.pairs for reading in readings}),
        secondary=_secondary(readings, others, verdicts, further),
        null_table=_null_table([*every, *further]),
        partitions=_of_parts({reading.contrast.part.name: reading.contrast.partitions() for reading in readings}),
        recruitment=pd.DataFrame(columns=RECRUITMENT),
        excluded=failed_runs(study["failed"]) + left_out((each.contrast.name, each.contrast.excluded) for each in every),
    )


def _read(contrast: Contrast, found: list[Gate]) -> Reading:
    part, estimate, nulls = contrast.part, contrast.estimate(), contrast.nulls()
    if part.prediction == "none":
        return Reading(contrast, estimate, nulls, equivalent(estimate, part.delta, found))
    return Reading(contrast, estimate, nulls, decide(estimate, part.delta, nulls, found, part.nulls))


def _others(primary: Reading, study: Mapping[str, pd.DataFrame], found: list[Gate]) -> list[Reading]:
    """The same part matched otherwise, and with every other reference that was measured of its sets."""
    contrast = primary.contrast
    ways: tuple[Matching, ...] = ("kl", "gain", "steps")
    readings = [Contrast(contrast.claim, contrast.part, contrast.recorded, way) for way in ways if way != contrast.matching]
    if any(term.set for term in contrast.part.terms):
        for reference in sorted(set(study["sets"]["reference"]) - {contrast.recorded.reference}):
            other = Recorded(study, reference)
            if _measured(contrast.part, other):
                readings.append(Contrast(contrast.claim, contrast.part, other, contrast.matching))
    return [_read(each, found) for each in readings]


def _measured(part: Part, recorded: Recorded) -> bool:
    """Whether every set of a part was read with this reference at all."""
    read = {key[3:] for key in recorded.effects}
    return all((term.probe, term.set) in read for term in (*part.terms, *part.over) if term.set)


def _across(primary: Reading, others: list[Reading]) -> Verdict:
    """The verdict of a part, as evidence needs it: not another by gain, and of one sign with the own-model mean."""
    verdict = primary.verdict
    for other in others:
        if other.contrast.matching == "gain" and primary.contrast.matching == "kl":
            verdict = across_matchings(verdict, other.verdict)
        if other.contrast.recorded.reference == OWN_MEAN and primary.contrast.part.prediction == "greater":
            verdict = across_references(verdict, primary.estimate, other.estimate)
    return verdict


def _all(verdicts: Mapping[str, Verdict]) -> Verdict:
    found = conjunction(verdicts)
    if found.word == NOT_TESTABLE:
        why = next(part.why for part in verdicts.values() if part.word == NOT_TESTABLE)
        return Verdict(found.word, why)
    return found


def _sentence(verdict: Verdict, readings: list[Reading], others: Mapping[str, list[Reading]]) -> str:
    """The verdict in plain words, then every part with its figures and the readings to which the rule gives another word."""
    text = f"{verdict.word[0].upper()}{verdict.word[1:]}{', and reversed' if verdict.note == REVERSED else ''} ({verdict.why})."
    for reading in readings:
        part, estimate = reading.contrast.part, reading.estimate
        if not estimate.n:
            text += f" {part.statistic}: no arms could be matched."
            continue
        level = f"{estimate.level:.0%}".replace("%", " %")
        over = f"; {level} interval over {estimate.n} organisms" if estimate.n > 1 else ""
        text += f" {part.statistic}: {estimate} ({part.unit}{over}; δ {part.delta:g})."
        differing = [each for each in others[part.name] if each.verdict.word != reading.verdict.word]
        if differing and verdict.word not in (NOT_TESTABLE, DEPENDS):
            words = "; ".join(f"{each.verdict.word} ({each.estimate}), {each.contrast.name}" for each in differing)
            text += f" The same rule says: {words}."
    return text


def _of_parts(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The tables of all parts, one below the other, with the part's name where there are several."""
    if len(tables) == 1:
        return next(iter(tables.values()))
    named = [table.assign(part=name)[["part", *table.columns]] for name, table in tables.items() if len(table)]
    return pd.concat(named, ignore_index=True) if named else pd.DataFrame(columns=["part"])


def _secondary(
    readings: list[Reading], others: Mapping[str, list[Reading]], verdicts: Mapping[str, Verdict], further: list[Reading]
) -> pd.DataFrame:
    """Every reading but the primary one; the parts of a conjunction each with their own word, and what is read beside."""
    rows = []
    for reading in readings:
        name = reading.contrast.part.name
        several = [(reading, verdicts[name])] if len(readings) > 1 else []
        for each, verdict in [*several, *((other, other.verdict) for other in others[name])]:
            where = (each.contrast.name, each.contrast.matching, each.contrast.recorded.reference)
            rows.append((*where, *interval_row(each.estimate), verdict.word, verdict.note, verdict.why))
    for each in further:
        where = (f"beside: {each.contrast.name}", each.contrast.matching, each.contrast.recorded.reference)
        rows.append((*where, *interval_row(each.estimate), each.verdict.word, each.verdict.note, each.verdict.why))
    return pd.DataFrame(rows, columns=["reading", "matching", "reference", *INTERVAL, "verdict", "note", "why"])


def _null_table(readings: list[Reading]) -> pd.DataFrame:
    rows = [
        (reading.contrast.name, name, *interval_row(null.interval), null.inside(reading.contrast.part.delta), null.void)
        for reading in readings
        for name, null in reading.nulls.items()
    ]
    return pd.DataFrame(rows, columns=["reading", "null", *INTERVAL, "inside", "void"])
