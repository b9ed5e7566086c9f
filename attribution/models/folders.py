"""What is looked at in a model's folder before anything opens it: a folder from somewhere else is data, and runs no code.

Knows the files that transformers would open by themselves; knows nothing about architectures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

from attribution.errors import ModelError
from attribution.texts import content, parsed

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_ADAPTERS = "adapter_config.json"
MOST = {  # more of these than any model has would take memory and hours before a single weight is looked at
    "num_hidden_layers": 1_024, "n_layer": 1_024, "num_layers": 1_024, "num_labels": 1_000_000, "hidden_size": 10_000_000,
}  # fmt: skip


def check_config(name: str, source: Path | str) -> None:
    """Refuse what a config.json must not make transformers do: run code of others, or build without end.

    Args:
        name: as the model was asked for.
        source: where it is.

    Raises:
        ModelError: a value of another type than configs have, sizes beyond `MOST`, or a kernel to be fetched and run.
        Exception: whatever transformers raises where there is no config that can be read.
    """
    given, _ = PreTrainedConfig.get_config_dict(source)
    if not isinstance(given, Mapping):
        raise ModelError(f"the config of model {name!r} is no JSON object; expected one that save_pretrained wrote")
    declared = given.get("architectures") or []
    if not (isinstance(declared, list) and all(isinstance(each, str) for each in declared)):
        raise ModelError(f"the config of model {name!r} has architectures {str(declared)[:80]}; expected a list of class names")
    for key, value in given.items():
        if key.strip("_").startswith(("attn_implementation", "experts_implementation")) and "/" in json.dumps(value):
            raise ModelError(
                f"the config of model {name!r} asks for a kernel of others ({key}: {str(value)[:80]}), which is code; remove "
                f"{key} from its config.json"
            )
    counts = [(key, given.get(key)) for key in MOST]
    kinds = given.get("attention_types")  # of GPT-Neo: [[kinds], so many times]
    counts += (
        [("num_layers", each[1]) for each in kinds if isinstance(each, list) and len(each) == 2]
        if isinstance(kinds, list)
        else []
    )
    for key, value in counts:
        if isinstance(value, int | float) and value > MOST[key]:
            raise ModelError(f"the config of model {name!r} has {key} {value}; expected at most {MOST[key]}")


def check_weights(name: str, source: Path | str, allow_pickle: bool) -> None:
    """Refuse weights that are not all in safetensors, or not all in the folder.

    Args:
        name: as the model was asked for.
        source: where it is.
        allow_pickle: weights may be pickles.

    Raises:
        ModelError: no weights, pickles that are not allowed, adapters of another model, or shards elsewhere.
    """
    if isinstance(source, Path):
        _check_folder(source, allow_pickle)
        whole = (source / SAFE_WEIGHTS_NAME).is_file()
        indexes = [] if whole else [source / each for each in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)]
        found = [index for index in indexes if index.exists()]
    else:
        cached = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        found = [] if cached is None else [Path(cached)]
    for index in found:
        for shard in _shards(index):
            if Path(shard).name != shard or "\\" in shard:
                raise ModelError(f"{index.name} of model {name!r} names a shard outside the folder, {shard!r}; put it there")
            if not allow_pickle and not shard.endswith(".safetensors"):
                raise ModelError(
                    f"{index.name} of model {name!r} names {shard!r}, which is not safetensors; convert it (save_pretrained), "
                    "or pass allow_pickle=True (--allow-pickle) if you trust it"
                )


def _shards(index: Path) -> list[str]:
    """The files that an index of shards names."""
    try:
        found = list(parsed(content(index))["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read ({type(error).__name__}: {error}); save the model again") from None
    if other := [each for each in found if not isinstance(each, str)]:
        raise ModelError(f"{index} names {str(other[0])[:80]} as a file; save the model again")
    return list(dict.fromkeys(found))


def _check_folder(folder: Path, allow_pickle: bool) -> None:
    if (folder / _ADAPTERS).exists():
        raise ModelError(
            f"{folder} holds adapters ({_ADAPTERS}), whose model is elsewhere; merge them into it (peft: merge_and_unload) and "
            "name the folder of the whole"
        )
    if list(folder.glob("*.safetensors")):
        return
    pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
    if not pickles:
        raise ModelError(f"{folder} holds no weights; expected model.safetensors")
    if not allow_pickle:
        raise ModelError(
            f"{folder} holds weights only as pickle ({pickles[0]}), which can run code when opened; convert it with "
            "save_pretrained to safetensors, or pass allow_pickle=True (--allow-pickle) if you trust it"
        )
