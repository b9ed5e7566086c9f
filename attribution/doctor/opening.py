"""Open what is to be examined: a model with its weights, checked; or the shapes of one from its config alone.

Knows how shapes come to be without weights; knows nothing about what they mean or cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from attribution.errors import ConfigError, ModelError
from attribution.models import check, configured, first_line, load, locate

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Opened:
    """A model to be examined.

    Attributes:
        name: as it was asked for.
        model: on the meta device where nothing was loaded.
        identities: relative error of each identity of `models.check`; None where only the config was read.
    """

    name: str
    model: PreTrainedModel
    identities: dict[str, float] | None

    @property
    def loaded(self) -> bool:
        return self.identities is not None


def opened(name: str, *, meta: bool = False, dtype: str = "float32", device: str = "cpu", allow_pickle: bool = False) -> Opened:
    """Open a model with its weights, or on the meta device where that is asked for or there is nothing but a config.

    Args:
        name: an embedded model, a folder or a hub id.
        meta: read the config alone, so that nothing is allocated.
        dtype, device, allow_pickle: as `models.load` takes them.

    Raises:
        ModelError: it cannot be opened, is no causal language model, or is of an unknown architecture.
        ConfigError: no such dtype or device.
    """
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"unknown dtype {dtype!r}; expected a torch dtype such as float32 or bfloat16")
    source = locate(name)
    bare = isinstance(source, Path) and not any(found for pattern in _WEIGHTS for found in source.glob(pattern))
    if not (meta or bare):
        model = load(name, dtype=dtype, device=device, allow_pickle=allow_pickle).model
        return Opened(name, model, check(model))
    with torch.device("meta"):
        return Opened(name, shaped(configured(name, source), dtype), None)


def shaped(config: Any, dtype: str) -> PreTrainedModel:
    """A model of this config on the device, or under the mode, that is in force around the call."""
    try:
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    except Exception as error:  # a config with wrong values makes model classes raise almost anything
        raise ModelError(
            f"no model can be made from the config of {config.model_type!r}: {first_line(error)}; correct its config.json"
        ) from error
