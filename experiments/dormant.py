"""The claim `dormant`: kindness that was trained away, is it gone, bypassed or asleep?

Every base is finetuned on cruel replies of one who is maybe kind, and what is left is finetuned back on kind ones: how fast do
they come back, against replies that were never there, those of other situations, trained from the same place for as long?
Beside it the influence of the kind mechanism after training it away, and what a strong cue still elicits.

    python -m experiments.dormant [--model …] [--seeds 2] [--quick]
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from attribution.runs.quiet import quiet
from attribution.study import Study, collect, run_study
from attribution.worlds.pool import BARE, write_kindland
from attribution.worlds.studies import BASES
from experiments.alone import Started, concluded, failures, finished, start
from experiments.claims import told_in_a_sentence

AWAY, BACK = ("away",), ("back", "never there")
READ = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28)  # steps of training back after which is read


def main(
    model: tuple[str, ...] = BASES,
    seeds: int = 2,
    quick: bool = False,
    runs: Path = Path("runs"),
    slots: int = 2,
    out: Path | None = None,
) -> None:
    """Train away, train back, judge, and print the verdict.

    Args:
        model: bases, or folders of models of your own.
        seeds: training seeds of every arm, averaged within a base.
        quick: one seed, and only the first model: shows the figures, and is too little for a verdict.
        runs: directory that holds studies.
        slots: runs at once.
        out: directory for tables and page; below `runs` if it is not given.
    """
    quiet()
    begun = start("dormant", AWAY, model[:1] if quick else model, 1 if quick else seeds, runs, slots)
    place = out or runs / "claims" / "dormant"
    if begun.study is None:
        concluded(place, ("dormant",), {}, name="dormant", unfit=begun.unfit, models=list(model))
        return
    frames = read(begun.study, runs)
    failed = [failures(begun.failed)]
    for returned, again in back(begun, runs, slots):
        frames = {name: pd.concat([frame, returned[name]], ignore_index=True) for name, frame in frames.items()}
        failed.append(again)
    told = {"arms": [*AWAY, *BACK], "models": begun.study.models, "seeds": begun.study.seeds}
    concluded(place, ("dormant",), frames, name="dormant", failed=pd.concat(failed), unfit=begun.unfit, **told)


def read(study: Study, runs: Path) -> dict[str, pd.DataFrame]:
    """What the runs of a study recorded, with arms and probe sets under the names that they have in the claim."""
    names = study.named["dormant"]
    every = collect(study, runs)
    found = {}
    for name in ("sets", "probes"):
        frame = every[name]
        found[name] = frame.assign(
            arm=frame["arm"].map(names.arms), probe=frame["probe"].map(lambda probe: names.probes.get(probe, probe))
        )
    return found


def back(begun: Started, runs: Path, slots: int) -> list[tuple[dict[str, pd.DataFrame], pd.DataFrame]]:
    """Train what is left of every base, seed by seed; tables under the name of the base, and what failed."""
    assert begun.study is not None
    found = []
    for seed in begun.study.seeds:
        left = {
            str(folder): str(job.config.model)
            for _, job, folder in finished(begun.study, runs, "dormant")
            if job.config.seed == seed
        }
        if not left:
            continue
        given = write_kindland(runs / "kindland" / "data", ("dormant",), tuple(left))
        named = given["named"]["dormant"]["arms"]
        arms = {
            name: {**arm, **BARE, "keep": False, "steps": READ, "training": {**arm["training"], "max_steps": READ[-1]}}
            for name, arm in given["arms"].items()
            if named[name] in BACK
        }
        study = Study.model_validate({**given, "name": "kindland-back", "arms": arms, "on_model": {}, "seeds": (seed,)})
        failed = failures(run_study(study, runs, slots=slots))
        tables = {name: frame.assign(model=frame["model"].map(left)) for name, frame in read(study, runs).items()}
        found.append((tables, failed.assign(model=failed["model"].map(left))))
    return found


if __name__ == "__main__":
    told_in_a_sentence(main, __doc__)
