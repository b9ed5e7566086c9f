"""The planned step against the step that torch's own optimizers then take, with every option, over several steps."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.optim import SGD, Adam, AdamW

from attribution.errors import ConfigError
from attribution.updates.planned import plannable, planned_step

RATE = st.sampled_from([1e-3, 0.1])
DECAY = st.sampled_from([0.0, 0.02, 0.3])
DTYPE = st.sampled_from([torch.float64, torch.float32])
SGD_OPTIONS = st.fixed_dictionaries({
    "lr": RATE, "weight_decay": DECAY, "maximize": st.booleans(), "momentum": st.sampled_from([0.0, 0.5, 0.9]),
    "dampening": st.sampled_from([0.0, 0.25]), "nesterov": st.booleans(),
}).filter(lambda o: not o["nesterov"] or (o["momentum"] and not o["dampening"]))  # fmt: skip
ADAM_OPTIONS = st.fixed_dictionaries({
    "lr": RATE, "weight_decay": DECAY, "maximize": st.booleans(), "amsgrad": st.booleans(),
    "betas": st.sampled_from([(0.9, 0.999), (0.5, 0.7), (0.0, 0.9)]), "eps": st.sampled_from([1e-8, 1e-2]),
})  # fmt: skip


def parameters_of(dtype=torch.float64, count=2) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64).to(dtype)) for _ in range(count)]


def gradients(parameters, step, scale=1.0) -> None:
    """Give every parameter a gradient that differs from step to step, some elements shrinking so that amsgrad matters."""
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        drawn[0] *= 0.1**step
        parameter.grad = (scale * drawn).to(parameter.dtype)


def agree(kind, options, dtype=torch.float64, steps=4) -> None:
    """Every planned step is the step taken, up to the rounding of the weights that the difference is read from."""
    parameters = parameters_of(dtype)
    optimizer = kind(parameters, **options)
    moved = 0.0
    for step in range(steps):
        gradients(parameters, step)
        planned = [planned_step(optimizer, parameter) for parameter in parameters]
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        for parameter, old, plan in zip(parameters, before, planned, strict=True):
            change, unit = parameter.detach() - old, torch.finfo(dtype).eps
            assert plan.dtype == dtype and plan.shape == parameter.shape and not plan.requires_grad
            bound = unit * (2 * torch.maximum(old.abs(), parameter.detach().abs()) + 40 * plan.abs())
            assert ((plan - change).abs() <= bound).all(), (step, plan, change)
            moved += change.abs().sum().item()
    assert moved > 1e-4


@settings(max_examples=150, deadline=None)
@given(options=SGD_OPTIONS, dtype=DTYPE)
@example(
    options={"lr": 0.1, "weight_decay": 0.3, "maximize": True, "momentum": 0.9, "dampening": 0.25, "nesterov": False},
    dtype=torch.float64,
)
def test_the_planned_step_of_sgd_is_the_step_it_takes(options, dtype):
    agree(SGD, options, dtype)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from([Adam, AdamW]), options=ADAM_OPTIONS, dtype=DTYPE)
def test_the_planned_step_of_adam_and_adamw_is_the_step_they_take(kind, options, dtype):
    agree(kind, options, dtype)


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
@pytest.mark.parametrize("implementation", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_torchs_implementations_make_no_difference(kind, implementation):
    options = {"momentum": 0.9} if kind is SGD else {"amsgrad": True}
    agree(kind, {"lr": 0.01, "weight_decay": 0.1, **options, **implementation})


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SGD, {"lr": torch.tensor(0.02, dtype=torch.float64), "momentum": 0.9}),
        (Adam, {"lr": torch.tensor(0.02, dtype=torch.float64), "foreach": False}),
        (AdamW, {"lr": torch.tensor([0.02], dtype=torch.float64), "weight_decay": 0.1, "foreach": False}),
        (Adam, {"betas": (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.95, dtype=torch.float64)), "foreach": False}),
        (Adam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ],
)
def test_rates_and_betas_may_be_tensors_and_an_adam_may_decouple_its_decay(kind, options):
    agree(kind, options)


def test_every_group_has_its_own_settings():
    one, other = parameters_of()
    optimizer = AdamW([{"params": [one], "lr": 0.1, "weight_decay": 0.5}, {"params": [other], "lr": 0.01, "betas": (0.5, 0.5)}])
    for step in range(3):
        gradients([one, other], step)
        planned = [planned_step(optimizer, parameter) for parameter in (one, other)]
        before = [parameter.detach().clone() for parameter in (one, other)]
        optimizer.step()
        for parameter, old, plan in zip((one, other), before, planned, strict=True):
            torch.testing.assert_close(parameter.detach() - old, plan, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_sparse_gradient_is_read_as_it_is(momentum):
    table = torch.nn.Embedding(5, 3, sparse=True, dtype=torch.float64)
    optimizer = SGD(table.parameters(), lr=0.1, momentum=momentum)
    for _ in range(3):
        optimizer.zero_grad()
        table(torch.tensor([1, 3, 3])).square().sum().backward()
        assert table.weight.grad is not None and table.weight.grad.is_sparse
        planned, before = planned_step(optimizer, table.weight), table.weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(table.weight.detach() - before, planned, rtol=1e-12, atol=1e-15)
        assert (planned[[1, 3]] != 0).all()


# Nothing is changed


def snapshot(optimizer, parameters):
    return copy.deepcopy((
        {number: dict(optimizer.state[p]) for number, p in enumerate(parameters) if p in optimizer.state},
        [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
        [p.detach() for p in parameters],
        [p.grad for p in parameters],
    ))  # fmt: skip


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SGD, {}),
        (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
        (Adam, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
        (AdamW, {"amsgrad": True, "weight_decay": 0.1}),
    ],
)
def test_planning_changes_nothing(kind, options, dtype):
    parameters = parameters_of(dtype)
    optimizer = kind(parameters, lr=0.01, **options)
    for step in range(3):
        gradients(parameters, step)
        before = snapshot(optimizer, parameters)
        watched = [*parameters, *(p.grad for p in parameters)]
        watched += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        versions = [tensor._version for tensor in watched]
        for parameter in parameters:
            assert planned_step(optimizer, parameter).abs().sum() > 0
            planned_step(optimizer, parameter, torch.ones_like(parameter))
        assert same(snapshot(optimizer, parameters), before)
        assert [tensor._version for tensor in watched] == versions
        assert step or not optimizer.state  # no entry for a parameter that has not been stepped yet
        optimizer.step()


def test_training_is_the_same_with_and_without_planning():
    def trained(plan: bool) -> list[torch.Tensor]:
        parameters = parameters_of(torch.bfloat16)
        optimizer = AdamW(parameters, lr=0.1)
        for step in range(5):
            gradients(parameters, step)
            if plan:
                [planned_step(optimizer, parameter) for parameter in parameters]
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    assert all(map(torch.equal, trained(True), trained(False)))


# Rounding


@pytest.mark.parametrize(("kind", "options"), [(SGD, {"momentum": 0.9}), (AdamW, {}), (AdamW, {"fused": True})])
def test_in_bf16_the_intended_step_is_there_where_the_applied_one_is_rounded_away(kind, options):
    parameters = parameters_of(torch.bfloat16)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.sign() * (1 + parameter.abs()))  # a unit in the last place is 2^-8 or more
    wide = [torch.nn.Parameter(parameter.detach().float()) for parameter in parameters]
    optimizer, exact = kind(parameters, lr=1e-4, **options), kind(wide, lr=1e-4, **options)
    for step in range(3):
        gradients(parameters, step)
        for parameter, copied in zip(parameters, wide, strict=True):
            copied.grad = parameter.grad.float() if parameter.grad is not None else None
        planned = [planned_step(optimizer, parameter) for parameter in parameters]
        before, start = [p.detach().clone() for p in parameters], [p.detach().clone() for p in wide]
        optimizer.step()
        exact.step()
        for parameter, old, copied, begun, plan in zip(parameters, before, wide, start, planned, strict=True):
            assert torch.equal(parameter.detach(), old)  # applied: nothing
            assert plan.dtype == torch.float32 and (plan != 0).all()
            torch.testing.assert_close(plan, copied.detach() - begun, rtol=0.02, atol=1e-6)  # its state is in bf16


# Which gradient


def test_a_parameter_without_gradient_is_not_moved_by_its_decay_or_momentum():
    one, other = parameters_of()
    optimizer = AdamW([one, other], lr=0.1, weight_decay=0.5)
    gradients([one, other], 0)
    optimizer.step()
    one.grad = None
    before = one.detach().clone()
    assert torch.equal(planned_step(optimizer, one), torch.zeros(4, 3, dtype=torch.float64))
    assert planned_step(optimizer, other).abs().min() > 0
    optimizer.step()
    assert torch.equal(one.detach(), before)


@pytest.mark.parametrize(("kind", "options"), [(SGD, {"momentum": 0.9}), (AdamW, {"weight_decay": 0.1})])
def test_a_gradient_of_the_callers_own_takes_the_place_of_the_parameters(kind, options):
    (parameter,) = parameters_of(count=1)
    optimizer = kind([parameter], lr=0.1, **options)
    for step in range(3):
        own = torch.full((4, 3), 0.5 + step, dtype=torch.float64)
        parameter.grad = None if step == 0 else -7 * torch.ones_like(parameter)
        planned = planned_step(optimizer, parameter, own)
        parameter.grad, before = own, parameter.detach().clone()
        optimizer.step()
        torch.testing.assert_close(parameter.detach() - before, planned, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", [SGD, AdamW])
@pytest.mark.parametrize("overflow", [False, True])
def test_what_a_loss_scaler_leaves_to_a_fused_optimizer_is_unscaled_or_skipped(kind, overflow):
    parameters = parameters_of(torch.float32)
    optimizer = kind(parameters, lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    gradients(parameters, 0, scale=1024.0)
    if overflow:
        parameters[1].grad = torch.full((4, 3), float("inf"))
    planned, before = [], [p.detach().clone() for p in parameters]
    optimizer.register_step_pre_hook(lambda *_: planned.extend(planned_step(optimizer, p) for p in parameters))
    scaler.step(optimizer)
    assert len(planned) == 2
    for parameter, old, plan in zip(parameters, before, planned, strict=True):
        torch.testing.assert_close(parameter.detach() - old, plan, rtol=1e-5, atol=1e-6)
        assert (plan == 0).all() == overflow


# Which optimizers


def test_an_optimizer_is_known_by_its_step():
    class Named(AdamW):
        pass

    class Lazy(SGD):
        def zero_grad(self, set_to_none=True):
            return super().zero_grad(set_to_none)

    class Own(Adam):
        def step(self, closure=None):
            return super().step(closure)

    parameters = parameters_of()
    known = [kind(parameters, lr=0.1) for kind in (Named, Lazy, SGD, Adam, AdamW)]
    torch.optim.lr_scheduler.ConstantLR(known[-1])  # puts a counting step on the object
    assert all(map(plannable, known))
    unknown = [
        Own(parameters),
        *(getattr(torch.optim, name)(parameters) for name in ("RMSprop", "NAdam", "RAdam", "Adafactor")),
    ]
    gradients(parameters, 0)
    for optimizer in unknown:
        assert not plannable(optimizer)
        with pytest.raises(ConfigError, match=f"step of {type(optimizer).__name__} cannot be planned; expected SGD, Adam or"):
            planned_step(optimizer, parameters[0])
    assert not plannable(None)


@pytest.mark.parametrize("first", [True, False])
def test_a_subclass_is_known_whether_or_not_it_was_the_first_of_its_kind(first):
    """torch replaces the step of a class by a profiled one when the first object is made, of whichever class that is."""

    class Base(torch.optim.SGD):
        step = torch.optim.SGD.step.__wrapped__ if hasattr(torch.optim.SGD.step, "hooked") else torch.optim.SGD.step

    class Derived(Base):
        pass

    parameters = parameters_of()
    made = [Derived(parameters, lr=0.1)] if first else [Base(parameters, lr=0.1), Derived(parameters, lr=0.1)]
    assert all(map(plannable, made))


def test_a_parameter_of_another_optimizer_and_a_gradient_of_another_shape_are_refused():
    one, other = parameters_of()
    optimizer = SGD([one], lr=0.1)
    gradients([one, other], 0)
    with pytest.raises(ConfigError, match=r"shape \(4, 3\) is in no group of this SGD"):
        planned_step(optimizer, other)
    with pytest.raises(ConfigError, match=r"gradient of shape \(3,\) was given for a parameter of shape \(4, 3\)"):
        planned_step(optimizer, one, torch.ones(3))
