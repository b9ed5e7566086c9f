"""How a forecast turned out: its rank correlation with what a recorded run then did.

Knows frames; knows nothing about models.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from attribution.components import KINDS
from attribution.errors import RunError
from attribution.store import Run, read_run

if TYPE_CHECKING:
    from attribution.updates.forecast import Forecast

SETS, SINGLES, SHARE = "strengthening of sets", "strengthening of components", "update share"
EVERY = "every"  # probe set
FEWEST = 3  # pairs; the ranks of two always agree or disagree
_COMPONENT = ["kind", "layer", "index"]


def compare(forecast: Forecast, run: Run | str | os.PathLike[str], steps: Sequence[int] = (1, 5, 20)) -> pd.DataFrame:
    """Rank correlation of a forecast with what a run, recorded from the same start, had done after some of its steps.

    Args:
        forecast: what was to be expected of the first step.
        run: the record, or its directory.
        steps: which; recorded ones.

    Returns:
        One row per step, quantity and probe set: step; quantity; probe ("every": all together); n (pairs); rho (Spearman;
        NaN with fewer than 3 pairs, or where one side is the same for all). The quantities are "strengthening of sets",
        forecast against change of influence since the start, over sets and probe sets together; "strengthening of
        components", the same over single components where the run ablated them at this step; and "update share", forecast
        against the recorded shares added up, over components and remainder groups.

    Raises:
        RunError: no such run or step, or one that was read with another metric, reference or other probe sets.
    """
    run = run if isinstance(run, Run) else read_run(run)
    _check(forecast, run, steps)
    rows = []
    for step in steps:
        of_sets = _change(run.sets[run.sets["reference"] == forecast.reference], step, ["probe", "set"])
        rows.append((step, SETS, EVERY, *_rho(forecast.sets, "strengthening", of_sets)))
        of_singles = _change(run.influence, step, ["probe", *_COMPONENT])
        for probe, own in forecast.components.groupby("probe", sort=False):
            rows.append((step, SINGLES, probe, *_rho(own, "strengthening", of_singles)))
            rows.append((step, SHARE, probe, *_rho(own, "share", _shares(run, str(probe), step))))
    return pd.DataFrame(rows, columns=["step", "quantity", "probe", "n", "rho"])


def recorded_steps(run: Run) -> list[int]:
    """Steps of a run that were recorded whole, without the start."""
    return sorted({int(step) for step in run.probes["step"]} - {0})


def _check(forecast: Forecast, run: Run, steps: Sequence[int]) -> None:
    for name in ("metric", "reference"):
        asked, found = getattr(forecast, name), run.config.get(name)
        if asked != found:
            raise RunError(f"the forecast has {name} {asked!r}, {run.path} {found!r}; forecast with {name}={found!r}")
    wanted, there = set(forecast.probes["probe"]), set(run.probes["probe"])
    if not wanted <= there:
        raise RunError(
            f"{run.path} was not read on probe set {min(wanted - there)!r}, but on {', '.join(sorted(there)) or 'none'}; "
            "forecast on the same ones"
        )
    recorded = recorded_steps(run)
    for step in steps:
        if step not in recorded:
            raise RunError(
                f"{run.path} has no recorded step {step}; it has {', '.join(map(str, recorded)) or 'none'}, name some of those"
            )


def _change(frame: pd.DataFrame, step: int, keys: list[str]) -> pd.DataFrame:
    """Effect at a step minus effect at the start, where both were measured: keys, measured."""
    start, now = (frame.loc[frame["step"] == when, [*keys, "effect"]] for when in (0, step))
    both = _plain(start).merge(_plain(now), on=keys, suffixes=("_before", "_after"))
    measured = both["effect_after"].astype(float) - both["effect_before"].astype(float)
    return both[keys].assign(measured=measured)


def _shares(run: Run, probe: str, step: int) -> pd.DataFrame:
    """Shares added up to a step, of what was written at every recorded step until then: kind, layer, index, name, measured."""
    parts = run.components
    parts = parts[(parts["probe"] == probe) & (parts["step"] <= step) & parts["share"].notna()]
    single = _plain(parts[~(parts["kind"].isin(KINDS) & (parts["index"] < 0))])  # without the sums of layers
    found = single.groupby([*_COMPONENT, "name"])["share"].agg(measured="sum", times="count").reset_index()
    return found[found["times"] == single["step"].nunique()].drop(columns="times")


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """The same with words as words, and names of nothing but remainder groups, so that frames can be joined."""
    words = {name: frame[name].astype(object) for name in ("probe", "set", "kind", "name") if name in frame}
    if "name" in words:
        words["name"] = words["name"].where(words["kind"] == "remainder", "")
    return frame.assign(**words)


def _rho(forecast: pd.DataFrame, column: str, measured: pd.DataFrame) -> tuple[int, float]:
    keys = [name for name in measured if name != "measured"]
    both = _plain(forecast[forecast[column].notna()]).merge(measured, on=keys)
    one, other = both[column].to_numpy(float), both["measured"].to_numpy(float)
    if len(both) < FEWEST or not (np.ptp(one) > 0 and np.ptp(other) > 0):
        return len(both), np.nan
    return len(both), float(spearmanr(one, other).statistic)
