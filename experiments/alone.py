"""What scripts of claims share that measure more than runs record: the arms they start from, and where their tables go.

A script puts its tables into a directory of frames, from which `judged` computes its verdicts again without a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from attribution.claims import LEDGER, evaluate
from attribution.reports import study_report
from attribution.reports.study_tables import SINGLES
from attribution.runs.stages import KEPT
from attribution.store import is_finished, read_json, write_atomic
from attribution.study import Job, Study, jobs, listed, run_study, write_study
from attribution.updates.provenance import versions
from experiments.claims import Trained, parted, study_of, table, write_untestable

FAILED = ["model", "arm", "seed", "reason"]


class Started(NamedTuple):
    """Arms that were run on some models.

    Attributes:
        study: of these arms; None where nothing can be concluded from any of the models.
        failed: by run, what went wrong.
        unfit: by model that was left out, the reason.
    """

    study: Study | None
    failed: Mapping[Job, str]
    unfit: Mapping[str, str]


def start(claim: str, arms: Sequence[str], asked: Trained) -> Started:
    """Run some arms of a claim on the models that can be used, the same runs as those of the pool."""
    fit, unfit = parted(asked.models)
    if not fit:
        return Started(None, {}, unfit)
    study = study_of((claim,), fit, asked.runs)
    named = study.named[claim].arms  # by name in the study, the one in the claim
    study = study.only(seeds=asked.count, arms=tuple(each for each in study.arms if named[each] in arms))
    return Started(study, run_study(study, asked.runs, slots=asked.slots), unfit)


def finished(study: Study, runs: Path, claim: str) -> Iterator[tuple[str, Job, Path]]:
    """Every finished run of a study: its arm as the claim names it, the run, and the folder of the model that it left."""
    for job in jobs(study, runs):
        if is_finished(job.path):
            yield study.named[claim].arms[job.arm], job, job.path / KEPT


def concluded(
    place: Path,
    claims: Sequence[str],
    frames: Mapping[str, pd.DataFrame],
    *,
    name: str,
    rests_on: Iterable[Job | Mapping[str, Any]] = (),
    failed: pd.DataFrame | None = None,
    unfit: Mapping[str, str] | None = None,
    **told: Sequence[Any],
) -> None:
    """Write tables, judge the claims on them, and print verdicts and the path of the page.

    Args:
        place: directory.
        claims: ids.
        frames: what was measured, by name.
        name: of the page.
        rests_on: the runs behind the tables, or what study.json is to list of them.
        failed: columns model, arm, seed, reason.
        unfit: by model that was left out, the reason.
        told: arms, models and seeds.
    """  # fmt: skip
    given = {**frames, "failed": failures({}) if failed is None else failed}
    for each, frame in given.items():
        write_atomic(place / "frames" / f"{each}.parquet", frame.to_parquet(index=False, compression="zstd"))
    if frames:
        findings = [evaluate(LEDGER[claim], given).to_dict() for claim in claims]
        runs = [listed(run, place) if isinstance(run, Job) else run for run in rests_on]
        write_study(place, name, findings, runs=runs, versions=versions(), unfit=unfit, **told)
    else:
        write_untestable(place, name, claims, unfit or {})
    print(table(place))
    print(study_report(place))


def judged(place: Path, claims: Sequence[str]) -> None:
    """Judge claims anew from the tables of a directory, and write its findings and its page; runs nothing."""
    told = read_json(place / "study.json")
    files = sorted(file for file in (place / "frames").glob("*.parquet") if file.stem not in SINGLES)
    frames = {file.stem: pd.read_parquet(file) for file in files}
    frames = {("grafts" if name == "set_grafts" else name): frame for name, frame in frames.items()}
    write_study(
        place, told["name"], [evaluate(LEDGER[claim], frames).to_dict() for claim in claims], runs=told["runs"],
        not_judged=told["not_judged"], unfit=told.get("unfit"), versions=told["versions"],
        arms=told["arms"], models=told["models"], seeds=told["seeds"],
    )  # fmt: skip
    study_report(place)


def failures(failed: Mapping[Job, str]) -> pd.DataFrame:
    """Runs that failed, as claims list them."""
    rows = [(job.config.model, job.arm, job.config.seed, why) for job, why in failed.items()]
    return pd.DataFrame(rows, columns=FAILED)
