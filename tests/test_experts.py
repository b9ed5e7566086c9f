"""Mixtures of experts: the place where their neurons are seen is true, changes no bit, and is gone when nothing looks."""

import copy
import gc
import weakref

import pytest
import torch
from by_name import MIXTURES
from torch.nn.functional import linear, silu

from attribution.capture import Site, edited, scored_logits, sites, tapped
from attribution.causes import attribute
from attribution.components import Component, Components
from attribution.errors import ModelError, RecordError
from attribution.metrics import log_odds
from attribution.models import anatomy, check
from attribution.samples import Encoded, Sample, collate
from attribution.updates.graft import swapped
from attribution.updates.norms import OutputNorms
from attribution.worlds.build import word_tokenizer

EXPERTS, NEURONS, SLOTS = 5, 4, 2
IDS = ((1, 4, 7, 11, 5, 9), (1, 3, 3, 8), (1, 12, 20, 6, 10))
SAMPLES = [Sample(prompt="w1 w2 w3", response=" w4 w5"), Sample(prompt="w7 w2", response=" w9", weight=-0.5)]


@pytest.fixture(params=MIXTURES)
def mixture(request):
    return request.param


@pytest.fixture(params=["grouped_mm", "batched_mm"])
def kernel(request):
    return request.param


@pytest.fixture
def batch():
    return collate([Encoded(ids, 2, 1.0, ()) for ids in IDS])


@pytest.fixture
def tokenizer():
    return word_tokenizer([f"w{i}" for i in range(19)])


def traces(model):
    """What a place leaves on the modules of a model while it is open."""
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()) + sum(
        "_apply_gate" in module.__dict__ for module in model.modules()
    )


def plain(block, hidden):
    """An MLP block token by token: activations [token, expert, neuron], routing weights [token, expert], output."""
    hidden = hidden.flatten(0, 1)
    _, weights, chosen = block.gate(hidden)
    active = torch.zeros(len(hidden), EXPERTS, NEURONS)
    scale = torch.zeros(len(hidden), EXPERTS)
    out = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for slot in range(SLOTS):
            expert = int(chosen[token, slot])
            first, second = linear(hidden[token], block.experts.gate_up_proj[expert]).split(NEURONS)
            active[token, expert], scale[token, expert] = silu(first) * second, weights[token, slot]
            out[token] += scale[token, expert] * block.experts.down_proj[expert] @ active[token, expert]
    return active, scale, out


@torch.no_grad()
def test_a_tap_is_what_every_expert_computes_token_by_token(tiny, mixture, kernel, batch):
    model = tiny(mixture)
    model.set_experts_implementation(kernel)
    parts, read = anatomy(model), {}
    for layer in (0, 1):
        parts.layers[layer].mlp.register_forward_pre_hook(lambda _m, args, layer=layer: read.__setitem__(layer, args[0]))
    with tapped(parts, sites(parts)) as seen:
        scored_logits(parts, batch)
    for layer in (0, 1):
        active, scale, out = plain(parts.layers[layer].mlp, read[layer])
        found, place = seen[Site("neuron", layer)], parts.mlp_out[layer]
        assert found.shape == (*batch.ids.shape, EXPERTS * NEURONS)
        torch.testing.assert_close(found.view(-1, EXPERTS, NEURONS), active)
        torch.testing.assert_close(place.scale.view(-1, EXPERTS), scale)
        assert ((found.view(-1, EXPERTS, NEURONS) != 0).any(-1).sum(-1) == SLOTS).all() and scale.count_nonzero() == 2 * len(
            scale
        )
        torch.testing.assert_close(
            (found * scale.repeat_interleave(NEURONS, -1).view_as(found)) @ place.weight.T, out.view_as(read[layer])
        )


@torch.enable_grad()
def test_looking_changes_not_one_bit_of_logits_or_gradients(tiny, mixture, kernel, tied, batch):
    model = tiny(mixture, tied)
    model.set_experts_implementation(kernel)
    parts = anatomy(model)

    def run():
        model.zero_grad()
        logits = model(input_ids=batch.ids).logits
        logits.square().sum().backward()
        return [logits, *(parameter.grad.clone() for parameter in model.parameters())]

    before = run()
    for differentiable in (False, True):
        with tapped(parts, sites(parts), differentiable=differentiable):
            inside = run()
            assert traces(model) > 0
        assert traces(model) == 0
        assert all(torch.equal(one, other) for one, other in zip(inside, before, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(run(), before, strict=True))


def test_nothing_is_left_and_nothing_is_held(tiny, mixture, batch):
    model = tiny(mixture).train()
    parts = anatomy(model)
    assert anatomy(model).mlp_out[0] is parts.mlp_out[0] and traces(model) == 0
    assert [name for name, _ in parts.mlp_out[0].named_parameters()] == [] and parts.mlp_out[0] not in set(model.modules())
    with pytest.raises(RuntimeError, match="from inside"), tapped(parts, sites(parts)), tapped(parts, sites(parts)[:2]):
        raise RuntimeError("from inside")
    check(model)
    assert traces(model) == 0 and model.training
    twin = copy.deepcopy(model)
    with tapped(parts, [Site("neuron", 0)]):
        assert traces(twin) == 0
    assert anatomy(twin).mlp_out[0] is not parts.mlp_out[0]
    gone = weakref.ref(model)
    del model, parts, twin
    gc.collect()
    assert gone() is None


def test_taps_within_taps_close_in_any_order(tiny, mixture):
    parts = anatomy(tiny(mixture))
    place = parts.mlp_out[0]
    first, second = (place.register_forward_pre_hook(lambda _module, _args: None) for _ in range(2))
    first.remove()
    assert "_apply_gate" in place.experts.__dict__
    second.remove()
    assert "_apply_gate" not in place.experts.__dict__ and not place.experts._forward_pre_hooks


def test_kernels_that_hide_neurons_are_refused(tiny, mixture):
    model = tiny(mixture)
    model.set_experts_implementation("eager")
    with pytest.raises(ModelError, match=r"experts run by 'eager' show no single neurons; call .*\('grouped_mm'\) first"):
        check(model)
    assert traces(model) == 0


def test_layers_without_experts_are_refused(tiny):
    model = tiny("qwen3_moe")
    dense = tiny("qwen3").model.layers[0].mlp
    model.model.layers[1].mlp = dense
    with pytest.raises(ModelError, match=r"a layer of Qwen3MoeForCausalLM has no experts .*not supported"):
        anatomy(model)


# Owners, against slices written by hand


def test_a_neuron_of_an_expert_owns_its_column_and_rows(tiny, mixture):
    index = Components(tiny(mixture))
    for expert, neuron in ((0, 0), (3, 2), (4, 3)):
        unit = expert * NEURONS + neuron
        for name, where, part in (
            ("down_proj", (expert, slice(None), neuron), "writing"),
            ("gate_up_proj", (expert, neuron), "gating"),
            ("gate_up_proj", (expert, NEURONS + neuron), "gating"),
        ):
            mark = torch.zeros_like(index.parts.layers[1].mlp.experts.get_parameter(name))
            mark[where] = 1
            total = index.reduce(
                lambda use, name=name, mark=mark: mark if use.name == f"model.layers.1.mlp.experts.{name}" else None
            )
            owned = index.groups[total.numpy() > 0]
            assert [*owned.itertuples(index=False, name=None)] == [("neuron", 1, unit, part)] and total.sum() == 16
    router = index.groups[index.groups["part"] == "router"]
    assert [*router["layer"]] == [0, 1] and (index.sizes[router.index.to_numpy(copy=True)] == EXPERTS * 16).all()


def test_a_graft_and_a_norm_put_back_move_one_column_alone(tiny, mixture):
    base, tuned = tiny(mixture), tiny(mixture)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(2)
    into, source = Components(base), Components(tuned)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    mask = into.group_mask(into.positions([("neuron", 1, 3 * NEURONS + 2)]))
    with swapped(into, source, mask):
        changed = {name: (value != before[name]).nonzero().tolist() for name, value in base.state_dict().items()}
    changed = {name.removeprefix("model.layers.1.mlp.experts."): found for name, found in changed.items() if found}
    assert {(expert, row) for expert, row, _ in changed["gate_up_proj"]} == {(3, 2), (3, NEURONS + 2)}
    assert {(expert, column) for expert, _, column in changed["down_proj"]} == {(3, 2)}
    assert {name: len(found) for name, found in changed.items()} == {"gate_up_proj": 32, "down_proj": 16}
    with OutputNorms(source, OutputNorms(into).norms).restored():
        torch.testing.assert_close(tuned.model.layers[1].mlp.experts.down_proj, base.model.layers[1].mlp.experts.down_proj)
        assert torch.equal(tuned.model.layers[1].mlp.experts.gate_up_proj, 2 * base.model.layers[1].mlp.experts.gate_up_proj)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


# Effects, against weights edited by hand


@torch.no_grad()
def test_an_ablation_is_the_model_without_the_column(tiny, mixture, tokenizer):
    model = tiny(mixture)
    chosen = [Component("neuron", layer, unit) for layer in (0, 1) for unit in range(EXPERTS * NEURONS)]
    found = attribute(model, tokenizer, SAMPLES, components=chosen)
    rows = [tokenizer(sample.prompt + sample.response)["input_ids"] for sample in SAMPLES]
    starts = [len(tokenizer(sample.prompt)["input_ids"]) for sample in SAMPLES]
    batches = [collate([Encoded(tuple(ids), start, 1.0, ())]) for ids, start in zip(rows, starts, strict=True)]

    def read():
        return torch.cat([log_odds(model(input_ids=each.ids).logits[each.scored], each) for each in batches])

    intact = read()
    for number, (_, layer, unit) in enumerate(chosen):
        column = model.model.layers[layer].mlp.experts.down_proj[unit // NEURONS, :, unit % NEURONS]
        kept = column.clone()
        column.zero_()
        expected = intact - read()
        column.copy_(kept)
        torch.testing.assert_close(found.per_sample[number], expected, rtol=1e-4, atol=2e-5)
    assert found.per_sample.abs().max() > 1e-2


@torch.no_grad()
def test_what_is_put_where_no_token_is_routed_is_written_nowhere(tiny, mixture, batch):
    parts = anatomy(tiny(mixture))
    expected = scored_logits(parts, batch)
    with edited({parts.mlp_out[0]: lambda value: torch.where(value == 0, torch.full_like(value, 7.0), value)}):
        assert torch.equal(scored_logits(parts, batch), expected)
    with edited({parts.mlp_out[0]: torch.zeros_like}):
        found = scored_logits(parts, batch)
    parts.layers[0].mlp.register_forward_hook(lambda _module, _args, out: torch.zeros_like(out))
    torch.testing.assert_close(scored_logits(parts, batch), found)
    assert not torch.allclose(found, expected)


# Methods


def test_methods_say_what_routing_does_to_them(tiny, mixture, tokenizer):
    model = tiny(mixture)
    with pytest.raises(ModelError, match="a mixture of experts has no conductance"):
        attribute(model, tokenizer, SAMPLES, method="conductance")
    told = attribute(model, tokenizer, SAMPLES, method="integrated").caveats
    assert any("jump from expert to expert" in each for each in told)
    told = attribute(model, tokenizer, SAMPLES, method="gradient").caveats
    assert any("first order holds the choice of experts" in each for each in told)
    assert traces(model) == 0


def test_adapters_and_pasting_are_refused(tiny, mixture, tokenizer):
    from peft import LoraConfig, get_peft_model

    from attribution.causes.patching import patch
    from attribution.updates.adapters import Effective

    with pytest.raises(ModelError, match="is a mixture of experts, into which neurons are not pasted"):
        patch(tiny(mixture), tiny(mixture), tokenizer, SAMPLES)
    with pytest.raises(RecordError, match="is a mixture of experts, whose neurons are not recorded under adapters"):
        Effective(get_peft_model(tiny(mixture), LoraConfig(target_modules=["q_proj"], r=2)))
