"""A replay from any layer is the pass itself, with whatever it need not run left out."""

import pytest
import torch
from torch import nn

from attribution.capture import Site, edited, scored_logits, sites
from attribution.models import anatomy, load
from attribution.replay import Readers, Replay, answering
from attribution.samples import Encoded, collate

UNEQUAL = ((1, 4, 7, 11, 5, 9), (1, 3, 3, 8), (1, 12, 20, 6, 10))
BATCHES = {
    "unequal lengths": UNEQUAL,
    "one sample": UNEQUAL[:1],
    "as many samples as positions": tuple((1, 4 + i, 7, 20 - i, 5)[: 5 - i % 2] for i in range(5)),
}


def batch_of(rows, start=2):
    return collate([Encoded(ids, start, 1.0, ()) for ids in rows])


def close(found, expected, bound=1e-5):
    """Relative to the largest entry."""
    assert found.shape == expected.shape and expected.abs().max() > 0
    assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.fixture
def batch():
    return batch_of(UNEQUAL)


@pytest.fixture(params=["sdpa", "eager"])
def attention(request):
    """Without a mask, and with one that is passed to every layer."""
    return request.param


@pytest.mark.parametrize("name", BATCHES)
@torch.no_grad()
def test_a_replay_from_any_layer_is_the_pass(tiny, family, attention, name):
    model = tiny(family)
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("this kernel caps no scores")
    model.set_attn_implementation(attention)
    parts, batch = anatomy(model), batch_of(BATCHES[name])
    expected = model(input_ids=batch.ids, attention_mask=batch.mask).logits[batch.scored]
    replay = Replay(parts, batch)
    close(replay.logits, expected)
    assert len(replay.hidden) == parts.depth + 1
    for first in range(parts.depth + 1):
        for copies in (1, 2, 5):
            found = replay.run(replay.hidden[first].repeat(copies, 1, 1), first)
            close(found, expected.expand(copies, *expected.shape))


@pytest.mark.parametrize("name", ["planted", "stories"])
@torch.no_grad()
def test_a_replay_in_a_shipped_or_real_model(request, batch, name):
    opened = request.getfixturevalue(name)
    parts = anatomy(opened[0] if name == "planted" else load(str(opened)).model)
    replay = Replay(parts, batch)
    for first in range(parts.depth + 1):
        close(replay.run(replay.hidden[first].repeat(2, 1, 1), first)[1], replay.logits)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma3_text"])
@torch.no_grad()
def test_a_replay_keeps_sliding_windows(tiny, attention, family):
    """In every layer of Mistral; in Qwen 2 in the second only, in Gemma 3 in the first, so that layers get different masks."""
    model = tiny(family)
    model.set_attn_implementation(attention)
    parts, batch = anatomy(model), batch_of([(1, 4, 7, 11, 5, 9, 13, 15), (1, 3, 3, 8, 2, 9)])
    wide = scored_logits(parts, batch)
    model.config.sliding_window = 3
    if family == "qwen2":
        model.config.layer_types = ["full_attention", "sliding_attention"]
        model.model.has_sliding_layers = True
    replay = Replay(parts, batch)
    assert (replay.logits - wide).abs().max() > 1e-3
    for first in range(parts.depth + 1):
        close(replay.run(replay.hidden[first].repeat(2, 1, 1), first)[1], replay.logits)


@torch.no_grad()
def test_copies_do_not_mix(tiny, family, batch):
    parts = anatomy(tiny(family))
    replay = Replay(parts, batch)
    hidden = replay.hidden[1].repeat(3, 1, 1)
    change = torch.randn_like(hidden[:3])
    hidden[3:6] += change  # every sample of the second copy
    hidden[8] += change[2]  # the last sample of the third
    found = replay.run(hidden, 1)
    close(found[0], replay.logits)
    mine = batch.sample_of == 2
    assert ((found[1] - replay.logits).abs().amax(-1) > 1e-3).all()
    close(found[2][~mine], replay.logits[~mine])
    close(found[2][mine], found[1][mine])


@torch.no_grad()
def test_an_edited_replay_is_the_edited_pass(tiny, family, batch):
    parts = anatomy(tiny(family))
    replay = Replay(parts, batch)
    assert all(value.std() > 0 for value in replay.activations.values())
    for site in sites(parts):
        edit = {site.module(parts): torch.zeros_like}
        with edited(edit):
            expected = parts.model(input_ids=batch.ids, attention_mask=batch.mask).logits[batch.scored]
        assert (expected - replay.logits).abs().max() > 1e-3
        close(replay.run(replay.hidden[site.layer], site.layer, edit)[0], expected)


# What need not run


class Norm(nn.Module):
    """Neither an RMS nor a layer norm."""

    def forward(self, hidden):
        return hidden / hidden.abs().mean(-1, keepdim=True)


def moved_in(hidden):
    change, written = torch.randn(3, *hidden.shape[:2]), torch.randn(3, hidden.shape[-1])
    return hidden + change[..., None] * written[:, None, None], change, written


@pytest.mark.parametrize("width", [16, 17])
@pytest.mark.parametrize("kind", ["rms", "layer", "other"])
@torch.no_grad()
def test_linears_behind_a_norm_in_closed_form(kind, width):
    norm = {"rms": nn.RMSNorm(width, eps=1e-5), "layer": nn.LayerNorm(width, eps=1e-3), "other": Norm()}[kind]
    for parameter in norm.parameters():
        parameter.add_(torch.randn_like(parameter))
    linears, hidden = [nn.Linear(width, 7), nn.Linear(width, 5, bias=False)], 0.1 * torch.randn(2, 4, width) + 0.05
    readers = Readers(norm, linears, hidden)
    assert readers.hold() == (kind != "other")
    moved, change, written = moved_in(hidden)
    if kind != "other":
        for linear, found in readers(moved, change, written).items():
            close(found, linear(norm(moved)))


@torch.no_grad()
def test_what_reads_the_stream_in_closed_form(tiny, family, batch):
    """Every linear that reads a norm of the layer's input, or none where a layer reads the stream itself."""
    parts = anatomy(tiny(family))
    replay = Replay(parts, batch)
    for layer, part in enumerate(parts.layers):
        moved, change, written = moved_in(replay.hidden[layer])
        known, seen = replay.reading(layer, moved, change, written), {}
        handles = [each.register_forward_hook(lambda m, _args, out, seen=seen: seen.__setitem__(m, out)) for each in known]
        expected = replay.run(moved.flatten(0, 1), layer)
        if layer < parts.depth - 1:  # there queries run at scored positions alone
            for linear, out in known.items():
                close(out, seen[linear])
        for handle in handles:
            handle.remove()
        close(replay.run(moved.flatten(0, 1), layer, known=known), expected)
        attention = [parts.projection(layer, each) for each in parts.row.projections if "q" in each.parts]
        assert set(attention) <= set(known) or (family == "olmo2" and not known)
        assert set(known) <= set(part.modules())


@pytest.mark.parametrize("kind", ["head", "neuron"])
@torch.no_grad()
def test_a_branch_that_is_known_does_not_run(tiny, family, batch, kind):
    parts = anatomy(tiny(family))
    replay = Replay(parts, batch)
    if kind == "neuron" and parts.row.experts:  # they write through no linear
        assert not replay.writing(Site(kind, 0), torch.zeros(1, 1, 1, 1))
        return
    for layer in range(parts.depth):
        site, ran = Site(kind, layer), []
        module, value = site.module(parts), replay.activations[site]
        kept = torch.arange(value.shape[-1]) % 3 > 0
        known = replay.writing(site, (module(value * kept) - module(value))[None])
        expected = replay.run(replay.hidden[layer], layer, {module: lambda tiled, kept=kept: tiled * kept})
        handle = module.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        close(replay.run(replay.hidden[layer], layer, known=known), expected)
        handle.remove()
        assert known and not ran
        assert (expected[0] - replay.logits).abs().max() > 1e-3


@torch.no_grad()
def test_a_branch_that_does_more_than_its_linear_runs(tiny, batch):
    model = tiny("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda _module, _args, out: 2 * out)
    replay = Replay(anatomy(model), batch)
    assert not replay.writing(Site("neuron", 1), torch.zeros(1, 1, 1, 1))
    assert replay.writing(Site("neuron", 0), torch.zeros(1, 1, 1, 1))


@torch.no_grad()
def test_modules_run_again_once_they_are_not_answered_for():
    linear, value, x = nn.Linear(3, 3), torch.ones(2), torch.randn(1, 3)
    expected = linear(x)
    with pytest.raises(ZeroDivisionError), answering({linear: value}):
        assert linear(x) is value
        with answering({linear: 2 * value}):
            assert torch.equal(linear(x), 2 * value)
        assert linear(x) is value
        _ = 1 / 0
    assert torch.equal(linear(x), expected) and "forward" not in vars(linear)
