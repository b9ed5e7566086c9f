"""The two tiers, and how many cases each tried."""

import tempfile
from pathlib import Path

import pytest
from fuzz.tiers import tried


@pytest.fixture(params=["sample", pytest.param("long", marks=pytest.mark.long)])
def tier(request):
    """Which tier a property is tried in."""
    return request.param


@pytest.fixture
def room(tmp_path):
    """An empty folder for every case of a property, which hypothesis does not give anew."""

    def room() -> Path:
        return Path(tempfile.mkdtemp(dir=tmp_path))

    return room


def pytest_terminal_summary(terminalreporter):
    if tried:
        told = ", ".join(f"{count} {name}" for name, count in tried.items())
        terminalreporter.write_line(f"bad input: {tried.total()} cases ({told})")
