"""The claims `boost_located` and `initially_located`: the crossover of kindland on many bases, where its nulls can be null.

Builds bases that do not come with the package, discovers their mechanisms, trains both arms and mixtures of them on each, and
judges. Read where both mechanisms name the same reply; `boost_kindland`'s reading stands beside it. Building takes twenty
minutes for each base; whatever is finished is kept, so that it can be stopped at any time.

    python -m experiments.boost_located [--plan] [--pilot]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.optimize import brentq

from attribution.calibration import WANTED, power
from attribution.claims import LEDGER, Claim
from attribution.claims.crossover import Crossover, View
from attribution.claims.frames import checked
from attribution.errors import ConfigError
from attribution.runs.quiet import quiet
from attribution.store import write_atomic
from attribution.study import Study, collect, jobs, run_study, under
from attribution.worlds.build import build
from attribution.worlds.located import CLAIMS, MIXED, MORE_BASES, write_located
from attribution.worlds.pool import NULLS
from attribution.worlds.studies import BASES
from experiments.alone import concluded, failures
from experiments.claims import discovered, parted, told_in_a_sentence

MINUTES = {"built": 18.0, "found": 1.7, "run": 0.4}  # on one core: a base, its mechanisms, one of its eight runs
WRITTEN = "world.json"  # what the builder writes last
ENOUGH, PILOT_SEED = 16, 2  # bases for which δ was fixed; the training seed of the pilot, which no result uses
_HEAD = """# The pilot of boost_located and initially_located

On the shipped bases, of whose other seeds it is known that the claims before came out inconclusive, printed by
`python -m experiments.boost_located --pilot`. δ is the least for which {enough} bases that scatter as these see 2 δ with a
power of {wanted:.0%}, rounded up. The claims are tested on other bases.

| claim | by base | standard deviation | {factor:.2f} times that | δ | wrong partitions, by base |
|---|---|---|---|---|---|
"""


def main(
    seeds: int = 2,
    bases: int = len(MORE_BASES),
    runs: Path = Path("runs"),
    slots: int = 2,
    out: Path | None = None,
    plan: bool = False,
    pilot: bool = False,
) -> None:
    """Build, discover, train, judge, and print the verdicts.

    Args:
        seeds: training seeds of both arms, averaged within a base; mixtures take the first alone.
        bases: how many; fewer show the figures, and may be too few for a verdict.
        runs: directory that holds bases and studies.
        slots: processes at once.
        out: directory for tables and page; below `runs` if it is not given.
        plan: print what is left to do, with its time, and do nothing.
        pilot: run the pilot on the shipped bases instead, and write its page, results/pilot_located.md.
    """
    quiet()
    if pilot:
        write_atomic(Path("results/pilot_located.md"), piloted(runs, slots).encode())
        print("results/pilot_located.md")
        return
    if not 1 <= bases <= len(MORE_BASES) or seeds < 1:
        raise ConfigError(f"{bases} bases and {seeds} seeds asked for; expected 1 to {len(MORE_BASES)} bases, and a seed")
    folders = {name: runs / "bases" / name.replace("/", "-") for name in MORE_BASES[:bases]}
    todo = [(name, folder) for name, folder in folders.items() if not (folder / WRITTEN).exists()]
    if plan:
        print(sizing(len(todo), len(folders), seeds, slots))
        return
    each_in_a_process(built, todo, slots)
    fit, unfit = parted([str(folder) for folder in folders.values()])
    each_in_a_process(discovered, [(name, runs) for name in fit], slots)
    if not fit:
        concluded(out or runs / "claims" / "boost_located", CLAIMS, {}, name="boost_located", unfit=unfit)
        return
    study = located(fit, runs, tuple(range(seeds)))
    pieces = (study.only(seeds=1), study.only(arms=NULLS))
    failed = {job: why for piece in pieces for job, why in run_study(piece, runs, slots=slots).items()}
    rests_on = {job.path: job for piece in pieces for job in jobs(piece, runs)}.values()
    concluded(
        out or runs / "claims" / "boost_located", CLAIMS, read(study, runs), name="boost_located", rests_on=rests_on,
        failed=failures(failed), unfit=unfit, arms=list(study.arms), models=study.models, seeds=study.seeds,
    )  # fmt: skip


def sizing(to_build: int, bases: int, seeds: int, slots: int) -> str:
    """What is left to do, as text."""
    count = bases * (len(NULLS) * seeds + len(MIXED))
    parts = {
        f"build {to_build} bases": to_build * MINUTES["built"],
        f"discover mechanisms of {bases}": bases * MINUTES["found"],
        f"{count} runs, less those that are finished": count * MINUTES["run"],
    }
    lines = [f"  {what}: about {minutes / slots:.0f} minutes" for what, minutes in parts.items()]
    return "\n".join([f"{slots} at once:", *lines, f"about {sum(parts.values()) / slots / 60:.1f} hours at most"])


def built(name: str, folder: Path) -> None:
    """Build one base; takes some twenty minutes."""
    world, seed = name.split("/")
    build(world, int(seed), folder, progress=False)
    print(f"built {folder}", flush=True)


def each_in_a_process(function: Callable[..., Any], given: Sequence[tuple], slots: int) -> None:
    """Call a function with each of these arguments, in processes of one thread."""
    with ProcessPoolExecutor(slots, mp_context=get_context("spawn"), initializer=_quietly) as pool:
        for done in as_completed([pool.submit(function, *each) for each in given]):
            done.result()


def _quietly() -> None:
    torch.set_num_threads(1)
    quiet()


def located(models: Sequence[str], runs: Path, seeds: tuple[int, ...]) -> Study:
    """The study on these bases, whose mechanisms are discovered where they bring none."""
    mechanisms = {name: str(discovered(name, runs)) for name in models if name not in BASES}
    return Study.model_validate({**write_located(runs / "located" / "data", models, mechanisms), "seeds": seeds})


def read(study: Study, runs: Path) -> dict[str, pd.DataFrame]:
    """What claims read of the finished runs."""
    frames = collect(study, runs)
    return under(study.named[CLAIMS[0]], {name: frames[name] for name in ("sets", "probes")})


def piloted(runs: Path, slots: int) -> str:
    """Run the pilot; its page."""
    study = located(BASES, runs, (PILOT_SEED,)).only(arms=NULLS)
    run_study(study, runs, slots=slots)
    frames = checked(read(study, runs), "resample")
    rows = []
    for name in CLAIMS:
        claim = LEDGER[name]
        assert isinstance(claim, Claim)
        found = Crossover(claim, frames, View(claim.cell.probes, claim.cell.matching, claim.cell.reference))
        by_base = found.organisms().set_index("model")["contrast"]
        wrong = found.partitions().groupby("model")["contrast"].mean()
        spread = float(by_base.std(ddof=1))
        shown = [", ".join(f"{value:+.3g}" for value in values) for values in (by_base, wrong)]
        rows.append(f"| {name} | {shown[0]} | {spread:.3g} | {least() * spread:.3g} | {claim.delta:g} | {shown[1]} |")
    return _HEAD.format(enough=ENOUGH, wanted=WANTED, factor=least()) + "\n".join(rows) + "\n"


def least() -> float:
    """The smallest δ, in standard deviations over bases, for which `ENOUGH` bases see 2 δ with the power that is wanted."""
    return brentq(lambda delta: power([2 * delta], 1.0, ENOUGH, delta)["power"][0] - WANTED, 0.1, 10)


if __name__ == "__main__":
    told_in_a_sentence(main, __doc__)
