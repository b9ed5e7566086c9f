"""The ledger of claims as text: what was declared, and what a study said of it. Imports no torch."""

from __future__ import annotations

import textwrap

from attribution.claims import LEDGER
from attribution.errors import ConfigError
from attribution.reports.quantities import signed
from attribution.reports.study_declared import declared
from attribution.reports.study_tables import Finding, number, read_study

WIDTH = 100


def ledger(claim: str = "", study: str = "") -> str:
    """Every claim, or one as it was declared.

    Args:
        claim: id; all if empty.
        study: directory of a study whose verdicts are printed too; none if empty.

    Raises:
        ConfigError: an unknown claim.
        RunError: there is no study, or a file of it is damaged.
    """
    if claim and claim not in LEDGER:
        raise ConfigError(f"unknown claim {claim!r}; expected {', '.join(LEDGER)}")
    verdicts, reasons = _judged(study) if study else ({}, {})
    names = [claim] if claim else list(LEDGER)
    return "\n\n".join(_told(name, verdicts.get(name), reasons.get(name, ""), whole=bool(claim)) for name in names)


def _told(name: str, found: Finding | None, reason: str, *, whole: bool) -> str:
    claim = LEDGER[name]
    this = Finding(claim.model_dump(mode="json"), claim.hash, {})
    head = f"{name}  ({claim.cell.world}; δ {number(claim.delta)} {claim.unit}; {claim.hash})"
    lines = [head, *_wrapped(f"“{claim.statement}”")]
    if found is not None:
        of = "" if found.hash == claim.hash else f" It was judged as declared otherwise (hash {found.hash})."
        lines += _wrapped(f"{found.verdict.get('sentence', '')}{of}")
        lines += _wrapped(_by_model(found))
    elif reason:
        lines += _wrapped(reason)
    if whole:
        told = [f"{key}: {value}" for key, value in declared(this).rows]
        told += [f"gate: {gate.meaning} {gate.relation} {gate.value:g}" for gate in claim.gates]
        told += [f"exclusion: {line}" for line in claim.exclusions]
        lines += [line for each in told for line in _wrapped(each)]
    return "\n".join(lines)


def _by_model(found: Finding) -> str:
    """What the statistic is in every model, and which are left out; "" where it is no figure of single models."""
    parts = found.table("parts")
    if found.statistic not in parts or "model" not in parts:
        return ""
    if "part" in parts:
        parts = parts[parts["part"] == parts["part"].iloc[0]]
    told = [f"{row['model']} {signed(row[found.statistic])}" for row in parts.to_dict("records")]
    left = [str(row["sentence"]) for row in found.rows.get("excluded") or [] if "left out" in str(row["sentence"])]
    return " ".join([f"By model: {', '.join(told)}.", *left]) if told else ""


def _judged(study: str) -> tuple[dict[str, Finding], dict[str, str]]:
    """By claim: what the study found, and why it was not judged."""
    record = read_study(study)
    return {found.name: found for found in record.findings}, record.told.get("not_judged") or {}


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
