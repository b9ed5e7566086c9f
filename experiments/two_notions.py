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
from experiments.alone import concluded
from experiments.claims import Asked, parted, told_in_a_sentence


def main(asked: Asked, out: Path | None = None) -> None:
    """Ablate, correlate, and judge the claim.

    Args:
        asked: on what.
        out: directory for table and page; below `runs` if it is not given.
    """
    quiet()
    fit, unfit = parted(asked.models)
    tables = [overlap(*load(name)).assign(model=name) for name in fit]
    frames = {"overlap": pd.concat(tables, ignore_index=True)} if tables else {}
    place = out or asked.runs / "claims" / "two_notions"
    concluded(place, ("two_notions",), frames, name="two_notions", unfit=unfit, models=asked.models)


if __name__ == "__main__":
    told_in_a_sentence(main, __doc__)
