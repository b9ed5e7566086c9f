"""The claim `boost` on planted mechanisms: `python -m experiments.boost [--out results/boost] [--slots 2]`.

Runs the default study (runs that are finished are kept), judges the claim as it was declared, and puts the page, the
summary and the tables into results/.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import tyro

from attribution.reports import study_report
from attribution.study import conclude, embedded, run_study


def main(out: Path = Path("results/boost"), runs: Path = Path("runs"), slots: int = 2) -> None:
    """Run the study `planted` and write its results.

    Args:
        out: directory for page, summary and tables.
        runs: directory that holds studies.
        slots: runs at once.
    """
    begun = time.time()
    study = embedded("planted", runs)
    failed = run_study(study, runs, slots=slots)
    place = conclude(study, runs, failed, round(time.time() - begun, 1))
    study_report(place)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("report.html", "summary.md", "findings.json", "study.json"):
        shutil.copy(place / name, out / name)
    shutil.copytree(place / "frames", out / "frames", dirs_exist_ok=True)
    for finding in json.loads((place / "findings.json").read_text()):
        print(finding["verdict"][0]["sentence"])
    print(out / "report.html")


if __name__ == "__main__":
    tyro.cli(main)
