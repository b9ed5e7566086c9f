"""The crossover of two mechanisms and two arms: the scale-free contrast, its gates and its nulls, from frames.

Influence I_S = sign · effect of ablating S, the sign from the claim; strengthening dI_S(arm) = I_S at the matched step - I_S
at step 0. The contrast of a pair of arms (one model, one seed) is

    [dI_A(arm A) - dI_A(arm B)] / I_A(0) + [dI_B(arm B) - dI_B(arm A)] / I_B(0)

If training only rescaled the logits by 1 + s, every dI_S would be s · I_S(0), and the contrast 0. The split-half error of an
influence is |even - odd| / 2 over the two halves of the probe set: the standard error of the mean of two halves, from those
two. Wrong partitions, the unrouted control and identical arms are read by the same function, with other names put in.

Knows nothing about verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from attribution.claims.boost import UNROUTED
from attribution.claims.claim import IDENTICAL, WRONG_PARTITIONS, Claim, Matching
from attribution.claims.figures import ratio_to_error, relative_size, smallest, too_little, wrong_partitions
from attribution.claims.frames import trajectories
from attribution.claims.matching import Matched, Run, match, quantity, reading_name, value_at
from attribution.claims.statistics import Interval, organism_means, over_organisms, t_interval
from attribution.claims.verdict import Gate, Null
from attribution.errors import ConfigError, RunError

LR0 = "lr0"  # the arm with learning rate 0
BASE_ONLY = "training seed, this base only"
# One row per pair. A and B: the claim's first and second mechanism and arm, whatever their names. Influences in nats.
DELTAS = ["A_in_A", "A_in_B", "B_in_A", "B_in_B"]  # strengthening of a mechanism in an arm
BEFORE = ["before_A", "before_B", "error_A", "error_B"]  # influence at step 0, mean of the two runs, and its split-half error
STEPS = ["step_A", "step_B", "target", "gain_A", "gain_B"]  # matched steps, what was matched, training gain there
COLUMNS = ["model", "seed", *DELTAS, *BEFORE, "contrast", "strengthening", *STEPS]
MEASURED = COLUMNS[2:]


@dataclass(frozen=True)
class View:
    """One way to read a study: which probes, matched by what, with which reference."""

    probes: str
    matching: Matching
    reference: str

    @property
    def name(self) -> str:
        return reading_name(f"{self.probes} probes", self.matching, self.reference)


@dataclass(frozen=True)
class Crossover:
    """A study, seen in one view.

    Args:
        claim: whose cell names arms, mechanisms, signs and control.
        frames: as `frames.checked` returns them.
        view: the probes, matching and reference.

    Raises:
        RunError: the study lacks an arm, a mechanism, or the probes of this view.
        ConfigError: the claim has no signs for these probes.
    """

    claim: Claim
    frames: Mapping[str, pd.DataFrame]
    view: View

    def __post_init__(self) -> None:
        cell, probes = self.claim.cell, self.view.probes
        if probes not in cell.signs:
            raise ConfigError(f"claim {self.claim.id!r} has no signs for probes {probes!r}; expected {', '.join(cell.signs)}")
        rows = self._rows
        for column, names in (("arm", cell.arms), ("set", cell.mechanisms)):
            missing = set(names) - set(rows.loc[rows["model"] != cell.control, column])
            if missing:
                raise RunError(
                    f"the study has no rows of {column} {min(missing)!r} on probes {probes!r} with reference "
                    f"{self.view.reference!r}; run that arm with these probes and mechanisms"
                )

    @cached_property
    def _rows(self) -> pd.DataFrame:
        sets, cell = self.frames["sets"], self.claim.cell
        sets = sets[sets["reference"] == self.view.reference]
        first, second = cell.read_on(self.view.probes)
        if first == second:
            return sets[sets["probe"] == first]
        whose = [  # mechanisms, and wrong partitions in the place of either
            (sets["probe"] == probe) & sets["set"].str.endswith(name)
            for probe, name in zip((first, second), cell.mechanisms, strict=True)
        ]
        return sets[whose[0] | whose[1]]

    @cached_property
    def _effects(self) -> dict[tuple, pd.DataFrame]:
        return trajectories(self._rows, ["model", "arm", "seed", "set"], ["effect", "effect_even", "effect_odd"])

    @cached_property
    def _matched_by(self) -> dict[Run, pd.Series]:
        return quantity(self.frames["probes"], self.view.matching)

    @cached_property
    def _gain(self) -> dict[Run, pd.Series]:
        return quantity(self.frames["probes"], "gain")

    @cached_property
    def _all(self) -> list[tuple[str, int, tuple[Run, Run], Matched]]:
        """Every model and seed of the two arms, with where they are to be read."""
        first, second = self.claim.cell.arms
        runs = {key[:3] for key in self._effects} | set(self._matched_by)
        keys = sorted({(model, seed) for model, arm, seed in runs if arm in (first, second)})
        pairs = [(model, seed, ((model, first, seed), (model, second, seed))) for model, seed in keys]
        return [(model, seed, runs, self._match(runs)) for model, seed, runs in pairs]

    def _match(self, runs: tuple[Run, Run]) -> Matched:
        found = match(self._matched_by, runs, self.view.matching, self.claim.cell.fraction)
        recorded = {key[:3] for key in self._effects}
        lost = tuple(
            reason or ("" if run in recorded else "was not recorded") for run, reason in zip(runs, found.reasons, strict=True)
        )
        return Matched(found.target, found.steps, lost)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row per organism and seed whose arms could be matched: `COLUMNS`."""
        return self._table(self.claim.cell.mechanisms, control=False)

    @cached_property
    def excluded(self) -> list[tuple[str, str]]:
        """What was left out and why: organisms, and pairs once per arm that is the reason."""
        pairs = [
            (f"Seed {seed} of {model}", f"arm {run[1]} {reason}")
            for model, seed, runs, matched in self._all
            for run, reason in zip(runs, matched.reasons, strict=True)
            if reason
        ]
        return [*self._unfit.items(), *pairs]

    @cached_property
    def _unfit(self) -> dict[str, str]:
        """Organisms that lack what the claim needs before training, each with the figures that show it."""
        if not self.claim.needed:
            return {}
        figures = {"noise": self._noise, "balance": self._balance}
        unknown = [need.name for need in self.claim.needed if need.name not in figures]
        if unknown:
            raise ConfigError(f"unknown need {unknown[0]!r} of claim {self.claim.id!r}; expected {', '.join(figures)}")
        every = organism_means(self._measured(self.claim.cell.mechanisms, control=False), BEFORE).reset_index()
        found = {}
        for model, rows in every.groupby("model", sort=False):
            values = {need: figures[need.name](rows)[0] for need in self.claim.needed}
            lacks = [f"{need.meaning} is {value:.3g}" for need, value in values.items() if not need.holds(value)]
            if lacks:
                found[str(model)] = " and ".join(lacks)
        return found

    def _table(self, sets: tuple[str, str], *, control: bool) -> pd.DataFrame:
        rows = self._measured(sets, control=control)
        return rows[~rows["model"].isin(self._unfit)].reset_index(drop=True)

    def _measured(self, sets: tuple[str, str], *, control: bool) -> pd.DataFrame:
        rows = [
            self._row(model, seed, runs, matched, sets)
            for model, seed, runs, matched in self._all
            if matched.complete and (model == self.claim.cell.control) == control
        ]
        return pd.DataFrame(rows, columns=COLUMNS)

    def _row(self, model: str, seed: int, runs: tuple[Run, Run], matched: Matched, sets: tuple[str, str]) -> dict:
        """The four strengthenings of two sets in two runs, and the contrast; NaN where something was not recorded."""
        row: dict = {"model": model, "seed": seed, "target": matched.target}
        for name, components, sign in zip("AB", sets, self.claim.cell.signs[self.view.probes], strict=True):
            befores, errors = [], []
            for arm, run, step in zip("AB", runs, matched.steps, strict=True):
                effects = self._effects.get((*run, components))
                start, even, odd = (
                    (np.nan,) * 3 if effects is None else (sign * value_at(effects[column], 0.0) for column in effects)
                )
                now = np.nan if effects is None else sign * value_at(effects["effect"], step)
                row[f"{name}_in_{arm}"] = now - start
                befores.append(start)
                errors.append(abs(even - odd) / 2)
            row[f"before_{name}"], row[f"error_{name}"] = sum(befores) / 2, sum(errors) / 2
        for arm, run, step in zip("AB", runs, matched.steps, strict=True):
            row[f"step_{arm}"] = step
            row[f"gain_{arm}"] = value_at(self._gain[run], step) if run in self._gain else np.nan
        row["contrast"] = contrast(row)
        row["strengthening"] = contrast({**row, "A_in_B": _no_loss(row["A_in_B"]), "B_in_A": _no_loss(row["B_in_A"])})
        return row

    def estimate(self) -> Interval:
        """The contrast over organisms."""
        return over_organisms(self.pairs, "contrast")

    def organisms(self) -> pd.DataFrame:
        """One row per organism, seeds averaged: model, seeds, and the measured columns of `pairs`."""
        means = organism_means(self.pairs, MEASURED).reset_index()
        means.insert(1, "seeds", means["model"].map(self.pairs["model"].value_counts()).astype("int64"))
        return means

    # Gates

    def gates(self) -> list[Gate]:
        """The claim's gates, each with its worst figure and where it was found. Raises ConfigError: an unknown one."""
        figures: dict[str, Callable[[], tuple[float, str]]] = {
            "organisms": lambda: (float(len(self.organisms())), ""),
            "noise": lambda: self._noise(self.organisms()),
            "balance": lambda: self._balance(self.organisms()),
            "lr0": self._lr0,
            "gain": lambda: smallest(self.pairs, ["gain_A", "gain_B"]),
            "dissociated": self._dissociated,
        }
        unknown = [gate.name for gate in self.claim.gates if gate.name not in figures]
        if unknown:
            raise ConfigError(f"unknown gate {unknown[0]!r} of claim {self.claim.id!r}; expected {', '.join(figures)}")
        return [Gate(threshold, *figures[threshold.name]()) for threshold in self.claim.gates]

    @staticmethod
    def _noise(means: pd.DataFrame) -> tuple[float, str]:
        ratios = {
            name: [ratio_to_error(*each) for each in zip(means[f"before_{name}"], means[f"error_{name}"], strict=True)]
            for name in "AB"
        }
        return smallest(means.assign(**ratios), ["A", "B"])

    @staticmethod
    def _balance(means: pd.DataFrame) -> tuple[float, str]:
        ratios = [
            max(a, b) / min(a, b) if min(a, b) > 0 else np.nan
            for a, b in zip(means["before_A"], means["before_B"], strict=True)
        ]
        value, where = smallest(means.assign(ratio=[-ratio for ratio in ratios]), ["ratio"])
        return -value, where

    def _dissociated(self) -> tuple[float, str]:
        """Whether the two mechanisms are dissociated in every organism, by `separations`; NaN where it is not said."""
        told = self.frames["separations"]
        told = told[told["pair"] == " | ".join(sorted(self.claim.cell.mechanisms))]
        found = self.organisms()[["model"]].merge(told, on="model", how="left")
        return smallest(found, ["dissociated"])

    def _lr0(self) -> tuple[float, str]:
        """Largest change of any influence at any step of the arm with learning rate 0: it must be exactly 0."""
        largest, where = np.nan, ""
        for (model, arm, _, _), effects in self._effects.items():
            if arm == LR0:
                change = float(np.abs((effects["effect"] - value_at(effects["effect"], 0.0)).to_numpy()).max())
                if math.isnan(change):
                    return np.nan, model
                if not change <= largest:
                    largest, where = change, model
        return largest, where

    # Nulls

    def nulls(self) -> dict[str, Null]:
        """The nulls that the claim declares, in its order. Raises ConfigError: an unknown one."""
        known = {WRONG_PARTITIONS: self._wrong_partitions, UNROUTED: self._unrouted, IDENTICAL: self._identical}
        unknown = [name for name in self.claim.nulls if name not in known]
        if unknown:
            raise ConfigError(f"unknown null {unknown[0]!r} of claim {self.claim.id!r}; expected {', '.join(known)}")
        return {name: known[name]() for name in self.claim.nulls}

    def partitions(self) -> pd.DataFrame:
        """The contrast of every wrong partition in every organism, in units of the real mechanisms' influences.

        Columns: model, partition, contrast, before_A, before_B (of the wrong sets, nats), size (mean of their absolute
        influences, each as a fraction of the real one's).
        """
        real = organism_means(self.pairs, ["before_A", "before_B"])
        rows = []
        for partition, sets in self._wrong_sets().items():
            for model, values in organism_means(self._table(sets, control=False), [*DELTAS, "before_A", "before_B"]).iterrows():
                scale = real.loc[str(model)]
                rows.append({
                    "model": model, "partition": partition, "contrast": contrast({**values, **scale}),
                    "before_A": values["before_A"], "before_B": values["before_B"], "size": _size(values, scale),
                })  # fmt: skip
        return pd.DataFrame(rows, columns=["model", "partition", "contrast", "before_A", "before_B", "size"])

    def _wrong_sets(self) -> dict[str, tuple[str, str]]:
        first, second = self.claim.cell.mechanisms
        names = wrong_partitions(self._rows["set"].unique(), self.claim.cell.mechanisms)
        return {name: (f"{name} {first}", f"{name} {second}") for name in names}

    def _wrong_partitions(self) -> Null:
        rows = self.partitions()
        means = rows.groupby("model", sort=False)[["contrast", "size"]].agg(lambda values: values.mean(skipna=False))
        means = means.reindex(self.pairs["model"].unique())
        interval = t_interval(means["contrast"], unit="organism, mean over its wrong partitions")
        counts = rows["model"].value_counts().reindex(means.index, fill_value=0)
        return Null(
            interval, self._void(means["size"].min(skipna=False), int(counts.min()) if len(counts) else 0, "wrong partitions")
        )

    def _unrouted(self) -> Null:
        """The control's contrast, meaned over partitions."""
        rows = self.controls()
        if rows.empty:
            return Null(t_interval((), unit=BASE_ONLY), "the control has no matched pair of arms")
        means = rows.groupby("seed")[["contrast", "size"]].agg(lambda values: values.mean(skipna=False))
        count = rows["partition"].nunique()
        interval = t_interval(means["contrast"], unit=f"{BASE_ONLY}, mean over {count} partitions")
        return Null(interval, self._void(means["size"].min(skipna=False), count, "partitions of the control"))

    def controls(self) -> pd.DataFrame:
        """The contrast of the control, whose halves are no more than one partition among others.

        Columns model, seed, partition, contrast and size, both in units of the organisms' mean influences before.
        """
        sets = {"halves": self.claim.cell.mechanisms, **self._wrong_sets()}
        scale = self.organisms()[["before_A", "before_B"]].mean(skipna=False)
        rows = [
            (row["model"], row["seed"], name, contrast({**row, **scale}), _size(row, scale))
            for name, pair in sets.items()
            for row in self._table(pair, control=True).to_dict("records")
        ]
        return pd.DataFrame(rows, columns=["model", "seed", "partition", "contrast", "size"])

    def _void(self, size: float, count: int, which: str) -> str:
        return too_little(size, count, which, self.claim.cell.partitions, self.claim.cell.void_below)

    def alike(self) -> pd.DataFrame:
        """Disjoint pairs of seeds of one arm, as if the first were arm A and the second arm B: `COLUMNS`."""
        rows = []
        for model in self.pairs["model"].unique():
            for arm in self.claim.cell.arms:
                seeds = sorted(run[2] for run in self._matched_by if run[:2] == (model, arm))
                for first, second in zip(seeds[::2], seeds[1::2], strict=False):
                    runs = ((model, arm, first), (model, arm, second))
                    matched = self._match(runs)
                    if matched.complete:
                        rows.append(self._row(model, first, runs, matched, self.claim.cell.mechanisms))
        return pd.DataFrame(rows, columns=COLUMNS)

    def _identical(self) -> Null:
        rows = self.alike()
        interval = over_organisms(rows, "contrast")
        unit = f"organism, {len(rows)} pairs of runs that share an arm"
        void = "" if len(rows) else "it needs two seeds of an arm that can be matched"
        return Null(Interval(interval.mean, interval.low, interval.high, interval.n, unit), void)


def contrast(row: Mapping[str, float]) -> float:
    """[dI_A(arm A) - dI_A(arm B)] / I_A(0) + [dI_B(arm B) - dI_B(arm A)] / I_B(0); NaN where an influence before is 0."""
    if not (row["before_A"] and row["before_B"]):
        return np.nan
    return (row["A_in_A"] - row["A_in_B"]) / row["before_A"] + (row["B_in_B"] - row["B_in_A"]) / row["before_B"]


def _size(before: Mapping[str, float] | pd.Series, real: Mapping[str, float] | pd.Series) -> float:
    """Mean of two absolute influences, each as a fraction of the real mechanism's."""
    return relative_size(*([values["before_A"], values["before_B"]] for values in (before, real)))


def _no_loss(change: float) -> float:
    """A weakening counted as no change; NaN stays NaN."""
    return 0.0 if change < 0 else change
