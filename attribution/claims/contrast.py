"""Sums of readings of arms at matched steps, over organisms: the statistic of most claims, its gates and its nulls.

Computes what `claims.terms` declares from the frames of a study. Knows nothing about verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from attribution.claims.claim import IDENTICAL, WRONG_PARTITIONS, Matching
from attribution.claims.figures import ratio_to_error, relative_size, smallest, too_little, wrong_partitions
from attribution.claims.frames import trajectories
from attribution.claims.matching import Matched, Run, match, quantity, reading_name, value_at
from attribution.claims.statistics import EQUIVALENCE, Interval, organism_means, strict_means, t_interval
from attribution.claims.terms import Condition, ContrastClaim, Part, Term
from attribution.claims.verdict import Gate, Null
from attribution.errors import ConfigError, RunError

STATISTIC, TOP, BOTTOM = "statistic", "sum", "over"


@dataclass(frozen=True)
class Recorded:
    """What the runs of a study recorded, by run.

    Args:
        frames: as `frames.checked` returns them.
        reference: what ablated activations are replaced by.
    """

    frames: Mapping[str, pd.DataFrame]
    reference: str

    @cached_property
    def effects(self) -> dict[tuple, pd.DataFrame]:
        """Effect of ablating a set, whole and on either half of the probes, over steps: by run, probe and set."""
        rows = self.frames["sets"]
        rows = rows[rows["reference"] == self.reference]
        return trajectories(rows, ["model", "arm", "seed", "probe", "set"], ["effect", "effect_even", "effect_odd"])

    @cached_property
    def behaviours(self) -> dict[tuple, pd.DataFrame]:
        """Metric and probability over steps: by run and probe."""
        return trajectories(self.frames["probes"], ["model", "arm", "seed", "probe"], ["metric", "probability"])

    @cached_property
    def _matched(self) -> dict[Matching, dict[Run, pd.Series]]:
        return {}

    def matched_by(self, matching: Matching) -> dict[Run, pd.Series]:
        """What is matched, over steps, by run."""
        if matching not in self._matched:
            self._matched[matching] = quantity(self.frames["probes"], matching)
        return self._matched[matching]

    def gain(self, run: Run, step: float) -> float:
        """Rise of the metric on a run's own training samples, nats; NaN where it was not recorded."""
        series = self.matched_by("gain").get(run)
        return np.nan if series is None else value_at(series, step)

    def read(self, term: Term, run: Run, step: float, name: str = "") -> float:
        """A term of one run at a step, unweighted; NaN where it was not recorded.

        Args:
            term: what.
            run: whose.
            step: the matched step, fractional.
            name: of the set to read in the place of the term's own.
        """
        found = self.effects.get((*run, term.probe, name or term.set)) if term.set else self.behaviours.get((*run, term.probe))
        if found is None:
            return np.nan
        series = found["effect" if term.set else term.quantity]
        start, end = value_at(series, 0.0), value_at(series, step)
        return {"change": end - start, "start": start, "end": end}[term.when]

    def before(self, term: Term, run: Run, name: str = "") -> tuple[float, float]:
        """Influence of a term's set before training, and its split-half error: |even - odd| / 2."""
        found = self.effects.get((*run, term.probe, name or term.set))
        if found is None:
            return np.nan, np.nan
        effect, even, odd = (value_at(found[column], 0.0) for column in ("effect", "effect_even", "effect_odd"))
        return effect, abs(even - odd) / 2


@dataclass(frozen=True)
class Contrast:
    """One part of a claim on a study, matched in one way.

    Args:
        claim: whose part it is.
        part: the statistic.
        recorded: the study, with one reference.
        matching: how arms are matched; the part's own is its primary one.

    Raises:
        RunError: the study lacks an arm, or the rows of one of the part's terms.
    """

    claim: ContrastClaim
    part: Part
    recorded: Recorded
    matching: Matching

    def __post_init__(self) -> None:
        for term in (*self.part.terms, *self.part.over):
            frame = self.recorded.frames["sets" if term.set else "probes"]
            for column, wanted in (("arm", term.arm), ("probe", term.probe), *([("set", term.set)] if term.set else [])):
                if not (frame[column] == wanted).any():
                    raise RunError(f"the study has no rows of {column} {wanted!r}, on which claim {self.claim.id!r} rests")

    @property
    def name(self) -> str:
        return reading_name(self.part.name, self.matching, self.recorded.reference)

    # Rows

    @cached_property
    def _all(self) -> list[tuple[str, int, Matched]]:
        """Every model and seed that has one of the arms, with where all of them are to be read."""
        arms = self.part.arms
        keys = sorted({(model, seed) for model, arm, seed, _ in self.recorded.behaviours if arm in arms})
        return [(model, seed, self._match(tuple((model, arm, seed) for arm in arms))) for model, seed in keys]

    def _match(self, runs: tuple[Run, ...]) -> Matched:
        return match(self.recorded.matched_by(self.matching), runs, self.matching, self.claim.cell.fraction)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row per organism and seed whose arms could be matched: model, seed, every term, sum, over, steps and gains."""
        rows = []
        for model, seed, matched in self._all:
            if matched.complete:
                row = self._row(self._at(model, seed, matched))
                rows.append({"model": model, "seed": seed, **row, "target": matched.target})
        columns = ["model", "seed", *self._columns, "target"]
        return pd.DataFrame(rows, columns=columns)

    def _at(self, model: str, seed: int, matched: Matched) -> dict[str, tuple[Run, float]]:
        """Run and matched step by arm."""
        return {arm: ((model, arm, seed), step) for arm, step in zip(self.part.arms, matched.steps, strict=True)}

    @property
    def _columns(self) -> list[str]:
        arms = self.part.arms
        terms = [str(term) for term in (*self.part.terms, *self.part.over)]
        return [TOP, BOTTOM, *dict.fromkeys(terms), *(f"step of {arm}" for arm in arms), *(f"gain of {arm}" for arm in arms)]

    def _row(self, at: Mapping[str, tuple[Run, float]], sets: Mapping[str, str] | None = None) -> dict[str, float]:
        """Sum and denominator of one set of runs. `at`: run and step by arm; `sets`: what is read in a set's place."""
        named = sets or {}
        row = {}
        for term in (*self.part.terms, *self.part.over):
            row[str(term)] = self.recorded.read(term, *at[term.arm], named.get(term.set, ""))
        row[TOP] = sum(term.weight * row[str(term)] / self._scale(term, at) for term in self.part.terms)
        row[BOTTOM] = sum(term.weight * row[str(term)] for term in self.part.over) if self.part.over else 1.0
        for arm, (run, step) in at.items():
            row[f"step of {arm}"], row[f"gain of {arm}"] = step, self.recorded.gain(run, step)
        return row

    def _scale(self, term: Term, at: Mapping[str, tuple[Run, float]]) -> float:
        if not self.part.relative:
            return 1.0
        return self.recorded.before(term, at[term.arm][0])[0] or np.nan

    @cached_property
    def excluded(self) -> list[tuple[str, str]]:
        """What was left out and why: pairs of model and seed, once per arm that is the reason."""
        return [
            (f"Seed {seed} of {model}", f"arm {arm} {reason}")
            for model, seed, matched in self._all
            for arm, reason in zip(self.part.arms, matched.reasons, strict=True)
            if reason
        ]

    # Estimates

    def organisms(self) -> pd.DataFrame:
        """One row per organism, seeds averaged before the quotient is taken: model, seeds, statistic, and `pairs`' columns."""
        return self._organisms(self.pairs)

    def _organisms(self, pairs: pd.DataFrame) -> pd.DataFrame:
        means = organism_means(pairs, [column for column in pairs if column not in ("model", "seed")]).reset_index()
        means.insert(1, "seeds", means["model"].map(pairs["model"].value_counts()).astype("int64"))
        means.insert(2, STATISTIC, means[TOP] / means[BOTTOM].where(means[BOTTOM] != 0))
        return means

    def estimate(self) -> Interval:
        """The statistic over organisms: of 95 %, or of 90 % where the part predicts no difference."""
        level = EQUIVALENCE if self.part.prediction == "none" else 0.95
        return t_interval(self.organisms()[STATISTIC], level=level)

    # Gates

    def figures(self) -> dict[str, Callable[[], tuple[float, str]]]:
        """What gates may name, each with where its worst value was found."""
        return {
            "organisms": lambda: (float(len(self.organisms())), ""),
            "noise": self._noise,
            "gain": lambda: smallest(self.organisms(), [f"gain of {arm}" for arm in self.part.arms]),
        }

    def _noise(self) -> tuple[float, str]:
        """The smallest influence before training in units of its error, over all terms that read one."""
        terms = [term for term in (*self.part.terms, *self.part.over) if term.set]
        rows = []
        for row in self.pairs.itertuples():
            for term in terms:
                before, error = self.recorded.before(term, (str(row.model), term.arm, int(row.seed)))
                rows.append({"model": row.model, "term": str(term), "before": before, "error": error})
        if not rows:
            return np.inf if not terms else np.nan, ""
        means = strict_means(pd.DataFrame(rows), ["model", "term"], ["before", "error"]).reset_index()
        means["ratio"] = [ratio_to_error(*each) for each in zip(means["before"], means["error"], strict=True)]
        return smallest(means, ["ratio"])

    # Nulls

    def nulls(self) -> dict[str, Null]:
        """The nulls that the part declares, in its order."""
        made = {WRONG_PARTITIONS: self._wrong_partitions, IDENTICAL: self._identical}
        return {name: made[name]() if name in made else self._other_arms(name) for name in self.part.nulls}

    def partitions(self) -> pd.DataFrame:
        """The statistic of every wrong partition in every organism, influences in units of the real sets'.

        Columns: model, partition, statistic, size (mean absolute influence before of its sets, in the same units).
        """
        terms = [term for term in self.part.terms if term.set]
        mechanisms = list(dict.fromkeys(term.set for term in terms))
        rows = []
        for partition in wrong_partitions(self.recorded.frames["sets"]["set"].unique(), mechanisms) if mechanisms else ():
            sets = {name: f"{partition} {name}" for name in mechanisms}
            found = []
            for model, seed, matched in self._all:
                if matched.complete:
                    at = self._at(model, seed, matched)
                    wrong, real = (
                        [self.recorded.before(term, at[term.arm][0], named.get(term.set, ""))[0] for term in terms]
                        for named in (sets, {})
                    )
                    found.append({"model": model, "seed": seed, **self._row(at, sets), "size": relative_size(wrong, real)})
            means = self._organisms(pd.DataFrame(found, columns=["model", "seed", *self._columns, "size"]))
            rows.append(means[["model", STATISTIC, "size"]].assign(partition=partition))
        columns = ["model", "partition", STATISTIC, "size"]
        return pd.concat(rows, ignore_index=True)[columns] if rows else pd.DataFrame(columns=columns)

    def _wrong_partitions(self) -> Null:
        rows = self.partitions()
        models = self.pairs["model"].unique()
        means = rows.groupby("model")[[STATISTIC, "size"]].agg(lambda values: values.mean(skipna=False)).reindex(models)
        interval = t_interval(means[STATISTIC].astype("float64"), unit="organism, mean over its wrong partitions")
        counts = rows["model"].value_counts().reindex(models, fill_value=0)
        count = int(counts.min()) if len(counts) else 0
        cell = self.claim.cell
        size = float(means["size"].astype("float64").min(skipna=False)) if len(means) else np.nan
        return Null(interval, too_little(size, count, "wrong partitions", cell.partitions, cell.void_below))

    def _identical(self) -> Null:
        """Disjoint pairs of seeds of one arm: one in the place of the part's first arm, the other in that of all others."""
        arms, rows = self.part.arms, []
        for model in self.pairs["model"].unique():
            for arm in arms:
                seeds = sorted({run[2] for run in self.recorded.matched_by(self.matching) if run[:2] == (model, arm)})
                for first, second in zip(seeds[::2], seeds[1::2], strict=False):
                    matched = self._match(((model, arm, first), (model, arm, second)))
                    if matched.complete:
                        rows.append({"model": model, TOP: self._between(model, arm, (first, second), matched.steps)})
        scale = self.organisms().set_index("model")[BOTTOM] if self.part.over else None
        values = pd.DataFrame(rows, columns=["model", TOP]).groupby("model")[TOP].agg(lambda each: each.mean(skipna=False))
        interval = t_interval(
            values if scale is None else values / scale.reindex(values.index),
            unit=f"organism, {len(rows)} pairs of runs that share an arm",
        )
        return Null(interval, "" if rows else "it needs two seeds of an arm that can be matched")

    def _between(self, model: str, arm: str, seeds: Sequence[int], steps: Sequence[float]) -> float:
        """The sum with one run of an arm for the terms of the first arm, and another for those of all others."""
        total = 0.0
        for term in self.part.terms:
            place = 0 if term.arm == self.part.arms[0] else 1
            run = (model, arm, seeds[place])
            scale = (self.recorded.before(term, run)[0] or np.nan) if self.part.relative else 1.0
            total += term.weight * self.recorded.read(term, run, steps[place]) / scale
        return total

    def _other_arms(self, name: str) -> Null:
        """The same statistic of other arms."""
        if name not in self.claim.null_definitions:
            raise ConfigError(f"null {name!r} of claim {self.claim.id!r} is not defined")
        arms = self.claim.null_definitions[name].arms
        part = renamed(self.part, arms)
        missing = sorted(set(part.arms) - set(self.recorded.frames["probes"]["arm"]))
        if missing:
            return Null(t_interval(()), f"arm {missing[0]!r} was not run")
        other = Contrast(self.claim, part, self.recorded, self.matching)
        return Null(other.estimate(), "" if len(other.pairs) else "none of its arms could be matched")


def renamed(part: Part, arms: Mapping[str, str]) -> Part:
    """The same statistic with some arms in the place of others."""

    def swapped(terms: Sequence[Term]) -> tuple[Term, ...]:
        return tuple(term.model_copy(update={"arm": arms.get(term.arm, term.arm)}) for term in terms)

    return part.model_copy(update={"terms": swapped(part.terms), "over": swapped(part.over)})


def gates(claim: ContrastClaim, contrasts: Sequence[Contrast], recorded: Recorded) -> list[Gate]:
    """A claim's gates, each with its worst figure over all parts and where it was found. Raises ConfigError: an unknown one."""
    found = []
    for gate in claim.gates:
        if isinstance(gate, Condition):
            part = Part(
                name=gate.name, statistic=gate.meaning, unit="", terms=gate.terms, relative=gate.relative, delta=1,
                matching=gate.matching,
            )  # fmt: skip
            found.append(Gate(gate, *smallest(Contrast(claim, part, recorded, gate.matching).organisms(), [STATISTIC])))
            continue
        figures = [contrast.figures() for contrast in contrasts]
        if gate.name not in figures[0]:
            raise ConfigError(f"unknown gate {gate.name!r} of claim {claim.id!r}; expected {', '.join(figures[0])}")
        values = [each[gate.name]() for each in figures]
        found.append(Gate(gate, *min(values, key=lambda pair: -np.inf if np.isnan(pair[0]) else pair[0])))
    return found
