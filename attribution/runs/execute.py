"""One run from its config to its report: cause, train and record, graft, report; torch is imported when one begins."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribution.runs import checkpoints, stages
from attribution.runs.config import RunConfig, digests
from attribution.runs.faults import explained
from attribution.runs.stopping import Stopping, terminable
from attribution.store import TRAINING, RunWriter, hold, is_finished, read_run

if TYPE_CHECKING:
    import pandas as pd


def run(
    config: RunConfig,
    path: str | os.PathLike[str],
    *,
    progress: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    page: bool = True,
) -> Path:
    """Do one run and write its report. A finished run with the same config is left as it is.

    Everything the user gave is checked before anything is written. A run that broke off, however that happened, goes on from
    its newest checkpoint that is whole; one without begins anew, and what it had recorded is kept beside it. SIGTERM ends
    the step under way, writes a checkpoint and stops; Ctrl-C stops at once.

    Args:
        config: what to do.
        path: the run's directory.
        progress: show bars.
        tell: is given a line when a stage begins.
        page: write the report; a study of many runs has one of its own.

    Returns:
        Path of the report, or of the run where none was asked for.

    Raises:
        AttributionError: anything a user can mend, in one sentence; what was recorded until then stays readable.
    """
    from attribution.reports import report

    path = Path(path)
    config = config.model_copy(update={"inputs": digests(config)})
    written = config.model_dump(mode="json")
    if is_finished(path) and read_run(path).config == written:
        tidy(config, path)
        return report(path) if page else path
    given = stages.read(config, progress)
    with terminable() as stopping:
        _go(given, path, written, stopping, tell)
    return report(path) if page else path


def tidy(config: RunConfig, path: Path) -> None:
    """Remove what a finished run needs no more; one that was killed at its very end left it."""
    if config.checkpoint_seconds is not None:
        checkpoints.remove_all(path)


def _go(given: stages.Material, path: Path, written: dict[str, Any], stopping: Stopping, tell: Callable[[str], None]) -> None:
    """Begin, or go on, and finish."""
    checkpoint, said, lock = None, [], hold(path, written)
    if lock is not None:
        checkpoint, said = checkpoints.choose(path)
        said.append(
            f"going on from {checkpoint.name}" if checkpoint else "beginning anew; what was recorded is kept beside this"
        )
    parts = None if checkpoint is None else checkpoints.state(checkpoint)["parts"]
    writer, doing = RunWriter(path, written, parts=parts, lock=lock), "beginning"

    def stage(line: str) -> None:
        nonlocal doing
        doing = line.partition(",")[0]
        writer.log(line)
        tell(line)

    try:
        for line in said:
            stage(line)
        _stages(given, writer, checkpoint, stopping, stage)
    except BaseException as error:
        told = explained(error, path, doing)
        writer.fail(told)
        if told is error:
            raise
        raise told from error
    finally:
        writer.close()
    tidy(given.config, path)


def _stages(
    given: stages.Material, writer: RunWriter, checkpoint: Path | None, stopping: Stopping, stage: Callable[[str], None]
) -> None:
    from attribution.chat import is_bare
    from attribution.updates.starts import taken

    config, some, known = given.config, given.watched[0].samples, taken()
    if is_bare([*some, *given.probes[0].samples], given.tokenizer):
        stage(f"{config.model} has a chat template, in which these samples are not; `attribution chat` renders them in it")
    if checkpoint is None:
        stage(f"ablating {stages.CAUSES[config.singles]} on {len(some)} training samples, before training")
        writer.add("influence", stages.causes(given).assign(step=0, probe=TRAINING))
        if config.forecast:
            stage("forecasting what the first step would strengthen")
            writer.add("forecasts", _forecast(config))
        stages.read_words(given, writer, "before", given.model)
        writer.flush()
    again = f", again from {checkpoint.name}" if checkpoint else ""
    stage(f"training with {config.recipe}, and recording on {len(given.probes)} probe sets{again}")
    result, tuned = stages.train(given, writer, checkpoint, stopping)
    gc.collect()  # trainers hold themselves in circles, and with them the optimizer and the recorder's copies
    stages.read_words(given, writer, "after", tuned)
    stage("grafting")
    result |= stages.graft(given, writer, tuned)
    if known := taken() - known:
        writer.log(f"{known} tables of before training are those of an earlier run, which began at the same model")
    stage("finished")
    writer.finish({**result, "causes": {"samples": len(some), "metric": given.cause_metric, "reference": "zero"}})


def _forecast(config: RunConfig) -> pd.DataFrame:
    """What the first step would strengthen: named sets, each on the probe sets that it belongs to."""
    from attribution.runs.forecast import forecast_of

    found = forecast_of(config, top=0, compared=False).sets
    if config.sets_on is None:
        return found
    pairs = zip(found["probe"], found["set"], strict=True)
    return found[[name in config.sets_on.get(probe, ()) for probe, name in pairs]]
