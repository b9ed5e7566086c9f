"""The claim `sampling_or_update`: does it matter what produced the sample, or what is active in the update?

GRPO on the planted organisms, in prompts where both cues name the same reply, on training seeds that no earlier study used.
Mechanism A is ablated while completions are sampled; beside it, ablated in the update pass, and active there but kept from its
gradient.

    python -m experiments.sampling_or_update [--quick]
"""

from pathlib import Path

from attribution.reports import study_report
from attribution.runs.quiet import quiet
from attribution.study import conclude, embedded, run_study
from experiments.claims import table, told_in_a_sentence


def main(seeds: int = 2, quick: bool = False, runs: Path = Path("runs"), slots: int = 2, out: Path | None = None) -> None:
    """Run the study `sampling`, judge the claim, and print the verdict.

    Args:
        seeds: training seeds of every arm, averaged within an organism.
        quick: one seed of the first organism: shows the figures, and is too little for a verdict.
        runs: directory that holds studies.
        slots: runs at once.
        out: directory for tables and page; the study's own below `runs` if it is not given.
    """
    quiet()
    study = embedded("sampling", runs).only(seeds=1 if quick else seeds, models=1 if quick else None)
    place = conclude(study, runs, run_study(study, runs, slots=slots), into=out)
    print(table(place))
    print(study_report(place))


if __name__ == "__main__":
    told_in_a_sentence(main, __doc__)
