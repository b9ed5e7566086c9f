"""The pool of runs behind the claims in kindland: `python -m experiments.pool [--plan] [--part K] [--judge-only] [--help]`.

Every arm that a claim names is trained on every base and seed, once. Parts of some arms each take at most about forty minutes
on two cores; a part that is done leaves its tables in results/pool/ and is not run again, and within a part finished runs are
kept. From these tables alone, in seconds, `--judge-only` computes every verdict and writes results/kindland/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from attribution.errors import ConfigError, RunError
from attribution.reports import study_report
from attribution.runs.quiet import quiet
from attribution.store import read_json, write_atomic, write_json
from attribution.study import FRAMES, Study, conclude, jobs, judge, run_study, write_study
from attribution.worlds.pool import CROSSED, write_kindland
from experiments.claims import known, table, told_in_a_sentence

MINUTES = 40
SECONDS = {True: 120.0, False: 17.4}  # of a run on one core, by whether every component is ablated one by one


def main(
    out: Path = Path("results/pool"),
    page: Path = Path("results/kindland"),
    runs: Path = Path("runs"),
    slots: int = 2,
    part: int | None = None,
    plan: bool = False,
    judge_only: bool = False,
) -> None:
    """Run every part that is not done, then judge all claims.

    Args:
        out: directory for the tables of parts.
        page: directory for findings, page and summary.
        runs: directory that holds studies.
        slots: runs at once.
        part: run this part alone, from 1, and judge nothing.
        plan: print the parts with their sizes, and run nothing.
        judge_only: run nothing; judge the tables that are there.
    """
    quiet()
    study = reference(runs)
    pieces = list(parts(study, slots))
    if part is not None and not 1 <= part <= len(pieces):
        raise ConfigError(f"there is no part {part}; expected 1 to {len(pieces)}")
    if plan:
        print(sizing(study, pieces, slots, out))
        return
    if not judge_only:
        for number, arms in enumerate(pieces, start=1):
            if part in (None, number) and not is_done(study, arms, out / f"part-{number}", runs):
                print(f"part {number} of {len(pieces)}: {', '.join(arms)}", flush=True)
                run_part(study.only(arms=arms), number, out, runs, slots)
    if part is None:
        for number, arms in enumerate(pieces, start=1):
            if not is_done(study, arms, out / f"part-{number}", runs):
                raise RunError(f"part {number} of {len(pieces)} was not run; run it, or all, before claims are judged")
        file = out / "separations.parquet"
        if not judge_only and not file.exists():
            told = known(study.claims, study.models, runs).get(
                "separations", pd.DataFrame(columns=["model", "pair", "dissociated"])
            )
            write_atomic(file, told.to_parquet(index=False, compression="zstd"))
        print(table(judged(study, out, page)))
        print(study_report(page))


def reference(runs: Path) -> Study:
    """All arms on all bases; their samples are written below `runs`."""
    return Study.model_validate(write_kindland(runs / "kindland" / "data"))


def parts(study: Study, slots: int) -> Iterator[tuple[str, ...]]:
    """Arms in order, as many together as take the time of a part."""
    piece: list[str] = []
    for arm in study.arms:
        if piece and seconds(study, [*piece, arm], slots) > MINUTES * 60:
            yield tuple(piece)
            piece = []
        piece.append(arm)
    yield tuple(piece)


def seconds(study: Study, arms: list[str], slots: int) -> float:
    """About how long these arms take."""
    return sum(SECONDS[arm in CROSSED] for arm in arms) * len(study.models) * len(study.seeds) / slots


def is_done(study: Study, arms: Sequence[str], place: Path, runs: Path) -> bool:
    """Whether the tables of a part are there.

    Raises:
        RunError: they are those of other arms or settings.
    """
    if not (place / "study.json").exists():
        return False
    wanted = {f"{job.path.parent.name}/{job.path.name}" for job in jobs(study.only(arms=tuple(arms)), runs)}
    there = {"/".join(Path(run["path"]).parts[-2:]) for run in read_json(place / "study.json")["runs"]}
    if wanted != there:
        odd = min(wanted ^ there)
        raise RunError(f"{place} holds the runs of other arms or settings ({odd}); remove it, and run that part again")
    return True


def sizing(study: Study, pieces: list[tuple[str, ...]], slots: int, out: Path) -> str:
    """The parts as text, with what is done."""
    lines = [f"{len(study.arms)} arms x {len(study.models)} bases x {len(study.seeds)} seeds, {slots} at once:"]
    for number, arms in enumerate(pieces, start=1):
        done = " (done)" if (out / f"part-{number}" / "study.json").exists() else ""
        lines.append(f"  part {number}: {len(arms)} arms, about {seconds(study, list(arms), slots) / 60:.0f} minutes{done}")
    total = sum(seconds(study, list(arms), slots) for arms in pieces) / 3600
    return "\n".join([*lines, f"about {total:.1f} hours in all"])


def run_part(study: Study, number: int, out: Path, runs: Path, slots: int) -> None:
    """Run some arms and keep their tables; study.json, which says that the part is done, comes last."""
    scratch = runs / "parts" / f"part-{number}"
    bare = study.model_copy(update={"claims": ()})
    failed = run_study(bare, runs, slots=slots)
    conclude(bare, runs, failed, into=scratch)
    reasons = [
        {"model": job.config.model, "arm": job.arm, "seed": job.config.seed, "reason": why} for job, why in failed.items()
    ]
    place = out / f"part-{number}"
    for name in FRAMES:
        write_atomic(place / f"{name}.parquet", (scratch / "frames" / f"{name}.parquet").read_bytes())
    told = read_json(scratch / "study.json")
    write_json(place / "study.json", {**told, "failed": reasons})


def judged(study: Study, out: Path, page: Path) -> Path:
    """Judge every claim of the study on the tables of all parts that are there; returns the directory of the page."""
    done = sorted(out.glob("part-*/study.json"), key=lambda path: int(path.parent.name.removeprefix("part-")))
    told = [read_json(path) for path in done]
    frames = {
        name: pd.concat([pd.read_parquet(path.parent / f"{name}.parquet") for path in done], ignore_index=True)
        for name in FRAMES
    }
    failed = pd.DataFrame([each for part in told for each in part["failed"]], columns=["model", "arm", "seed", "reason"])
    file = out / "separations.parquet"
    frames |= {"separations": pd.read_parquet(file)} if file.exists() else {}
    findings, reasons = judge(study.claims, frames, study.named, failed)
    every: list[dict[str, Any]] = [run for part in told for run in part["runs"]]
    given = {"arms": list(study.arms), "models": list(study.models), "seeds": list(study.seeds), "runs": every}
    write_study(page, "kindland", findings, not_judged=reasons, versions=told[0]["versions"], **given)
    return page


if __name__ == "__main__":
    told_in_a_sentence(main, __doc__)
