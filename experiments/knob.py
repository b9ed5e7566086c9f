"""The claims `knob`, `knob_by_finetuning` and `compact`: is there a knob for kindness, and does finetuning turn it?

In every base the direction that tells speakers called kind from plain ones, what adding it does where nothing is told of the
speaker, whether finetuning on kind replies moves along it, and how few components bring most of the gain about.

    python -m experiments.knob [--model …] [--seeds 2] [--quick]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch

from attribution.claims.knob import OTHER_SEED, WHOLE, WITHOUT_ROWS
from attribution.errors import RunError
from attribution.models import load
from attribution.runs.quiet import quiet
from attribution.samples import read_samples
from attribution.study import jobs
from attribution.worlds.kindland import shifts
from experiments.alone import concluded, failures, finished, start
from experiments.claims import Trained, told_in_a_sentence

CLAIMS = ("knob", "knob_by_finetuning", "compact")
ARMS = ("kind", "cold", "strategist")
GAINING = ("kind", "cold")  # arms that kind replies are gained in


def main(asked: Trained, out: Path | None = None) -> None:
    """Run the arms, measure, judge, and print the verdicts.

    Args:
        asked: on what, and how often.
        out: directory for tables and page; below `runs` if it is not given.
    """
    quiet()
    begun, place = start("knob", ARMS, asked), out or asked.runs / "claims" / "knob"
    if begun.study is None:
        concluded(place, CLAIMS, {}, name="knob", unfit=begun.unfit)
        return
    frames = measured(begun.study, asked.runs)
    told = {"arms": ARMS, "models": begun.study.models, "seeds": begun.study.seeds}
    rests_on, failed = jobs(begun.study, asked.runs), failures(begun.failed)
    concluded(place, CLAIMS, frames, name="knob", rests_on=rests_on, failed=failed, unfit=begun.unfit, **told)


def measured(study: Any, runs: Path) -> dict[str, pd.DataFrame]:
    """The frames that the three claims read, from the models that the runs left."""
    turned, lines, compact = [], [], []
    kept: dict[str, list[tuple[str, Any, Path]]] = {}
    for arm, job, folder in finished(study, runs, "knob"):
        kept.setdefault(str(job.config.model), []).append((arm, job, folder))
    if not kept:
        raise RunError(f"no run of {', '.join(ARMS)} is finished, on which the knob is measured; see {runs / study.name}")
    for name, found in kept.items():
        base, tokenizer = load(name)
        known = shifts.directions(base, tokenizer)
        turned.append(shifts.turned(base, tokenizer, known).assign(model=name))
        vectors = {each: direction.vectors for each, direction in known.items()}
        moved, rows = {}, {}
        for arm, job, folder in found:
            tuned = load(str(folder)).model
            moved[arm, job.config.seed] = shifts.shift(base, tuned, tokenizer)
            rows[arm] = shifts.trained_rows(base, tokenizer, read_samples(job.config.data))
            if arm in GAINING:
                told = shifts.compact(base, tuned, tokenizer)
                compact.append({"model": name, "arm": arm, "seed": job.config.seed, **told})
        for (arm, seed), shift in moved.items():
            others = [each for (same, other), each in moved.items() if same == arm and other != seed]
            compared = vectors | ({OTHER_SEED: torch.stack(others).mean(0)} if others else {})
            for part, out in ((WITHOUT_ROWS, rows[arm]), (WHOLE, None)):
                told = shifts.aligned(shift, compared, out)
                lines.append(told.assign(model=name, arm=arm, seed=seed, part=part))
    frames = {"turned": pd.concat(turned), "shifts": pd.concat(lines), "compact": pd.DataFrame(compact)}
    return {each: frame.reset_index(drop=True) for each, frame in frames.items()}


if __name__ == "__main__":
    told_in_a_sentence(main, __doc__)
