"""Bytes that a result tells are of the size of those that were alive, and grow with what they depend on."""

import gc

import pytest
import torch

from attribution.causes import attribute, given
from attribution.causes.cost import saved, size
from attribution.samples import Sample
from attribution.worlds import planted as world
from experiments.timing import LiveBytes

CASES = [
    ("ablation", {}),
    ("ablation", {"path": "direct"}),
    ("gradient", {}),
    ("integrated", {}),
    ("conductance", {"nodes": 2}),
]


@pytest.fixture(scope="module")
def prompts():
    return [Sample(**row) for row in world.prompts(32, seed=3, star="agree")]


@pytest.mark.parametrize(("method", "asked"), CASES, ids=[method + "".join(asked) for method, asked in CASES])
def test_bytes_are_those_alive_at_the_peak(planted, prompts, method, asked, monkeypatch):
    from attribution.causes import integrated

    monkeypatch.setattr(integrated, "PIECES", 1)
    model, tokenizer = planted
    heads = [("head", layer, head) for layer in range(4) for head in range(4)]
    gc.collect()
    with LiveBytes() as live:
        told = attribute(model, tokenizer, prompts, method=method, components=heads, **asked).bytes
    assert told / 3 < live.peak < 3 * told and told > 100_000


def test_bytes_grow_with_samples(planted, prompts):
    few, many = (attribute(*planted, prompts[:n], method="gradient").bytes for n in (4, 32))
    assert 4 < many / few < 12


def test_bytes_are_of_the_largest_batch(planted, prompts, monkeypatch):
    monkeypatch.setattr(given, "BATCH_SIZE", 4)
    few, many = (attribute(*planted, prompts[:n], method="gradient").bytes for n in (4, 16))
    assert few <= many < 1.5 * few


def test_sizes_count_a_storage_once():
    one = torch.zeros(10)
    assert size([one, one[3:], one.view(2, 5)]) == 40 and size([one, torch.zeros(2)]) == 48 and size([]) == 0


def test_saved_are_activations_not_weights():
    model = torch.nn.Sequential(torch.nn.Linear(4, 100), torch.nn.ReLU(), torch.nn.Linear(100, 1))
    with saved(model) as found:
        total = model(torch.randn(6, 4)).sum()
    expected = torch.autograd.grad(total, list(model.parameters()))
    assert found.bytes == 6 * 4 * 4 + 6 * 100 * 4  # input, and the ReLU's output, which the next layer reads too
    assert all(gradient.abs().max() > 0 for gradient in expected)
