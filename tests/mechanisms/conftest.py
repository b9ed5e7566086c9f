"""A tiny model with prompts that differ in one word."""

import pytest
import torch

from attribution.models import load
from attribution.samples import ProbeSet, Sample


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
