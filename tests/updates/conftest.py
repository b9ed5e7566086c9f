"""Samples and loops for the recorder's tests."""

from collections.abc import Callable

import pytest
import torch

from attribution.models import load
from attribution.samples import ProbeSet, Sample, collate, encode
from attribution.updates.recorder import Recorder
from attribution.worlds import planted as grammar


def samples(count: int, seed: int, **form) -> list[Sample]:
    return [Sample(**row) for row in grammar.prompts(count, seed, **form)]


@pytest.fixture(scope="session")
def training() -> list[Sample]:
    return samples(24, 41, problems=grammar.TRAINING)


@pytest.fixture(scope="session")
def probes() -> list[ProbeSet]:
    return [
        ProbeSet(name="conflict", samples=samples(6, 42, star="conflict")),
        ProbeSet(name="agree", samples=samples(6, 43, star="agree")),
    ]


@pytest.fixture
def fresh():
    """A copy of the shipped control that a test may train, and its tokenizer."""
    return load("planted/unrouted")


def train(model, tokenizer, training, optimizer, steps, *, clip=1.0, size=8, accumulation=1) -> list[float]:
    """A plain loop over the first samples, again and again; returns the losses."""
    encoded = encode(tokenizer, training)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        chosen = [encoded[(step * size + i) % len(encoded)] for i in range(size)]
        for part in range(accumulation):
            batch = collate(chosen[part::accumulation])
            loss = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss / accumulation
            loss.backward()
        losses.append(loss.item())
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return losses


@pytest.fixture(scope="session")
def loop() -> Callable:
    return train


@pytest.fixture(scope="session")
def recorded(tmp_path_factory, training, probes):
    """A recorded loop of five AdamW steps: run directory, start and end weights, gradients as consumed."""
    model, tokenizer = load("planted/unrouted")
    path = tmp_path_factory.mktemp("recorded") / "run"
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    consumed, weights = [], []

    def keep(*_):
        consumed.append({name: p.grad.clone() for name, p in model.named_parameters()})
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})

    optimizer.register_step_pre_hook(keep)
    with Recorder(path, probes=probes, tokenizer=tokenizer, milestones="ends").attach(model, optimizer):
        losses = train(model, tokenizer, training, optimizer, 5, clip=0.5)
    weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return {"path": path, "model": model, "tokenizer": tokenizer, "start": start, "weights": weights,
            "consumed": consumed, "losses": losses}  # fmt: skip
