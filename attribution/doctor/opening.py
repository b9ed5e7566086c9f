"""Open what is to be examined: a model with its weights, checked; or the shapes of one from its config alone.

Knows how shapes come to be without weights; knows nothing about what they mean or cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from attribution.architectures import ARCHITECTURES
from attribution.errors import ConfigError, ModelError
from attribution.models import check, load, locate

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
        return Opened(name, shaped(_config(name, source), dtype), None)


def shaped(config: Any, dtype: str) -> PreTrainedModel:
    """A model of this config on the device, or under the mode, that is in force around the call."""
    try:
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    except Exception as error:  # a config with wrong values makes model classes raise almost anything
        raise ModelError(
            f"no model can be made from the config of {config.model_type!r}: {_first_line(error)}; correct its config.json"
        ) from error


def _config(name: str, source: Path | str) -> Any:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"the config of model {name!r} cannot be read: {_first_line(error)}; name a folder with a config.json, or a hub id"
        ) from error
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if causal is None or (config.architectures and causal not in config.architectures):
        what = ", ".join(config.architectures or [config.model_type])
        raise ModelError(
            f"model {name!r} is not a causal language model ({what}); name one whose class is …ForCausalLM or …LMHeadModel"
        )
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"unknown architecture {config.model_type!r}; known: {known}")
    return config


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
