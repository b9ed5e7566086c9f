"""Reinforcement learning: TRL's RLOOTrainer and GRPOTrainer on completions that the model samples, and a reward function.

A training sample's response and contrasts are never trained on; they are there for the reward to look at. Where its
gradient's algebra allows, a control needs no trainer of its own: it is a setting.
"""

from __future__ import annotations

from math import lcm
from typing import Any, Literal

from pydantic import Field

from attribution.errors import ConfigError, DataError
from attribution.recipes import Setting
from attribution.recipes.rewards import Control, Reward, reward_named
from attribution.recipes.trainer import TrainerRecipe

_OWN = {  # arguments of TRL's config on which the order of completions depends: the recipe's settings for them
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "num_iterations": "iterations",
    "num_generations": "generations",
    "generation_batch_size": "trainer.steps_per_generation",
}


class _Sampling(TrainerRecipe):
    """Settings of all that sample.

    Attributes:
        reward: response (1 where the completion begins with the sample's response, else 0), ends (1 where it has the last
            token of that in its place), or path/to/file.py:function, which is called as `recipes.rewards` says.
        control: random_reward and shuffled_advantage take away what a completion has to do with its reward; flipped_reward
            turns it round.
        generations: completions of every prompt, compared among themselves.
        completion_length: tokens of a completion at most.
        temperature: of sampling.
        beta: weight of the penalty on KL to the model before training; 0 needs no such model.
        iterations: how often the completions sampled together are trained on; from the second on the importance ratio is
            not 1.
        epsilon: that ratio is clipped to 1 ± epsilon.
    """

    reward: str = "response"
    control: Control = "none"
    generations: int = Field(default=8, ge=2)
    completion_length: int = Field(default=16, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    beta: float = Field(default=0.0, ge=0)
    iterations: int = Field(default=1, ge=1)
    epsilon: float = Field(default=0.2, gt=0)

    @property
    def boundary(self) -> int:
        per_generation = int(self.trainer.get("steps_per_generation") or self.accumulation) * self.iterations
        return lcm(per_generation, self.accumulation) // self.accumulation

    def check(self, setting: Setting) -> None:
        self.intervention.check(setting, samples=True, adapters=self.lora.rank > 0)
        reward_named(self.reward)
        if named := [name for name in _OWN if name in self.trainer]:
            raise ConfigError(
                f"trainer.{named[0]} is a setting of this recipe, which counts on it; give {_OWN[named[0]]} instead"
            )
        together = self.batch_size * int(self.trainer.get("steps_per_generation") or self.accumulation)
        if together % self.generations:
            raise ConfigError(
                f"{together} completions are sampled together (batch_size x accumulation), which are no whole groups of "
                f"generations={self.generations}; make one a multiple of the other"
            )
        if len(setting.samples) * self.generations < together:
            raise DataError(
                f"{together} completions are sampled together, {self.generations} to a prompt, and there are "
                f"{len(setting.samples)} prompts; lower batch_size or accumulation, or give more samples"
            )
        context = getattr(setting.model.config, "max_position_embeddings", None)
        for sample, encoded in zip(setting.samples, setting.encoded, strict=True):
            if sample.weight != 1:
                raise DataError(f"the weight of a completion is its advantage, a sample has {sample.weight}; leave weights out")
            prompt = list(encoded.ids[: encoded.start])
            if list(setting.tokenizer(text=[sample.whole_prompt])["input_ids"][0]) != prompt:
                raise DataError(
                    f"prompt {sample.whole_prompt[-40:]!r}: this tokenizer ends texts in a token of its own, after which "
                    "nothing can be sampled; set add_eos_token=False"
                )
            if context is not None and encoded.start + self.completion_length > context:
                raise DataError(
                    f"a prompt of {encoded.start} tokens and a completion of {self.completion_length} do not fit the model's "
                    f"context window of {context}; shorten one"
                )

    def _made(self, setting: Setting, trainer: type, config: type, arguments: dict[str, Any]) -> Any:
        from datasets import Dataset

        from attribution.recipes.phases import Phases, phased
        from attribution.recipes.sampling import SamplingTrainer

        named = [sample.id or str(number) for number, sample in enumerate(setting.samples, start=1)]
        reward = Reward(self.reward, named, self.control, setting.seed)
        watched = phased(
            trainer, Phases(self.intervention, setting), SamplingTrainer, reward=reward, samples=setting.samples,
            recorder=setting.recorder, shuffled=self.control == "shuffled_advantage",
        )  # fmt: skip
        rows = [
            {
                "prompt": sample.whole_prompt, "sample": number, "response": sample.response, "contrast": list(sample.contrast),
                "response_ids": list(encoded.ids[encoded.start :]), "id": sample.id,
            }
            for number, (sample, encoded) in enumerate(zip(setting.samples, setting.encoded, strict=True))
        ]  # fmt: skip
        given = {
            "num_generations": self.generations, "max_completion_length": self.completion_length, "beta": self.beta,
            "temperature": self.temperature, "num_iterations": self.iterations, "epsilon": self.epsilon,
            "remove_unused_columns": False, "log_completions": False,
        }  # fmt: skip
        made = self.assembled(
            setting, watched, config, given | arguments, train_dataset=Dataset.from_list(rows), reward_funcs=[reward]
        )
        if made.ref_model is not None:  # TRL opens it anew from where the model came from; it is to be the model as it is
            made.ref_model.load_state_dict(setting.model.state_dict())
        return made


class RLOO(_Sampling):
    """Settings of `rloo`: REINFORCE with the mean reward of a prompt's other completions as baseline (Ahmadian et al. 2024).

    The importance ratio is of whole completions, and is there in every iteration: log-probabilities of the sampler are kept.
    """

    def build(self, setting: Setting) -> Any:
        _no_telemetry()
        from trl.trainer.rloo_config import RLOOConfig
        from trl.trainer.rloo_trainer import RLOOTrainer

        return self._made(setting, RLOOTrainer, RLOOConfig, {})


class GRPO(_Sampling):
    """Settings of `grpo`: group relative policy optimization (Shao et al. 2024).

    Attributes:
        scale_rewards: divide advantages by the standard deviation of rewards in the group, or the batch, or not at all.
        loss: how tokens are averaged, a loss_type of trl.GRPOConfig.
    """

    scale_rewards: Literal["group", "batch", "none"] = "group"
    loss: str = "grpo"

    def build(self, setting: Setting) -> Any:
        _no_telemetry()
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer

        return self._made(setting, GRPOTrainer, GRPOConfig, {"scale_rewards": self.scale_rewards, "loss_type": self.loss})


class REINFORCE(GRPO):
    """Settings of `reinforce`: `grpo` whose advantage is the reward minus its mean over the prompt's completions, no more.

    The loss is summed over tokens, not averaged within a completion (`dr_grpo` of TRL).
    """

    scale_rewards: Literal["group", "batch", "none"] = "none"
    loss: str = "dr_grpo"


def _no_telemetry() -> None:
    import os

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
