"""The ledger in plain words: results/README.md, from the findings in results/.

    python -m experiments.ledger [--judge]

With `--judge` every verdict is first computed anew from the tables that lie in results/, in seconds; nothing is run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from attribution.claims import LEDGER
from attribution.claims.plain import PLAIN
from attribution.errors import RunError
from attribution.reports import study_report
from attribution.store import read_json, write_atomic
from attribution.worlds.located import CLAIMS as LOCATED
from attribution.worlds.pool import JUDGED
from experiments import alone, pool
from experiments.claims import told_in_a_sentence

PAGES = {  # by directory below results/, the claims that are judged there
    "boost": ("boost",),
    "sampling": ("sampling_or_update",),
    "kindland": JUDGED,
    "knob": ("knob", "knob_by_finetuning", "compact"),
    "dormant": ("dormant",),
    "notions": ("two_notions",),
    "precision": ("precision",),
    "accuracy": ("accuracy",),
    "recruited": ("recruited",),
    "located": LOCATED,
}
_HEAD = """# Results

Every statement of the essay that was put to a test, with the verdict of a rule that was fixed before the runs
(`attribution claims` prints every claim as it was declared, with its hash). *Supported* and *contradicted* are words of that
rule: the 95 % interval over bases or organisms lies above, or below, the smallest effect of interest δ. All of it is about
small models of two made-up worlds, see [worlds.md](worlds.md); error rates and power are in
[calibration.md](calibration.md).{essay}

{count}

| | The essay says | What was tried | Verdict | Effect, 95 % interval | What else could explain it |
|---|---|---|---|---|---|
"""
_ESSAY = "\nWhat all this says about the essay, and what it does not, is in [essay.md](essay.md)."
_FOOT = """
An equivalence claim (*does little*, *keeps*) has a 90 % interval, inside ±δ where it is supported. Every finding with its
gates, nulls, further readings and tables is in the directory that its name links to (report.html, summary.md); each lists its
runs, whose directories carry the hash of their config. The verdicts are computed anew from the tables here by
`python -m experiments.ledger --judge`.
"""


def main(results: Path = Path("results"), runs: Path = Path("runs"), judge: bool = False) -> None:
    """Write the ledger.

    Args:
        results: directory of the reference results.
        runs: directory that holds studies; what the arms of the pool train on is written there.
        judge: compute every verdict anew first.
    """
    if not any((results / name / "findings.json").exists() for name in PAGES):
        raise RunError(f"{results} holds no findings; run `make results`, or name the directory that it wrote")
    if judge:
        judged(results, runs)
    write_atomic(results / "README.md", page(results).encode())
    print(results / "README.md")


def judged(results: Path, runs: Path) -> None:
    """Compute every finding anew from the tables that are there."""
    for name, claims in PAGES.items():
        if name == "kindland":
            if (results / name).exists():  # the pool was run to its end
                study_report(pool.judged(pool.reference(runs), results / "pool", results / name))
        elif (results / name / "study.json").exists():
            alone.judged(results / name, claims)


def page(results: Path) -> str:
    """The ledger as Markdown."""
    rows, words = [], Counter()
    for claim, where, finding in found(results):
        verdict = told(finding)
        words[verdict.split(" (")[0]] += 1
        cells = (
            f"[{claim}]({where}/summary.md{anchor(results / where / 'summary.md', claim)})",
            LEDGER[claim].statement,
            PLAIN[claim].asked,
            verdict,
            effect(finding),
        )
        rows.append(" | ".join((*map(plain, cells), plain(PLAIN[claim].otherwise))))
    count = ", ".join(f"{number} {word}" for word, number in words.most_common())
    essay = _ESSAY if (results / "essay.md").exists() else ""
    head = _HEAD.format(essay=essay, count=f"{len(rows)} of {len(LEDGER)} claims are judged: {count}.")
    missing = [claim for claim in LEDGER if not any(row.startswith(f"[{claim}]") for row in rows)]
    absent = f"\nNot run yet: {', '.join(missing)}.\n" if missing else ""
    return head + "".join(f"| {row} |\n" for row in rows) + absent + _FOOT


def found(results: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Every claim of the ledger that was judged, in its order: claim, directory, finding as plain data."""
    where = {claim: name for name, claims in PAGES.items() for claim in claims}
    for claim in LEDGER:
        file = results / where[claim] / "findings.json"
        own = [each for each in read_json(file) if each["claim"]["id"] == claim] if file.exists() else []
        if own:
            yield claim, where[claim], own[0]


def told(finding: Mapping[str, Any]) -> str:
    """The verdict, with what else must be said."""
    row = finding["verdict"][0]
    note = f" ({row['note']})" if row["note"] else ""
    return f"{row['verdict']}{note}"


def effect(finding: Mapping[str, Any]) -> str:
    """Estimate and interval, with unit, δ and number of bases."""
    row = finding["verdict"][0]
    if row["mean"] is None or pd.isna(row["mean"]):
        return "not measured"
    claim = LEDGER[finding["claim"]["id"]]
    return f"{row['mean']:+.3g} [{row['low']:+.3g}, {row['high']:+.3g}] {claim.unit} (n = {row['n']}, δ {claim.delta:g})"


def anchor(summary: Path, claim: str) -> str:
    """Where the claim stands in a summary that tells several, as GitHub makes it of a heading; "" where it is not told."""
    lines = summary.read_text(encoding="utf-8").splitlines() if summary.exists() else []
    heading = next((line.removeprefix("## ") for line in lines if line.startswith(f"## {claim}: ")), "")
    kept = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
    return f"#{kept}" if kept else ""


def plain(text: str) -> str:
    """As one cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    told_in_a_sentence(main, __doc__)
