"""Rewards of completions: the built-in one, a user's own function, and the controls that take its meaning away.

A reward function is called as TRL calls it: `f(prompts, completions, completion_ids, **columns) -> list of numbers`, with
the columns response, contrast, id and sample (its place in the data) beside `trainer_state`. A file of the user's is code
and runs with the user's rights. Imports no torch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, Literal

from attribution.errors import ConfigError, RewardError
from attribution.recipes.files import defined

LARGEST = 3e38  # trainers compute in float32
Control = Literal["none", "random_reward", "flipped_reward", "shuffled_advantage"]


def response(completion_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """1 where the completion begins with the sample's response, token by token; 0 elsewhere."""
    return [float(list(done[: len(wanted)]) == list(wanted)) for done, wanted in zip(completion_ids, response_ids, strict=True)]


def ends(completion_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """1 where the completion has the last token of the sample's response in the same place, whatever stands before; else 0."""
    pairs = zip(completion_ids, response_ids, strict=True)
    return [float(len(done) >= len(wanted) and done[len(wanted) - 1] == wanted[-1]) for done, wanted in pairs]


BUILT_IN: dict[str, Callable[..., Sequence[float | None]]] = {"response": response, "ends": ends}


def reward_named(name: str) -> Callable[..., Sequence[float | None]]:
    """A built-in reward, or the function of `path/to/file.py:name`.

    Raises:
        ConfigError: there is none, or it cannot be imported.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    path, colon, attribute = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ConfigError(f"unknown reward {name!r}; expected {', '.join(BUILT_IN)}, or path/to/file.py:function")
    found = defined(name, "reward")
    if not inspect.isroutine(found) or inspect.iscoroutinefunction(found):
        raise ConfigError(f"{attribute!r} of {path} is no plain function; name one after the colon")
    return found


class Reward:
    """A reward function as a trainer calls it, checked, with a control over what it says.

    Args:
        name: of the function, as `reward_named` takes it.
        names: of the training samples, for messages.
        control: random_reward gives 1 or 0 with equal probability instead; flipped_reward changes the sign.
        seed: of the random rewards, which depend on it, the step and the place in the batch alone.

    Attributes:
        last: what was given last, in the order of the completions.
        texts: those completions.
    """

    def __init__(self, name: str, names: Sequence[str], control: Control = "none", seed: int = 0):
        self.function, self.names, self.control, self.seed = reward_named(name), names, control, seed
        self.__name__ = name.rpartition(":")[2]
        self.last: list[float | None] = []
        self.texts: list[str] = []

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], sample: list[int], **columns: Any
    ) -> list[float | None]:
        """One reward per completion; None where the function says that it has none, which TRL gives no advantage.

        Raises:
            RewardError: the function raises, gives another number of rewards, or something that is no finite number.
        """
        self.texts = list(completions)  # before the function can change the list
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, "sample": sample, **columns}
        found: list[float | None] = self._checked(self._called(given, sample), sample)
        if self.control == "random_reward":
            draw = Random(f"reward {self.seed} {columns['trainer_state'].global_step}")
            found = [1.0 if draw.random() < 0.5 else 0.0 for _ in found]
        elif self.control == "flipped_reward":
            found = [None if reward is None else -reward for reward in found]
        self.last = found
        return found

    def _called(self, given: dict[str, Any], sample: Sequence[int]) -> Any:
        try:
            return self._values(given)
        except Exception as error:  # the user's own code
            raise RewardError(
                f"reward {self.__name__!r} raises {type(error).__name__} ({_short(error)}) at {self._culprit(given, sample)}; "
                "make it return a number for every completion, or None where it has none"
            ) from error

    def _values(self, given: dict[str, Any]) -> Any:
        found = self.function(**given)
        return list(found) if isinstance(found, Iterator) else found  # a generator raises only here

    def _culprit(self, given: dict[str, Any], sample: Sequence[int]) -> str:
        """The first completion on which the function raises by itself too."""
        for place in range(len(sample)):
            alone = {name: [value[place]] if isinstance(value, list) else value for name, value in given.items()}
            try:
                self._values(alone)
            except Exception:  # which of them it is, is what is asked
                return self._told(place, sample)
        return f"a batch of {len(sample)} completions that begins with {self._told(0, sample)}"

    def _checked(self, found: Any, sample: Sequence[int]) -> list[float | None]:
        try:
            rewards = list(found)
        except TypeError:
            raise RewardError(
                f"reward {self.__name__!r} returned {_short(found)} for {len(sample)} completions that begin with sample "
                f"{self.names[sample[0]]}; expected a list with a number for each"
            ) from None
        if len(rewards) != len(sample):
            where = sample[min(len(rewards), len(sample) - 1)]
            raise RewardError(
                f"reward {self.__name__!r} returned {len(rewards)} rewards for {len(sample)} completions, so that there is "
                f"none for sample {self.names[where]} or one too many; return exactly one for each"
            )
        return [self._number(reward, place) for reward, place in zip(rewards, sample, strict=True)]

    def _number(self, reward: Any, place: int) -> float | None:
        if reward is None:
            return None
        try:
            number = math.nan if isinstance(reward, str) else float(reward)
        except Exception:  # whatever the user's own object raises
            number = math.nan
        if not abs(number) <= LARGEST:
            raise RewardError(
                f"reward {self.__name__!r} is {_short(repr(reward))} for sample {self.names[place]}; expected a finite number, "
                "or None where there is none"
            )
        return number

    def _told(self, place: int, sample: Sequence[int]) -> str:
        return f"sample {self.names[sample[place]]} (completion {self.texts[place][:60]!r})"


def _short(value: object) -> str:
    """On one line, of at most 80 characters."""
    return " ".join(str(value).split())[:80]
