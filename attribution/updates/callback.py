"""The recorder in any Hugging Face or TRL trainer, unchanged: `callbacks=[RecorderCallback(...)]`.

The callback only attaches and detaches, and passes on what the trainer says about a step; what it records comes from the
optimizer's own hooks.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from attribution.errors import RecordError
from attribution.updates.recorder import STATE, Recorder
from attribution.updates.seam import REPLICAS


class RecorderCallback(TrainerCallback):
    """Records a trainer's run. Takes the arguments of `Recorder`; the tokenizer defaults to the trainer's.

    Beside every checkpoint that the trainer writes, the recorder writes what it needs to go on from there: give the
    checkpoint's folder to both, as `resume` here and as `resume_from_checkpoint` to the trainer. After an exception in
    training, call `failed(error)`, which closes the record with what it holds.

    Args:
        path: as `Recorder` takes it.
        checkpoint_seconds: ask the trainer for a checkpoint when the last one is older than this; None: never.
        keep: how many checkpoints that can be gone on from stay, the newest; older ones and what cannot be gone on from are
            removed. None: the trainer keeps them as it is told.
        boundary: the trainer can be resumed after multiples of so many steps; ask for one, and write beside one, only there.
        stopping: asked after every step: an error to stop with, once a checkpoint is written where one can be; None: go on.
        settings: of the `Recorder`.
    """

    def __init__(
        self,
        path: Any,
        *,
        checkpoint_seconds: float | None = None,
        keep: int | None = None,
        boundary: int = 1,
        stopping: Callable[[], BaseException | None] = lambda: None,
        **settings: Any,
    ):
        self.recorder = Recorder(path, **settings)
        self._open = False
        self._checkpoint_seconds, self._boundary, self._saved = checkpoint_seconds, boundary, time.monotonic()
        self._keep, self._stopping = keep, stopping
        self._before = 0  # steps the trainer had made before this record began

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.n_gpu > 1:  # the trainer makes replicas of the model that is handed over here
            raise RecordError(REPLICAS)
        if self.recorder.tokenizer is None:
            self.recorder.tokenizer = kwargs.get("processing_class")
        self.recorder.begin(kwargs["model"], kwargs["optimizer"])
        self._open, self._before = True, state.global_step - self.recorder.steps
        if self.recorder.steps and self._before:
            error = RecordError(
                f"the record goes on from step {self.recorder.steps} and the trainer from {state.global_step}; give both the "
                "same checkpoint"
            )
            self.failed(error)
            raise error
        if args.load_best_model_at_end:
            self.recorder.note("After the last step the trainer put its best model back; what was read last is of that one.")

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        expected = state.global_step + 1 - self._before
        if self.recorder.steps == expected - 1 and getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.recorder.skipped()  # its loss scaler met an overflow and left the optimizer alone
        if self.recorder.steps != expected:
            raise RecordError(
                f"the trainer made step {expected}, the optimizer's hooks saw {self.recorder.steps}; this optimizer steps "
                "where it cannot be seen (inside backward, or layer by layer): train with a plain torch optimizer"
            )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._open:
            self.recorder.logged(kwargs.get("logs") or {})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        error = self._stopping()
        late = self._checkpoint_seconds is not None and time.monotonic() - self._saved >= self._checkpoint_seconds
        if (late or error is not None) and state.global_step < state.max_steps and state.global_step % self._boundary == 0:
            control.should_save = True
        elif error is not None:
            raise error

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        whole = state.global_step % self._boundary == 0  # also of those that the trainer writes unasked
        there = folder.is_dir()  # where a trainer keeps a few by their dates, the newest is gone once the clock was set back
        if self._open and whole and there and state.global_step < state.max_steps:  # from the last one it would go one too far
            self._save(folder)
            self._saved = time.monotonic()
        if (error := self._stopping()) is not None:
            raise error

    def _save(self, folder: Path) -> None:
        if not self.recorder.resumable:
            self.recorder.note("Checkpoints: several processes train the model, so that its recording cannot go on from one.")
            return
        self.recorder.save(folder)
        if self._keep is not None:
            _remove_older(folder, self._keep)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._open = False
        self.recorder.end()

    def failed(self, error: BaseException) -> None:
        """Detach, and close the record as failed or interrupted."""
        if self._open:
            self._open = False
            self.recorder.end(error)


def _remove_older(newest: Path, keep: int) -> None:
    """Keep so many checkpoints that a record can go on from, by their steps: dates are no order once the clock was set."""
    found = {int(each.name.rpartition("-")[2]): each for each in newest.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*[0-9]")}
    whole = sorted((step for step, folder in found.items() if (folder / STATE).exists()), reverse=True)
    for step, folder in found.items():
        if step not in whole[:keep]:
            (folder / STATE).unlink(missing_ok=True)  # first: half of it is none
            shutil.rmtree(folder, ignore_errors=True)
