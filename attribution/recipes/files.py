"""Files of the user's own, named as `path/to/file.py:name`: they are code and run with the user's rights. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

from attribution.errors import ConfigError
from attribution.texts import content


def defined(name: str, what: str) -> Any:
    """What `path/to/file.py:name` defines under that name.

    Args:
        name: path and name.
        what: the kind of thing it should be, for messages: "recipe", "reward".

    Raises:
        ConfigError: there is no such file, it cannot be imported, or it defines no such name.
    """
    path, _, attribute = name.rpartition(":")
    module = _loaded(Path(path), what)
    if not hasattr(module, attribute):
        raise ConfigError(f"{path} defines no {attribute!r}; name the {what} after the colon")
    return getattr(module, attribute)


def named(settings: Any) -> list[str]:
    """Every file that plain settings name as `path/to/file.py:name`, in order, however deep it stands."""
    if isinstance(settings, dict):
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        return list(dict.fromkeys(file for value in settings for file in named(value)))
    found = re.fullmatch(r"(.+\.py):\w+", settings) if isinstance(settings, str) else None
    return [found[1]] if found and os.path.isfile(found[1]) else []


def _loaded(file: Path, what: str) -> Any:
    """The file as a module: the same one as long as its content is the same, so that its classes are themselves again."""
    try:
        code = content(file)
    except OSError:
        raise ConfigError(f"there is no {what} file {file}; name it as path/to/file.py:name") from None
    digest = hashlib.sha256(os.fsencode(file.resolve()) + b"\n" + code).hexdigest()[:12]
    name = f"attribution_{what}_{file.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is no Python file; name the {what} as path/to/file.py:name")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where whoever reads a class's source looks for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises is theirs to read
        del sys.modules[name]
        raise ConfigError(f"{what} file {file} fails on import ({type(error).__name__}: {error}); correct it") from error
    return module
