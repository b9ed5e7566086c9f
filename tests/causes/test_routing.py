"""Queries and keys replaced one head at a time, as by plain hooks; right where a saturated softmax hides from the gradient."""

import numpy as np
import pytest
import torch
from by_name import module

from attribution.causes import attribute
from attribution.components import Component
from attribution.metrics import log_odds
from attribution.samples import Sample, collate, encode

HEADS, DEPTH = 4, 2


@pytest.fixture(params=["zero", "mean", "resample"])
def reference(request):
    return request.param


class ByHand:
    """One sample alone, hooks on modules found by name."""

    def __init__(self, model, ids):
        self.model, self.ids = model, torch.tensor([ids])
        self.head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // HEADS
        self.kv_heads = getattr(model.config, "num_key_value_heads", None) or HEADS

    def modules(self, layer):
        """Of queries, keys, and the output linear."""
        return tuple(module(self.model, name, layer) for name in ("queries", "keys", "head"))

    def features(self, part, head):
        owner = head if part == "queries" else head * self.kv_heads // HEADS
        first, family = owner * self.head_dim, self.model.config.model_type
        if family == "gpt_neox":  # query, key and value of one head after the other
            first = owner * 3 * self.head_dim + (self.head_dim if part == "keys" else 0)
        elif family in ("gpt2", "phi3") and part == "keys":  # after all queries
            first += HEADS * self.head_dim
        return slice(first, first + self.head_dim)

    def outputs(self):
        """{(layer, part): [position, feature]} of the projections."""
        kept, handles = {}, []
        for layer in range(DEPTH):
            for part, linear in zip(("queries", "keys"), self.modules(layer), strict=False):
                handles.append(
                    linear.register_forward_hook(lambda _m, _a, out, key=(layer, part): kept.__setitem__(key, out[0].detach()))
                )
        self.model(input_ids=self.ids)
        for handle in handles:
            handle.remove()
        return kept

    def heads(self, replaced=None):
        """Inputs of the output linears, and the metric; with (layer, part, head, value) replaced."""
        kept, handles = {}, []

        def keep(layer):
            def look(_module, args):
                if not replaced:
                    args[0].retain_grad()
                kept[layer] = args[0]

            return look

        handles += [self.modules(layer)[2].register_forward_pre_hook(keep(layer)) for layer in range(DEPTH)]
        if replaced:
            layer, part, head, value = replaced
            mine = self.features(part, head)

            def put(_module, _args, out):
                out = out.clone()
                out[..., mine] = value[..., mine] if value.ndim else value
                return out

            handles.append(self.modules(layer)[0 if part == "queries" else 1].register_forward_hook(put))
        logits = self.model(input_ids=self.ids).logits
        for handle in handles:
            handle.remove()
        return kept, logits


def expected_of(model, tokenizer, samples, counterfactuals, reference):
    """{part: [layer * heads, sample]}."""
    found = {part: torch.zeros(DEPTH * HEADS, len(samples)) for part in ("queries", "keys")}
    others = [ByHand(model, tokenizer(s.prompt + s.response)["input_ids"]).outputs() for s in counterfactuals]
    for number, one in enumerate(encode(tokenizer, samples)):
        hand, batch = ByHand(model, list(one.ids)), collate([one])
        kept, logits = hand.heads()
        log_odds(logits[batch.scored], batch).sum().backward()
        for layer in range(DEPTH):
            for part in found:
                value = torch.zeros(())
                if reference == "mean":
                    value = torch.cat([each[layer, part] for each in others]).mean(0)
                elif reference == "resample":
                    value = others[number][layer, part]
                for head in range(HEADS):
                    changed = hand.heads((layer, part, head, value))[0][layer]
                    difference = kept[layer].detach() - changed.detach()
                    own = torch.zeros(HEADS, hand.head_dim)  # what this head puts out
                    own[head] = 1
                    difference = difference * own.flatten()
                    found[part][layer * HEADS + head, number] = (difference * kept[layer].grad).sum()
        model.zero_grad()
    return found


def test_every_head_as_by_hand(tiny, family, tokenizer, samples, counterfactuals, agree, reference):
    model = tiny(family)
    found = attribute(
        model, tokenizer, samples, method="gradient", queries=True, reference=reference, counterfactuals=counterfactuals
    )
    expected = expected_of(model, tokenizer, samples, counterfactuals, reference)
    weights = torch.tensor([s.weight for s in samples])
    heads = found.table["kind"] == "head"
    for part, value in expected.items():
        agree(found.table.loc[heads, part].to_numpy(), (value * weights).mean(1))
        assert found.table.loc[~heads, part].isna().all()
    plain = attribute(model, tokenizer, samples, method="gradient", reference=reference, counterfactuals=counterfactuals)
    assert torch.equal(plain.per_sample, found.per_sample)  # of a head's output nothing needs correction
    assert list(plain.table) == ["kind", "layer", "index", "effect"] and plain.passes < found.passes


def test_without_queries_or_without_keys_attention_is_uniform(tiny, tokenizer, samples):
    """Llama has no biases: a zero query scores every position alike, as zero keys do."""
    table = attribute(tiny("llama"), tokenizer, samples, method="gradient", queries=True).table.query("kind == 'head'")
    assert np.allclose(table["queries"], table["keys"], atol=1e-5) and table["queries"].abs().max() > 1e-2


def test_a_saturated_softmax_hides_from_the_gradient_and_not_from_this(tiny, tokenizer, agree):
    """Queries scaled until every head looks at one position: their gradient vanishes, their effect does not."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(300)
        model.model.layers[1].self_attn.o_proj.weight.mul_(0.02)  # small, so that first order holds behind the softmax
    samples = [Sample(prompt="w1 w2 w3 w5 w9", response=" w4"), Sample(prompt="w7 w2 w11 w5", response=" w9")]
    heads = [Component("head", 1, head) for head in range(HEADS)]
    found = attribute(model, tokenizer, samples, method="gradient", queries=True, components=heads).table["queries"]
    exact, linear = torch.zeros(HEADS), torch.zeros(HEADS)
    for one in encode(tokenizer, samples):
        hand, batch = ByHand(model, list(one.ids)), collate([one])
        queries = []
        handle = model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda _m, _a, out, q=queries: q.append(out))
        logits = model(input_ids=hand.ids).logits
        handle.remove()
        before = log_odds(logits[batch.scored], batch).sum()
        slope = torch.autograd.grad(before, queries[0])[0]
        linear += (slope * queries[0]).detach().sum((0, 1)).unflatten(0, (HEADS, -1)).sum(1) / len(samples)
        for head in range(HEADS):
            logits = hand.heads((1, "queries", head, torch.zeros(())))[1]
            exact[head] += (before - log_odds(logits[batch.scored], batch).sum()).detach() / len(samples)
    agree(torch.tensor(found.to_numpy()), exact, 0.05 * exact.abs().max().item())
    assert linear.abs().max() < 0.1 * exact.abs().max()


def test_a_sample_is_its_own_counterfactual_without_effect(tiny, family, tokenizer, samples):
    given = {"method": "gradient", "queries": True, "reference": "resample", "counterfactuals": samples}
    table = attribute(tiny(family), tokenizer, samples, **given).table.query("kind == 'head'")
    assert table[["queries", "keys"]].abs().to_numpy().max() < 1e-5


def test_passes_are_those_that_ran(tiny, tokenizer, samples):
    """Attention runs as often as is told, the rest of a layer less often."""
    model, ran = tiny("llama"), []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _m, args: ran.append(len(args[0]) * (3 if torch.is_grad_enabled() else 1))
        )
    found = attribute(model, tokenizer, samples, method="gradient", queries=True)
    assert found.passes == sum(ran) / len(samples) / DEPTH == 7 + 2 * HEADS
