"""Prompts of `planted` with one cue, and the same without it."""

import re

import pytest

from attribution.samples import ProbeSet, Sample
from attribution.worlds import planted

FORMS = {  # form of a prompt, and the sentence that is its cue
    "A": ({"trait": True}, r"^\w+ is (kind|cruel|plain) \. "),
    "B": ({"trait": False, "star": True}, r"teacher : star for \w+ \. "),
}


@pytest.fixture(scope="session")
def cued():
    """Discovery prompts of a route: `cued("A", 96)`."""

    def build(route: str, count: int, seed: int = 7) -> ProbeSet:
        form, cue = FORMS[route]
        rows = planted.prompts(count, seed, problems=planted.TRAINING, **form)
        bare = [{**row, "prompt": re.sub(cue, "", row["prompt"])} for row in rows]
        return ProbeSet(
            name=route,
            samples=tuple(Sample(**row) for row in rows),
            counterfactuals=tuple(Sample(**row) for row in bare),
        )

    return build


@pytest.fixture(scope="session")
def conflicts():
    """Estimation prompts with both cues, by route: its own reply against the one that neither cue names."""
    return {
        route: ProbeSet(
            name=f"conflict {route}",
            samples=tuple(Sample(**row) for row in planted.prompts(72, 5, star="conflict", third=True, reply=reply)),
        )
        for route, reply in (("A", "trait"), ("B", "star"))
    }
