"""Samples of unequal lengths for the tiny models, counterfactuals that align with them, and what "the same" means."""

import numpy as np
import pytest
import torch

from attribution.samples import Sample
from attribution.worlds.build import word_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """One token per word, for the vocabulary of the tiny models."""
    return word_tokenizer([f"w{i}" for i in range(19)])


@pytest.fixture(scope="session")
def samples():
    """Lengths, response lengths and weights all differ."""
    return [
        Sample(prompt="w1 w2 w3", response=" w4 w5", contrast=(" w4 w6", " w7 w5")),
        Sample(prompt="w7 w2", response=" w9", weight=-0.5, contrast=(" w8",)),
        Sample(prompt="w1 w18 w8 w8", response=" w4 w5 w6", weight=2.0, contrast=(" w11 w5 w6",)),
    ]


@pytest.fixture(scope="session")
def counterfactuals():
    """One per sample, of the same lengths."""
    return [
        Sample(prompt="w11 w2 w12", response=" w4 w5"),
        Sample(prompt="w13 w3", response=" w14"),
        Sample(prompt="w15 w16 w8 w10", response=" w0 w5 w6"),
    ]


@pytest.fixture(scope="session")
def agree():
    """Assert that numbers agree, relative to the largest, and that they are something to agree on."""

    def agree(found, expected, bound=1e-5):
        found, expected = (
            values.detach().double() if torch.is_tensor(values) else torch.tensor(np.array(values))
            for values in (found, expected)
        )
        assert found.shape == expected.shape
        scale = expected.abs().max()
        assert scale > 1e-2 and (expected.abs() > 1e-3 * scale).double().mean() > 0.25, "nothing to compare"
        assert (found - expected).abs().max() <= bound * scale.clamp_min(1)

    return agree
