"""Update shares: closed forms, the sum rule, and weights that come back bit by bit."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from attribution import uses
from attribution.components import Components
from attribution.metrics import log_odds
from attribution.models import load
from attribution.samples import Encoded, batches, collate, encode
from attribution.updates import share
from attribution.updates.graft import level, swapped
from attribution.updates.share import FLOOR, TOLERANCE, Node, Path, integrate, read, shares


def polynomial(coefficients):
    """A path along which metric(s) is a polynomial, its gradient split between two groups."""

    def node(s: float) -> Node:
        slope = sum(k * c * s ** (k - 1) for k, c in enumerate(coefficients) if k)
        metric = sum(c * s**k for k, c in enumerate(coefficients))
        return Node(s, metric, torch.tensor([0.25 * slope, 0.75 * slope], dtype=torch.float64))

    return node


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_cubics_are_exact_and_split_as_their_gradient(coefficients):
    node = polynomial([0.0, *coefficients[1:]])
    found = integrate(node(0.0), node(1.0), node)
    assert found.resolved
    assert found.share.sum().item() + found.residual == pytest.approx(found.change, abs=1e-9)
    if found.passes > 2:  # Simpson integrates the slope of a cubic exactly
        assert found.share.tolist() == pytest.approx([0.25 * found.change, 0.75 * found.change], abs=1e-9)


def test_a_straight_metric_takes_two_passes_and_a_bent_one_more():
    square = polynomial([0.0, 1.0, 3.0])  # whose slope is straight, so the trapezoid is exact
    found = integrate(square(0.0), square(1.0), square)
    assert found.passes == 2 and found.share.tolist() == pytest.approx([1.0, 3.0])
    straight, bent = polynomial([1.0, 2.0]), polynomial([0.0, 1.0, -2.0, 5.0, -1.0, 7.0, 3.0])
    assert integrate(straight(0.0), straight(1.0), straight).passes == 2
    found = integrate(bent(0.0), bent(1.0), bent)
    assert found.passes > 3 and found.resolved
    assert abs(found.residual) <= TOLERANCE * abs(found.change) + FLOOR


def test_a_budget_that_does_not_suffice_is_said():
    wild = polynomial([0.0] * 60 + [1.0])
    found = integrate(wild(0.0), wild(1.0), wild, passes=3)
    assert found.passes == 3 and not found.resolved
    assert found.residual == pytest.approx(found.change - found.share.sum().item())
    assert integrate(wild(0.0), wild(1.0), wild, passes=40).resolved


def test_refinement_goes_where_the_metric_bends():
    asked = []

    def cliff(s: float) -> Node:
        asked.append(s)
        sharp = torch.tensor(60.0 * (s - 0.9), dtype=torch.float64)
        return Node(s, torch.sigmoid(sharp).item(), 60 * torch.sigmoid(sharp) * (1 - torch.sigmoid(sharp)).reshape(1))

    found = integrate(cliff(0.0), cliff(1.0), cliff, passes=21)
    assert found.resolved and sum(s > 0.75 for s in asked) > len(asked) / 2


@pytest.fixture(scope="module")
def trained(training):
    """Start weights, the model one large step later, and a probe batch."""
    model, tokenizer = load("planted/unrouted")
    components = Components(model)
    start = {name: p.detach().clone() for name, p in components.stored.items()}
    found = batches(encode(tokenizer, training), 16)
    reading = read(components, found, log_odds)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in components.stored.items():
            gradient = reading.gradients[name]
            parameter += 2e-3 * gradient.sign() * torch.rand(parameter.shape, generator=generator)
    return components, start, found, reading


def test_shares_add_up_to_the_change(trained):
    components, start, found, before = trained
    after = read(components, found, log_odds)
    path = Path(components, start)
    result = shares(path, found, log_odds, path.node(0.0, before), path.node(1.0, after))
    assert result.resolved and abs(result.change) > 0.1
    assert result.change == pytest.approx(after.metric - before.metric)
    assert abs(result.change - result.share.sum().item()) <= TOLERANCE * abs(result.change) + FLOOR
    assert (result.share != 0).float().mean() > 0.9


def test_between_the_ends_no_gradient_is_kept_and_shares_are_the_same(trained, monkeypatch):
    components, start, found, before = trained
    path, kept = Path(components, start), []
    ends = path.node(0.0, before), path.node(1.0, read(components, found, log_odds))

    def between(s: float) -> Node:
        with path.at(s):
            return path.node(s, read(components, found, log_odds))

    def watched(*args, **given):
        reading = read(*args, **given)
        kept.append(reading.gradients)
        return reading

    monkeypatch.setattr(share, "TOLERANCE", 0.0)  # so that the path is refined
    monkeypatch.setattr(share, "FLOOR", 0.0)
    expected = integrate(*ends, between, passes=5)
    monkeypatch.setattr(share, "read", watched)
    result = shares(path, found, log_odds, *ends, passes=5)
    assert kept == [{}] * 3 and len(found) > 1
    assert expected.share.abs().max() > 1e-3
    torch.testing.assert_close(result.share, expected.share, rtol=1e-4, atol=1e-6)
    assert not any(use.parameter._backward_hooks for use in components.uses)


@pytest.mark.parametrize("tied", [False, True])
def test_what_moved_is_what_the_weights_say(tiny, tied):
    """A tied matrix counts once in the length of the change, and in the groups of both its uses."""
    components = Components(tiny("llama", tied=tied))
    start = {name: p.detach().clone() for name, p in components.stored.items()}
    with torch.no_grad():
        for parameter in components.stored.values():
            parameter.view(-1)[::2] += 0.1
    found = Path(components, start).moved({})
    changes = {name: parameter.detach() - start[name] for name, parameter in components.stored.items()}
    assert found.length == pytest.approx(sum(change.square().sum().item() for change in changes.values()) ** 0.5, rel=1e-5)
    uses = [changes[components.source[use.name]] for use in components.uses]
    assert found.squares.sum().item() == pytest.approx(sum(change.square().sum().item() for change in uses), rel=1e-5)
    assert found.changed.sum().item() == sum(int((change != 0).sum()) for change in uses) and not found.products.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_moved_is_exact_in_every_precision_and_in_blocks(tiny, monkeypatch, dtype):
    components = Components(tiny("llama").to(dtype))
    start = {name: p.detach().clone() for name, p in components.stored.items()}
    with torch.no_grad():
        for each in components.stored.values():
            each.add_(torch.randn_like(each), alpha=0.1)
    gradients = {use.name: 300 * torch.randn_like(use.values) for use in components.uses}  # whose squares no half holds

    def change(use):
        return use.values.double() - start[components.source[use.name]].double()

    expected = components.reduce(lambda use: gradients[use.name].double() * change(use))
    for block in (2**20, 7):
        monkeypatch.setattr(uses, "BLOCK", (block, block))
        path = Path(components, start)
        found, close = path.moved(gradients), {"rtol": 1e-4, "atol": 1e-2}
        torch.testing.assert_close(found.products, expected, **close)
        torch.testing.assert_close(path.products(gradients), expected, **close)
        torch.testing.assert_close(found.squares, components.reduce(change, torch.square), **close)
        assert torch.equal(found.changed, components.reduce(lambda use: change(use).ne(0)))


def test_zeros_instead_of_gradients_break_the_sum_rule(trained):
    components, start, found, before = trained
    nothing = {name: torch.zeros_like(g) for name, g in before.gradients.items()}
    path = Path(components, start)
    ends = [path.node(s, reading.__class__(reading.metric, nothing, [])) for s, reading in
            ((0.0, before), (1.0, read(components, found, log_odds)))]  # fmt: skip
    assert not integrate(*ends, lambda s: Node(s, 0.0, ends[0].products), passes=5).resolved


def test_the_gradient_along_the_path_is_the_finite_difference(trained):
    components, start, found, _ = trained
    path = Path(components, start)
    with path.at(0.5):
        slope = path.products(read(components, found, log_odds).gradients).sum().item()
    width = 0.05
    values = []
    for s in (0.5 - width, 0.5 + width):
        with path.at(s):
            values.append(level(components, found, log_odds))
    assert slope == pytest.approx((values[1] - values[0]) / (2 * width), rel=5e-3)


def test_weights_come_back_bit_by_bit_also_after_an_exception(trained):
    components, start, _, _ = trained
    before = {name: p.detach().clone() for name, p in components.stored.items()}
    path = Path(components, start)
    with path.at(0.3):
        assert not all(torch.equal(before[name], p) for name, p in components.stored.items())
    with pytest.raises(KeyboardInterrupt), path.at(0.7):
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], p) for name, p in components.stored.items())


def test_reading_leaves_no_trace(fresh, training):
    model, tokenizer = fresh
    components = Components(model)
    model.train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    reading = read(components, batches(encode(tokenizer, training), 16), log_odds)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not model.model.norm.weight.requires_grad
    assert reading.gradients["model.norm.weight"].abs().sum() > 0  # frozen weights take part in the sum rule


def test_groups_swapped_one_after_the_other_telescope(trained):
    components, start, found, _ = trained
    tuned, base = components, Components(load("planted/unrouted").model)
    assert all(torch.equal(base.stored[name], value) for name, value in start.items())
    generator = torch.Generator().manual_seed(0)
    piece = torch.randint(0, 5, (base.group_count,), generator=generator)
    at = [level(base, found, log_odds)]
    for last in range(5):
        with swapped(base, tuned, piece <= last):
            at.append(level(base, found, log_odds))
    steps = [b - a for a, b in pairwise(at)]
    change = level(tuned, found, log_odds) - at[0]
    assert abs(change) > 0.1 and all(abs(step) > 1e-4 for step in steps)
    assert sum(steps) == pytest.approx(change, abs=1e-5)


def test_a_model_whose_layers_are_wrapped_to_run_again_is_read_as_it_is(tiny):
    """As accelerate wraps them for FSDP2: they run again in the backward pass, when no hook is on."""
    batch = collate([Encoded(ids, 2, 1.0, ()) for ids in ((1, 4, 7, 11), (1, 3, 3, 8, 9))])
    plain, wrapped = tiny("llama"), tiny("llama")
    expected = read(Components(plain), [batch], log_odds, sized=True)
    for number, layer in enumerate(wrapped.model.layers):
        wrapped.model.layers[number] = checkpoint_wrapper(layer)
    components = Components(wrapped)
    for sized in (False, True):
        found = read(components, [batch], log_odds, sized=sized)
        assert found.metric == pytest.approx(expected.metric, rel=1e-5)
        for one, two in zip(found.gradients.values(), expected.gradients.values(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
