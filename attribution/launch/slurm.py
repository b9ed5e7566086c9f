"""Jobs as one array of a Slurm cluster, through submitit: sbatch scripts, logs, signals and requeueing are its business.

What a run comes to is read from its directory and its ticket, never from Slurm; Slurm is asked only which jobs it still has
(squeue), and of one that is gone without a word, why (sacct). So a second start goes on waiting for what the first asked for.
A job that is preempted, or that reaches its time limit, goes back to the queue and on from the run's newest checkpoint.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from attribution.errors import ConfigError, RunError
from attribution.launch.job import Job, attempt, mark_lost
from attribution.launch.tickets import FOLDER, Ticket
from attribution.runs import first_error
from attribution.store import is_finished

LOOK_SECONDS = 1.0  # between looks at run directories
ASK_SECONDS = 30.0  # between questions to Slurm
_MISSED = 3  # questions in a row in which a job must be missing: its files may come late over a network
_UNITS = {"K", "M", "G", "T"}


class Slurm(BaseModel):
    """What is asked of Slurm for each run.

    Attributes:
        partition: where it runs; by default the cluster's own choice.
        time: its limit, as sbatch takes it: minutes, H:MM:SS or D-HH:MM:SS.
        memory: as sbatch takes it: 16G; by default the cluster's own choice.
        cpus: processors, and as many threads.
        gpus: of the node; the arms' own config says device cuda.
        account: to which it is charged.
        setup: shell commands before the run: module load cuda.
        extra: further options of sbatch, by their long name; with an empty value, an option that takes none.
        requeues: how often a run that reached its time limit goes on; preemptions are not counted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    partition: str | None = None
    time: str = "60"
    memory: str | None = None
    cpus: int = Field(default=1, ge=1)
    gpus: int = Field(default=0, ge=0)
    account: str | None = None
    setup: tuple[str, ...] = ()
    extra: dict[str, str] = Field(default_factory=dict)
    requeues: int = Field(default=3, ge=0)

    @field_validator("time", mode="before")
    @classmethod
    def _a_duration(cls, given: Any) -> str:
        minutes(str(given))
        return str(given)

    @field_validator("memory")
    @classmethod
    def _a_size(cls, given: str | None) -> str | None:
        number = (given or "1").removesuffix("B")
        if not (number[:-1] if number[-1] in _UNITS else number).isdecimal():
            raise ConfigError(f"memory {given!r} is no amount that sbatch takes; expected a number and K, M, G or T, as 16G")
        return given

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Slurm:
        """Read options from JSON. Raises ConfigError naming the first wrong key or value."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read Slurm's options {path}: {error.strerror}; name a JSON file") from None
        except ValidationError as error:
            raise ConfigError(f"{path}: {first_error(error, cls)}") from None


def minutes(given: str) -> int:
    """A time limit of Slurm in minutes, rounded up: M, M:SS, H:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS. Raises ConfigError."""
    days, dash, rest = given.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in (*parts, *([days] if dash else []))) or len(parts) > 3:
        raise ConfigError(f"time {given!r} is no limit that sbatch takes; expected minutes, H:MM:SS or D-HH:MM:SS")
    first = 3600 if dash or len(parts) == 3 else 60
    seconds = sum(int(part) * first // 60**place for place, part in enumerate(parts)) + int(days or 0) * 86400
    if seconds < 1:
        raise ConfigError(f"time {given!r} is no time; expected at least a minute")
    return -(-seconds // 60)


def outcomes_on_slurm(
    todo: Sequence[Job], slots: int, options: Slurm, study: Path, tell: Callable[[str], None]
) -> Iterator[tuple[Job, str | None]]:
    """Do jobs on a Slurm cluster; each as it ends, with what went wrong, if anything.

    Jobs that an earlier start asked for and that Slurm still has are waited for; the others are submitted as one array.

    Args:
        todo: what to do.
        slots: jobs at once.
        options: what is asked for each.
        study: directory of the study, which every node must see under this name.
        tell: is given a line about what was submitted.

    Raises:
        ConfigError: submitit or Slurm is not there, or Slurm refuses the array.
    """
    if not todo:
        return
    submit = _submitter(study / FOLDER, options)
    asked = {job: Ticket(job.path).told.get("job", "") for job in todo if Ticket(job.path).state not in ("", "failed")}
    there = _known(asked.values()) if asked else set()
    if there is None:
        raise ConfigError(f"squeue does not say which of {len(asked)} jobs still wait or run; start again when it answers")
    ids = {job: identity for job, identity in asked.items() if identity in there}
    new = [job for job in todo if job not in ids]
    if ids:
        tell(f"{len(ids)} runs wait or run already, as {_arrays(ids.values())}")
    if new:
        ids |= submit(new, max(slots - len(ids), 1))
        which = f"{len(new)} runs submitted as {_arrays(ids[job] for job in new)}"
        tell(f"{which}, at most {slots} at once; logs in {study / FOLDER}")
    try:
        yield from _waited(ids)
    except KeyboardInterrupt:
        tell(f"{_arrays(ids.values())} of Slurm go on; the same command waits for them again, and scancel stops them")
        raise


class Task:
    """One run as submitit calls it on a node. Plain data alone is pickled.

    Args:
        config: of the run, as JSON.
        path: of the run.
        threads: of torch.
    """

    def __init__(self, config: str, path: str, threads: int = 1):
        self.config, self.path, self.threads = config, path, threads

    def __call__(self) -> None:
        """Do the run, from its newest checkpoint if there is one. Raises RunError if it fails, so that the job does too."""
        import torch

        from attribution.runs.quiet import quiet

        ticket = Ticket(Path(self.path))
        ticket.write("running")
        quiet()
        torch.set_num_threads(self.threads)
        error = attempt(self.config, self.path)
        if error is not None:
            ticket.write("failed", error)
            raise RunError(error)

    def checkpoint(self) -> Any:
        """Called before a job is preempted or reaches its limit; what submitit puts back into the queue.

        The run writes checkpoints of its own (`RunConfig.checkpoint_seconds`), from which the next attempt goes on.
        """
        from submitit.helpers import DelayedSubmission

        Ticket(Path(self.path)).write("queued again")
        return DelayedSubmission(self)


def _submitter(folder: Path, options: Slurm) -> Callable[[list[Job], int], dict[Job, str]]:
    """What submits jobs as one array of so many at once, and says their ids."""
    try:
        import submitit
    except ImportError:
        raise ConfigError(
            "--slurm needs submitit, which is not installed; `pip install 'attribution[slurm]'`, or leave --slurm out"
        ) from None
    missing = [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]
    if missing:
        raise ConfigError(f"--slurm finds no {missing[0]} here; start on a node that submits jobs, or leave --slurm out")
    executor = submitit.SlurmExecutor(folder, max_num_timeout=options.requeues)
    given = {
        "partition": options.partition, "mem": options.memory, "account": options.account,
        "gpus_per_node": options.gpus or None, "setup": list(options.setup) or None,
    }  # fmt: skip
    executor.update_parameters(
        job_name=folder.parent.name, time=minutes(options.time), cpus_per_task=options.cpus,
        additional_parameters={"requeue": True, **{key: value or True for key, value in options.extra.items()}},
        **{key: value for key, value in given.items() if value is not None},
    )  # fmt: skip

    def submit(jobs: list[Job], slots: int) -> dict[Job, str]:
        executor.update_parameters(array_parallelism=slots)
        for job in jobs:
            Ticket(job.path).remove()
        tasks = [Task(job.config.model_dump_json(), str(job.path.absolute()), options.cpus) for job in jobs]
        try:
            submitted = executor.submit_array(tasks)
        except RuntimeError as error:  # submitit's own are of this kind
            raise ConfigError(f"Slurm refuses an array of {len(jobs)} runs: {str(error).strip()}") from None
        for job, each in zip(jobs, submitted, strict=True):
            about = {"model": job.config.model, "recipe": job.config.recipe, "seed": job.config.seed}
            Ticket(job.path).ask({"job": each.job_id, "log": str(each.paths.stderr), **about})
        return {job: each.job_id for job, each in zip(jobs, submitted, strict=True)}

    return submit


def _waited(ids: dict[Job, str]) -> Iterator[tuple[Job, str | None]]:
    """Jobs as they end; those of which Slurm knows no more, and which left no word, failed."""
    waiting, missed, asked = dict(ids), dict.fromkeys(ids, 0), time.monotonic()
    while waiting:
        for job in list(waiting):
            ticket = Ticket(job.path)
            if is_finished(job.path) or ticket.state == "failed":
                del waiting[job]
                yield job, None if is_finished(job.path) else ticket.error
        if waiting and time.monotonic() - asked >= ASK_SECONDS:
            there, asked = _known(waiting.values()), time.monotonic()
            for job, identity in list(waiting.items()) if there is not None else ():
                missed[job] = 0 if identity in there else missed[job] + 1
                if missed[job] >= _MISSED and not is_finished(job.path) and Ticket(job.path).state != "failed":
                    error = f"Slurm ended job {identity} ({_reason(identity)}) before the run did"
                    Ticket(job.path).write("failed", error)
                    mark_lost(job.path, error)
        elif waiting:
            time.sleep(LOOK_SECONDS)


def _known(ids: Iterable[str]) -> set[str] | None:
    """Which of these jobs wait or run; None where Slurm gave no answer."""
    wanted = set(ids)
    arrays = ",".join(sorted({identity.partition("_")[0] for identity in wanted}))
    found = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={arrays}"], capture_output=True, text=True, check=False
    )
    if found.returncode and "Invalid job id" not in found.stderr:  # it says so where it knows none of them any more
        return None
    return wanted & set(found.stdout.split())


def _reason(identity: str) -> str:
    """What Slurm's accounting says of a job that ended: OUT_OF_MEMORY, TIMEOUT, CANCELLED, …"""
    from submitit import SlurmJob

    return SlurmJob.watcher.get_state(identity, mode="force")


def _arrays(ids: Iterable[str]) -> str:
    found = sorted({identity.partition("_")[0] for identity in ids})
    return f"job{'s' if len(found) > 1 else ''} {', '.join(found)}"
