"""Prompts of `planted` with one cue, and the same without it; and a tiny model with prompts that differ in one word."""

import re

import pytest
import torch

from attribution.models import load
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
            samples=tuple(Sample(**row) for row in planted.prompts(36, 5, star="conflict", third=True, reply=reply)),
        )
        for route, reply in (("A", "trait"), ("B", "star"))
    }


@pytest.fixture
def toy(folder):
    """A tiny random model, its tokenizer, and prompts whose second word raises the response."""
    model, tokenizer = load(str(folder))
    words = [f"w{i}" for i in range(19)]
    samples, others = [], []
    for i in range(16):
        cue, contrary = (f"{words[i]} {word} {words[(3 * i + 1) % 19]} {words[(7 * i + 2) % 19]}" for word in ("w4", "w11"))
        with torch.no_grad():
            with_cue, without = (model(**tokenizer(text, return_tensors="pt")).logits[0, -1, 4:] for text in (cue, contrary))
        rise = with_cue - without
        said = {"response": f" {words[rise.argmax()]}", "contrast": (f" {words[rise.argmin()]}",)}
        samples.append(Sample(prompt=cue, **said))
        others.append(Sample(prompt=contrary, response=" w0"))
    return model, tokenizer, ProbeSet(name="w4", samples=tuple(samples), counterfactuals=tuple(others))
