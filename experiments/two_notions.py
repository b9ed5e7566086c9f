"""The claim `two_notions`: is what makes a model answer about kindness what makes it act kindly?

In every base each head and neuron is ablated while it answers questions about kind ones, and while a kind one replies; their
effects are correlated, against what halves of the same prompts would let one see. Nothing is trained.

    python -m experiments.two_notions [--model …] [--quick]
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from attribution.models import load
from attribution.runs.quiet import quiet
from attribution.worlds.kindland.notions import overlap
from attribution.worlds.studies import BASES
from experiments.alone import concluded
from experiments.claims import not_testable, told_in_a_sentence


def main(model: tuple[str, ...] = BASES, quick: bool = False, runs: Path = Path("runs"), out: Path | None = None) -> None:
    """Ablate, correlate, and judge the claim.

    Args:
        model: bases, or folders of models of your own.
        quick: the first model alone, which is too little for a verdict.
        runs: directory that the page is written below.
        out: directory for table and page; below `runs` if it is not given.
    """
    quiet()
    models = model[:1] if quick else model
    unfit = {name: reason for name in models if (reason := not_testable(name))}
    tables = [overlap(*load(name)).assign(model=name) for name in models if name not in unfit]
    frames = {"overlap": pd.concat(tables, ignore_index=True)} if tables else {}
    place = out or runs / "claims" / "two_notions"
    concluded(place, ("two_notions",), frames, name="two_notions", unfit=unfit, models=list(models))


if __name__ == "__main__":
    told_in_a_sentence(main, __doc__)
