"""What a pilot says about thresholds: `python -m experiments.pilot BASE BASE … [--judge-only] [--help]`.

Runs the arms of the pool, one seed of each, on bases that no result rests on (`attribution build-world kindland --seed 92`) and
prints the primary statistic of every claim by base. δ of a claim was set by one rule: what had been proposed, unless five
bases that scatter as the pilot's would see twice that with less than 80 % power; then 1.7 standard deviations over bases, the
least for which they do, rounded up. Two bases say little about scatter, and nothing is concluded from them.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import tyro

from attribution.claims import LEDGER, evaluate
from attribution.claims.measured import STATISTIC
from attribution.claims.terms import ContrastClaim
from attribution.errors import ConfigError, RunError
from attribution.runs.quiet import quiet
from attribution.store import write_atomic
from attribution.study import Study, collect, run_study, under
from attribution.worlds.pool import ALONE, JUDGED, write_kindland
from attribution.worlds.studies import BASES
from experiments.claims import not_testable, told_in_a_sentence

FACTOR = 1.7  # power .8 at 2 δ of five bases: (t .975 + its noncentral share) / sqrt(5), see calibration.power
_HEAD = """# The pilot

Primary statistics of the claims in `kindland` on bases {bases}, one seed each, printed by `python -m experiments.pilot`. They
fixed δ, by the rule that its help tells, before the reference runs; no result rests on these bases. A claim that is tested on
checkpoints, or on what a run leaves, has no row.

| claim | unit | by base | standard deviation | {factor} times that | δ |
|---|---|---|---|---|---|
"""


def main(
    bases: tyro.conf.Positional[tuple[str, ...]],
    out: Path = Path("results/pilot.md"),
    runs: Path = Path("runs"),
    slots: int = 2,
    judge_only: bool = False,
) -> None:
    """Run the pilot and write its page.

    Args:
        bases: folders of models.
        out: file to write.
        runs: directory that holds studies.
        slots: runs at once.
        judge_only: run nothing; read the runs that are finished.
    """
    quiet()
    if len(bases) < 2:
        raise ConfigError(f"{len(bases)} bases named; expected at least 2, whose scatter can be seen")
    if shipped := [base for base in bases if base in BASES]:
        raise ConfigError(f"results rest on {shipped[0]}; name bases that none does, as `attribution build-world` makes them")
    if unfit := {base: reason for base in bases if (reason := not_testable(base))}:
        raise ConfigError("nothing can be tried on " + "; ".join(f"{base}: {reason}" for base, reason in unfit.items()))
    given = write_kindland(runs / "kindland" / "data", (*JUDGED, *ALONE), bases)
    study = Study.model_validate({**given, "name": "pilot", "seeds": (0,)})
    if not judge_only:
        run_study(study, runs, slots=slots)
    frames = {"grafts" if name == "set_grafts" else name: frame for name, frame in collect(study, runs).items()}
    rows = [row for claim in JUDGED if (row := line(claim, study, frames))]
    head = _HEAD.format(bases=" and ".join(Path(base).name for base in bases), factor=FACTOR)
    write_atomic(out, (head + "\n".join(rows) + "\n").encode())
    print(out.read_text(encoding="utf-8"))


def line(claim: str, study: Study, frames: dict[str, pd.DataFrame]) -> str:
    """The row of a claim; "" where nothing can be said of single bases."""
    declared = LEDGER[claim]
    if isinstance(declared, ContrastClaim):
        declared = declared.model_copy(update={"beside": ()})
    try:
        parts = evaluate(declared, under(study.named[claim], frames)).parts
    except RunError as error:
        return f"| {claim} | {declared.unit} | {error} | | | {declared.delta:g} |"
    if "part" in parts:
        parts = parts[parts["part"] == parts["part"].iloc[0]]
    column = STATISTIC if STATISTIC in parts else "contrast"
    if column not in parts or len(parts) < 2:
        return ""
    values = parts[column].astype("float64")
    spread = float(values.std(ddof=1))
    shown = ", ".join(f"{value:+.3g}" for value in values)
    return f"| {claim} | {declared.unit} | {shown} | {spread:.3g} | {FACTOR * spread:.3g} | {declared.delta:g} |"


if __name__ == "__main__":
    told_in_a_sentence(main, __doc__)
