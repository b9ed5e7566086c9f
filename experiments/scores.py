"""The claim `accuracy`: how good is each score, causally, on the planted organisms?

Over random sets of heads and neurons, the sum of their first-order causes is compared with the effect of ablating the set, and
the sum of their update shares with the effect of grafting what training changed in it. Every method and its rivals on two
models are in `experiments.accuracy`.

    python -m experiments.scores [--quick]
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from attribution.claims.scored import ABLATION, ABLATION_HALF, GRAFT, GRAFT_ONE_END
from attribution.runs.quiet import quiet
from attribution.store import is_finished, read_run
from attribution.study import Study, jobs, run_study
from attribution.worlds.studies import ORGANISMS, write_planted
from experiments.accuracy import GROUPS, METHODS, SHARES, TOGETHER, joint_effects, spearman, subject
from experiments.alone import concluded, failures
from experiments.claims import told_in_a_sentence

SETS, SAMPLES, PROBE = 200, 64, "conflict"


def main(quick: bool = False, runs: Path = Path("runs"), slots: int = 2, out: Path | None = None, sets: int = SETS) -> None:
    """Score, ablate, train, graft, and judge the claim.

    Args:
        quick: the first organism alone, which is too little for a verdict.
        runs: directory that holds studies.
        slots: runs at once.
        out: directory for tables and page; below `runs` if it is not given.
        sets: random sets of each kind.
    """
    quiet()
    models = ORGANISMS[:1] if quick else ORGANISMS
    rows = [row for name in models for row in ablated(name, sets)]
    study = grafting(runs, models, sets)
    failed = failures(run_study(study, runs, slots=slots))
    rows += [row for job in jobs(study, runs) if is_finished(job.path) for row in grafted(str(job.config.model), job.path)]
    frame = pd.DataFrame(rows, columns=["model", "score", "value"])
    place = out or runs / "claims" / "accuracy"
    told = {"arms": ["A"], "models": list(models), "seeds": [0]}
    rests_on = jobs(study, runs)
    concluded(place, ("accuracy",), {"scores": frame}, name="accuracy", rests_on=rests_on, failed=failed, **told)


def ablated(name: str, sets: int) -> list[tuple[str, str, float]]:
    """Scores of first-order causes on one organism: model, score, value."""
    given = subject(name, None, SAMPLES)
    causes, _ = METHODS["gradient"](given)
    index = pd.Series(range(len(causes)))
    rows = []
    for share, label in zip(SHARES, (ABLATION, ABLATION_HALF), strict=True):
        members, effects = joint_effects(given, GROUPS[TOGETHER], share, sets)
        own = causes[index[: members.shape[1]]]  # heads and neurons stand before rows
        rows.append((name, label, float(spearman((members @ own).mean(1), effects.mean(1)))))
    return rows


def grafting(runs: Path, models: tuple[str, ...], sets: int) -> Study:
    """Arm A of the study `planted`, whose change is grafted in random sets."""
    given = write_planted(runs / "accuracy" / "data")
    arm = {**given["arms"]["A"], "compared": None, "beside": (), "grafts": "none", "everything": True, "linear_grafts": sets}
    return Study.model_validate({"name": "accuracy", "arms": {"A": arm}, "models": models, "seeds": (0,)})


def grafted(name: str, path: Path) -> list[tuple[str, str, float]]:
    """Scores of update shares in one run: model, score, value."""
    told = (read_run(path).result or {})["linear_graft"][PROBE]
    return [(name, GRAFT, told["spearman_both_ends"]), (name, GRAFT_ONE_END, told["spearman"])]


if __name__ == "__main__":
    told_in_a_sentence(main, __doc__)
