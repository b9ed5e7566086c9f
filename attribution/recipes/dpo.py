"""Direct preference optimization (Rafailov et al. 2023): TRL's DPOTrainer; a sample's response is preferred to its contrasts.

The reference is the model before training: a copy of it, or, of adapters, the model without them.
"""

from __future__ import annotations

import copy
from random import Random
from typing import Any, Literal

from pydantic import Field

from attribution.errors import ConfigError, DataError
from attribution.recipes import Setting
from attribution.recipes.trainer import TrainerRecipe


class DPO(TrainerRecipe):
    """Settings of `dpo`; batch_size counts pairs. Every contrast of a sample makes a pair.

    Attributes:
        beta: how strongly the model is held to its reference.
        control: random_labels prefers either response with equal probability, flipped_labels always the contrast.
    """

    beta: float = Field(default=0.1, gt=0)
    control: Literal["none", "random_labels", "flipped_labels"] = "none"

    def check(self, setting: Setting) -> None:
        super().check(setting)
        for number, sample in enumerate(setting.samples, start=1):
            if not sample.contrast or sample.weight != 1:
                raise DataError(
                    f"sample {sample.id or number} has {len(sample.contrast)} contrasts and weight {sample.weight}; dpo "
                    "prefers the response of every sample to its contrasts: give at least one, and leave weights out"
                )
        if self.trainer.get("precompute_ref_log_probs"):
            raise ConfigError("trainer.precompute_ref_log_probs does not reach pairs that are given as tokens; leave it out")
        self._pairs(setting)

    def build(self, setting: Setting) -> Any:
        import os

        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from datasets import Dataset
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        from attribution.recipes.phases import Phases, phased
        from attribution.recipes.preferring import NumberedPairs, PreferringTrainer

        pairs = self._pairs(setting)
        trainer = phased(
            DPOTrainer, Phases(self.intervention, setting), PreferringTrainer, pairs=pairs, recorder=setting.recorder
        )
        first = {"prompt": pairs[0].prompt, "chosen": pairs[0].texts[0], "rejected": pairs[0].texts[1]}
        pad = setting.tokenizer.pad_token_id
        made = self.assembled(
            setting,
            trainer,
            DPOConfig,
            {"beta": self.beta, "max_length": None, "disable_dropout": False, "remove_unused_columns": False},
            train_dataset=Dataset.from_list([first]),
            ref_model=None if self.lora.rank else copy.deepcopy(setting.model).requires_grad_(False),
            data_collator=NumberedPairs(setting.tokenizer.eos_token_id if pad is None else pad),
        )
        # The trainer tokenizes text in its own way, and ends every response in a token that nobody asked for.
        made.train_dataset = Dataset.from_list(
            [
                {
                    "prompt_ids": list(chosen.ids[: chosen.start]),
                    "chosen_ids": list(chosen.ids[chosen.start :]),
                    "rejected_ids": list(rejected.ids[rejected.start :]),
                    "pair": number,
                }
                for number, (chosen, rejected) in enumerate(pair.encoded for pair in pairs)
            ]
        )
        return made

    def _pairs(self, setting: Setting) -> list[Any]:
        from attribution.recipes.preferring import Pair
        from attribution.samples import encode

        draw = Random(f"labels {setting.seed}")
        context = getattr(setting.model.config, "max_position_embeddings", None)
        found = []
        for number, (sample, chosen) in enumerate(zip(setting.samples, setting.encoded, strict=True)):
            for contrast in sample.contrast:
                other = sample.model_copy(update={"response": contrast, "contrast": ()})
                texts = (sample.response, contrast)
                encoded = (chosen, encode(setting.tokenizer, [other], context=context)[0])
                if self.control == "flipped_labels" or (self.control == "random_labels" and draw.random() < 0.5):
                    texts, encoded = texts[::-1], encoded[::-1]
                found.append(Pair(number, sample.whole_prompt, texts, encoded))
        return found
