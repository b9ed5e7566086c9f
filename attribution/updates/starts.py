"""What runs that begin at the same model all measure there, measured once in a process.

The runs of a study differ in arms and seeds and begin at a few models, in each of which they would ablate the same components
on the same samples. Inside `shared`, what one run found stands for the others too. It is known by all that it depends on, the
bytes of the weights among it, and a model with hooks shares nothing: what is shared would have come out the same.

Knows weights and what was asked of them; knows nothing about what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn

from attribution.components import Components

AT_MOST = 64  # results that are kept, the newest: those of some ten models

T = TypeVar("T")


@dataclass
class _Kept:
    results: dict[Hashable, Any] = field(default_factory=dict)
    taken: int = 0


_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextmanager
def shared() -> Iterator[None]:
    """Runs inside the block, one after the other, share what they measure before training."""
    token = _kept.set(_Kept())
    try:
        yield
    finally:
        _kept.reset(token)


def taken() -> int:
    """How many results inside the block were those of an earlier run, so far."""
    kept = _kept.get()
    return kept.taken if kept else 0


class Start:
    """A model before training.

    Args:
        components: of the model, as it is now. One that lies in several processes shares nothing, nor does one with hooks.
    """

    def __init__(self, components: Components):
        model = components.parts.model
        self._kept = None if components.together.several or _hooked(model) else _kept.get()
        self._model = b"" if self._kept is None else _digest(model)

    def once(self, make: Callable[[], T], *asked: Hashable) -> T:
        """What `make` returns, or returned where the same was asked of the same model; a copy, but of one level.

        Args:
            make: measures it, and draws no random numbers.
            asked: all that it depends on beside the model.
        """
        if self._kept is None:
            return make()
        results, key = self._kept.results, (self._model, *asked)
        if key in results:
            self._kept.taken += 1
        else:
            results[key] = make()
            while len(results) > AT_MOST:
                del results[next(iter(results))]
        return copy(results[key])


def _hooked(model: nn.Module) -> bool:
    """Whether a reading runs anything beside the modules' own code. Trainers wrap the whole model, which no reading calls."""
    inner = (module for module in model.modules() if module is not model)
    return any(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in inner)


def _digest(model: nn.Module) -> bytes:
    """Of everything that a forward pass of the model depends on."""
    found = blake2b(digest_size=16)
    config: Any = model.config
    found.update(f"{model!r} {config._attn_implementation} {config.to_json_string(use_diff=False)}".encode())
    for name, module in model.named_modules():  # what `repr` may not show: the number that scores are multiplied by, say
        own = {key: value for key, value in vars(module).items() if key != "training"}
        plain = {key: value for key, value in own.items() if isinstance(value, int | float | str | tuple)}
        functions = {key: value.__qualname__ for key, value in own.items() if isinstance(value, FunctionType)}
        found.update(f"{name} {plain} {functions}".encode())
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device}".encode())
        found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return found.digest()
