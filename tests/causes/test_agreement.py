"""nnsight sees the same activations and gradients, and what the new contexts of `capture` do is what they say."""

import nnsight
import pytest
import torch
from by_name import LLAMA, NAMES

from attribution.capture import Site, only_at, rewritten, scored_logits, sites, streamed, tapped
from attribution.causes import attribute
from attribution.metrics import log_odds
from attribution.models import anatomy
from attribution.replay import Replay
from attribution.samples import collate, encode


@pytest.fixture
def batch(tokenizer, samples):
    return collate(encode(tokenizer, samples))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_times_activation_by_nnsight(tiny, tokenizer, samples, batch, agree, name):
    found = attribute(tiny(name), tokenizer, samples, method="gradient")
    model = tiny(name)
    wrapped, kept = nnsight.NNsight(model), {}
    places = {
        (kind, layer): wrapped.get(getattr(NAMES.get(name, LLAMA), kind).format(layer))
        for layer in (0, 1)
        for kind in ("head", "neuron")
    }
    scored, order = batch.scored, [*places]
    with wrapped.trace(input_ids=batch.ids, attention_mask=batch.mask):
        activations = nnsight.save([])
        for key in order:
            activations.append(places[key].input)
            places[key].input.requires_grad_()
        total = log_odds(wrapped.output.logits[scored], batch).sum()
        with total.backward():
            gradients = nnsight.save([])
            for activation in reversed(activations):
                gradients.append(activation.grad)
    for key, activation, gradient in zip(order, activations, reversed(gradients), strict=True):
        kept[key] = (activation * gradient).sum(1)  # [sample, feature]
    for (kind, layer), product in kept.items():
        mine = (found.table["kind"] == kind) & (found.table["layer"] == layer)
        expected = product.unflatten(-1, (4 if kind == "head" else 20, -1)).sum(-1).T
        agree(found.per_sample[torch.as_tensor(mine.to_numpy(copy=True))], expected)


# The contexts of `capture` that methods use


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_streams_are_the_inputs_of_layers_and_of_the_final_norm(tiny, family, batch):
    parts, seen = anatomy(tiny(family)), {}
    replay = Replay(parts, batch)
    with torch.no_grad(), streamed(parts, {n: lambda v, n=n: seen.setdefault(n, v) for n in range(parts.depth + 1)}):
        scored_logits(parts, batch)
    length = replay.scored.shape[1]
    assert all(torch.allclose(seen[n][:, :length], replay.hidden[n], atol=1e-5) for n in range(parts.depth + 1))
    assert hooks(parts.model) == 0


@torch.no_grad()
def test_a_stream_is_what_the_layer_reads(tiny, family, batch):
    parts = anatomy(tiny(family))
    plain = scored_logits(parts, batch)
    with streamed(parts, {1: lambda value: value}):
        assert torch.equal(scored_logits(parts, batch), plain)
    with streamed(parts, {parts.depth: torch.zeros_like}):
        assert (scored_logits(parts, batch).var(0) < 1e-10).all()  # the same at every position
    assert torch.equal(scored_logits(parts, batch), plain)


@torch.no_grad()
def test_an_output_is_rewritten(tiny, family, batch):
    parts = anatomy(tiny(family))
    branch = parts.branch(0, "mlp")
    with rewritten({branch: torch.zeros_like}), tapped(parts, [Site("neuron", 0)]) as seen:
        without = scored_logits(parts, batch)
    assert seen[Site("neuron", 0)].abs().max() > 0 and not torch.allclose(without, scored_logits(parts, batch))
    with pytest.raises(ZeroDivisionError), rewritten({branch: lambda _value: 1 / 0}):
        scored_logits(parts, batch)
    assert hooks(parts.model) == 0


@torch.no_grad()
def test_only_some_positions_run(tiny, family):
    parts = anatomy(tiny(family))
    module = parts.mlp_out[0]
    value = torch.randn(2, 5, parts.neurons)
    whole, where = module(value), torch.zeros(2, 5, dtype=torch.bool)
    where[0, 3] = where[1, :2] = True
    with only_at([module], where.nonzero(as_tuple=True)):
        found = module(value)
    torch.testing.assert_close(found[where], whole[where])
    assert found[~where].eq(0).all() and hooks(parts.model) == 0


@torch.no_grad()
def test_heads_with_nothing_replaced_are_the_heads(tiny, family, batch):
    parts = anatomy(tiny(family))
    replay = Replay(parts, batch)
    for layer in range(parts.depth):
        found = replay.heads_with(layer, {}, 3)
        expected = replay.activations[Site("head", layer)].repeat(3, 1, 1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert hooks(parts.model) == 0 and len(sites(parts)) == 4


@torch.no_grad()
def test_a_replay_leaves_out_what_no_scored_position_reads(tiny, batch):
    """Positions after the last scored one do not run; in the last layer, queries and the MLP run at scored ones alone."""
    model, seen = tiny("llama"), []
    parts = anatomy(model)
    replay = Replay(parts, batch)
    assert replay.hidden[0].shape[1] == batch.ids.shape[1] - 1
    last = model.model.layers[1]

    def count(out):
        seen.append(out.shape[:-1].numel())
        return out

    modules = (last.self_attn.q_proj, last.self_attn.k_proj, last.mlp.up_proj)
    with rewritten(dict.fromkeys(modules, count)):  # by hooks of the package: with others a module is run whole
        replay.run(replay.hidden[0].repeat(2, 1, 1), 0)
    scored, every = 2 * int(batch.scored.sum()), 2 * replay.scored.numel()
    assert seen == [scored, every, scored]


def test_a_repeated_batch_scores_as_the_batch(batch):
    from attribution.metrics import METRICS

    logits = torch.randn(len(batch.tokens), 23)
    for metric in METRICS.values():
        once = metric(logits, batch)
        twice = metric(torch.cat([logits, logits.roll(1, 0), logits]), batch.repeated(3))
        torch.testing.assert_close(twice[:3], once)
        torch.testing.assert_close(twice[6:], once)
        torch.testing.assert_close(twice[3:6], metric(logits.roll(1, 0), batch))
