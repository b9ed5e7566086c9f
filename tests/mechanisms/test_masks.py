"""Soft masks: open they change nothing, closed they ablate everything, between they are differentiable."""

import numpy as np
import pytest
import torch

from attribution.capture import scored_logits, sites
from attribution.causes.ablation import without
from attribution.causes.reference import Reference, at_sites
from attribution.components import Components
from attribution.mechanisms.masks import Cued, learned, masked, under, units
from attribution.models import anatomy
from attribution.samples import Encoded, collate


def cued(model, reference="resample", device="cpu"):
    parts = anatomy(model)
    generator = np.random.default_rng(0)
    one, other = (
        collate([Encoded(tuple(generator.integers(3, 23, 7).tolist()), 5, 1.0, ()) for _ in range(3)]) for _ in range(2)
    )
    with torch.no_grad():
        values = Reference(reference, [other]).of("sites", at_sites(parts))
        return parts, Cued(one, values, scored_logits(parts, one), scored_logits(parts, other))


def test_units_are_numbered_as_the_table_of_components(tiny):
    index = Components(tiny("llama"))
    seen = []
    for site in sites(index.parts):
        rows = index.table.iloc[units(index.parts, site)]
        assert set(zip(rows["kind"], rows["layer"], strict=True)) == {(site.kind, site.layer)}
        seen += rows.index.tolist()
    assert sorted(seen) == np.flatnonzero(index.table["kind"] != "row").tolist()


@pytest.mark.parametrize("reference", ["zero", "mean", "resample"])
def test_open_gates_change_nothing_and_closed_ones_ablate_all(tiny, family, reference):
    model = tiny(family)
    parts, given = cued(model, reference)
    index = Components(parts)
    every = np.flatnonzero(index.table["kind"] != "row")
    with torch.no_grad():
        assert torch.equal(under(parts, given, torch.ones(len(every))), given.intact)
        with without(index, every, given.values):
            ablated = scored_logits(parts, given.batch)
        assert torch.equal(under(parts, given, torch.zeros(len(every))), ablated) and not torch.equal(ablated, given.intact)
        some = np.random.default_rng(1).permutation(every)[: len(every) // 2]
        gates = torch.ones(len(every)).index_fill(0, torch.as_tensor(some), 0)
        with without(index, some, given.values):
            assert torch.equal(under(parts, given, gates), scored_logits(parts, given.batch))


@pytest.mark.parametrize("reference", ["zero", "resample"])
def test_gradients_of_gates_are_finite_differences(tiny, reference):
    parts, given = cued(tiny("llama", dtype=torch.float64), reference)
    count = parts.depth * (parts.heads + parts.neurons)
    gates = torch.rand(count, dtype=torch.float64).requires_grad_()

    def read(gates):
        return under(parts, given, gates).log_softmax(-1).gather(1, given.batch.tokens[:, None]).sum()

    (gradient,) = torch.autograd.grad(read(gates), gates)
    with torch.no_grad():
        for unit in (0, 3, 5, parts.depth * parts.heads, count - 1):
            step = 1e-6 * torch.nn.functional.one_hot(torch.tensor(unit), count)
            assert gradient[unit] == pytest.approx(((read(gates + step) - read(gates - step)) / 2e-6).item(), abs=1e-7)
    assert (gradient != 0).all()


def test_learned_gates_keep_and_take_out_what_differs(tiny):
    model = tiny("llama")
    parts, given = cued(model)
    hooks = {module: dict(module._forward_pre_hooks) for module in model.modules()}
    gates = learned(parts, given, sparsity=0.02)
    assert torch.equal(gates, learned(parts, given, sparsity=0.02))
    assert gates.min() >= 0 and gates.max() <= 1 and 0 < (gates > 0.5).sum() < len(gates)
    assert (learned(parts, given, sparsity=100) == 0).all()
    assert hooks == {module: dict(module._forward_pre_hooks) for module in model.modules()}
    assert all(parameter.grad is None for parameter in model.parameters())

    def misses(gates):
        kept, taken = (under(parts, given, each).log_softmax(-1) for each in (gates, 1 - gates))
        return sum(
            (wanted.log_softmax(-1).exp() * (wanted.log_softmax(-1) - found)).sum(-1).mean()
            for wanted, found in ((given.intact, kept), (given.absent, taken))
        )

    with torch.no_grad():
        assert misses(gates) < 0.2 * misses(torch.full_like(gates, 0.5))
        assert misses(gates) < 0.2 * misses(gates[torch.randperm(len(gates))])


def test_gates_are_let_go_of_after_an_error(tiny):
    model = tiny("llama")
    parts, given = cued(model)
    with pytest.raises(RuntimeError), masked(parts, torch.ones(parts.depth * (parts.heads + parts.neurons)), given.values):
        raise RuntimeError
    assert not any(module._forward_pre_hooks for module in model.modules())
