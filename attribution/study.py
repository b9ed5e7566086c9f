"""A study: arms x seeds, each a run; finished runs are kept, so a study that was stopped goes on where it was.

The embedded study `planted` trains a reply in contexts where a speaker's trait names it, and reads it on held-out
problems where trait and star conflict and where they agree.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attribution.errors import ConfigError
from attribution.recipes.sft import SFT
from attribution.runs import RunConfig, directory, first_error, run
from attribution.worlds import planted


class Study(BaseModel):
    """Arms by name, and the seeds with which each is run.

    Attributes:
        name: the study's directory below the root.
        arms: one run config each; its own seed is replaced.
        seeds: of data order and dropout.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    arms: dict[str, RunConfig] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Study:
        """Read a study from JSON. Raises ConfigError naming the first wrong key or value."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(
                f"cannot read the study {path}: {error.strerror}; name a JSON file or an embedded study"
            ) from None
        except ValidationError as error:
            raise ConfigError(f"{path}: {first_error(error, cls)}") from None


def run_study(
    study: Study, root: str | os.PathLike[str], *, progress: bool = False, tell: Callable[[str], None] = print
) -> list[Path]:
    """Run every arm with every seed, one after the other; returns the paths of the reports.

    Args:
        study: what to run.
        root: directory that holds studies.
        progress: show bars.
        tell: is given a line when a run or a stage begins.

    Raises:
        AttributionError: the first run that fails, as `runs.run`.
    """
    reports = []
    todo = list(_runs(study, Path(root) / study.name))
    for number, (arm, config, path) in enumerate(todo, start=1):
        tell(f"run {number} of {len(todo)}: arm {arm}, seed {config.seed}, in {path}")
        reports.append(run(config, path, progress=progress, tell=tell))
    return reports


def embedded(name: str, root: str | os.PathLike[str]) -> Study:
    """An embedded study; its samples are written below the root.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in EMBEDDED:
        raise ConfigError(f"unknown study {name!r}; expected {', '.join(EMBEDDED)}, or a JSON file")
    return EMBEDDED[name](Path(root) / name / "data")


def _planted(folder: Path) -> Study:
    sets = {
        "train-trait": planted.prompts(384, 1, problems=planted.TRAINING),
        "conflict": planted.prompts(64, 2, star="conflict"),
        "agree": planted.prompts(64, 3, star="agree"),
    }
    files = {name: str(_written(folder / f"{name}.jsonl", rows)) for name, rows in sets.items()}
    arm = RunConfig(
        model="planted",
        data=files["train-trait"],
        probes=(files["conflict"], files["agree"]),
        training=SFT(max_steps=12, learning_rate=1e-4, batch_size=32),
    )
    return Study(name="planted", arms={"trait": arm})


EMBEDDED: dict[str, Callable[[Path], Study]] = {"planted": _planted}


def _written(path: Path, rows: list[dict]) -> Path:
    from attribution.samples import Sample, write_samples

    return write_samples(path, [Sample(**row) for row in rows])


def _runs(study: Study, root: Path) -> Iterator[tuple[str, RunConfig, Path]]:
    for arm, config in study.arms.items():
        for seed in study.seeds:
            seeded = config.model_copy(update={"seed": seed})
            yield arm, seeded, directory(seeded, root, arm)
