"""Gradient x activation is the derivative it says it is: by captum, by finite differences, by weights, and by hand."""

import pytest
import torch
from by_name import module, put_out, with_row
from captum.attr import LayerGradientXActivation

from attribution.capture import Site, sites
from attribution.causes import attribute
from attribution.causes.gradient import first_order
from attribution.causes.reference import aligned_activations, mean_activations, zeros
from attribution.components import Component, Components
from attribution.metrics import METRICS, log_odds
from attribution.models import anatomy
from attribution.samples import batches, collate, encode

UNITS = {"head": 4, "neuron": 20}
SOME = [
    *(Component("head", layer, head) for layer in (0, 1) for head in range(4)),
    *(Component("neuron", layer, neuron) for layer in (0, 1) for neuron in (0, 7, 19)),
    *(Component("row", -1, token) for token in (1, 8, 9, 13)),  # 8, 9 and 13 are response tokens
]


@pytest.fixture
def encoded(tokenizer, samples):
    return encode(tokenizer, samples)


@pytest.fixture
def batch(encoded):
    return collate(encoded)


@pytest.fixture(params=["zero", "mean", "resample"])
def reference(request):
    return request.param


def values_of(reference, model, tokenizer, counterfactuals):
    """References as the package makes them; test_reference.py checks them."""
    parts, others = anatomy(model), encode(tokenizer, counterfactuals)
    if reference == "zero":
        return zeros(parts)
    return mean_activations(parts, batches(others, 2)) if reference == "mean" else aligned_activations(parts, others)


def test_captum_says_the_same(tiny, family, tied, tokenizer, samples, batch, agree):
    model = tiny(family, tied)
    found = attribute(model, tokenizer, samples, method="gradient")

    def score(embeddings):
        logits = model(inputs_embeds=embeddings, attention_mask=batch.mask).logits[batch.scored]
        return log_odds(logits, batch)

    embeddings = model.get_input_embeddings()(batch.ids).detach()
    for kind, units in UNITS.items():
        for layer in (0, 1):
            theirs = LayerGradientXActivation(score, module(model, kind, layer)).attribute(
                embeddings, attribute_to_layer_input=True
            )  # [sample, position, feature]
            mine = (found.table["kind"] == kind) & (found.table["layer"] == layer)
            expected = theirs.sum(1).unflatten(-1, (units, -1)).sum(-1).T
            agree(found.per_sample[torch.as_tensor(mine.to_numpy(copy=True))], expected)


@pytest.mark.parametrize("metric", METRICS)
def test_finite_differences_say_the_same(tiny, family, tokenizer, samples, batch, agree, metric):
    check_by_differences(tiny(family, dtype=torch.float64), tokenizer, samples, batch, agree, metric, "zero", samples)


def test_finite_differences_towards_any_reference(tiny, tokenizer, samples, counterfactuals, batch, agree, reference):
    model = tiny("gpt2", tied=True, dtype=torch.float64)
    check_by_differences(model, tokenizer, samples, batch, agree, "log_odds", reference, counterfactuals)


def check_by_differences(model, tokenizer, samples, batch, agree, metric, reference, counterfactuals, step=1e-4):
    """Move one component's activation a little along (activation - reference), both ways."""
    values = values_of(reference, model, tokenizer, counterfactuals)

    @torch.no_grad()
    def read(component, amount):
        kind, layer, index = component
        handles = []
        if kind != "row":
            linear = module(model, kind, layer)

            def move(_module, args):
                size = args[0].shape[-1] // UNITS[kind]
                mask = torch.zeros(args[0].shape[-1], dtype=torch.float64)
                mask[index * size : (index + 1) * size] = amount
                return (args[0] + mask * (args[0] - values[Site(kind, layer)]),)

            handles.append(linear.register_forward_pre_hook(move))
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits[batch.scored]
        for handle in handles:
            handle.remove()
        assert logits.dtype == torch.float64
        if kind == "row":
            rows = put_out(model, logits)
            logits = with_row(model, logits, index, rows[:, index] + amount * (rows[:, index] - rows.mean(-1)))
        return METRICS[metric](logits, batch)

    expected = torch.stack([(read(c, step) - read(c, -step)) / (2 * step) for c in SOME])
    found = attribute(
        model, tokenizer, samples, method="gradient", metric=metric, reference=reference,
        counterfactuals=counterfactuals, components=SOME,
    )  # fmt: skip
    assert found.per_sample.dtype == torch.float64
    for kind in ("head", "neuron", "row"):
        mine = torch.tensor([c.kind == kind for c in SOME])
        if kind == "row":  # far from every response token the gradient is small
            assert (found.per_sample[mine] - expected[mine]).abs().max() < 1e-6 and expected[mine].abs().max() > 0.01
        else:
            agree(found.per_sample[mine], expected[mine], 1e-6)


def test_output_weights_and_their_gradient_say_the_same(tiny, family, tied, tokenizer, samples, batch, agree):
    model = tiny(family, tied)
    index = Components(model)
    with index.untied():
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        expected = index.first_order(index.gradients(log_odds(logits[batch.scored], batch).sum()))
    found = attribute(model, tokenizer, samples, method="gradient").per_sample.sum(1)
    for kind in ("head", "neuron", "row"):
        mine = torch.as_tensor((index.table["kind"] == kind).to_numpy(copy=True))
        agree(found[mine], expected[mine])
        if kind == "row":
            agree(found[mine], rows_before_cap_and_bias(model, batch))


def rows_before_cap_and_bias(model, batch):
    """(W h, less its mean over the vocabulary) x gradient, written out."""
    kept = {}
    handle = module(model, "final").register_forward_hook(lambda _m, _args, out: kept.update(normed=out.detach()))
    model(input_ids=batch.ids)
    handle.remove()
    plain = torch.nn.functional.linear(kept["normed"], model.lm_head.weight.detach())[batch.scored].requires_grad_()
    logits = plain if model.lm_head.bias is None else plain + model.lm_head.bias
    logits = 5 * torch.tanh(logits / 5) if model.config.model_type == "gemma2" else logits
    gradient = torch.autograd.grad(log_odds(logits, batch).sum(), plain)[0]
    return ((plain - plain.mean(-1, keepdim=True)) * gradient).sum(0).detach()


def test_it_is_linear_in_the_reference(tiny, family, tokenizer, samples, counterfactuals, encoded, agree, reference):
    """(activation - reference) x gradient, sample by sample without padding, by plain hooks."""
    model = tiny(family)
    values = values_of(reference, model, tokenizer, counterfactuals)
    found = attribute(model, tokenizer, samples, method="gradient", reference=reference, counterfactuals=counterfactuals)
    units = torch.as_tensor((found.table["kind"] != "row").to_numpy(copy=True))
    for number, one in enumerate(encoded):
        expected = []
        for (kind, layer), (activation, gradient) in activations_and_gradients(model, collate([one])).items():
            value = values[Site(kind, layer)]
            if reference == "resample":
                value = value[number, : len(one.ids)]
            expected.append(((activation - value) * gradient).sum((0, 1)).view(UNITS[kind], -1).sum(1))
        agree(found.per_sample[units, number], torch.cat(expected))


def activations_and_gradients(model, batch):
    """Of the log-odds, heads before neurons: {(kind, layer): (activation, gradient)}."""
    kept = {}

    def keep(key):
        def hook(_module, args):
            args[0].retain_grad()
            kept[key] = args[0]

        return hook

    places = [(kind, layer) for kind in UNITS for layer in (0, 1)]
    handles = [module(model, *place).register_forward_pre_hook(keep(place)) for place in places]
    log_odds(model(input_ids=batch.ids).logits[batch.scored], batch).sum().backward()
    for handle in handles:
        handle.remove()
    return {place: (kept[place], kept[place].grad) for place in places}


def test_a_reference_moves_every_unit_and_no_row(tiny, tokenizer, samples, counterfactuals):
    given = {"method": "gradient", "counterfactuals": counterfactuals}
    zero, mean, resample = (
        attribute(tiny("llama"), tokenizer, samples, reference=r, **given) for r in ("zero", "mean", "resample")
    )
    rows = torch.as_tensor((zero.table["kind"] == "row").to_numpy(copy=True))
    for one, other in ((zero, mean), (zero, resample), (mean, resample)):
        assert torch.equal(one.per_sample[rows], other.per_sample[rows])
        assert ((one.per_sample - other.per_sample)[~rows].abs() > 1e-6).double().mean() > 0.9


# Mutations: what the comparisons above must notice


def test_agreement_notices_zeros_and_a_wrong_sign(agree):
    expected = torch.randn(20)
    agree(expected * (1 + 1e-7), expected)
    for found in (torch.zeros(20), -expected, expected.roll(1), expected * (1 + 1e-3), torch.full((20,), torch.nan)):
        with pytest.raises(AssertionError):
            agree(found, expected)
    with pytest.raises(AssertionError, match="nothing to compare"):
        agree(torch.zeros(20), torch.zeros(20))


@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_a_zero_activation_or_gradient_has_no_cause(tiny, batch, kind):
    model = tiny("llama")
    index = Components(model)
    units = torch.as_tensor((index.table["kind"] == kind).to_numpy(copy=True))
    assert (first_order(index, batch, zeros(index.parts), log_odds)[units].abs() > 0).all()
    for layer in (0, 1):
        module(model, kind, layer).register_forward_pre_hook(lambda _module, args: (args[0] * 0,))
    assert first_order(index, batch, zeros(index.parts), log_odds)[units].eq(0).all()
    constant = first_order(index, batch, zeros(index.parts), lambda logits, batch: 0 * log_odds(logits, batch))
    assert constant.eq(0).all()


def test_it_works_on_frozen_weights(tiny, family, batch, agree):
    index = Components(tiny(family))
    expected = first_order(index, batch, zeros(index.parts), log_odds)
    index.parts.model.requires_grad_(False)
    with torch.no_grad():
        agree(first_order(index, batch, zeros(index.parts), log_odds), expected)
    assert len(sites(index.parts)) == 4


@pytest.mark.parametrize(("family", "vanishes"), [("olmo2", True), ("gemma2", True), ("gemma3_text", True), ("llama", False)])
def test_where_a_norm_follows_first_order_causes_sum_to_zero_in_each_module(tiny, tokenizer, samples, family, vanishes):
    """Euler's theorem: behind a norm the metric does not depend on the scale of what a module writes, so <W, dM/dW> = 0."""
    model = tiny(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                continue
            parameter.mul_(3)  # so that the norm's epsilon is small beside what it divides
    table = attribute(model, tokenizer, samples, method="gradient").table.query("kind != 'row'")
    for _, one in table.groupby(["kind", "layer"]):
        size = one["effect"].abs().sum()
        assert size > 1e-3 and (abs(one["effect"].sum()) < 1e-3 * size) == vanishes
