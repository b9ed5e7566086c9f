"""Every recipe on the planted organisms: `python -m experiments.recipes_compared [--out results/recipes] [--slots 2]`.

What SFT, DPO, RLOO, GRPO and REINFORCE, full and with LoRA, strengthen when they train the same conflict prompts, of which
either mechanism A's reply is rewarded or B's; what their controls do; and whether the forecast of the first step said so.
Finished runs are kept.

The checks were written down before the study ran, after a pilot of one seed on an organism that is not among these. They
read D = dI_A / I_A - dI_B / I_B after 20 steps on prompts where both cues name the same reply, seeds averaged, with a
t-interval over organisms:
    opposite   each of sft, dpo, rloo, grpo, reinforce, full and LoRA: where A's reply is rewarded, dI_A > 0 > dI_B; where B's
               is, the other way round; all four intervals clear of zero
    null       random reward, shuffled advantage, random labels, shuffled contexts: the interval of D inside ± 0.1, the
               smallest effect of interest of the claim `boost`
    reversed   flipped reward: the interval of D below zero
    nothing    a learning rate of 0: exactly zero
"""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import tyro

from attribution.claims.statistics import Interval, organism_means, t_interval
from attribution.runs.quiet import quiet
from attribution.study import Job, conclude, embedded, jobs, run_study
from attribution.worlds.studies import RECIPE_STEPS

DELTA = 0.1
SIGNS = {"agree": 1, "conflict": -1}  # of B's effect: in a conflict the metric speaks for A's reply
PRIMARY = "agree"
TRAINERS = ("sft", "dpo", "rloo", "grpo", "reinforce", "sft lora", "dpo lora", "grpo lora")
NULLS = ("grpo random reward", "grpo shuffled advantage", "dpo random labels", "contexts shuffled")
REVERSED, NOTHING = "grpo flipped reward", "grpo lr 0"
FORECAST_STEPS = (1, 5, 20)
REPEATS, TIMED_STEPS, TIMED_BATCH = 5, 10, 32


def main(out: Path = Path("results/recipes"), runs: Path = Path("runs"), slots: int = 2, timed: bool = True) -> None:
    """Run the study `recipes`, forecast each of its trainings, and write what came out.

    Args:
        out: directory for the page and the tables.
        runs: directory that holds studies.
        slots: runs at once.
        timed: time a step of every trainer too, which wants a quiet machine.
    """
    quiet()
    study = embedded("recipes", runs)
    failed = run_study(study, runs, slots=slots)
    place = conclude(study, runs, failed)
    first = [job for job in jobs(study, runs) if job.config.seed == study.seeds[0] and job not in failed]
    with ProcessPoolExecutor(slots, mp_context=multiprocessing.get_context("spawn"), initializer=quiet) as pool:
        forecasts = pd.concat(pool.map(forecast, first), ignore_index=True)
    out.mkdir(parents=True, exist_ok=True)
    forecasts.to_parquet(out / "forecasts.parquet", index=False)
    for name in ("sets", "probes"):
        shutil.copy(place / "frames" / f"{name}.parquet", out / f"{name}.parquet")
    if timed:
        step_times().to_parquet(out / "times.parquet", index=False)
    (out / "summary.md").write_text(summary(read(out)), encoding="utf-8")
    print((out / "summary.md").read_text())
    print(out / "summary.md")


def read(out: Path) -> dict[str, pd.DataFrame]:
    """The recorded frames, by name."""
    names = [name for name in ("sets", "probes", "forecasts", "times") if (out / f"{name}.parquet").exists()]
    return {name: pd.read_parquet(out / f"{name}.parquet") for name in names}


def changes(sets: pd.DataFrame, step: int = RECIPE_STEPS) -> pd.DataFrame:
    """Change of influence over influence before, per run and probe set: model, arm, seed, probe, A, B, D."""
    sets = sets[sets["reference"] == "zero"]
    keys = ["model", "arm", "seed", "probe"]
    effect = sets.pivot_table(index=keys, columns=["step", "set"], values="effect", observed=True, sort=False)
    sign = effect.index.get_level_values("probe").map(SIGNS).to_numpy()
    found = pd.DataFrame(index=effect.index)
    for name, flip in (("A", 1), ("B", sign)):
        before = effect[0, name] * flip
        found[name] = (effect[step, name] * flip - before) / before
    found["D"] = found["A"] - found["B"]
    return found.reset_index()


def over_organisms(rows: pd.DataFrame, arm: str, column: str, probe: str = PRIMARY) -> Interval:
    """Of one arm, seeds averaged within organisms."""
    chosen = rows[(rows["arm"] == arm) & (rows["probe"] == probe)]
    return t_interval(organism_means(chosen, [column])[column])


def table(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per arm: relative changes of influence, behaviour and KL, as mean and interval over organisms."""
    found, probes = changes(frames["sets"]), frames["probes"]
    keys = ["model", "arm", "seed"]
    level = probes[probes["probe"] == "conflict"].pivot_table(index=keys, columns="step", values="metric", observed=True)
    behaviour = (level[RECIPE_STEPS] - level[0]).rename("behaviour").reset_index()
    neutral = probes[(probes["probe"] == "neutral") & (probes["step"] == RECIPE_STEPS)]
    rows = []
    for arm in dict.fromkeys(found["arm"]):
        row: dict[str, Any] = {"arm": arm}
        for probe in SIGNS:
            row |= {f"{column} {probe}": over_organisms(found, arm, column, probe) for column in "ABD"}
        row["behaviour"] = t_interval(organism_means(behaviour[behaviour["arm"] == arm], ["behaviour"])["behaviour"])
        row["kl"] = t_interval(organism_means(neutral[neutral["arm"] == arm], ["kl"])["kl"])
        rows.append(row)
    return pd.DataFrame(rows)


def checks(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The checks above, each with what was asked, what was found, and whether it holds."""
    found = changes(frames["sets"])

    def of(arm: str, column: str) -> Interval:
        return over_organisms(found, arm, column)

    rows = []
    for trainer in TRAINERS:
        up = {mine: of(f"{trainer} {mine}", mine) for mine in "AB"}
        down = {mine: of(f"{trainer} {mine}", "BA"["AB".index(mine)]) for mine in "AB"}
        holds = all(each.low > 0 for each in up.values()) and all(each.high < 0 for each in down.values())
        told = "; ".join(f"{mine} rewarded: own {up[mine]}, other {down[mine]}" for mine in "AB")
        rows.append(("opposite", trainer, "own > 0 > other", told, holds))
    within = f"D within ± {DELTA}"
    rows += [("null", arm, within, str(of(arm, "D")), of(arm, "D").inside(DELTA)) for arm in NULLS]
    rows.append(("reversed", REVERSED, "D < 0", str(of(REVERSED, "D")), of(REVERSED, "D").high < 0))
    exact = found.loc[found["arm"] == NOTHING, ["A", "B"]].abs().to_numpy().max()
    rows.append(("nothing", NOTHING, "exactly 0", f"{exact:g}", bool(exact == 0)))
    return pd.DataFrame(rows, columns=["check", "arm", "asked", "found", "holds"])


# Forecasts


def forecast(job: Job) -> pd.DataFrame:
    """What the first step of a run would strengthen, beside what the run did: model, arm, probe, what, name, step, …"""
    import torch

    from attribution.runs.forecast import forecast_of
    from attribution.store import read_run

    torch.set_num_threads(1)
    heads = job.config.model_copy(update={"kinds": ("head",), "inputs": {}})
    found = forecast_of(heads, top=10**6)
    run = read_run(job.path)
    key = {"model": job.config.model, "arm": job.arm}
    sets = run.sets[run.sets["reference"] == job.config.reference].rename(columns={"set": "name"})
    single = run.influence[run.influence["kind"] == "head"]
    single = single.assign(name="head " + single["layer"].astype(str) + "." + single["index"].astype(str))
    ahead = found.components[found.components["kind"] == "head"]
    ahead = ahead.assign(name="head " + ahead["layer"].astype(str) + "." + ahead["index"].astype(str))
    rows = []
    for what, said, measured in (("set", found.sets.rename(columns={"set": "name"}), sets), ("head", ahead, single)):
        effect = measured.pivot_table(index=["probe", "name"], columns="step", values="effect", observed=True)
        for probe, name, forecasted in said[["probe", "name", "strengthening"]].itertuples(index=False):
            rows += [
                {**key, "probe": probe, "what": what, "name": name, "step": step, "forecast": forecasted,
                 "measured": effect.loc[(probe, name), step] - effect.loc[(probe, name), 0]}
                for step in FORECAST_STEPS
            ]  # fmt: skip
    return pd.DataFrame(rows)


def agreement(forecasts: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of forecast and measured strengthening within an organism, mean and interval over organisms.

    Sets: over arms x mechanisms x probe sets. Heads: over heads, within each arm and probe set, averaged. The learning rate of
    zero, where both are zero, is left out. Beside it what a trivial cause would give: the forecast's sign alone, and the
    correlation among forecasts of one sign.
    """
    moving = forecasts[forecasts["arm"] != NOTHING].assign(sign=np.sign(forecasts["forecast"]))
    rows = []
    for step, at in moving.groupby("step"):
        for what, within in (("set", ["model"]), ("head", ["model", "arm", "probe"])):
            chosen = at[at["what"] == what]
            rows.append(
                {
                    "what": what,
                    "step": step,
                    "ranked": int(chosen.groupby(within).size().iloc[0]),
                    "rho": _rank_correlation(chosen, within, "forecast"),
                    "of the sign alone": _rank_correlation(chosen, within, "sign"),
                    "within one sign": _rank_correlation(chosen, [*within, "sign"], "forecast"),
                }
            )
    return pd.DataFrame(rows).sort_values(["what", "step"], ascending=[False, True], ignore_index=True)


def _rank_correlation(rows: pd.DataFrame, within: list[str], predictor: str) -> Interval:
    """Spearman's, in every group of three or more rows, averaged over the groups of an organism."""
    found = {
        key: group[predictor].corr(group["measured"], method="spearman")
        for key, group in rows.groupby(within)
        if len(group) > 2 and group[predictor].nunique() > 1
    }
    if not found:
        return t_interval([])
    by_group = pd.Series(found, index=pd.MultiIndex.from_tuples(found, names=within))
    return t_interval(by_group.groupby("model").mean())


# What recording costs


def step_times() -> pd.DataFrame:
    """Seconds per step of every trainer on `planted`: bare, recorded, and with a probe set as large as its batch."""
    import torch

    from attribution.samples import ProbeSet, Sample
    from attribution.worlds import planted

    torch.set_num_threads(1)
    samples = [Sample(**row) for row in planted.prompts(128, 1, star="conflict", problems=planted.TRAINING)]
    probe = ProbeSet(name="agree", samples=tuple(Sample(**row) for row in planted.prompts(TIMED_BATCH, 3, star="agree")))
    ways = {"bare": None, "recorded": (), "with a probe set": (probe,)}
    return pd.DataFrame(
        [
            {"trainer": trainer, "how": how, "repeat": repeat, "seconds": _timed(trainer, samples, probes)}
            for repeat in range(REPEATS)
            for trainer in TRAINERS
            for how, probes in ways.items()
        ]
    )


def _timed(trainer: str, samples: Sequence[Any], probes: Sequence[Any] | None) -> float:
    """Median seconds of a step; construction, the first step and the readings at both ends left out."""
    from transformers import TrainerCallback

    from attribution.models import load
    from attribution.recipes import Setting, recipe_named
    from attribution.samples import encode
    from attribution.updates.callback import RecorderCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

    name, *adapters = trainer.split()
    settings: dict[str, Any] = {"batch_size": TIMED_BATCH, "max_steps": TIMED_STEPS}
    settings |= {"lora": {"rank": 8}} if adapters else {}
    settings |= {} if name in ("sft", "dpo") else {"completion_length": 1}
    model, tokenizer = load("planted")
    clock = Clock()
    callbacks: list[Any] = [clock]
    with TemporaryDirectory() as folder:
        place = Path(folder)
        if probes is not None:
            asked = {"milestones": "ends", "singles": "heads", "everything": False, "batch_after": False, "completions": 0}
            callbacks.insert(0, RecorderCallback(place / "run", probes=probes, tokenizer=tokenizer, **asked))
        recorder = None if probes is None else callbacks[0].recorder
        setting = Setting(
            model, tokenizer, list(samples), encode(tokenizer, samples), 0, place / "trainer", callbacks, recorder
        )
        recipe_named(name).model_validate(settings).build(setting).train()
    return statistics.median(np.diff(clock.times))


def costs(times: pd.DataFrame) -> pd.DataFrame:
    """Median seconds of a bare step, and ratios to it, with the range over repeats."""
    wide = times.pivot_table(index=["trainer", "repeat"], columns="how", values="seconds", sort=False)
    rows = []
    for trainer, group in wide.groupby("trainer", sort=False):
        row: dict[str, Any] = {"trainer": trainer, "bare, ms": f"{1e3 * group['bare'].median():.0f}"}
        for how in ("recorded", "with a probe set"):
            ratio = group[how] / group["bare"]
            row[how] = f"{ratio.median():.2f} ({ratio.min():.2f} – {ratio.max():.2f})"
        rows.append(row)
    return pd.DataFrame(rows)


def summary(frames: dict[str, pd.DataFrame]) -> str:
    """All of it as Markdown."""
    rows = table(frames)
    told_as = dict.fromkeys(rows.columns[1:], _told) | {"kl": lambda interval: _told(interval, 5)}
    shown = rows[["arm"]].assign(**{column: rows[column].map(say) for column, say in told_as.items()})
    found = checks(frames)
    told = found.assign(holds=found["holds"].map({True: "yes", False: "**no**"}))
    agreed = agreement(frames["forecasts"])
    ranked = agreed.assign(**{column: agreed[column].map(_told) for column in agreed.columns[3:]})
    timed = _markdown(costs(frames["times"])) if "times" in frames else "Not timed."
    return "\n\n".join([
        _HEAD, _markdown(told), _TABLE, _markdown(shown), _FORECAST, _markdown(ranked), _COST, timed,
    ]) + "\n"  # fmt: skip


def _told(interval: Interval, digits: int = 3) -> str:
    mean, low, high = (f"{value:+.{digits}f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def _markdown(rows: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(rows.columns) + " |", "|" + "---|" * len(rows.columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows.itertuples(index=False))])


_HEAD = f"""# Every recipe on the planted organisms

Written by `python -m experiments.recipes_compared`, whose first lines say what was asked. Five organisms, two seeds each,
{RECIPE_STEPS} steps; intervals are 95 % over organisms. D = dI_A / I_A − dI_B / I_B, on held-out prompts where both cues name
the same reply.

## What had to hold"""
_TABLE = """## What each recipe strengthened

Change of the influence of A and B over their influence before, on *agree* and *conflict* prompts; behaviour: change of the
logit difference between A's reply and B's on held-out conflict prompts, nats; KL to the start on neutral prompts, nats per
token."""
_FORECAST = """## Was it forecast?

Spearman correlation of the forecast of strengthening, from the first step alone, with the strengthening that was measured after
so many steps. Sets: over all arms, both mechanisms and both probe sets of an organism. Heads: over the heads of an organism,
within an arm and probe set. After one step it is close to an identity: the forecast contains the step. Much of the
correlation over sets is the sign, which follows from whose reply is rewarded; the last columns say how much."""
_COST = """## What recording costs

One thread, `planted`, 32 samples a step (pairs, completions); medians of interleaved repeats, ratios to a bare step with their
range. The probe set has 32 samples."""


if __name__ == "__main__":
    tyro.cli(main)
