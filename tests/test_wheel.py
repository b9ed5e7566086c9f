"""What is built: the same bytes each time, all that the package needs and no more, and it works away from its source."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KEPT = ("attribution", "experiments", "tests", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff",
        "Makefile", "constraints.txt", ".gitignore")  # fmt: skip

pytestmark = pytest.mark.long


def built(source: Path, out: Path, *what: str) -> dict[str, Path]:
    """Build as `make build` does; the files by suffix."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *what, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {path.suffix: path for path in out.iterdir()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    """Two copies of this checkout, of which one has other times and modes of files."""
    copies = [tmp_path_factory.mktemp("source") / "attribution" for _ in range(2)]
    for copy in copies:
        copy.mkdir()
        for name in KEPT:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, copy)
    for file in copies[1].rglob("*"):
        if file.is_file():
            os.utime(file, (1_000_000_000, 1_000_000_000))
            file.chmod(0o600)
    return copies


@pytest.fixture(scope="module")
def dist(sources, tmp_path_factory) -> dict[str, Path]:
    """The source distribution, and the wheel that is built from it."""
    return built(sources[0], tmp_path_factory.mktemp("dist"))


def test_builds_are_the_same_bytes(sources, dist, tmp_path, monkeypatch):
    again = built(sources[1], tmp_path / "again")
    assert {suffix: path.name for suffix, path in again.items()} == {suffix: path.name for suffix, path in dist.items()}
    assert all(again[suffix].read_bytes() == dist[suffix].read_bytes() for suffix in (".whl", ".gz"))
    direct = built(sources[1], tmp_path / "direct", "--wheel")
    assert direct[".whl"].read_bytes() == dist[".whl"].read_bytes(), "the source distribution builds the wheel of the checkout"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    dated = [built(source, tmp_path / f"dated-{k}", "--wheel")[".whl"].read_bytes() for k, source in enumerate(sources)]
    assert dated[0] == dated[1] != dist[".whl"].read_bytes()


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    with zipfile.ZipFile(dist[".whl"]) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"attribution", "attribution-0.1.0.dist-info"}
    package = {name for name in names if name.startswith("attribution/")}
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "attribution").rglob("*") if path.is_file()}
    assert package == {name for name in tracked if "__pycache__" not in name and not Path(name).name.startswith(".")}
    assert {"attribution/worlds/data/planted/31/model.safetensors", "attribution/py.typed"} <= package
    with tarfile.open(dist[".gz"]) as archive:
        whole = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/conftest.py", "experiments/boost.py", "constraints.txt", "LICENSE"} <= whole
    assert not any(name.startswith(("results/", "runs/")) for name in whole)


def test_an_installed_wheel_works_without_its_source(dist, tmp_path):
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(dist[".whl"])]
    subprocess.run(install, check=True, capture_output=True)

    def run(*command: str) -> str:
        own = {**os.environ, "PYTHONPATH": str(target)}
        done = subprocess.run([sys.executable, *command], cwd=empty, env=own, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = (
        "import attribution as at, torch\n"
        "print(at.__file__)\n"
        "for name in ('planted', 'planted/unrouted', 'kindland'):\n"
        "    model, tokenizer = at.load(name)\n"
        "    ids = torch.tensor([[tokenizer.bos_token_id]])\n"
        "    print(name, bool(model(input_ids=ids).logits.isfinite().all()))\n"
    )
    place, *loaded = run("-c", code).splitlines()
    assert place == str(target / "attribution" / "__init__.py")
    assert loaded == ["planted True", "planted/unrouted True", "kindland True"]
    assert "usage: attribution COMMAND" in run("-m", "attribution", "--help")
    script = target / "bin" / "attribution"
    assert "usage: attribution COMMAND" in run(str(script), "--help") and run(str(script), "--version") == "attribution 0.1.0\n"
    assert "sft" in run("-m", "attribution", "recipes")
    assert not list(empty.iterdir())
