"""A training step with bergson's callback: the projected gradient of every sample, which is what others record of a step.

It keeps another quantity than the recorder, per sample and not per component, and stands beside it as what a user has today.
bergson is not among the extras, because it asks for CUDA libraries by default: `pip install bergson` where it is wanted.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

WITHOUT = "bergson is not installed (`pip install bergson`)"


def installed() -> bool:
    return find_spec("bergson") is not None


def collecting(model: Any, optimizer: Any, samples: int, path: Path) -> tuple[dict[str, Any], Any, Any]:
    """What the callback needs of a loop: arguments for each forward pass, a call after each step, and one at the end."""
    from bergson.huggingface import GradientCollectorCallback  # type: ignore[import-not-found]

    callback = GradientCollectorCallback(path)
    args, state = SimpleNamespace(__gradient_collection_enabled__=True), SimpleNamespace(epoch=0.0, global_step=0)
    callback.on_train_begin(args, state, None, model=model)
    callback.on_epoch_begin(args, state, None, train_dataloader=SimpleNamespace(dataset=range(samples)))
    return (
        {"_idx": torch.arange(samples)},
        lambda: callback.on_step_end(args, state, None, model=model, optimizer=optimizer),
        lambda: callback.on_train_end(args, state, None),
    )
