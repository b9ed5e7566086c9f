"""The claim `boost` on planted mechanisms: `python -m experiments.boost [--out results/boost] [--slots 2]`.

Runs the default study (runs that are finished are kept), judges the claim as it was declared, and puts the page, the
summary and the tables into results/. With `--judge` it runs nothing, and judges the tables that are there anew, in seconds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import tyro

from attribution.claims import LEDGER
from attribution.reports import study_report
from attribution.study import conclude, embedded, run_study
from attribution.worlds.studies import UNROUTED
from experiments import alone


def main(out: Path = Path("results/boost"), runs: Path = Path("runs"), slots: int = 2, judge: bool = False) -> None:
    """Run the study `planted` and write its results.

    Args:
        out: directory for page, summary and tables.
        runs: directory that holds studies.
        slots: runs at once.
        judge: run nothing; judge the tables in `out` anew and write its page.
    """
    if judge:
        alone.judged(out, ("boost",))
    else:
        run_anew(out, runs, slots)
    for finding in json.loads((out / "findings.json").read_text()):
        print(finding["verdict"][0]["sentence"])
    print(out / "report.html")


def run_anew(out: Path, runs: Path, slots: int) -> None:
    """Run what is not finished, and write everything."""
    study = embedded("planted", runs)
    failed = run_study(study, runs, slots=slots)
    place = conclude(study, runs, failed)
    study_report(place)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("report.html", "summary.md", "findings.json", "study.json"):
        shutil.copy(place / name, out / name)
    shutil.copytree(place / "frames", out / "frames", dirs_exist_ok=True)
    (out / "pilot-gates.md").write_text(pilot_gates(place), encoding="utf-8")


def pilot_gates(place: Path) -> str:
    """The gates that the pilot set on a crossover, in its own metric and on its mix of probes, as a Markdown page.

    Not normalised, at equal steps, in nats: [dA(arm A) - dA(arm B)] + [dB(arm B) - dB(arm A)], on prompts with both cues, of
    which a third agree and two thirds conflict.
    """
    signs = {("agree", "A"): 1, ("agree", "B"): 1, ("conflict", "A"): 1, ("conflict", "B"): -1}
    mix = {"agree": 1 / 3, "conflict": 2 / 3}
    sets, grafts = (pd.read_parquet(place / "frames" / f"{name}.parquet") for name in ("sets", "set_grafts"))
    sets = sets[sets["reference"] == LEDGER["boost"].cell.reference]
    last = sets["step"].max()
    ends = sets[sets["step"].isin([0, last])].assign(value=sets["effect"].where(sets["step"] == last, -sets["effect"]))
    change = ends.groupby(["model", "seed", "arm", "probe", "set"], as_index=False)["value"].sum()
    graft = grafts[grafts["ablated"] == ""].rename(columns={"graft": "value"})

    def crossed(frame: pd.DataFrame) -> pd.Series:
        rows = frame[frame["set"].isin(["A", "B"]) & frame["arm"].isin(["A", "B"])]
        sign = [signs[key] for key in zip(rows["probe"], rows["set"], strict=True)]
        own = rows["arm"].eq(rows["set"]).map({True: 1, False: -1})
        mixed = rows.assign(value=rows["value"] * sign * own * rows["probe"].map(mix))
        return mixed.groupby(["model", "seed"])["value"].sum().groupby("model").mean()

    found = pd.DataFrame({"@AB": crossed(change), "graft @AB": crossed(graft)})
    needed = {False: ("≥ 0.35", "≥ 0.08"), True: ("within ± 0.15", "within ± 0.05")}
    lines = ["| model | @AB | needed | graft @AB | needed |", "|---|---:|---|---:|---|"]
    for model, row in found.iterrows():
        control = model == UNROUTED
        ab, gab = row["@AB"], row["graft @AB"]
        passed = (abs(ab) <= 0.15, abs(gab) <= 0.05) if control else (ab >= 0.35, gab >= 0.08)
        marks = ["" if each else " ✗" for each in passed]
        lines.append(f"| {model} | {ab:+.2f}{marks[0]} | {needed[control][0]} | {gab:+.3f}{marks[1]} | {needed[control][1]} |")
    return f"{_PILOT}\n" + "\n".join(lines) + "\n"


_PILOT = """# The pilot's gates on the crossover

In the pilot's own metric: the sum of changes of influence in nats at equal steps, not normalised, on prompts in which both cues
stand, a third of which agree. Shown because they were set before these organisms were built; no verdict follows from them. Two
thirds of the mix are conflicts, where a change of behaviour shows whatever the partition, and in the control too.
"""


if __name__ == "__main__":
    tyro.cli(main)
