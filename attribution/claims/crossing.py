"""The test of claims about a crossover: from frames to a finding, with every other reading of the statistic beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from attribution.claims.claim import Claim
from attribution.claims.crossover import Crossover, View
from attribution.claims.finding import INTERVAL, Finding, failed_runs, interval_row, left_out
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
from attribution.store import NORMS_KEPT, OWN_MEAN


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
        excluded=failed_runs(study["failed"])
        + left_out((each.view.name, each.crossover.excluded) for each in [primary, *others]),
    )


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
    columns = ["reading", "probes", "matching", "reference", *INTERVAL, "verdict", "note", "why"]
    rows = [
        (r.view.name, r.view.probes, r.view.matching, r.view.reference, *interval_row(r.estimate), r.verdict.word,
         r.verdict.note, r.verdict.why)
        for r in readings
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _null_table(readings: list[Reading], delta: float) -> pd.DataFrame:
    rows = [
        (reading.view.name, name, *interval_row(null.interval), null.inside(delta), null.void)
        for reading in readings
        for name, null in reading.nulls.items()
    ]
    return pd.DataFrame(rows, columns=["reading", "null", *INTERVAL, "inside", "void"])
