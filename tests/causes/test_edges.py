"""What must not matter (side of padding, one-token prompts, where layers are), what half precision adds, what is warned of."""

import numpy as np
import pytest
import torch

from attribution.causes import METHODS, ablate, attribute, floor, self_repair
from attribution.causes.patching import patch
from attribution.causes.steering import Steering, steering
from attribution.causes.tokens import token_causes
from attribution.components import Component
from attribution.errors import ConfigError, DataError, ModelError
from attribution.models import anatomy
from attribution.samples import ProbeSet, Sample
from attribution.worlds.build import word_tokenizer

PATHS = [*((method, {}) for method in METHODS), ("ablation", {"path": "direct"}), ("gradient", {"queries": True})]
IDS = [method + "".join(given) for method, given in PATHS]


@pytest.mark.parametrize(("method", "given"), PATHS, ids=IDS)
def test_the_side_of_padding_does_not_matter(tiny, samples, method, given):
    tables = []
    for side in ("left", "right"):
        tokenizer = word_tokenizer([f"w{i}" for i in range(19)])
        tokenizer.padding_side = side
        tables.append(attribute(tiny("gpt2"), tokenizer, samples, method=method, **given).per_sample)
    assert torch.equal(*tables)


@pytest.mark.parametrize(("method", "given"), PATHS, ids=IDS)
def test_a_prompt_of_one_token_beside_longer_ones(tiny, tokenizer, samples, method, given, agree):
    """The beginning token alone; its batch may be as long as you like."""
    short = Sample(prompt="", response=" w4")
    fine = {"method": method, "nodes": 40, **given}
    alone = attribute(tiny("llama"), tokenizer, [short], **fine)
    among = attribute(tiny("llama"), tokenizer, [*samples, short], **fine)
    bound = 1e-5 if method in ("ablation", "gradient") else 2e-3
    agree(among.per_sample[:, -1], alone.per_sample[:, 0], bound)


def everything(model, tokenizer, samples):
    """Every public way to ask a model about its causes, each with numbers for an answer."""
    probe = ProbeSet(name="a", samples=tuple(samples))
    directions = Steering(torch.ones(3, 16), "last", False, "a", "b")
    sets = {"some": [("head", 0, 1), ("neuron", 1, 3)]}
    return {
        "attribute": lambda: attribute(model, tokenizer, samples).per_sample,
        "ablate": lambda: ablate(model, tokenizer, samples, sets)["effect"],
        "self_repair": lambda: self_repair(model, tokenizer, samples, sets)["direct"],
        "patch": lambda: patch(model, model, tokenizer, samples, kinds=["head"]).per_sample,
        "steering": lambda: steering(model, tokenizer, probe, probe).vectors,
        "read": lambda: directions.read(model, tokenizer, samples, 1)["metric"],
        "token_causes": lambda: token_causes(model, tokenizer, samples, steps=1).table["effect"],
    }


@pytest.mark.parametrize("ask", everything(None, None, []))
def test_neither_mode_nor_checkpointing_of_the_model_matters_and_it_keeps_both(tiny, tokenizer, samples, ask):
    """GPT-2 has dropout in every layer."""
    model = tiny("gpt2")
    expected = everything(model, tokenizer, samples)[ask]()
    model.train().activation_checkpointing_enable()
    modules = [*model.modules()]

    def hooks():  # checkpointing has one of its own
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in modules]

    before = torch.get_rng_state(), hooks()
    assert np.array_equal(everything(model, tokenizer, samples)[ask](), expected)
    assert torch.equal(torch.get_rng_state(), before[0]) and hooks() == before[1]
    assert all(module.training for module in modules) and model.is_activation_checkpointing
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("method", "given"), PATHS, ids=IDS)
def test_the_mode_of_the_caller_does_not_matter(tiny, tokenizer, samples, method, given, mode):
    model = tiny("llama")
    expected = attribute(model, tokenizer, samples, method=method, **given)
    with mode():
        found = attribute(model, tokenizer, samples, method=method, **given)
        assert not torch.is_grad_enabled() and torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert torch.equal(found.per_sample, expected.per_sample) and found.table.equals(expected.table)


@pytest.mark.parametrize("ask", everything(None, None, []))
def test_every_question_can_be_asked_in_inference_mode(tiny, tokenizer, samples, ask):
    model = tiny("llama")
    with torch.inference_mode():
        everything(model, tokenizer, samples)[ask]()


def on(device_of):
    """Layers on other devices, as accelerate would place them; its hooks carry activations over."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in device_of:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=False))


@pytest.mark.parametrize(("method", "given"), PATHS, ids=IDS)
def test_a_model_placed_by_accelerate_reads_the_same(tiny, tokenizer, samples, method, given):
    model = tiny("llama")
    expected = attribute(model, tokenizer, samples, method=method, **given).per_sample
    on([*model.model.layers, model.model.norm, model.lm_head])
    assert hasattr(model.model.layers[0], "_hf_hook")
    assert torch.equal(attribute(model, tokenizer, samples, method=method, **given).per_sample, expected)


@pytest.mark.parametrize("ask", everything(None, None, []))
def test_offloaded_weights_are_refused(tiny, tokenizer, samples, ask):
    model = tiny("llama")
    everything(model, tokenizer, samples)[ask]()
    model.model.layers[1].to("meta")
    with pytest.raises(ModelError, match="weights are offloaded; open it where all of them fit"):
        everything(model, tokenizer, samples)[ask]()


@pytest.mark.parametrize("ask", everything(None, None, []))
@pytest.mark.parametrize("where", ["prompt", "response", "contrast"])
def test_a_token_that_the_model_does_not_have_is_named(tiny, ask, where):
    """The tokenizer of a larger model."""
    text = {"prompt": "w1", "response": " w4", "contrast": (" w6",)}
    sample = Sample(**{**text, where: (" w35",) if where == "contrast" else " w35"})
    larger = word_tokenizer([f"w{i}" for i in range(40)])
    with pytest.raises(DataError, match="the tokenizer gives token 39, of which the model has 23, counted from 0; give"):
        everything(tiny("llama"), larger, [sample])[ask]()


# Half precision


@pytest.mark.parametrize(("method", "given"), PATHS, ids=IDS)
def test_half_precision_comes_with_its_noise_floor(tiny, tokenizer, samples, method, given):
    """The floor is of the size of the error that half precision really makes."""
    heads = [Component("head", layer, head) for layer in (0, 1) for head in range(4)]
    model = tiny("llama")
    model.to(torch.bfloat16)
    half = attribute(model, tokenizer, samples, method=method, components=heads, **given)
    whole = attribute(model.float(), tokenizer, samples, method=method, components=heads, **given)  # of the same weights
    error = (half.table["effect"] - whole.table["effect"]).abs().max()
    assert whole.floor is None and half.floor is not None
    assert error / 30 < half.floor < 30 * error and error < 0.3 * whole.table["effect"].abs().max() + 0.1
    assert any("half precision" in each and f"{half.floor:.2g}" in each for each in half.caveats)


def test_rounding_otherwise_moves_by_a_unit_in_the_last_place(tiny):
    model = tiny("llama").to(torch.bfloat16)
    parts, ids = anatomy(model), torch.arange(10).view(2, 5)
    seen = []
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(input_ids=ids)
    with floor.rounded_otherwise(parts):
        model(input_ids=ids)
        hooks = len(model.model.layers[0]._forward_pre_hooks)
    moved = (seen[1].float() - seen[0].float()).abs() / seen[0].float().abs()
    assert 0 < (moved > 0).float().mean() < 1 and moved.max() <= torch.finfo(torch.bfloat16).eps
    assert len(model.model.layers[0]._forward_pre_hooks) == hooks - 1


# Warnings and refusals


def test_what_applies_is_said_and_nothing_else(tiny, tokenizer, samples):
    even = samples[:1]
    assert attribute(tiny("llama"), tokenizer, even, components=[]).caveats == ()
    (told,) = attribute(tiny("llama"), tokenizer, samples, components=[]).caveats
    assert told.startswith("responses differ in length, and log_odds grows with it")
    (told,) = attribute(tiny("llama"), tokenizer, even, metric="log_prob", components=[]).caveats
    assert told.startswith("log_prob saturates")
    (told,) = attribute(tiny("olmo2"), tokenizer, even, method="gradient").caveats
    assert "sum to nearly zero" in told and "rank within a layer only" in told
    given = {"method": "gradient", "reference": "resample", "counterfactuals": even}
    assert attribute(tiny("olmo2"), tokenizer, even, **given).caveats == ()


def test_every_method_says_what_it_is_complete_for(tiny, tokenizer, samples):
    told = {attribute(tiny("llama"), tokenizer, samples[:1], method=method, components=[], **given).complete
            for method, given in PATHS}  # fmt: skip
    assert len(told) == len(PATHS) - 1 and all(len(each) > 60 for each in told)  # queries change nothing about it


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "indirect"}, "unknown path 'indirect'; expected total, direct"),
        ({"method": "gradient", "path": "direct"}, "method 'gradient' has no direct path; use method=\"ablation\""),
        ({"queries": True}, "method 'ablation' does not replace queries; use method=\"gradient\""),
        ({"method": "integrated", "nodes": 0}, "0 nodes asked for; an integral takes at least 1"),
        ({"method": "gradient", "verify": 3, "seed": -1}, "seed -1 cannot start a draw; expected 0 or more"),
        ({"reference": "vocabulary"}, "unknown reference 'vocabulary'; expected zero, mean, resample"),
    ],
)
def test_options_that_a_method_does_not_have_are_refused(tiny, tokenizer, samples, given, message):
    with pytest.raises(ConfigError, match=message):
        attribute(tiny("llama"), tokenizer, samples, **given)


def test_the_floor_of_some_is_no_higher_than_that_of_all(tiny, tokenizer, samples, monkeypatch):
    """First order computes all components in one pass, so that those drawn are rounded as they are among all."""
    model = tiny("llama").to(torch.bfloat16)
    found = []
    for count in (5, 10**6):
        monkeypatch.setattr(floor, "COMPONENTS", count)
        found.append(attribute(model, tokenizer, samples, method="gradient").floor)
    assert 0 < found[0] <= found[1]
