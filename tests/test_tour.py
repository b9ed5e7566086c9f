"""The notebook tour runs from its first cell to its last, and shows what it says."""

import json
from pathlib import Path

import pytest

TOUR = Path(__file__).parents[1] / "experiments" / "tour.ipynb"


def test_the_tour_is_kept_without_what_it_printed():
    cells = json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 8 and not any(cell["outputs"] or cell["execution_count"] for cell in code)


LESS = {"prompts(256,": "prompts(64,", "train[:64]": "train[:16]", "prompts(64, seed=3": "prompts(16, seed=3",
        "prompts(64, seed=4": "prompts(16, seed=4", "train_batch_size=32": "train_batch_size=16"}  # fmt: skip


@pytest.mark.slow
def test_the_tour_runs(tmp_path):
    """On fewer samples than it shows."""
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    text = TOUR.read_text(encoding="utf-8")
    assert all(text.count(much) == 1 for much in LESS)
    for much, little in LESS.items():
        text = text.replace(much, little)
    book = nbformat.reads(text, 4)
    client.NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("application/vnd.plotly.v1+json" in output.get("data", {}) for output in outputs)
    sets = next(
        output["data"]["text/plain"] for output in outputs if "set " in output.get("data", {}).get("text/plain", "")[:4]
    )
    first, last = ([float(value) for value in line.split()[1:]] for line in (sets.splitlines()[2], sets.splitlines()[-1]))
    assert last[0] > first[0] and last[1] < first[1]  # A grew, B did not
    assert (tmp_path / "runs" / "tour" / "report.html").exists()
