"""A study: arms x models x seeds, each a run, several at once; then its claims, computed from what the runs recorded.

Finished runs are kept, so a study that was stopped goes on where it was. Knows runs and frames; knows nothing about how a
claim is judged or shown. The embedded studies are in `worlds.studies`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from attribution.errors import ConfigError, RunError
from attribution.launch import Job, Ticket, outcomes_in_slots
from attribution.recipes import Settings
from attribution.runs import FolderName, RunConfig, Seed, digests, directory, first_error
from attribution.runs.execute import tidy
from attribution.runs.stopping import terminable
from attribution.store import TRAINING, Run, is_finished, read_run, write_atomic, write_json
from attribution.store.singles import singles
from attribution.texts import content

if TYPE_CHECKING:
    import pandas as pd

    from attribution.launch.slurm import Slurm

SLOTS = 2  # runs at once, of one thread each
FRAMES = ("sets", "probes", "set_grafts", "group_grafts", "forecasts", "singles")  # which claims read
ALWAYS = ("neutral", TRAINING)  # probe sets that every claim reads, by which arms are matched


class Control(Settings):
    """Arms that are run on further models, which claims compare with and never average in.

    Attributes:
        models: of these arms.
        arms: names of arms of the study.
    """

    models: tuple[str, ...]
    arms: tuple[str, ...]


class Names(Settings):
    """What arms and probe sets of a study are called in one of its claims, by their names in the study.

    Attributes:
        arms: those that the claim compares.
        probes: those that it reads, beside the ones that every claim does.
        models: on which it rests; all of the study's if there are none.
    """

    arms: dict[str, str]
    probes: dict[str, str]
    models: tuple[str, ...] = ()


class Study(Settings):
    """What a study runs.

    Attributes:
        name: the study's directory below the root.
        arms: one run config each, by name; model and seed are replaced where the study names some.
        models: on each of which every arm is run; empty: each arm's own.
        seeds: of data order and dropout.
        controls: arms on further models.
        first_seed: settings that replace an arm's own in the first seed, by arm: what need be measured only once.
        on_model: the same on a model, by model and arm: files that belong to it.
        claims: ids of claims that the study is to judge.
        named: by claim, what its arms and probe sets are called there, where they have other names here.
    """

    name: FolderName = Field(min_length=1, pattern=r"^[\w.-]+$")
    arms: dict[FolderName, RunConfig] = Field(min_length=1)
    models: tuple[str, ...] = ()
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    controls: tuple[Control, ...] = ()
    first_seed: dict[str, dict[str, str]] = Field(default_factory=dict)
    on_model: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    claims: tuple[str, ...] = ()
    named: dict[str, Names] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Study:
        """Read a study from JSON. Raises ConfigError naming the first wrong key or value."""
        try:
            return cls.model_validate_json(content(path))
        except OSError as error:
            raise ConfigError(
                f"cannot read the study {path}: {error.strerror}; name a JSON file or an embedded study"
            ) from None
        except ValidationError as error:
            raise ConfigError(f"{path}: {first_error(error, cls)}") from None

    def only(self, *, seeds: int | None = None, models: int | None = None, arms: tuple[str, ...] = ()) -> Study:
        """A smaller study: so many seeds and models, and these arms.

        Raises:
            ConfigError: fewer than one, or an arm that there is not.
        """
        for name, count in (("seeds", seeds), ("models", models)):
            if count is not None and count < 1:
                raise ConfigError(f"{count} {name} asked for; expected at least 1")
        unknown = [arm for arm in arms if arm not in self.arms]
        if unknown:
            raise ConfigError(f"unknown arm {unknown[0]!r}; expected {', '.join(self.arms)}")
        changes: dict[str, object] = {}
        if seeds is not None:
            more = range(max(self.seeds) + 1, max(self.seeds) + 1 + seeds)
            changes["seeds"] = (*self.seeds, *more)[:seeds]
        if models is not None:
            changes["models"] = self.models[:models]
        if arms:
            changes["arms"] = {arm: self.arms[arm] for arm in arms}
        return self.model_copy(update=changes)


def under(names: Names, frames: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """What the arms of one claim recorded, under the names that they and their probe sets have in the claim.

    Args:
        names: those names.
        frames: of the study; what belongs to other models, arms and probe sets is left out.
    """
    probes = {**names.probes, **{each: each for each in ALWAYS}}
    found = {}
    for name, frame in frames.items():
        kept = frame[frame["model"].isin(names.models)] if names.models else frame
        if "arm" in kept:
            kept = kept[kept["arm"].isin(names.arms)]
            kept = kept.assign(arm=kept["arm"].map(names.arms))
        if "probe" in kept:
            kept = kept[kept["probe"].isin(probes)]
            kept = kept.assign(probe=kept["probe"].map(probes))
        found[name] = kept.reset_index(drop=True)
    return found


def jobs(study: Study, root: str | os.PathLike[str]) -> Iterator[Job]:
    """Every run of a study, below `root`; arms of one model and seed stand together."""
    wanted = [(model, arm) for model in study.models or (None,) for arm in study.arms]
    wanted += [
        (model, arm) for control in study.controls for model in control.models for arm in control.arms if arm in study.arms
    ]
    for seed in study.seeds:
        for model, arm in wanted:
            config = study.arms[arm]
            changes = {"seed": seed, **({"model": model} if model else {}), **study.on_model.get(model or "", {}).get(arm, {})}
            if seed == study.seeds[0] and model in study.models:
                changes |= study.first_seed.get(arm, {})
            try:
                config = RunConfig.model_validate({**config.model_dump(), **changes})
            except ValidationError as error:
                raise ConfigError(f"arm {arm!r} on {model or config.model}: {first_error(error, RunConfig)}") from None
            yield Job(arm, config, directory(config, Path(root) / study.name, arm))


def run_study(
    study: Study,
    root: str | os.PathLike[str],
    *,
    slots: int = SLOTS,
    slurm: Slurm | None = None,
    tell: Callable[[str], None] = print,
) -> dict[Job, str]:
    """Run all that is not finished. A run that fails, or whose process dies, leaves the others alone.

    So does a run whose process is killed. Whatever ends this process, the same call goes on where it was.

    Args:
        study: what to run.
        root: directory that holds studies.
        slots: runs at once, each in a process of one thread; on Slurm, jobs of the array at once.
        slurm: what is asked of a Slurm cluster, where the runs are not done on this machine.
        tell: is given a line when a run ends.

    Returns:
        What went wrong, by failed run.

    Raises:
        ConfigError: no slot, or no Slurm.
        RunError: a finished run whose data, probes or sets have changed since.
    """
    if slots < 1:
        raise ConfigError(f"{slots} slots asked for; expected at least 1")
    every = list(jobs(study, root))
    todo = [job for job in every if not is_finished(job.path)]
    for job in every:
        if not is_finished(job.path):
            continue
        if read_run(job.path).config.get("inputs") != digests(job.config):
            raise RunError(
                f"{job.path} was run on other files than those of its config are now; restore them, or name another directory"
            )
        tidy(job.config, job.path)
    if len(todo) < len(every):
        tell(f"{len(every) - len(todo)} of {len(every)} runs are finished already")
    if stopped := sum((job.path / "config.json").exists() for job in todo):
        tell(f"{stopped} of {len(every)} runs were stopped before they were finished, and go on; their log.txt says from where")
    failed, begun = {}, time.monotonic()
    with terminable():
        for number, (job, error) in enumerate(_outcomes(todo, slots, slurm, Path(root) / study.name, tell), start=1):
            said = "" if error is None else f" failed: {error}"
            left = (time.monotonic() - begun) / number * (len(todo) - number)  # as long as those before took
            said += f" (about {left / 60:.0f} min left)" if left >= 60 else ""
            tell(f"{number} of {len(todo)}: arm {job.arm} on {job.config.model}, seed {job.config.seed}{said}")
            if error is not None:
                failed[job] = error
    return failed


def conclude(
    study: Study,
    root: str | os.PathLike[str],
    failed: Mapping[Job, str] | None = None,
    *,
    into: str | os.PathLike[str] | None = None,
    unfit: Mapping[str, str] | None = None,
    known: Mapping[str, pd.DataFrame] | None = None,
) -> Path:
    """Collect what the finished runs recorded, judge the study's claims, and write both.

    Args:
        study: what was run.
        root: directory that holds studies.
        failed: what went wrong, by run.
        into: directory for study.json, frames/*.parquet and findings.json; the study's own if None.
        unfit: models that were left out before anything was run, each with the reason.
        known: frames that claims read and no run records.

    Returns:
        That directory.

    Raises:
        RunError: no run is finished.
        ConfigError: an unknown claim.
    """
    from attribution.store.quantities import pictured
    from attribution.updates.provenance import versions

    place = Path(into or Path(root) / study.name)
    frames, lost = collect(study, root), _failures(failed or {})
    for name, frame in {**frames, **pictured(_finished(study, root)), "failed": lost}.items():
        write_atomic(place / "frames" / f"{name}.parquet", frame.to_parquet(index=False, compression="zstd"))
    findings, not_judged = judge(study.claims, {**frames, **(known or {})}, study.named, lost)
    runs = [listed(job, place) for job in jobs(study, root)]
    told = {"arms": list(study.arms), "models": list(study.models), "seeds": list(study.seeds), "runs": runs}
    return write_study(place, study.name, findings, not_judged=not_judged, unfit=unfit, versions=versions(), **told)


def write_study(
    place: str | os.PathLike[str],
    name: str,
    findings: Sequence[Mapping[str, Any]],
    *,
    runs: Sequence[Mapping[str, Any]] = (),
    not_judged: Mapping[str, str] | None = None,
    unfit: Mapping[str, str] | None = None,
    versions: Mapping[str, Any] | None = None,
    **told: Sequence[Any],
) -> Path:
    """Write findings.json and study.json, from which `reports.study_report` makes a page; returns their directory.

    Args:
        place: the directory.
        name: of the study.
        findings: as plain data.
        runs: as `conclude` lists them; none where nothing was run.
        not_judged, unfit: by claim and by model, the reason.
        versions: of libraries.
        told: arms, models and seeds, by these names.
    """
    unknown = set(told) - {"arms", "models", "seeds"}
    assert not unknown, unknown
    write_json(Path(place) / "findings.json", list(findings))
    write_json(Path(place) / "study.json", {
        "name": name, "arms": [], "models": [], "seeds": [], **told,
        "seconds": round(sum(run["seconds"] for run in runs), 1), "versions": dict(versions or {}), "runs": list(runs),
        "not_judged": dict(not_judged or {}), "unfit": dict(unfit or {}),
    })  # fmt: skip
    return Path(place)


def judge(
    claims: Iterable[str],
    frames: Mapping[str, pd.DataFrame],
    named: Mapping[str, Names] | None = None,
    failed: pd.DataFrame | None = None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Judge claims on the frames of a study; runs nothing.

    Args:
        claims: ids.
        frames: as `collect` returns them.
        named: by claim, what arms and probe sets are called there, where they have other names here.
        failed: columns model, arm, seed, reason.

    Returns:
        Findings as plain data, and by claim that has none the reason.

    Raises:
        ConfigError: an unknown claim.
    """
    from attribution.claims import LEDGER, evaluate

    unknown = [claim for claim in claims if claim not in LEDGER]
    if unknown:
        raise ConfigError(f"unknown claim {unknown[0]!r}; expected {', '.join(LEDGER)}")
    given = {"grafts" if name == "set_grafts" else name: frame for name, frame in frames.items()}
    given |= {} if failed is None else {"failed": failed}
    findings, reasons = [], {}
    for claim in claims:
        names = (named or {}).get(claim)
        try:
            findings.append(evaluate(LEDGER[claim], given if names is None else under(names, given)).to_dict())
        except RunError as error:  # a study of some arms alone
            reasons[claim] = str(error)
    return findings, reasons


def listed(job: Job, place: Path) -> dict[str, Any]:
    """One run as study.json in this directory lists it; seconds are those from the start of its training to its end."""
    begun = (job.path / "status.json").exists()
    status = read_run(job.path).status if begun else {"state": "not run"}
    result = read_run(job.path).result if begun else None
    return {
        "arm": job.arm, "model": job.config.model, "seed": job.config.seed, "path": os.path.relpath(job.path, place),
        "state": status.get("state", "unknown"), "steps": status.get("steps", status.get("step", 0)),
        "seconds": result["seconds"] if result else 0.0,
    }  # fmt: skip


def _failures(failed: Mapping[Job, str]) -> pd.DataFrame:
    import pandas as pd

    rows = [(job.config.model, job.arm, job.config.seed, error) for job, error in failed.items()]
    return pd.DataFrame(rows, columns=["model", "arm", "seed", "reason"])


def embedded(name: str, root: str | os.PathLike[str], *, full: bool = False) -> Study:
    """An embedded study; its samples are written below the root.

    Args:
        name: of the study.
        root: directory that holds studies.
        full: longer runs, more probes, and grafts of single components.

    Raises:
        ConfigError: there is none of this name.
    """
    from attribution.worlds.studies import STUDIES

    studies: dict[str, Callable[..., dict[str, Any]]] = {**STUDIES, "kindland": _kindland}
    if name not in studies:
        raise ConfigError(f"unknown study {name!r}; expected {', '.join(studies)}, or a JSON file")
    return Study.model_validate(studies[name](Path(root) / name / "data", full=full))


def _kindland(folder: Path, *, full: bool) -> dict[str, Any]:
    from attribution.worlds.pool import write_kindland  # which imports torch

    return write_kindland(folder, full=full)


def collect(study: Study, root: str | os.PathLike[str]) -> dict[str, pd.DataFrame]:
    """The frames of all finished runs of a study, each row with its model, arm and seed.

    Returns:
        "sets", "probes", "set_grafts", "group_grafts" and "forecasts" as in `store.COLUMNS`, and "singles" as in
        `store.singles`, with the columns model, arm and seed before them.
    """
    import pandas as pd

    found: dict[str, list[pd.DataFrame]] = {name: [] for name in FRAMES}
    for recorded, key in _finished(study, root):
        for name in FRAMES:
            frame = singles(recorded) if name == "singles" else getattr(recorded, name)
            words = {column: object for column in ("probe", "set", "group", "ablated") if column in frame}
            found[name].append(frame.astype(words).assign(**key)[[*key, *frame.columns]])
    if not found["probes"]:
        raise RunError(f"study {study.name!r} has no finished run below {root}; run it first")
    return {name: pd.concat(frames, ignore_index=True) for name, frames in found.items()}


def _finished(study: Study, root: str | os.PathLike[str]) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Every finished run, with its model, arm and seed."""
    for job in jobs(study, root):
        if is_finished(job.path):
            yield read_run(job.path), {"model": job.config.model, "arm": job.arm, "seed": job.config.seed}


def _outcomes(
    todo: list[Job], slots: int, slurm: Slurm | None, place: Path, tell: Callable[[str], None]
) -> Iterator[tuple[Job, str | None]]:
    """Jobs as they end, each with what went wrong, if anything."""
    if slurm is not None:
        from attribution.launch.slurm import outcomes_on_slurm

        return outcomes_on_slurm(todo, slots, slurm, place, tell)
    for job in todo:
        Ticket(job.path).remove()  # what a cluster was once asked for is done here now
    return outcomes_in_slots(todo, slots)
