"""The one face: what it returns, what it refuses, and that the model is left as it was."""

import re

import pandas as pd
import pytest
import torch
from by_name import MIXTURES
from transformers import AutoModel, AutoModelForSequenceClassification

from attribution.causes import METHODS, Causes, ablate, attribute, integrated
from attribution.components import Component, Components
from attribution.errors import AttributionError, ConfigError, DataError, ModelError
from attribution.samples import Sample

HEAD, NEURON, ROW = Component("head", 1, 2), Component("neuron", 0, 7), Component("row", -1, 9)


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


# What comes back


def test_the_table_is_every_component_once(tiny, family, tied, tokenizer, samples, method, monkeypatch):
    if method == "conductance" and family in MIXTURES:
        pytest.skip("refused, see test_experts.py")
    monkeypatch.setattr(integrated, "PIECES", 1)  # how exact they are is tested beside each method
    model = tiny(family, tied)
    found = attribute(model, tokenizer, samples, method=method, metric="log_odds_per_token")
    names = ["kind", "layer", "index"]
    assert list(found.table) == [*names, "effect", *["kl"] * (method == "ablation")]
    pd.testing.assert_frame_equal(found.table[names], Components(model).table)
    assert found.per_sample.shape == (len(found.table), len(samples)) and found.per_sample.isfinite().all()
    assert not found.table.isna().any(axis=None) and found.table["effect"].abs().max() > 1e-2
    reference = "vocabulary" if method == "conductance" else "zero"
    assert (found.method, found.metric, found.reference) == (method, "log_odds_per_token", reference)
    assert (found.residual is None) == (found.sums is None) == (method in ("ablation", "gradient"))
    assert not found.per_sample.requires_grad and found.per_sample.device.type == "cpu"
    assert found.complete and found.bytes > 0 and found.passes >= 3 and found.floor is found.verified is None


def test_exact_ablation_of_zero_is_the_default(tiny, tokenizer, samples):
    found = attribute(tiny("llama"), tokenizer, samples, components=[HEAD])
    assert isinstance(found, Causes)
    assert (found.method, found.metric, found.reference) == ("ablation", "log_odds", "zero")


def test_the_effect_is_the_weighted_mean_over_samples(tiny, tokenizer, samples, method):
    model = tiny("llama")
    found = attribute(model, tokenizer, samples, method=method)
    weights = torch.tensor([1.0, -0.5, 2.0])
    torch.testing.assert_close(torch.tensor(found.table["effect"]), (found.per_sample * weights).mean(1).double())
    plain = attribute(model, tokenizer, [s.model_copy(update={"weight": 1.0}) for s in samples], method=method)
    assert torch.equal(plain.per_sample, found.per_sample)
    torch.testing.assert_close(torch.tensor(plain.table["effect"]), found.per_sample.mean(1).double())
    assert (plain.table["effect"] - found.table["effect"]).abs().max() > 1e-2
    if method == "ablation":
        pd.testing.assert_series_equal(plain.table["kl"], found.table["kl"])  # a distance has no weight


def test_a_sample_reads_the_same_alone(tiny, tokenizer, samples, method, agree):
    model = tiny("gpt2")
    together = attribute(model, tokenizer, samples, method=method, nodes=40).per_sample
    alone = [attribute(model, tokenizer, [s], method=method, nodes=40).per_sample for s in samples]
    agree(torch.cat(alone, 1), together, 1e-5 if method in ("ablation", "gradient") else 2e-3)  # a path is split to 1e-3


# Restriction


@pytest.mark.parametrize("as_table", [False, True])
def test_some_components_are_rows_of_all(tiny, tokenizer, samples, method, as_table):
    model = tiny("llama")
    every = attribute(model, tokenizer, samples, method=method)
    chosen = [ROW, NEURON, HEAD, Component("head", 0, 0), NEURON]  # not in order, one twice
    asked = pd.DataFrame(chosen).assign(note="theirs") if as_table else chosen
    found = attribute(model, tokenizer, samples, method=method, components=asked)
    assert [*found.table[["kind", "layer", "index"]].itertuples(index=False, name=None)] == [
        ("head", 0, 0), HEAD, NEURON, ROW,
    ]  # fmt: skip
    where = [[*every.table[["kind", "layer", "index"]].itertuples(index=False, name=None)].index(c) for c in sorted({*chosen})]
    torch.testing.assert_close(found.per_sample, every.per_sample[where], rtol=1e-5, atol=1e-6)
    expected = every.table.iloc[where].reset_index(drop=True)
    pd.testing.assert_frame_equal(found.table, expected, rtol=1e-4, atol=1e-6)


def test_no_components_is_an_empty_table(tiny, tokenizer, samples, method):
    found = attribute(tiny("llama"), tokenizer, samples, method=method, components=[])
    assert len(found.table) == 0 and found.per_sample.shape == (0, len(samples))


# Refusals, each in the package's own words


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"method": "shap"}, ConfigError, "unknown method 'shap'; expected ablation, gradient"),
        ({"metric": "loss"}, ConfigError, "unknown metric 'loss'; expected log_odds, "),
        ({"reference": "noise"}, ConfigError, "'noise'; expected zero, mean, resample"),
        ({"reference": "mean"}, DataError, "'mean' takes its values from counterfactual samples; give"),
        ({"reference": "resample", "counterfactuals": []}, DataError, "'resample' takes its values from counterfactual"),
        ({"components": [("head", 2, 0)]}, ConfigError, "there is no head (2, 0); this model has 2 layers of 4 heads"),
        ({"components": [("neuron", 0, 20)]}, ConfigError, "there is no neuron (0, 20);"),
        ({"components": [("row", -1, 23)]}, ConfigError, "there is no row (-1, 23);"),
        ({"components": [("haed", 0, 0)]}, ConfigError, "unknown component kind 'haed'; expected head, neuron, row"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_named(tiny, tokenizer, samples, method, given, error, message):
    with pytest.raises(error, match=re.escape(message)):
        attribute(tiny("llama"), tokenizer, samples, **{"method": method, **given})


@pytest.mark.parametrize(
    ("samples", "given", "message"),
    [
        ([], {}, "there are no samples; give at least one"),
        ([Sample(prompt="w1", response="")], {}, "response '' tokenizes to nothing"),
        ([Sample(prompt="w1", response=" nobody")], {}, "does not know a word"),
        ([Sample(prompt="w1 " * 40, response=" w2")], {}, "do not fit the model's context window of 32"),
        ([Sample(prompt="w1", response=" w2")], {"metric": "logit_difference"}, "needs a contrast on every sample; add"),
    ],
)
def test_samples_that_cannot_be_scored_are_refused(tiny, tokenizer, method, samples, given, message):
    with pytest.raises(DataError, match=re.escape(message)):
        attribute(tiny("llama"), tokenizer, samples, method=method, **given)
    with pytest.raises(DataError, match=re.escape(message)):
        ablate(tiny("gpt2"), tokenizer, samples, {"one": [HEAD]}, **given)


def test_counterfactuals_that_do_not_align_are_named(tiny, tokenizer, samples, counterfactuals, method):
    given = {"method": method, "reference": "resample"}
    with pytest.raises(DataError, match="2 counterfactuals for 3 samples"):
        attribute(tiny("llama"), tokenizer, samples, counterfactuals=counterfactuals[:2], **given)
    with pytest.raises(DataError, match="counterfactual 1 cannot be aligned: 3 \\+ 1 tokens, the sample has 4 \\+ 2"):
        attribute(tiny("llama"), tokenizer, samples, counterfactuals=[counterfactuals[i] for i in (1, 0, 2)], **given)


def test_a_model_without_a_row_is_refused(tokenizer, samples):
    for model in (torch.nn.Linear(2, 2), torch.nn.ModuleList()):
        with pytest.raises(ModelError):
            attribute(model, tokenizer, samples)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_a_model_without_an_unembedding_is_refused(tiny, family, tokenizer, samples, kind):
    if (family, kind) == ("olmoe", AutoModelForSequenceClassification):
        pytest.skip("transformers has none")
    other = kind.from_config(tiny(family).config)
    with pytest.raises(ModelError, match=f"{type(other).__name__} has no unembedding, so that it is no causal language model"):
        attribute(other, tokenizer, samples)


def test_no_sets_and_wrong_members_are_refused(tiny, tokenizer, samples):
    with pytest.raises(ConfigError, match="there are no sets to ablate; give at least one"):
        ablate(tiny("llama"), tokenizer, samples, {})
    with pytest.raises(ConfigError, match=re.escape("there is no head (9, 0)")):
        ablate(tiny("llama"), tokenizer, samples, {"fine": [HEAD], "wrong": [("head", 9, 0)]})


# The model is left as it was


def snapshot(model):
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("fails", [False, True], ids=["finishes", "raises"])
@pytest.mark.parametrize("reference", ["zero", "mean", "resample"])
@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt2", "gpt_neox", "gemma2", "phi3", "mixtral"])  # one of each make
def test_the_model_is_untouched(tiny, family, tied, tokenizer, samples, counterfactuals, method, reference, fails, monkeypatch):
    if method == "conductance" and family in MIXTURES:
        pytest.skip("refused, see test_experts.py")
    monkeypatch.setattr(integrated, "PIECES", 1)
    model = tiny(family, tied).train()
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.randn_like(parameter) if number % 3 == 1 else None
    before = snapshot(model)
    assert None in before["grads"].values() and len({*before["training"]}) == 2
    bare = [s.model_copy(update={"contrast": ()}) for s in samples]
    given = {"reference": reference, "counterfactuals": counterfactuals, "metric": "logit_difference"}
    asked = {"method": method, "components": [HEAD, NEURON, ROW], "nodes": 2}
    try:  # without contrasts it stops in the middle of its work
        attribute(model, tokenizer, bare if fails else samples, **asked, **given)
        ablate(model, tokenizer, samples, {"all": [HEAD, NEURON, ROW]}, **given)
        raised = False
    except AttributionError:
        raised = True
    assert raised == fails
    assert same(snapshot(model), before)


def test_dropout_is_off_whatever_the_mode(tiny, tokenizer, samples, method):
    model = tiny("gpt2")
    expected = attribute(model, tokenizer, samples, method=method).per_sample
    assert torch.equal(attribute(model.train(), tokenizer, samples, method=method).per_sample, expected)
    with torch.no_grad():
        assert torch.equal(attribute(model, tokenizer, samples, method=method).per_sample, expected)


def test_checkpointing_changes_nothing(tiny, tokenizer, samples, method):
    model = tiny("llama")
    expected = attribute(model, tokenizer, samples, method=method).per_sample
    model.activation_checkpointing_enable()
    assert torch.equal(attribute(model.train(), tokenizer, samples, method=method).per_sample, expected)
    assert model.is_activation_checkpointing


def test_the_shipped_model_can_be_attributed(planted):
    model, tokenizer = planted
    sample = Sample(prompt="tom is kind . eve fell . tom says :", response=" lift")
    chosen = [Component("head", layer, head) for layer in range(4) for head in range(4)]
    found = attribute(model, tokenizer, [sample], components=chosen, metric="log_prob").table
    assert found["effect"].abs().max() > 0.05 and (found["kl"] >= -1e-6).all()
