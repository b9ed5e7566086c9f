"""Open a causal language model; `anatomy` resolves its row of `architectures` to modules, `identities` refutes a wrong row.

Knows where models are kept and how they open; knows nothing about samples, training or attribution.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from attribution.errors import AttributionError, ConfigError, ModelError
from attribution.models.anatomy import Anatomy, anatomy, output_weights, row_of
from attribution.models.experts import ExpertsOut
from attribution.models.folders import check_config, check_weights
from attribution.models.identities import IDENTITY_TOLERANCE, check

EMBEDDED = Path(__file__).parents[1] / "worlds" / "data"


class Loaded(NamedTuple):
    """What `load` returns; unpacks as `model, tokenizer`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(name: str, *, dtype: str = "float32", device: str = "cpu", allow_pickle: bool = False) -> Loaded:
    """Open a causal language model and its tokenizer, checked and in eval mode.

    Args:
        name: an embedded model (`embedded()` lists them), a local folder, or a hub id.
        dtype: torch dtype name of the weights.
        device: torch device.
        allow_pickle: also accept weights stored as pickles, which can run code when opened.

    Raises:
        ModelError: nothing there, weights not in safetensors, unknown architecture, not a causal LM, or the model
            does not behave as its row in `architectures` says.
        ConfigError: no such dtype, or no such device here.
    """
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"unknown dtype {dtype!r}; expected a torch dtype such as float32 or bfloat16")
    try:
        torch.empty(0, device=device).tolist()  # which the meta device refuses
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used: {first_line(error)}; expected cpu, or cuda where there is one"
        ) from None
    source = locate(name)
    config = configured(name, source)
    check_weights(name, source, allow_pickle)
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, info = opened
    except Exception as error:  # a damaged file makes safetensors, tokenizers and transformers raise almost anything
        raise ModelError(f"model {name!r} cannot be opened: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"model {name!r} lacks weights of a causal language model (missing: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}); name a folder saved from a …ForCausalLM model"
        )
    tokenizer = load_tokenizer(name)
    if model.dtype == torch.float64 and row_of(config.model_type).experts:
        model.set_experts_implementation("batched_mm")  # transformers' default kernel has no float64
    try:
        check(model.to(device).eval())
    except AttributionError:
        raise
    except Exception as error:  # values that only a pass through the model reveals
        raise ModelError(f"model {name!r} cannot be run: {first_line(error)}; correct its config.json") from error
    return Loaded(model, tokenizer)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model alone; `name` as in `load`. Raises ModelError: there is none, or it cannot be opened."""
    try:
        return AutoTokenizer.from_pretrained(locate(name), trust_remote_code=False)
    except Exception as error:  # tokenizers and transformers raise almost anything
        raise ModelError(
            f"the tokenizer of model {name!r} cannot be opened; save one beside the weights with save_pretrained"
        ) from error


def embedded() -> list[str]:
    """Names of the models shipped with the package; a world's first model also answers to the world's bare name."""
    return sorted(f"{path.parent.parent.name}/{path.parent.name}" for path in EMBEDDED.glob("*/*/config.json"))


def locate(name: str) -> Path | str:
    """Folder of an embedded or local model, or the hub id unchanged. Raises ModelError: there is no such folder."""
    try:
        return _located(name)
    except (OSError, RuntimeError, ValueError) as error:  # a name too long for the file system, a home that is not there
        raise ModelError(f"model {name!r} cannot be looked for: {first_line(error)}; name a folder or a hub id") from None


def _located(name: str) -> Path | str:
    inside = EMBEDDED / name
    if not Path(name).is_absolute() and ".." not in Path(name).parts:
        if (inside / "config.json").is_file():
            return inside
        first = sorted(inside.glob("*/config.json"))
        if first:
            return first[0].parent
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} holds no config.json; name a folder written by save_pretrained")
        return folder
    looks_local = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith("/")
    if looks_local or folder.exists():
        raise ModelError(f"no model folder at {name}; embedded models: {', '.join(embedded())}")
    return name


def configured(name: str, source: Path | str) -> Any:
    """The config of a causal language model of a known family.

    Args:
        name: as it was asked for.
        source: where it is, from `locate`.

    Raises:
        ModelError: it cannot be read, is of no causal language model, or of an unknown architecture.
    """
    try:
        check_config(name, source)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # an invalid value raises types of transformers' own
        raise ModelError(
            f"model {name!r} cannot be opened: {first_line(error)}; expected an embedded model "
            f"({', '.join(embedded())}), a folder or a hub id"
        ) from error
    declared = config.architectures or []
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if causal is None or (declared and causal not in declared):
        what = ", ".join(declared) or config.model_type
        raise ModelError(
            f"model {name!r} is not a causal language model ({what}); name one whose class is …ForCausalLM or …LMHeadModel"
        )
    row_of(config.model_type)
    return config


def first_line(error: Exception) -> str:
    """What an error says first, or its type; where its first line only announces what follows, the next one too."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(said[: 2 if said[0].endswith(":") else 1]).rstrip(".")[:500] if said else type(error).__name__


__all__ = [
    "EMBEDDED", "IDENTITY_TOLERANCE", "Anatomy", "ExpertsOut", "Loaded", "anatomy", "check", "configured", "embedded",
    "first_line", "load", "locate", "output_weights",
]  # fmt: skip
