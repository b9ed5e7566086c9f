"""One run from its config to its report: cause, train and record, graft, report."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from attribution.runs import stages
from attribution.runs.config import RunConfig, digests
from attribution.runs.forecast import forecast_of
from attribution.store import TRAINING, RunWriter, claim, is_finished, read_run

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

    Everything the user gave is checked before anything is written. A run that was killed goes on from its newest
    checkpoint; one without a checkpoint begins anew, and what it had recorded is kept beside it.

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
        return report(path) if page else path
    given = stages.read(config, progress)
    checkpoint = stages.newest_checkpoint(path)
    if checkpoint is None:
        claim(path, written)
    writer = RunWriter(path, written, parts=None if checkpoint is None else stages.kept_parts(checkpoint))

    def stage(line: str) -> None:
        writer.log(line)
        tell(line)

    try:
        some = given.watched[0].samples
        if checkpoint is None:
            stage(f"ablating {stages.CAUSES[config.singles]} on {len(some)} training samples, before training")
            writer.add("influence", stages.causes(given).table.assign(step=0, probe=TRAINING))
            if config.forecast:
                stage("forecasting what the first step would strengthen")
                writer.add("forecasts", _forecast(config))
            stages.read_words(given, writer, "before", given.model)
            writer.flush()
        again = f", again from {checkpoint.name}" if checkpoint else ""
        stage(f"training with {config.recipe}, and recording on {len(given.probes)} probe sets{again}")
        result, tuned = stages.train(given, writer, checkpoint)
        gc.collect()  # trainers hold themselves in circles, and with them the optimizer and the recorder's copies
        stages.read_words(given, writer, "after", tuned)
        stage("grafting")
        result |= stages.graft(given, writer, tuned)
        stage("finished")
        writer.finish({
            **result, "causes": {"samples": len(some), "metric": given.cause_metric, "reference": "zero"}
        })  # fmt: skip
        if config.checkpoint_seconds is not None:
            stages.remove_checkpoints(path)
    except BaseException as error:
        writer.log(f"{type(error).__name__}: {error}")
        writer.flush()
        if read_run(path).status["state"] == "running":
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            writer.status(state, error=f"{type(error).__name__}: {error}")
        raise
    finally:
        writer.close()
    return report(path) if page else path


def _forecast(config: RunConfig) -> pd.DataFrame:
    """What the first step would strengthen: named sets, each on the probe sets that it belongs to."""
    found = forecast_of(config, top=0, compared=False).sets
    if config.sets_on is None:
        return found
    pairs = zip(found["probe"], found["set"], strict=True)
    return found[[name in config.sets_on.get(probe, ()) for probe, name in pairs]]
