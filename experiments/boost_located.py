"""The claims `boost_located` and `initially_located`: the crossover of kindland on many bases, where its nulls can be null.

Builds bases that do not come with the package, discovers their mechanisms, trains both arms and mixtures of them on each, and
judges. Read where both mechanisms name the same reply; `boost_kindland`'s reading stands beside it. A base takes some 25
minutes on one core. What it showed is added to the tables in OUT, from which its runs and weights can be missing thereafter,
so that this can be stopped at any time, and go on from the tables alone. Nothing is judged before all bases are there.

    python -m experiments.boost_located [--plan] [--pilot]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import torch
from scipy.optimize import brentq

from attribution.calibration import WANTED, power
from attribution.claims import LEDGER, Claim
from attribution.claims.crossover import Crossover, View
from attribution.claims.frames import checked
from attribution.errors import ConfigError, RunError
from attribution.launch import end_with_parent
from attribution.runs.quiet import quiet
from attribution.store import read_json, write_atomic, write_json
from attribution.study import Study, collect, jobs, listed, run_study, under
from attribution.worlds.build import build
from attribution.worlds.located import CLAIMS, MIXED, MORE_BASES, write_located
from attribution.worlds.pool import NULLS
from attribution.worlds.studies import BASES
from experiments.alone import FAILED, concluded, failures
from experiments.claims import discovered, not_testable, told_in_a_sentence

MINUTES = {"built": 20.0, "run": 0.4}  # on one core: a base with its mechanisms, one of its eight runs
WRITTEN = "world.json"  # written by the builder once the weights are there
READ = ("sets", "probes")  # what the claims read
ENOUGH, PILOT_SEED = 16, 2  # bases for which δ was fixed; the training seed of the pilot, which no result uses
T = TypeVar("T")

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
    place = out or runs / "claims" / "boost_located"
    kept = Kept(place, seeds)
    todo = [name for name in MORE_BASES[:bases] if name not in kept.bases or kept.bases[name]["failed"]]
    if plan:
        print(sizing(sum(not (folder_of(name, runs) / WRITTEN).exists() for name in todo), len(todo), seeds, slots))
        return
    for name, shown in each_in_a_process(showed, [(name, runs, seeds, place) for name in todo], slots):
        kept.add(name, shown)
        print(f"{len(kept.bases)} of {bases} bases are in {place}", flush=True)
    kept.judge()


class Shown(NamedTuple):
    """What one base showed.

    Attributes:
        frames: "sets" and "probes", under the names of the claims; none if the base is unfit.
        told: as plain data its model, the reason why nothing can be concluded from it or "", its runs as study.json lists
            them, and those that failed.
    """

    frames: Mapping[str, pd.DataFrame]
    told: Mapping[str, Any]


class Kept:
    """Tables that grow by base, and what is told of the bases in them.

    Args:
        place: directory of the tables, which need not be there.
        seeds: of both arms.

    Raises:
        RunError: the tables there are of claims that were declared otherwise, or of other seeds.
    """

    def __init__(self, place: Path, seeds: int) -> None:
        self.place, file = place, place / "bases.json"
        asked = {"claims": {claim: LEDGER[claim].hash for claim in CLAIMS}, "seeds": seeds}
        self._told = read_json(file) if file.exists() else {**asked, "bases": {}}
        other = [name for name, value in asked.items() if self._told.get(name) != value]
        if other:
            raise RunError(f"{file} is of other {' and '.join(other)} than those asked for; remove {place}, or name another")

    @property
    def bases(self) -> dict[str, dict[str, Any]]:
        """By name, what is told of it."""
        return self._told["bases"]

    def add(self, name: str, shown: Shown) -> None:
        """Add what one base showed. The list of bases is written last, and rows of a base that it lacks are written anew."""
        for table, rows in shown.frames.items():
            file = self.place / "frames" / f"{table}.parquet"
            if file.exists():
                before = pd.read_parquet(file)
                rows = pd.concat([before[before["model"].ne(shown.told["model"])], rows], ignore_index=True)
            write_atomic(file, rows.to_parquet(index=False, compression="zstd"))
        self.bases[name] = dict(shown.told)
        write_json(self.place / "bases.json", self._told)

    def judge(self) -> None:
        """Judge the claims on all bases that are there, and write the page."""
        every = sorted(self.bases.values(), key=lambda told: told["model"])
        fit = [told for told in every if not told["unfit"]]
        runs = [run for told in fit for run in told["runs"]]
        files = {name: self.place / "frames" / f"{name}.parquet" for name in READ}
        frames = {name: pd.read_parquet(file) for name, file in files.items() if file.exists()}
        concluded(
            self.place, CLAIMS, frames, name="boost_located", rests_on=runs,
            failed=pd.DataFrame([lost for told in fit for lost in told["failed"]], columns=FAILED),
            unfit={told["model"]: told["unfit"] for told in every if told["unfit"]},
            arms=list(dict.fromkeys(run["arm"] for run in runs)), models=[told["model"] for told in fit],
            seeds=list(range(self._told["seeds"])),
        )  # fmt: skip


def folder_of(name: str, runs: Path) -> Path:
    """Where a base is built."""
    return runs / "bases" / name.replace("/", "-")


def showed(name: str, runs: Path, seeds: int, place: Path) -> Shown:
    """Build a base, discover its mechanisms, and train it; what was done before is not done again.

    Args:
        name: of the base.
        runs: directory that holds bases and studies.
        seeds: of both arms; mixtures take the first alone.
        place: directory from which paths of runs are told.
    """
    folder = folder_of(name, runs)
    if not (folder / WRITTEN).exists():
        built(name, folder)
    model = str(folder)
    unfit = not_testable(model)
    if unfit:
        return Shown({}, {"model": model, "unfit": unfit, "runs": [], "failed": []})
    study = located((model,), runs, tuple(range(seeds)), data=runs / "located" / folder.name)
    pieces = (study.only(seeds=1), study.only(arms=NULLS))
    failed = {job: why for piece in pieces for job, why in run_study(piece, runs, slots=1).items()}
    every = {job.path: job for piece in pieces for job in jobs(piece, runs)}.values()
    told = {"runs": [listed(job, place) for job in every], "failed": failures(failed).to_dict("records")}
    frames = read(study, runs) if len(failed) < len(every) else {}
    return Shown(frames, {"model": model, "unfit": "", **told})


def sizing(to_build: int, bases: int, seeds: int, slots: int) -> str:
    """What is left to do, as text."""
    count = bases * (len(NULLS) * seeds + len(MIXED))
    parts = {
        f"build {to_build} bases": to_build * MINUTES["built"],
        f"{count} runs, less those that are finished": count * MINUTES["run"],
    }
    lines = [f"  {what}: about {minutes / slots:.0f} minutes" for what, minutes in parts.items()]
    return "\n".join([f"{slots} at once:", *lines, f"about {sum(parts.values()) / slots / 60:.1f} hours at most"])


def built(name: str, folder: Path) -> None:
    """Build one base, and discover its mechanisms; takes some twenty minutes."""
    world, seed = name.split("/")
    build(world, int(seed), folder, progress=False)
    print(f"built {folder}", flush=True)


def each_in_a_process(function: Callable[..., T], given: Sequence[tuple], slots: int) -> Iterator[tuple[Any, T]]:
    """Call a function with each of these arguments, in processes of one thread that end with this one; in this one if there is
    to be but one.

    Yields:
        As each is done, the first argument and what was returned.
    """
    if slots == 1:
        _quietly()
        yield from ((each[0], function(*each)) for each in given)
        return
    with ProcessPoolExecutor(slots, mp_context=get_context("spawn"), initializer=_apart) as pool:
        every = {pool.submit(function, *each): each[0] for each in given}
        for done in as_completed(every):
            yield every[done], done.result()


def _apart() -> None:
    end_with_parent()
    _quietly()


def _quietly() -> None:
    torch.set_num_threads(1)
    quiet()


def located(models: Sequence[str], runs: Path, seeds: tuple[int, ...], data: Path | None = None) -> Study:
    """The study on these bases, whose mechanisms are discovered where they bring none. `data`: where to write its samples."""
    mechanisms = {name: str(discovered(name, runs)) for name in models if name not in BASES}
    return Study.model_validate({**write_located(data or runs / "located" / "data", models, mechanisms), "seeds": seeds})


def read(study: Study, runs: Path) -> dict[str, pd.DataFrame]:
    """What claims read of the finished runs."""
    frames = collect(study, runs)
    return under(study.named[CLAIMS[0]], {name: frames[name] for name in READ})


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
