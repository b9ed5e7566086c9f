"""The claim `recruited`: does training recruit early components of an idle mechanism to feed the one that is at work?

Every planted organism is trained where one mechanism alone has a cue, on training seeds that no earlier study used. The change
of each mechanism, and of its early and late halves, is put into the model before training, while nothing or a mechanism is
ablated. What an idle half brings only while the other mechanism is intact, it brings by feeding that.

    python -m experiments.recruited [--quick]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from attribution.claims.recruited import ALONE, EARLY, LATE, TOGETHER
from attribution.errors import RunError
from attribution.mechanisms import read_mechanisms
from attribution.models import load, locate
from attribution.runs.quiet import quiet
from attribution.runs.stages import KEPT
from attribution.samples import ProbeSet, Sample
from attribution.store import is_finished
from attribution.study import Study, embedded, jobs, run_study
from attribution.updates.graft import graft_sets
from attribution.worlds import planted
from attribution.worlds.pool import NO_SINGLES
from attribution.worlds.studies import FRESH
from experiments.alone import concluded, failures
from experiments.claims import told_in_a_sentence

ARMS = ("A", "B")
BARE: dict[str, Any] = {"compared": None, "beside": (), "grafts": "none", "keep": True, **NO_SINGLES}
PROBED = 64
FORMS: dict[str, dict[str, Any]] = {
    f"A {ALONE}": {"trait": True},
    f"B {ALONE}": {"trait": False, "star": True},
    TOGETHER: {"star": "agree"},
}


def main(
    seeds: int = 2,
    quick: bool = False,
    runs: Path = Path("runs"),
    slots: int = 2,
    out: Path | None = None,
) -> None:
    """Train, graft, judge, and print the verdict.

    Args:
        seeds: training seeds of every arm, averaged within an organism.
        quick: one seed of the first organism: shows the figures, and is too little for a verdict.
        runs: directory that holds studies.
        slots: runs at once.
        out: directory for tables and page; below `runs` if it is not given.
    """
    quiet()
    study = arms(runs).only(seeds=1 if quick else seeds, models=1 if quick else None)
    failed = run_study(study, runs, slots=slots)
    frames = {"recruited": grafted(study, runs)}
    told = {"arms": ARMS, "models": study.models, "seeds": study.seeds}
    place = out or runs / "claims" / "recruited"
    rests_on = jobs(study, runs)
    concluded(place, ("recruited",), frames, name="recruited", rests_on=rests_on, failed=failures(failed), **told)


def arms(runs: Path) -> Study:
    """Both arms of the study `planted`, with little read on the way, on fresh seeds; what they leave is kept."""
    whole = embedded("planted", runs)
    chosen = {name: whole.arms[name].model_copy(update=BARE) for name in ARMS}
    update = {"name": "recruited", "arms": chosen, "seeds": FRESH, "controls": (), "first_seed": {}, "claims": ()}
    return whole.model_copy(update=update)


def grafted(study: Study, runs: Path) -> pd.DataFrame:
    """Grafts of every finished run, as the claim reads them.

    Raises:
        RunError: none is finished.
    """
    done = [job for job in jobs(study, runs) if is_finished(job.path)]
    if not done:
        raise RunError(f"no run of {', '.join(ARMS)} is finished, of which grafts could be measured; see {runs / study.name}")
    given = {name: [Sample(**row) for row in planted.prompts(PROBED, 5, **form)] for name, form in FORMS.items()}
    probes = [ProbeSet(name=name, samples=tuple(samples)) for name, samples in given.items()]
    tables = []
    for job in done:
        base, tokenizer = load(str(job.config.model))
        sets = halved(read_mechanisms(locate(str(job.config.model))), base.config.num_hidden_layers)
        table = graft_sets(
            base, load(str(job.path / KEPT)).model, sets, tokenizer=tokenizer, probes=probes, metric=job.config.metric
        )
        tables.append(table.assign(model=str(job.config.model), arm=job.arm, seed=job.config.seed))
    found = pd.concat(tables, ignore_index=True)
    return found[found["ablated"].isin(["", *ARMS])].reset_index(drop=True)


def halved(mechanisms: dict[str, pd.DataFrame], layers: int) -> dict[str, pd.DataFrame]:
    """Each mechanism, and apart its components in the first half of the layers and in the second."""
    found = {}
    for name in ARMS:
        table = mechanisms[name]
        early = table["layer"] < layers // 2
        found |= {name: table, f"{name}, {EARLY}": table[early], f"{name}, {LATE}": table[~early]}
    return found


if __name__ == "__main__":
    told_in_a_sentence(main, __doc__)
