"""Trainers that sample completions, watched: which step trained on which completion, its reward, advantage and ratio.

A completion is known by its place in the batch that was sampled, in a column of its own that is shuffled and split with the
rest, never by its text. Knows GRPO's and RLOO's methods; knows nothing about what is done with what it tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import RepeatSampler

from attribution.capture import evaluating
from attribution.errors import ConfigError
from attribution.recipes.phases import PhasedTrainer
from attribution.recipes.rewards import Reward
from attribution.samples import Completion, Encoded, Sample, encode

if TYPE_CHECKING:
    from attribution.updates.recorder import Recorder

_PLACE = "place"  # of a completion in the batch that was sampled


class _Prompts(RepeatSampler):
    """TRL's order of prompts, which a resumed training can enter in any epoch."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


class SamplingTrainer(PhasedTrainer):
    """Stands before TRL's GRPOTrainer or RLOOTrainer, see `phases.phased`.

    Attributes:
        reward: the only reward function.
        samples: that prompts come from, by the column `sample`.
        recorder: is told of every completion that a step trains on.
        shuffled: whether advantages are dealt out anew among the completions sampled together.
    """

    reward: Reward
    samples: Sequence[Sample]
    recorder: Recorder | None
    shuffled: bool

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> _Prompts:
        own: Any = super()._get_train_sampler(*args, **kwargs)
        return _Prompts(own.data_source, own.mini_repeat_count, own.batch_size, own.repeat_count, own.shuffle, own.seed)

    def _generate(self, prompts: list) -> Any:
        with self.phases.during("sample"):
            return super()._generate(prompts)  # pyright: ignore[reportAttributeAccessIssue]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)  # pyright: ignore[reportAttributeAccessIssue]
        self._from = [row["sample"] for row in inputs]
        self._rewards, self._texts = self.reward.last, self.reward.texts
        advantages = batch["advantages"]
        if self.shuffled:
            draw = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
            batch["advantages"] = advantages[torch.randperm(len(advantages), generator=draw).to(advantages.device)]
        batch[_PLACE] = torch.arange(len(inputs), device=advantages.device)
        return batch

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.phases.now == "update":
            found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            self._logps = found[0].detach()
            return found
        own = model is self.model or model is self.model_wrapped
        with self.phases.during("old" if own and not self.phases.without_adapters else "reference"):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.recorder is not None and model.training:
            self.recorder.completed(self._completions(inputs))
        return loss

    def _completions(self, inputs: dict[str, Any]) -> list[Completion]:
        """What one forward pass trains on."""
        ratios = self._ratios(inputs)
        found = []
        for row, place in enumerate(inputs[_PLACE].tolist()):
            prompt, mask = inputs["prompt_ids"][row], inputs["prompt_mask"][row].bool()
            text, done = inputs["completion_ids"][row], inputs["completion_mask"][row].bool()
            start = int(mask.sum())
            ids = (*prompt[mask].tolist(), *text[done].tolist())
            sample = self._from[place]
            found.append(
                Completion(
                    sample=sample,
                    prompt=self.samples[sample].whole_prompt,
                    text=self._texts[place],
                    encoded=Encoded(ids, start, inputs["advantages"][row].item(), ()),
                    reward=self._rewards[place],
                    ratio=ratios[row],
                )
            )
        return found

    def _ratios(self, inputs: dict[str, Any]) -> list[float]:
        """pi(completion) / pi_sampler(completion), as far as the loss sees them differ: 1 where it takes no ratio."""
        new = (self._logps * inputs["completion_mask"]).sum(1)
        if "old_logps" in inputs:  # RLOO
            old = inputs["old_logps"]
        elif inputs.get("old_per_token_logps") is not None:  # GRPO, where sampling and updates are not aligned
            old = (inputs["old_per_token_logps"] * inputs["completion_mask"]).sum(1)
        else:
            old = new
        return (new - old).exp().tolist()


def sampled(
    model: Any, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], *, temperature: float = 1.0, seed: int
) -> list[Sample]:
    """The samples with responses that the model itself gives, of at most as many tokens as those given.

    As text, which is tokenized anew where it is used. Contrasts are left out. The model and all random state stay as they
    were. A sample that stands there several times gets as many responses, drawn independently.

    Raises:
        ConfigError: a temperature that is not above 0.
        DataError: samples that cannot be encoded.
    """
    if not temperature > 0:
        raise ConfigError(f"a temperature of {temperature}; expected more than 0")
    encoded = encode(tokenizer, samples)
    found: dict[int, str] = {}
    alike: dict[tuple[int, int], list[int]] = {}
    for place, each in enumerate(encoded):
        alike.setdefault((each.start, len(each.ids)), []).append(place)
    with torch.random.fork_rng(), evaluating(model), torch.no_grad():
        torch.manual_seed(seed)
        for (start, length), places in sorted(alike.items()):  # prompts of one length need no padding
            ids = torch.tensor([encoded[place].ids[:start] for place in places], device=model.device)
            done = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
                min_new_tokens=1, max_new_tokens=length - start, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            for place, row in zip(places, done, strict=True):
                said, before = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (row, row[:start]))
                found[place] = said[len(before) :]
    return [sample.model_copy(update={"response": found[place], "contrast": ()}) for place, sample in enumerate(samples)]
