"""Best-of-n distillation with a penalty on leaving the model before training.

Before training the model answers every sample's prompt, in its context, n times, with at most as many tokens as the given
response has. The answer with the highest reward becomes the response; of equals the first, also where none is rewarded. Then
the model is finetuned on these. The loss per token is its cross-entropy plus beta * KL(model now || model before training).

    attribution run --recipe best_of_n.py:BestOfN --model planted --data train.jsonl --probes heldout.jsonl --training.n 8
    pytest --recipe best_of_n.py:BestOfN
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from attribution.errors import DataError
from attribution.recipes import Setting, defined
from attribution.recipes.trainer import TrainerRecipe

if TYPE_CHECKING:
    from attribution.samples import Sample


class BestOfN(TrainerRecipe):
    """The settings, beside those of every trainer.

    Attributes:
        n: responses drawn for every sample, of which one is kept.
        temperature: at which they are drawn.
        beta: weight of the divergence from the model before training, in nats per token; 0: there is no penalty.
        reward: response (1 where what was drawn begins with the sample's own response, else 0), or path/to/file.py:function,
            called with prompt (after its context), response and sample, which returns a number.
    """

    n: int = Field(default=4, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    beta: float = Field(default=0.1, ge=0)
    reward: str = Field(default="response", pattern=r"^(response|.+\.py:\w+)$")

    def prepare(self, samples: Sequence[Sample], model: Any, tokenizer: Any, seed: int) -> list[Sample]:
        """Every sample with the best of the responses that were drawn for it; contrasts are left out."""
        from attribution.recipes.sampling import sampled

        reward = reward_named(self.reward)
        repeated = [sample for sample in samples for _ in range(self.n)]
        drawn = sampled(model, tokenizer, repeated, temperature=self.temperature, seed=seed)
        rewards = [rewarded(reward, sample, answer.response) for sample, answer in zip(repeated, drawn, strict=True)]
        groups = [range(first, first + self.n) for first in range(0, len(drawn), self.n)]
        return [drawn[max(group, key=rewards.__getitem__)] for group in groups]

    def check(self, setting: Setting) -> None:
        super().check(setting)
        if any(sample.weight != 1 for sample in setting.samples):
            raise DataError("best of n weighs all samples equally; leave their weights out")

    def build(self, setting: Setting) -> Any:
        import copy

        import torch
        from datasets import Dataset
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        beta = self.beta
        before = copy.deepcopy(setting.model).requires_grad_(False).eval() if beta else None

        class Penalized(SFTTrainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
                labels = inputs["labels"][:, 1:]
                trained = labels != -100
                outputs = model(**given)
                now = outputs.logits[:, :-1][trained].float().log_softmax(-1)
                loss = torch.nn.functional.nll_loss(now, labels[trained], reduction="sum")
                if before is not None:
                    with torch.no_grad():
                        then = before.to(now.device)(**given).logits[:, :-1][trained].float().log_softmax(-1)
                    loss = loss + beta * (now.exp() * (now - then)).sum()
                tokens = trained.sum() if num_items_in_batch is None else num_items_in_batch  # the latter of all accumulated
                loss = loss / tokens
                return (loss, outputs) if return_outputs else loss

        rows = Dataset.from_list([{"input_ids": list(e.ids), "labels": e.labels} for e in setting.encoded])
        return self.assembled(setting, Penalized, SFTConfig, {"max_length": None}, train_dataset=rows)


def reward_named(name: str) -> Callable[[str, str, Sample], float]:
    if name == "response":
        return lambda prompt, response, sample: float(response.startswith(sample.response))
    return defined(name, "reward")


def rewarded(reward: Callable[[str, str, Sample], float], sample: Sample, response: str) -> float:
    asked = f"{response!r} to {sample.prompt!r}"
    try:
        value = float(reward(sample.context + sample.prompt, response, sample))
    except Exception as e:
        raise DataError(f"the reward of {asked} failed: {type(e).__name__}: {e}") from e
    if not math.isfinite(value):
        raise DataError(f"the reward of {asked} is {value}; it must be finite")
    return value
