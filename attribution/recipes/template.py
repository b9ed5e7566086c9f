"""A recipe to start from: supervised finetuning that counts the first tokens of every response more than the later ones.

A recipe says how to train; everything else – what is recorded, which arms there are, what is concluded – is done for it. What
you have to write is `build`, which returns a trainer: an object with a `train()` method whose optimizer is a torch optimizer.
TRL's and Hugging Face's trainers are such objects, and so are subclasses of them, as here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from attribution.errors import DataError
from attribution.recipes import Setting
from attribution.recipes.trainer import TrainerRecipe

if TYPE_CHECKING:
    from attribution.samples import Sample


class Template(TrainerRecipe):
    """Settings of this recipe: plain values, which stand in the run's config and on the command line (--training.fading 0.3).

    `TrainerRecipe` brings those that all trainers have, steps, learning rate, LoRA and the rest. Add your own below.

    Attributes:
        fading: the weight of every token of the response, as a fraction of the weight of the token before it.
    """

    fading: float = Field(default=0.5, gt=0, le=1)

    def prepare(self, samples: Sequence[Sample], model: Any, tokenizer: Any, seed: int) -> list[Sample]:
        """What is trained on, made of the samples that were given; causes before training are read on these.

        Here as they are. A recipe that samples responses from the model, drops contexts or filters does it here; `seed` is
        the only source of chance it may use. Leave this method out if you change nothing.
        """
        return list(samples)

    def check(self, setting: Setting) -> None:
        """Refuse, in one sentence, what cannot be trained on, before anything is written. May be left out too."""
        super().check(setting)
        if any(sample.weight != 1 for sample in setting.samples):
            raise DataError("this recipe weighs tokens, not samples; leave the weights of samples out")

    def build(self, setting: Setting) -> Any:
        """The trainer. Import torch and trainers here and not above, so that listing recipes stays quick.

        `setting` holds the model, to be trained in place, the tokenizer, the samples and the same as tokens, the seed, a
        directory for files, and callbacks, which must reach the trainer as they are: the recorder is one of them.
        `self.assembled` makes a trainer from all that; without it, pass `callbacks=setting.callbacks` yourself.
        """
        import torch
        from datasets import Dataset
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        fading = self.fading

        class Fading(SFTTrainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                labels = inputs["labels"][:, 1:]
                outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
                logits = outputs.logits[:, :-1]
                trained = labels != -100
                losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # 0 where -100
                place = trained.cumsum(1) - 1  # of a token in its response
                # All passes of one optimizer step are added up: divide by what all of them hold, not by what this one does.
                tokens = trained.sum() if num_items_in_batch is None else num_items_in_batch
                loss = (fading ** place.clamp(min=0) * losses).sum() / tokens
                return (loss, outputs) if return_outputs else loss

        rows = Dataset.from_list([{"input_ids": list(e.ids), "labels": e.labels} for e in setting.encoded])
        return self.assembled(setting, Fading, SFTConfig, {"max_length": None}, train_dataset=rows)
