"""A replay from any layer is the pass itself, with whatever it need not run left out."""

import pytest
import torch

from attribution.capture import edited, scored_logits, sites
from attribution.models import anatomy, load
from attribution.replay import Replay
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
