"""Files to start a recipe from: the template under a name of one's own, and its test."""

from __future__ import annotations

import keyword
import os
import re
from pathlib import Path

from attribution.errors import ConfigError
from attribution.texts import write_text

_TEST = '''"""Tests of the recipe `{name}`: those that every recipe must pass, and what is particular to it.

    pytest {test}                 all of them
    pytest --recipe {file}:{name}  the former alone, without this file
"""

from pathlib import Path

import pytest
from attribution.conformance.checks import *
from attribution.recipes import recipe_named

FILE = Path(__file__).with_name("{file}")


@pytest.fixture(scope="module")
def recipe():
    """What the tests that every recipe must pass are run on, with the settings it needs beside its defaults."""
    return f"{{FILE}}:{name}", {{}}


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="fading"):
        recipe_named(f"{{FILE}}:{name}")(fading=2)
'''


def write_recipe(name: str, folder: str | Path = ".") -> tuple[Path, Path]:
    """Write a commented recipe, which works as it is, and its test.

    Args:
        name: in snake_case or CamelCase; the file is called by the one, the class by the other.
        folder: where the files go.

    Returns:
        Path of the recipe and of its test.

    Raises:
        ConfigError: no name of a class, or one of the files is there already.
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    title = "".join(word[0].upper() + word[1:] for word in words)
    if not re.fullmatch(r"[A-Za-z]\w*", name) or keyword.iskeyword(title) or len(name) > 100:
        raise ConfigError(f"{name!r} cannot be the name of a recipe; expected letters, digits and _, a letter first")
    file = Path(folder) / ("_".join(words).lower() + ".py")
    test = file.with_name(f"test_{file.name}")
    for path in (file, test):
        if os.path.lexists(path):
            raise ConfigError(f"{path} is there already; remove it, or choose another name")
    text = Path(__file__).with_name("template.py").read_text(encoding="utf-8")
    try:
        write_text(file, text.replace("class Template(", f"class {title}("))
        write_text(test, _TEST.format(name=title, file=file.name, test=test.name))
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}; choose another folder") from error
    return file, test
