"""`attribution study`: its flags, and what is said of runs that failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from attribution.errors import ConfigError, RunError
from attribution.launch import Job, log_of
from attribution.launch.slurm import Slurm
from attribution.reports import study_report
from attribution.study import Study, conclude, embedded, jobs, run_study
from attribution.verbs.flags import value_of

_SHOWN = 5  # failed runs that are told one by one


def study(given: list[str], root: str, tell: Callable[[str], None]) -> None:
    """Run a study as the command line asks.

    Args:
        given: the command line after the verb.
        root: directory that holds studies, unless another is named.
        tell: is given a line when a run ends.

    Raises:
        AttributionError: what the user can mend; RunError at the end where runs failed.
    """
    options = value_of(given, "--slurm-file")
    default = Slurm() if options is None else Slurm.read(options)

    def study(
        study: Positional[str] = "planted",
        /,
        seeds: int | None = None,
        organisms: int | None = None,
        arms: tuple[str, ...] = (),
        slots: int = 2,
        full: bool = False,
        out: str = root,
        slurm: bool = False,
        slurm_file: str | None = options,
        job: Annotated[Slurm, OmitArgPrefixes] = default,
    ) -> None:
        """Run a study: every arm with every model and seed. Finished runs are kept. Ends with the path of the report.

        Args:
            study: an embedded study, or a JSON file with name, arms (run configs by name), models, seeds and claims.
            seeds: run this many seeds, 0, 1, …, instead of the study's own.
            organisms: run this many of the study's models.
            arms: run these arms alone.
            slots: runs at once, each in a process of one thread; with --slurm, jobs at once.
            full: of an embedded study, more steps and probes, and grafts of single components.
            out: directory that holds studies.
            slurm: do the runs as one array of jobs of a Slurm cluster, and wait for them; the same command waits again.
            slurm_file: JSON of what is asked of Slurm for each run, by the names of the flags below, which replace it.
        """
        for name, count in (("seeds", seeds), ("organisms", organisms), ("slots", slots)):
            if count is not None and count < 1:
                raise ConfigError(f"{count} {name} asked for; expected at least 1")
        if not slurm and job != Slurm():
            raise ConfigError("options of Slurm are given and --slurm is not; add it, or leave them out")
        found = Study.read(study) if study.endswith(".json") else embedded(study, out, full=full)
        found = found.only(seeds=seeds, models=organisms, arms=arms)
        failed = run_study(found, out, slots=slots, slurm=job if slurm else None, tell=tell)
        if len(failed) < sum(1 for _ in jobs(found, out)):
            print(study_report(conclude(found, out, failed)))
        if failed:
            raise RunError(failures(failed))

    tyro.cli(study, args=given, prog="attribution study")


def failures(failed: Mapping[Job, str]) -> str:
    """Which runs failed, why, and where the log of each is."""
    count = f"{len(failed)} run{'s' if len(failed) > 1 else ''}"
    lines = [f"{count} failed, the others are kept; the same command tries again what failed"]
    for job, error in list(failed.items())[:_SHOWN]:
        log = log_of(job.path)
        lines.append(f"  {job.path}: {error}" + (f" (log: {log})" if log else ""))
    if len(failed) > _SHOWN:
        lines.append(f"  and {len(failed) - _SHOWN} more, which `attribution ls` lists")
    return "\n".join(lines)
