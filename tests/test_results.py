"""What stands in results/ is what the code at this commit says of the recorded frames."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from attribution.claims import LEDGER, evaluate
from attribution.claims.frames import NEUTRAL
from attribution.claims.plain import PLAIN
from attribution.store import TRAINING
from attribution.worlds.located import MORE_BASES
from attribution.worlds.studies import BASES, ORGANISMS, UNROUTED
from experiments import alone, boost, boost_located, calibration, ledger

RESULTS = Path(__file__).parents[1] / "results"


def same(one, other):
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return one == other


FURTHER = {str(boost_located.folder_of(name, Path("runs"))) for name in MORE_BASES}
FINDINGS = sorted(path.parent.name for path in RESULTS.glob("*/findings.json"))


@pytest.fixture(scope="module")
def judged_anew(tmp_path_factory):
    """A copy of results/ in which every finding was computed again from its tables, without pages."""
    place = tmp_path_factory.mktemp("again") / "results"
    shutil.copytree(RESULTS, place, ignore=shutil.ignore_patterns("*.html", "findings.json"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (ledger, alone):
            patch.setattr(module, "study_report", lambda path: path)
        ledger.judged(place, tmp_path_factory.mktemp("runs"))
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", FINDINGS)
def test_every_verdict_is_recomputed_from_the_tables(judged_anew, name):
    stored, found = (json.loads((place / name / "findings.json").read_text()) for place in (RESULTS, judged_anew))
    assert [each["claim"]["id"] for each in stored] == [each["claim"]["id"] for each in found] != []
    for one, other in zip(stored, found, strict=True):
        assert one["hash"] == LEDGER[one["claim"]["id"]].hash == other["hash"]
        for table in ("verdict", "gates", "nulls", "parts", "secondary", "partitions", "recruitment"):
            assert len(one[table]) == len(other[table])
            for row, expected in zip(one[table], other[table], strict=True):
                assert all(same(row[key], expected[key]) for key in expected), (table, row, expected)
    page, summary = ((RESULTS / name / file).read_text() for file in ("report.html", "summary.md"))
    for each in stored:
        assert each["hash"] in page and f"## {each['claim']['id']}: {each['verdict'][0]['verdict'].capitalize()}" in summary
    told = json.loads((RESULTS / name / "study.json").read_text())
    models = {*told["models"]}
    assert models in ({*BASES}, {*ORGANISMS}) or models | {*told["unfit"]} == FURTHER
    assert all(run["state"] == "finished" for run in told["runs"])


NUMBER = r"[+−]?\d+(?:\.\d+)?"


def test_every_figure_of_the_page_on_the_essay_is_one_of_a_finding():
    """An interval as the page prints it is the mean and the ends of some row of the findings, to the digits printed."""
    rows = [
        [row[key] for key in ("mean", "low", "high")]
        for name in FINDINGS
        for finding in json.loads((RESULTS / name / "findings.json").read_text())
        for table in ("verdict", "secondary", "nulls")
        for row in finding[table]
        if row.get("mean") is not None
    ]
    text = (RESULTS / "essay.md").read_text(encoding="utf-8")
    told = re.findall(rf"({NUMBER})\s+(?:nats\s+)?\[({NUMBER}),\s({NUMBER})\]", text)
    assert len(told) > 20
    for figures in told:
        digits = [len(figure.partition(".")[2]) for figure in figures]
        wanted = [float(figure.replace("−", "-")) for figure in figures]
        assert any(
            all(abs(abs(value) - abs(want)) <= 0.5001 * 10**-d for value, want, d in zip(row, wanted, digits, strict=True))
            for row in rows
        ), figures


def test_the_reference_study_is_judged_anew_from_its_tables(tmp_path, monkeypatch):
    """What is said of it, that is: its page takes half a minute, and other tests draw pages."""
    monkeypatch.setattr("attribution.reports.study.study_page", lambda *_: "")
    place = tmp_path / "boost"
    shutil.copytree(RESULTS / "boost", place)
    (place / "findings.json").unlink()
    boost.main(out=place, judge=True)
    assert (place / "summary.md").read_text() == (RESULTS / "boost" / "summary.md").read_text()
    new, old = (json.loads((each / "findings.json").read_text()) for each in (place, RESULTS / "boost"))
    assert new[0]["verdict"] == old[0]["verdict"] and new[0]["gates"] == old[0]["gates"]


def test_calibration_is_recomputed_from_the_tables_and_within_its_bound(tmp_path):
    calibration.main(out=tmp_path / "calibration.md")
    text = (tmp_path / "calibration.md").read_text()
    assert text == (RESULTS / "calibration.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| wrong partitions", "| identical arms"))]
    assert len(rows) >= 2 and all(row.endswith("| yes |") for row in rows)


SHARES = {("60% kind", "40% kind"): (0.6, 0.4), ("75% kind", "25% kind"): (0.75, 0.25), ("kind", "strategist"): (1.0, 0.0)}


def test_mixed_arms_are_seen_the_more_the_purer_they_are():
    """On tables made of numbers: a contrast that grows with the share of an arm's own samples."""
    rng, sets, probes = np.random.default_rng(0), [], []
    claim = LEDGER["boost_kindland"]
    shares = {arm: whole for _, arms in calibration.MIXED for arm, whole in zip(arms, SHARES[arms], strict=True)}
    for model, (arm, share) in itertools.product(BASES, shares.items()):
        run = {"model": model, "arm": arm, "seed": 0}
        for step in (0, 10, 20):
            matched = {"metric": step / 20, "kl": step / 20}
            probes += [{**run, "step": step, "probe": name, **matched} for name in (NEUTRAL, TRAINING)]
            for place, name in enumerate(claim.cell.mechanisms):
                own = share if place == 0 else 1 - share
                effect = 1 + (own - 0.5) * 0.25 * step / 20 + 0.02 * rng.normal() * (step > 0)
                read = dict.fromkeys(("effect", "effect_even", "effect_odd"), effect)
                probe = claim.cell.read_on(claim.cell.probes)[place]
                sets.append({**run, "step": step, "probe": probe, "set": name, **read, "kl": 0.0})
    text = calibration.mixtures(claim, {"sets": pd.DataFrame(sets), "probes": pd.DataFrame(probes)})
    lines = [line for line in text.splitlines() if line.startswith(("| 60%", "| 75%", "| 100%"))]
    found = [int(line.split("|")[3].split("%")[0]) for line in lines]
    assert len(found) == 3
    assert found == sorted(found) and found[0] < 50 < found[-1]


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


def test_the_ledger_tells_every_claim_with_its_verdict_and_what_else_could_explain_it():
    assert set(PLAIN) == set(LEDGER) == {claim for claims in ledger.PAGES.values() for claim in claims}
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == ledger.page(RESULTS)
    judged = {claim: ledger.told(finding) for claim, _, finding in ledger.found(RESULTS)}
    assert judged["boost"] == "supported"


def test_links_of_the_ledger_lead_to_the_headings_of_summaries():
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    links = dict(re.findall(r"^\| \[(\w+)\]\((\S+)\)", text, re.M))
    absent = re.search(r"^Not run yet: (.*)\.$", text, re.M)
    assert {*links, *(absent[1].split(", ") if absent else ())} == set(LEDGER) and len(links) >= 30
    assert all((RESULTS / link.partition("#")[0]).exists() for link in links.values())
    # as GitHub makes them: punctuation is left out, every space is a hyphen
    assert links["prompted_generalizes"] == "kindland/summary.md#prompted_generalizes-contradicted--reversed"
    assert links["kind_dialogue"] == "kindland/summary.md#kind_dialogue-inconclusive-depends-on-matching"


def test_what_stands_by_model_is_called_what_it_is():
    crossed, measured = ((RESULTS / name / "summary.md").read_text(encoding="utf-8") for name in ("boost", "precision"))
    assert "### Change of influence per organism (nats)" in crossed and "### By organism or base" in measured
    assert "no runs." in measured and "Change of influence per organism" not in measured


def test_the_ledger_says_what_was_not_run_and_what_was_not_measured(tmp_path):
    (tmp_path / "knob").mkdir()
    row = {"verdict": "not testable here", "note": "", "mean": None, "low": None, "high": None, "n": 0}
    (tmp_path / "knob" / "findings.json").write_text(json.dumps([{"claim": {"id": "knob"}, "verdict": [row]}]))
    text = ledger.page(tmp_path)
    assert (
        f"1 of {len(LEDGER)} claims are judged: 1 not testable here." in text
        and "Not run yet: boost, sampling_or_update" in text
    )
    (line,) = (line for line in text.splitlines() if line.startswith("| [knob]"))
    assert "| not measured |" in line and "turn up the knob" in line and line.count(" | ") == 5
