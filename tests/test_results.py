"""What stands in results/ is what the code at this commit says of the recorded frames."""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest

from attribution.claims import LEDGER, evaluate
from attribution.worlds.studies import ORGANISMS, UNROUTED
from experiments import boost

RESULTS = Path(__file__).parents[1] / "results"


def same(one, other):
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return one == other


@pytest.mark.parametrize("claim", sorted(path.parent.name for path in RESULTS.glob("*/findings.json")))
def test_the_verdict_is_recomputed_from_the_frames(claim):
    frames = {
        name: pd.read_parquet(RESULTS / claim / "frames" / f"{name}.parquet") for name in ("sets", "probes", "set_grafts")
    }
    found = evaluate(
        LEDGER[claim], {"sets": frames["sets"], "probes": frames["probes"], "grafts": frames["set_grafts"]}
    ).to_dict()
    (stored,) = json.loads((RESULTS / claim / "findings.json").read_text())
    assert stored["hash"] == LEDGER[claim].hash == found["hash"]
    for table in ("verdict", "gates", "nulls", "parts", "secondary", "partitions", "recruitment"):
        assert len(stored[table]) == len(found[table]) > 0
        for row, expected in zip(stored[table], found[table], strict=True):
            assert all(same(row[key], expected[key]) for key in expected), (table, row, expected)
    told = json.loads((RESULTS / claim / "study.json").read_text())
    assert tuple(told["models"]) == ORGANISMS and all(run["state"] == "finished" for run in told["runs"])
    page, summary = ((RESULTS / claim / name).read_text() for name in ("report.html", "summary.md"))
    assert stored["hash"] in page and stored["verdict"][0]["verdict"] in summary.lower()


def test_the_reference_study_is_judged_anew_from_its_tables(tmp_path):
    place = tmp_path / "boost"
    shutil.copytree(RESULTS / "boost", place)
    (place / "findings.json").unlink()
    boost.main(out=place, judge=True)
    assert (place / "summary.md").read_text() == (RESULTS / "boost" / "summary.md").read_text()
    new, old = (json.loads((each / "findings.json").read_text()) for each in (place, RESULTS / "boost"))
    assert new[0]["verdict"] == old[0]["verdict"] and new[0]["gates"] == old[0]["gates"]


def test_the_reference_contrast_changes_its_sign_with_the_mechanism_table():
    """Had the planted sets been called by each other's names, the contrast would be its negative."""
    frames = {name: pd.read_parquet(RESULTS / "boost" / "frames" / f"{name}.parquet") for name in ("sets", "probes")}
    swapped = frames["sets"].assign(set=frames["sets"]["set"].replace({"A": "B", "B": "A"}))
    found, other = (evaluate(LEDGER["boost"], {**frames, "sets": sets}) for sets in (frames["sets"], swapped))
    assert other.estimate.mean == pytest.approx(-found.estimate.mean) and found.estimate.mean > LEDGER["boost"].delta
    assert (other.verdict, other.note) == ("contradicted", "reversed")


def test_the_page_on_worlds_has_every_model():
    text = (RESULTS / "worlds.md").read_text()
    assert all(name in text for name in (*ORGANISMS, UNROUTED))
