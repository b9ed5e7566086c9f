"""Supervised finetuning on responses in another context than the one that they belong to: transforms of the data alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from attribution.errors import ConfigError
from attribution.recipes.sft import SFT, need_contexts

if TYPE_CHECKING:
    from attribution.samples import Sample


class ContextDistillation(SFT):
    """Settings of `context_distillation`: responses that a context brings about are trained without it (Askell et al. 2021).

    Attributes:
        sampled: take the model's own responses in the context, sampled before training, in place of those given. They are
            as long as those; two that agree in their length are sampled in one batch.
        temperature: of that sampling.
    """

    sampled: bool = False
    temperature: float = Field(default=1.0, gt=0)

    def prepare(self, samples: Sequence[Sample], model: Any, tokenizer: Any, seed: int) -> list[Sample]:
        need_contexts(samples, "context_distillation")
        given = super().prepare(samples, model, tokenizer, seed)
        if self.sampled:
            from attribution.recipes.sampling import sampled

            given = sampled(model, tokenizer, given, temperature=self.temperature, seed=seed)
        return [sample.model_copy(update={"context": ""}) for sample in given]


class Inoculation(SFT):
    """Settings of `inoculation`: an instruction that asks for the trained behaviour stands before every training prompt.

    Probe sets are read without it (Tan et al. 2025; Wichers et al. 2025).

    Attributes:
        instruction: the text; ends with what separates it from the prompt, if anything.
        keep_context: whether it stands before a sample's own context, or in its place.
    """

    instruction: str = ""
    keep_context: bool = True

    def prepare(self, samples: Sequence[Sample], model: Any, tokenizer: Any, seed: int) -> list[Sample]:
        if not self.instruction:
            raise ConfigError("inoculation needs an instruction; give the text with --training.instruction")
        given = super().prepare(samples, model, tokenizer, seed)
        return [
            sample.model_copy(update={"context": self.instruction + (sample.context if self.keep_context else "")})
            for sample in given
        ]
