"""TRL's DPOTrainer, watched: how much a step pushed each response of a pair, and the reward that the loss implies.

Knows DPOTrainer's batches, in which chosen responses stand before rejected ones; knows nothing about what is done with what
it tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from trl.trainer.dpo_trainer import DataCollatorForPreference

from attribution.recipes.phases import PhasedTrainer
from attribution.samples import Completion, Encoded

if TYPE_CHECKING:
    from attribution.updates.recorder import Recorder

_PAIR = "pair"


class Pair(NamedTuple):
    """Two responses to one prompt, of which the first is preferred; `sample` is the place of the prompt in the data."""

    sample: int
    prompt: str
    texts: tuple[str, str]
    encoded: tuple[Encoded, Encoded]


@dataclass
class NumberedPairs(DataCollatorForPreference):
    """The trainer's own collator, which lets the number of every pair through."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**super().torch_call(examples), _PAIR: torch.tensor([example[_PAIR] for example in examples])}


class PreferringTrainer(PhasedTrainer):
    """Stands before TRL's DPOTrainer, see `phases.phased`.

    Attributes:
        pairs: that are trained on, by the column `pair`.
        recorder: is told of both responses of every pair that a step trains on.
    """

    pairs: Sequence[Pair]
    recorder: Recorder | None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._pushed: list[Tensor] = []
        loss = super().training_step(*args, **kwargs)
        if self.recorder is not None:
            self.recorder.completed(self._completions())
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        self._numbers = inputs.pop(_PAIR).tolist()
        outputs: list[Any] = []
        run = {model, self.ref_model} - {None}  # pyright: ignore[reportAttributeAccessIssue]
        handles = [each.register_forward_hook(lambda _module, _args, output: outputs.append(output)) for each in run]
        try:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        policy = outputs[0]
        if policy.log_probs.requires_grad:
            policy.log_probs.register_hook(self._pushed.append)
        log_probs = policy.log_probs.detach().sum(1)
        if len(outputs) > 1:
            reference = outputs[1].log_probs.sum(1)
        else:
            reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        self._rewards = (self.beta * (log_probs - reference)).tolist()  # pyright: ignore[reportAttributeAccessIssue]
        self._mask = policy.label_mask
        return loss

    def _completions(self) -> list[Completion]:
        """Both responses of every pair of one forward pass, chosen ones first."""
        # Of the loss averaged over pairs: minus its derivative by a response's log-probability is that response's advantage.
        scale = len(self._numbers) * self.current_gradient_accumulation_steps
        gradient = (self._pushed[0] * self._mask).sum(1) / self._mask.sum(1)
        advantages = (-scale * gradient).tolist()
        found = []
        for row, advantage in enumerate(advantages):
            side, place = divmod(row, len(self._numbers))
            pair = self.pairs[self._numbers[place]]
            ids = pair.encoded[side]
            found.append(
                Completion(
                    sample=pair.sample,
                    prompt=pair.prompt,
                    text=pair.texts[side],
                    encoded=Encoded(ids.ids, ids.start, advantage, ()),
                    reward=self._rewards[row],
                    ratio=None,
                )
            )
        return found
