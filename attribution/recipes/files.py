"""Files of the user's own, named as `path/to/file.py:name`: they are code and run with the user's rights. Imports no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from attribution.errors import ConfigError


def defined(name: str, what: str) -> Any:
    """What `path/to/file.py:name` defines under that name.

    Args:
        name: path and name.
        what: the kind of thing it should be, for messages: "recipe", "reward".

    Raises:
        ConfigError: there is no such file, it cannot be imported, or it defines no such name.
    """
    path, _, attribute = name.rpartition(":")
    file = Path(path)
    spec = importlib.util.spec_from_file_location(f"attribution_{what}_{file.stem}", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"there is no {what} file {path}; name it as path/to/file.py:name")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code: whatever it raises is theirs to read
        raise ConfigError(f"{what} file {path} fails on import ({type(error).__name__}: {error})") from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{path} defines no {attribute!r}; name the {what} after the colon")
    return getattr(module, attribute)
