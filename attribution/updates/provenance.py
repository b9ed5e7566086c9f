"""Where a record comes from: versions of libraries, and the model's shape. Written into meta.json."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attribution.components import Components

LIBRARIES = ("attribution", "torch", "transformers", "trl", "accelerate", "numpy", "pandas")


def versions() -> dict[str, str]:
    """Python's version and those of the libraries that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def shape(components: Components) -> dict[str, Any]:
    """The model's architecture and sizes."""
    parts = components.parts
    return {
        "type": parts.model.config.model_type,
        "layers": parts.depth,
        "heads": parts.heads,
        "key/value heads": parts.kv_heads,
        "neurons": parts.neurons,
        "vocabulary": parts.vocabulary,
        "tied": parts.tied,
        "parameters": sum(parameter.numel() for parameter in components.stored.values()),
        "dtype": str(parts.unembedding.weight.dtype).removeprefix("torch."),
        "device": str(parts.unembedding.weight.device),
    }
