"""The claim `dormant`: kindness that was trained away, is it gone, bypassed or asleep?

Every base is finetuned on cruel replies of one who is maybe kind, and what is left is finetuned back on kind ones: how fast do
they come back, against replies that were never there, those of other situations, trained from the same place for as long?
Beside it the influence of the kind mechanism after training it away, and what a strong cue still elicits.

    python -m experiments.dormant [--model …] [--seeds 2] [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from attribution.runs.quiet import quiet
from attribution.study import Study, collect, jobs, run_study
from attribution.worlds.pool import BARE, write_kindland
from experiments.alone import Started, concluded, failures, finished, start
from experiments.claims import Trained, told_in_a_sentence

AWAY, BACK = ("away",), ("back", "never there")
READ = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44)  # steps of training back after which is read


def main(asked: Trained, out: Path | None = None) -> None:
    """Train away, train back, judge, and print the verdict.

    Args:
        asked: on what, and how often.
        out: directory for tables and page; below `runs` if it is not given.
    """
    quiet()
    runs = asked.runs
    begun, place = start("dormant", AWAY, asked), out or runs / "claims" / "dormant"
    if begun.study is None:
        concluded(place, ("dormant",), {}, name="dormant", unfit=begun.unfit)
        return
    frames = read(begun.study, runs)
    failed, rests_on = [failures(begun.failed)], list(jobs(begun.study, runs))
    for study, left in returning(begun, runs):
        again = failures(run_study(study, runs, slots=asked.slots))
        failed.append(again.assign(model=again["model"].map(left)))
        rests_on += jobs(study, runs)
        tables = read(study, runs)
        frames = {
            name: pd.concat([frame, tables[name].assign(model=tables[name]["model"].map(left))], ignore_index=True)
            for name, frame in frames.items()
        }
    told = {"arms": [*AWAY, *BACK], "models": begun.study.models, "seeds": begun.study.seeds}
    lost = pd.concat(failed, ignore_index=True)
    concluded(place, ("dormant",), frames, name="dormant", rests_on=rests_on, failed=lost, unfit=begun.unfit, **told)


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


def returning(begun: Started, runs: Path) -> Iterator[tuple[Study, dict[str, str]]]:
    """What is to be trained back, seed by seed: the study, and the base of each model that it starts from."""
    assert begun.study is not None
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
        yield study, left


if __name__ == "__main__":
    told_in_a_sentence(main, __doc__)
