"""Looking changes nothing, no hook stays, and a replay from any layer is the pass itself."""

import pytest
import torch

from attribution.capture import Site, edited, evaluating, scored_logits, sites, tapped
from attribution.models import anatomy, load
from attribution.replay import Replay
from attribution.samples import Encoded, collate

UNEQUAL = ((1, 4, 7, 11, 5, 9), (1, 3, 3, 8), (1, 12, 20, 6, 10))
BATCHES = {
    "unequal lengths": UNEQUAL,
    "one sample": UNEQUAL[:1],
    "as many samples as positions": tuple((1, 4 + i, 7, 20 - i, 5)[: 5 - i % 2] for i in range(5)),
}
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def batch_of(rows, start=2):
    return collate([Encoded(ids, start, 1.0, ()) for ids in rows])


def hooks(model):
    return {(path, kind): len(getattr(module, kind)) for path, module in model.named_modules() for kind in HOOKS}


def close(found, expected, bound=1e-5):
    """Relative to the largest entry."""
    assert found.shape == expected.shape and expected.abs().max() > 0
    assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.fixture(params=["llama", "gpt2 tied", "planted", "stories"])
def parts(request, tiny):
    """Grouped queries with heads wider than d / H; a tied and transposed one; the shipped one; a real one."""
    if request.param == "planted":
        return anatomy(request.getfixturevalue("planted")[0])
    if request.param == "stories":
        return anatomy(load(str(request.getfixturevalue("stories"))).model)
    family, *tied = request.param.split()
    return anatomy(tiny(family, tied=bool(tied)))


@pytest.fixture
def batch():
    return batch_of(UNEQUAL)


# Taps


@pytest.mark.parametrize("differentiable", [False, True])
@torch.enable_grad()
def test_taps_do_not_change_one_bit(parts, batch, differentiable):
    without = parts.model(input_ids=batch.ids).logits
    with tapped(parts, sites(parts), differentiable=differentiable) as seen:
        inside = parts.model(input_ids=batch.ids).logits
    assert torch.equal(inside, without) and torch.equal(parts.model(input_ids=batch.ids).logits, without)
    assert list(seen) == sites(parts) and len(seen) == 2 * parts.depth
    assert all(value.requires_grad == differentiable for value in seen.values())


def test_a_tap_is_the_input_of_the_output_linear(parts, batch):
    kept = {}
    handles = [
        linear.register_forward_hook(lambda _module, args, _out, key=(kind, layer): kept.__setitem__(key, args[0].detach()))
        for kind, linears in (("head", parts.attention_out), ("neuron", parts.mlp_out))
        for layer, linear in enumerate(linears)
    ]
    with tapped(parts, sites(parts)) as seen:
        parts.model(input_ids=batch.ids)
    for handle in handles:
        handle.remove()
    width = {"head": parts.heads * parts.head_dim, "neuron": parts.neurons}
    for site, value in seen.items():
        assert value.shape == (*batch.ids.shape, width[site.kind]) and value.std() > 0
        assert torch.equal(value, kept[site])


def test_only_the_last_pass_and_the_asked_sites_stay(parts, batch):
    site = Site("head", parts.depth - 1)
    with tapped(parts, [site]) as seen:
        parts.model(input_ids=batch.ids)
        first = seen[site]
        parts.model(input_ids=batch.ids.flip(1))
    assert list(seen) == [site] and not torch.equal(seen[site], first)


def test_differentiable_taps_need_no_trainable_weight(tiny, family, tied, batch):
    parts = anatomy(tiny(family, tied))

    def gradients():
        with tapped(parts, sites(parts), differentiable=True) as seen:
            logits = scored_logits(parts, batch)
        return logits, torch.autograd.grad(logits.square().sum(), list(seen.values()))

    logits, expected = gradients()
    parts.model.requires_grad_(False)
    frozen_logits, frozen = gradients()
    assert torch.equal(logits, frozen_logits)
    for one, other in zip(frozen, expected, strict=True):
        close(one, other)
    assert all(parameter.grad is None for parameter in parts.model.parameters())


# Edits


def test_an_edit_is_what_the_linear_reads(parts, batch):
    weight = parts.mlp_out[0]
    plain = scored_logits(parts, batch)
    with edited({weight: lambda value: value}):
        assert torch.equal(scored_logits(parts, batch), plain)
    with edited({weight: torch.zeros_like}), tapped(parts, [Site("neuron", 0)]) as seen:
        assert not torch.allclose(scored_logits(parts, batch), plain)
    assert seen[Site("neuron", 0)].eq(0).all()
    assert torch.equal(scored_logits(parts, batch), plain)


def refuse(_value):
    raise RuntimeError("from inside")


@pytest.mark.parametrize("fails", [False, True], ids=["finishes", "raises"])
@pytest.mark.parametrize("which", ["tapped", "edited", "replay", "replay run"])
def test_no_hook_outlives_its_block(parts, batch, which, fails):
    before = hooks(parts.model)
    module = parts.attention_out[-1]
    ids = torch.full_like(batch.ids, parts.vocabulary) if fails else batch.ids  # a token that does not exist
    try:
        if which == "tapped":
            with tapped(parts, sites(parts)):
                assert hooks(parts.model) != before
                parts.model(input_ids=ids)
        elif which == "edited":
            with edited({module: refuse if fails else torch.zeros_like}):
                assert hooks(parts.model) != before
                parts.model(input_ids=batch.ids)
        elif which == "replay":
            if fails:
                with edited({module: refuse}):
                    Replay(parts, batch)
            else:
                Replay(parts, batch)
        else:
            replay = Replay(parts, batch)
            replay.run(replay.hidden[0], 0, {module: refuse if fails else torch.zeros_like})
        raised = False
    except (RuntimeError, IndexError):
        raised = True
    assert raised == fails
    assert hooks(parts.model) == before


# Logits


@torch.no_grad()
def test_scored_logits_are_those_of_the_model(parts, batch):
    logits = parts.model(input_ids=batch.ids, attention_mask=batch.mask).logits
    close(scored_logits(parts, batch), logits[batch.scored])


@pytest.mark.parametrize("start", [1, 3])
@torch.no_grad()
def test_scored_logits_do_not_depend_on_padding(tiny, family, tied, start):
    parts = anatomy(tiny(family, tied))
    rows = [ids + (9,) * start for ids in UNEQUAL]
    alone = torch.cat([parts.model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1] for ids in rows])
    close(scored_logits(parts, batch_of(rows, start)), alone)
    longer = [*rows, rows[0] + rows[1]]
    close(scored_logits(parts, batch_of(longer, start))[: len(alone)], alone)


# Replays


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


@torch.no_grad()
def test_a_replay_in_a_real_or_shipped_model(parts, batch):
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


# Modes


@pytest.mark.parametrize("fails", [False, True], ids=["finishes", "raises"])
def test_every_module_gets_its_own_mode_back(tiny, batch, fails):
    model = tiny("gpt2")
    modules = list(model.modules())
    for number, module in enumerate(modules):
        module.training = number % 3 == 0
    before = [module.training for module in modules]
    try:
        with evaluating(model):
            assert not any(module.training for module in modules)
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert [module.training for module in modules] == before and len(set(before)) == 2


def test_evaluating_switches_dropout_off(tiny, batch):
    parts = anatomy(tiny("gpt2"))
    expected = scored_logits(parts, batch)
    parts.model.train()
    assert not torch.allclose(scored_logits(parts, batch), expected)  # it has dropout
    with evaluating(parts.model):
        assert torch.equal(scored_logits(parts, batch), expected)
    assert all(module.training for module in parts.model.modules())
