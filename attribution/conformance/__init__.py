"""Whether a recipe keeps what the instrument rests on: `pytest --recipe file.py:Name`, in any directory.

A plugin of pytest, found where this package is installed. With `--recipe` and no files named, the tests of
`attribution.conformance.checks` are run on that recipe; a recipe file is code and runs with your rights. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

CHECKS = Path(__file__).with_name("checks.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attribution")
    group.addoption("--recipe", help="a recipe's name, or path/to/file.py:Name, on which the conformance suite is run")
    group.addoption(
        "--recipe-settings", default="{}", help='JSON: settings that the recipe needs beside its defaults, {"instruction": "…"}'
    )
    group.addoption("--recipe-data", help="JSONL file of samples to train on, in words of the model `planted`")


def pytest_configure(config: pytest.Config) -> None:
    """Run the checks, where a recipe is named and no test."""
    import pytest

    if config.getoption("--recipe") is None:
        return
    try:
        told = json.loads(config.getoption("--recipe-settings"))
    except json.JSONDecodeError as error:
        raise pytest.UsageError(f"--recipe-settings is no JSON ({error})") from None
    if not isinstance(told, dict):
        raise pytest.UsageError(f"--recipe-settings is {told!r}; expected a JSON object of settings by name")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(CHECKS)]


def asked(config: pytest.Config) -> tuple[str, dict[str, Any]]:
    """The recipe that was named on the command line, and the settings that it needs.

    Raises:
        pytest.UsageError: none is named.
    """
    import pytest

    name = config.getoption("--recipe", default=None)
    if name is None:
        raise pytest.UsageError(
            "no recipe is named; say pytest --recipe path/to/file.py:Name, or override the fixture `recipe`"
        )
    return name, json.loads(config.getoption("--recipe-settings"))


def pytest_report_header(config: pytest.Config) -> str | None:
    """Which recipe it is, above the tests."""
    name = config.getoption("--recipe", default=None)
    return None if name is None else f"attribution: conformance of the recipe {name}"
