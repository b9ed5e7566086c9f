"""How much of what training strengthens is decided by the context it trains in, and how much by which model is trained.

Outcome of a run: which of two mechanisms grew, [dI_A / I_A(before)] - [dI_B / I_B(before)], read where all arms of its base
and seed have gained equally much on what they trained. Bases x contexts x order seeds is a balanced two-way layout; the share
of a factor is its sum of squares over the total one (eta squared). Statistic: share of base and of context x base, less that
of context; its interval over bases is a jackknife's, from pseudo-values.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from attribution.claims.claim import MeasuredClaim
from attribution.claims.contrast import Contrast, Recorded
from attribution.claims.finding import left_out
from attribution.claims.frames import Frames, checked
from attribution.claims.measured import STATISTIC, Measured
from attribution.claims.statistics import pseudo_values
from attribution.claims.terms import ContrastClaim, Part, Place, Term

SOURCES = ("context", "base", "context x base", "order")


def control(claim: MeasuredClaim, frames: Frames, mechanisms: Mapping[str, str]) -> Measured:
    """What the claim's statistic is measured from.

    Args:
        claim: whose cell names the contexts.
        frames: sets and probes.
        mechanisms: the two whose growth is compared, each with the probe set that it is read on.

    Raises:
        RunError: the study lacks an arm, a mechanism or the probe set.
    """
    outcomes, excluded = _outcomes(claim, frames, mechanisms)
    whole = _balanced(outcomes)
    shares = _shares(whole)
    bases = sorted(whole["model"].unique())
    values = pseudo_values(bases, lambda some: _statistic(_shares(whole[whole["model"].isin(some)]))) if len(bases) > 2 else {}
    dropped = len(outcomes) - len(whole)
    return Measured(
        bases=pd.DataFrame(list(values.items()), columns=["model", STATISTIC]),
        details=outcomes,
        beside={},
        nulls={},
        figures={f"share of {name}": (value, "") for name, value in shares.items()},
        excluded=excluded + [f"{dropped} runs of bases with fewer seeds are left out of the layout."] * (dropped > 0),
    )


def _outcomes(claim: MeasuredClaim, frames: Frames, mechanisms: Mapping[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """One row per run: model, arm, seed, outcome; and what could not be matched."""
    cell = claim.cell
    terms = tuple(Term(arm=arm, set=name, probe=probe) for arm in cell.arms for name, probe in mechanisms.items())
    part = Part(name=claim.id, statistic=claim.statistic, unit=claim.unit, terms=terms, relative=True, delta=1, matching="gain")
    place = Place(world=cell.world, recipe=cell.recipe, optimizer=cell.optimizer, reference=cell.reference)
    of = ContrastClaim(id=claim.id, statement=claim.statement, cell=place, parts=(part,))
    contrast = Contrast(of, part, Recorded(checked(frames, cell.reference), cell.reference), "gain")
    rows = []
    for row in contrast.pairs.to_dict("records"):
        run = (str(row["model"]), int(row["seed"]))
        for arm in cell.arms:
            grown = []
            for name, probe in mechanisms.items():
                term = Term(arm=arm, set=name, probe=probe)
                before, _ = contrast.recorded.before(term, (run[0], arm, run[1]))
                grown.append(row[str(term)] / before if before else np.nan)
            rows.append({"model": run[0], "arm": arm, "seed": run[1], "outcome": grown[0] - grown[1]})
    return pd.DataFrame(rows, columns=["model", "arm", "seed", "outcome"]), left_out([(contrast.name, contrast.excluded)])


def _balanced(outcomes: pd.DataFrame) -> pd.DataFrame:
    """The runs of those bases that have all contexts for as many seeds as the others have at least."""
    if outcomes.empty:
        return outcomes
    seeds = outcomes.groupby("model")["seed"].nunique()
    kept = outcomes[outcomes["model"].map(seeds) == seeds.max()]
    return kept.reset_index(drop=True)


def _shares(outcomes: pd.DataFrame) -> dict[str, float]:
    """Sum of squares of every source over the total, of a balanced layout; NaN where nothing varies, or a value is none."""
    if outcomes.empty or outcomes["outcome"].isna().any():
        return dict.fromkeys(SOURCES, np.nan)
    value, whole = outcomes["outcome"], outcomes["outcome"].mean()
    context, base = (value.groupby(outcomes[name]).transform("mean") for name in ("arm", "model"))
    cell = value.groupby([outcomes["arm"], outcomes["model"]]).transform("mean")
    squares = [((each) ** 2).sum() for each in (context - whole, base - whole, cell - context - base + whole, value - cell)]
    total = float(((value - whole) ** 2).sum())
    return {name: float(each / total) if total else np.nan for name, each in zip(SOURCES, squares, strict=True)}


def _statistic(shares: dict[str, float]) -> float:
    return shares["base"] + shares["context x base"] - shares["context"]
