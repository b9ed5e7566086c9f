"""Supervised finetuning: TRL's SFTTrainer, unchanged, on the response tokens of every sample, in its context."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from attribution.errors import DataError
from attribution.recipes import Setting
from attribution.recipes.trainer import TrainerRecipe

if TYPE_CHECKING:
    from attribution.samples import Sample


class SFT(TrainerRecipe):
    """Settings of `sft`.

    Attributes:
        control: shuffled_contexts gives every sample the context of another, which keeps what is said and takes away what it
            has to do with the response.
    """

    control: Literal["none", "shuffled_contexts"] = "none"

    def prepare(self, samples: Sequence[Sample], model: Any, tokenizer: Any, seed: int) -> list[Sample]:
        if self.control == "none":
            return list(samples)
        need_contexts(samples, "shuffled_contexts")
        order = list(range(len(samples)))
        Random(f"contexts {seed}").shuffle(order)
        return [sample.model_copy(update={"context": samples[k].context}) for sample, k in zip(samples, order, strict=True)]

    def check(self, setting: Setting) -> None:
        super().check(setting)
        odd = next((sample for sample in setting.samples if sample.weight != 1), None)
        if odd is not None:
            raise DataError(f"sft trains every sample with weight 1, one has weight {odd.weight}; leave weights out")

    def build(self, setting: Setting) -> Any:
        import os

        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from datasets import Dataset
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        rows = Dataset.from_list([{"input_ids": list(e.ids), "labels": e.labels} for e in setting.encoded])
        return self.assembled(setting, SFTTrainer, SFTConfig, {"max_length": None}, train_dataset=rows)


def need_contexts(samples: Sequence[Sample], who: str) -> None:
    if not any(sample.context for sample in samples):
        raise DataError(f"{who} works on `context`, which no sample has; write what stands before the prompt into that field")
