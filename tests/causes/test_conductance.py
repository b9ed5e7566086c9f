"""Conductance adds up over every cut, is captum's in the limit, and its slopes are derivatives."""

from itertools import pairwise

import pytest
import torch
from by_name import DENSE, module
from captum.attr import LayerConductance
from turns import in_turn

from attribution.capture import rewritten, scored_logits
from attribution.causes import attribute, conductance, integrated
from attribution.components import Components
from attribution.errors import ModelError
from attribution.metrics import log_odds
from attribution.samples import collate, encode

UNITS = {"head": 4, "neuron": 20}


@pytest.fixture(params=DENSE)
def family(request):
    """Mixtures are refused, see test_experts.py."""
    return request.param


@pytest.fixture
def batch(tokenizer, samples):
    return collate(encode(tokenizer, samples))


def end(model, batch):
    return model.get_input_embeddings()(batch.ids).detach()


def baseline(model, tokenizer, counterfactuals, reference):
    """Of the input embeddings, written out here."""
    weight = model.get_input_embeddings()(torch.arange(model.config.vocab_size)).detach()  # scaled, where the model scales
    ids = [tokenizer(s.prompt + s.response)["input_ids"] for s in counterfactuals]
    if reference == "vocabulary":
        return weight.mean(0)
    if reference == "mean":
        return torch.cat([weight[i] for i in ids]).mean(0)
    return torch.stack([torch.cat([weight[i], weight[[0] * (max(map(len, ids)) - len(i))]]) for i in ids])


def metric_at(model, batch, embeddings):
    with torch.no_grad():
        return log_odds(model(inputs_embeds=embeddings, attention_mask=batch.mask).logits[batch.scored], batch)


@pytest.mark.parametrize(("family", "reference"), in_turn(DENSE, ["vocabulary", "mean", "resample"]))
def test_every_cut_passes_the_whole_change(tiny, family, tokenizer, samples, counterfactuals, batch, reference):
    """Heads of a layer, and neurons, with what goes past them; rows, under a soft cap with what moves all alike."""
    model = tiny(family)
    found = attribute(
        model, tokenizer, samples, method="conductance", reference=reference, counterfactuals=counterfactuals, nodes=10
    )
    start = baseline(model, tokenizer, counterfactuals, reference).expand_as(end(model, batch))
    weights = torch.tensor([s.weight for s in samples])
    change = ((metric_at(model, batch, end(model, batch)) - metric_at(model, batch, start)) * weights).mean().item()
    cuts = [f"{kind}s of layer {layer}" for kind in ("head", "neuron") for layer in (0, 1)]
    assert list(found.sums["cut"]) == [*cuts, "rows"]
    for number, (cut, members) in enumerate(found.table.groupby(["kind", "layer"], sort=False)):
        told = found.sums.iloc[number]
        assert told["effects"] == pytest.approx(members["effect"].sum(), abs=1e-5), cut
        assert told["change"] == pytest.approx(change, abs=1e-4)
        assert told["effects"] + told["beside"] + told["residual"] == pytest.approx(told["change"], abs=1e-9)
        assert abs(told["residual"]) <= 1e-2 * abs(change) + 2e-3
        assert (told["beside"] == 0) == (cut[0] == "row" and family != "gemma2") and abs(told["effects"]) > 1e-3
    assert not any("not resolved" in each for each in found.caveats)


def test_captum_says_the_same_in_the_limit(tiny, tokenizer, samples, counterfactuals, batch, agree):
    """captum takes increments times the gradient before them, which is first order in the step: extrapolated to none."""
    model = tiny("gpt2", tied=True, dtype=torch.float64)
    start = baseline(model, tokenizer, counterfactuals, "vocabulary").expand_as(end(model, batch))
    found = attribute(model, tokenizer, samples, method="conductance", nodes=30)

    def score(embeddings):
        copies = len(embeddings) // len(batch)
        many = batch.repeated(copies)
        logits = model(inputs_embeds=embeddings, attention_mask=many.mask).logits[many.scored]
        return log_odds(logits, many)

    for kind, units in UNITS.items():
        for layer in (0, 1):
            tool = LayerConductance(score, module(model, kind, layer))
            table = [
                tool.attribute(end(model, batch), start, n_steps=n, method="riemann_trapezoid", attribute_to_layer_input=True)
                for n in (16, 32, 64, 128, 256)
            ]  # alphas 0, 1/n, ..., 1
            for order in range(1, len(table)):  # Richardson
                table = [(2**order * fine - rough) / (2**order - 1) for rough, fine in pairwise(table)]
            expected = table[0].sum(1).unflatten(-1, (units, -1)).sum(-1).T
            mine = (found.table["kind"] == kind) & (found.table["layer"] == layer)
            agree(found.per_sample[torch.as_tensor(mine.to_numpy(copy=True))], expected, 1e-5)


def test_slopes_are_finite_differences(tiny, family, tokenizer, samples, batch, agree, monkeypatch):
    """With one node: what passes through every cut is the metric's derivative along the path, in its middle."""
    monkeypatch.setattr(integrated, "PIECES", 1)
    model = tiny(family, dtype=torch.float64)
    index = Components(model)
    start = model.get_input_embeddings().weight.detach().mean(0)
    direction = end(model, batch) - start
    found = conductance.conductance(index, batch, start, log_odds, 1)
    step = 1e-5

    def at(s):
        with torch.no_grad(), rewritten({index.parts.embedding: lambda _out: start + s * direction}):
            return log_odds(scored_logits(index.parts, batch), batch)

    expected = (at(0.5 + step) - at(0.5 - step)) / (2 * step)
    for cut in found.cuts.values():
        agree(cut.effects + cut.beside, expected, 1e-6)
        agree(cut.change, at(1.0) - at(0.0), 1e-9)
    assert len({round(cut.effects[0].item(), 6) for cut in found.cuts.values()}) == len(found.cuts)


def test_a_component_through_which_nothing_moves_has_none(tiny, tokenizer, samples):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, :6] = 0  # head 0 writes nothing
        model.model.layers[1].mlp.up_proj.weight[3] = 0  # neuron 3 is never active
    table = attribute(model, tokenizer, samples, method="conductance").table.set_index(["kind", "layer", "index"])["effect"]
    assert abs(table["head", 0, 0]) < 1e-6 and abs(table["neuron", 1, 3]) < 1e-6
    assert abs(table["head", 0, 1]) > 1e-3 and abs(table["neuron", 1, 4]) > 1e-5


def test_a_sample_is_its_own_baseline_without_any(tiny, tokenizer, samples):
    found = attribute(tiny("qwen2"), tokenizer, samples, method="conductance", reference="resample", counterfactuals=samples)
    assert found.per_sample.abs().max() < 1e-6 and found.sums["change"].abs().max() < 1e-6


def test_zero_embeddings_come_with_a_warning(tiny, tokenizer, samples, monkeypatch):
    monkeypatch.setattr(integrated, "PIECES", 1)
    found = attribute(tiny("llama"), tokenizer, samples, method="conductance", reference="zero")
    assert any("no direction at zero embeddings" in each for each in found.caveats)
    assert any("not resolved" in each for each in found.caveats)


def test_passes_are_those_that_ran(tiny, tokenizer, samples):
    model, ran = tiny("llama"), []
    model.model.layers[1].register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    found = attribute(model, tokenizer, samples, method="conductance")
    gradients, others = sum(ran), len(ran) - sum(ran)
    tangents = gradients  # one for each node, of twice the cost of a forward pass
    assert found.passes == 3 * gradients + 2 * tangents + (others - tangents)


def test_an_attention_without_a_forward_derivative_is_named(tiny, tokenizer, samples, monkeypatch):
    def refuse(*_args):
        raise NotImplementedError("Trying to use forward AD with _flash_attention that does not support it")

    monkeypatch.setattr(conductance, "_watched", refuse)
    with pytest.raises(ModelError, match=r'\(sdpa\) has no forward derivative; call model.set_attn_implementation\("eager"\)'):
        attribute(tiny("llama"), tokenizer, samples, method="conductance")


# Mutations: what the sums above must notice


@pytest.mark.parametrize("which", ["_by_component", "_beside"])
def test_the_sum_notices_zeros(tiny, tokenizer, samples, monkeypatch, which):
    model = tiny("gpt2")
    honest = attribute(model, tokenizer, samples, method="conductance").sums
    whole = getattr(conductance, which)

    def spoiled(*args):
        value = whole(*args).clone()
        value[: None if which == "_by_component" else -1] = 0  # the last of what passes beside is the metric's own slope
        return value

    monkeypatch.setattr(conductance, which, spoiled)
    sums = attribute(model, tokenizer, samples, method="conductance").sums
    assert abs(sums["residual"]).max() > 10 * abs(honest["residual"]).max()
