"""The shape of the package: imports run one way, the public face is whole and cheap, and files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import attribution

ROOT = Path(attribution.__file__).parent
ORDER = (
    "errors", "texts", "architectures", "models", "sharding", "uses", "components", "samples", "chat", "metrics", "capture",
    "replay", "store", "causes", "mechanisms", "updates", "recipes", "worlds", "runs", "launch", "claims", "study",
    "calibration", "doctor", "reports", "verbs", "cli", "conformance",
)  # fmt: skip
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem not in ("__init__", "__main__"))


def room(name: str) -> str:
    return name.split(".")[1]


def imported(path: Path, *, top_level: bool) -> set[str]:
    """Modules of this package that a file imports: when it is itself imported, or at any time."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("attribution"):
            found |= {node.module if node.module != "attribution" else f"attribution.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("attribution.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_before_it(path):
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert here in ORDER
    for name in imported(path, top_level=False):
        there = room(name)
        late = (here, there) == ("runs", "reports")  # a run ends by writing its report
        assert late or ORDER.index(there) <= ORDER.index(here), f"{here} imports {there}"


def test_the_public_face_is_whole():
    assert sorted(attribution.__all__) == attribution.__all__ == sorted(attribution._HOMES)
    for name in attribution.__all__:
        found = getattr(attribution, name)
        assert found.__doc__ and found.__module__.startswith("attribution.")
    with pytest.raises(AttributeError, match="no attribute 'atribute'"):
        _ = attribution.atribute


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, attribution; print(sorted({'torch', 'pandas', 'transformers', 'pydantic', 'plotly'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_say_what_they_know_and_stay_small(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    assert len(path.read_text().splitlines()) <= 450
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 80, node.name
