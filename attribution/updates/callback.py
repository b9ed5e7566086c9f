"""The recorder in any Hugging Face or TRL trainer, unchanged: `callbacks=[RecorderCallback(...)]`.

The callback only attaches and detaches, and passes on what the trainer says about a step; what it records comes from the
optimizer's own hooks.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from attribution.errors import RecordError
from attribution.updates.recorder import Recorder


class RecorderCallback(TrainerCallback):
    """Records a trainer's run. Takes the arguments of `Recorder`; the tokenizer defaults to the trainer's.

    Beside every checkpoint that the trainer writes, the recorder writes what it needs to go on from there: give the
    checkpoint's folder to both, as `resume` here and as `resume_from_checkpoint` to the trainer. After an exception in
    training, call `failed(error)`, which closes the record with what it holds.

    Args:
        path: as `Recorder` takes it.
        checkpoint_seconds: ask the trainer for a checkpoint when the last one is older than this; None: never.
        boundary: the trainer can be resumed after multiples of so many steps; ask for one, and write beside one, only there.
        settings: of the `Recorder`.
    """

    def __init__(self, path: Any, *, checkpoint_seconds: float | None = None, boundary: int = 1, **settings: Any):
        self.recorder = Recorder(path, **settings)
        self._open = False
        self._checkpoint_seconds, self._boundary, self._saved = checkpoint_seconds, boundary, time.monotonic()
        self._before = 0  # steps the trainer had made before this record began

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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
        late = self._checkpoint_seconds is not None and time.monotonic() - self._saved >= self._checkpoint_seconds
        if late and state.global_step < state.max_steps and state.global_step % self._boundary == 0:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        whole = state.global_step % self._boundary == 0  # also of those that the trainer writes unasked
        if not self._open or not whole or state.global_step >= state.max_steps:  # from its last step it would go one too far
            return
        if not self.recorder.resumable:
            self.recorder.note("Checkpoints: several processes train the model, so that its recording cannot go on from one.")
        else:
            self.recorder.save(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            self._saved = time.monotonic()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._open = False
        self.recorder.end()

    def failed(self, error: BaseException) -> None:
        """Detach, and close the record as failed or interrupted."""
        if self._open:
            self._open = False
            self.recorder.end(error)
