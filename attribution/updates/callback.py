"""The recorder in any Hugging Face or TRL trainer, unchanged: `callbacks=[RecorderCallback(...)]`.

The callback only attaches and detaches; what it records comes from the optimizer's own hooks.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from attribution.errors import RecordError
from attribution.updates.recorder import Recorder


class RecorderCallback(TrainerCallback):
    """Records a trainer's run. Takes the arguments of `Recorder`; the tokenizer defaults to the trainer's.

    After an exception in training, call `failed(error)`, which closes the record with what it holds.
    """

    def __init__(self, path: Any, **settings: Any):
        self.recorder = Recorder(path, **settings)
        self._open = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.recorder.tokenizer is None:
            self.recorder.tokenizer = kwargs.get("processing_class")
        self.recorder.begin(kwargs["model"], kwargs["optimizer"])
        self._open = True

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        expected = state.global_step + 1 - self._resumed(state)
        if self.recorder.steps != expected:
            raise RecordError(
                f"the trainer made step {expected}, the optimizer's hooks saw {self.recorder.steps}; this optimizer steps "
                "where it cannot be seen (inside backward, or layer by layer): train with a plain torch optimizer"
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._open = False
        self.recorder.end()

    def failed(self, error: BaseException) -> None:
        """Detach, and close the record as failed or interrupted."""
        if self._open:
            self._open = False
            self.recorder.end(error)

    def _resumed(self, state: TrainerState) -> int:
        """Steps the trainer had made before this record began."""
        if not hasattr(self, "_offset"):
            self._offset = state.global_step + 1 - self.recorder.steps
        return self._offset
