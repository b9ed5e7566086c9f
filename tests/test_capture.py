"""Looking changes nothing, and no hook stays."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from attribution.capture import Site, edited, evaluating, logits_alone, scored_logits, sites, tapped, tapped_for_logits
from attribution.models import anatomy, load
from attribution.replay import Replay
from attribution.samples import Encoded, collate

UNEQUAL = ((1, 4, 7, 11, 5, 9), (1, 3, 3, 8), (1, 12, 20, 6, 10))
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


def gradients_of(logits, *others):
    """Of some scalar that depends on every logit, with respect to further tensors."""
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return torch.autograd.grad((logits * weights).square().sum(), others, allow_unused=True, materialize_grads=True)


@torch.enable_grad()
def test_what_is_run_for_logits_alone_gives_the_same_logits_and_gradients(tiny, family, tied, batch):
    parts, positions = anatomy(tiny(family, tied, dtype=torch.float64)), []
    parameters = [each for each in parts.model.parameters() if each.requires_grad]
    plain = scored_logits(parts, batch)
    handle = parts.embedding.register_forward_hook(lambda _module, args, _out: positions.append(args[0].shape[1]))
    before = hooks(parts.model)
    alone = logits_alone(parts, batch)
    assert hooks(parts.model) == before and positions == [batch.ids.shape[1] - 1]  # nobody asks for the last one
    handle.remove()
    close(alone, plain, 1e-12)
    for found, expected in zip(gradients_of(alone, *parameters), gradients_of(plain, *parameters), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * plain.abs().max().item())


@torch.enable_grad()
def test_taps_for_logits_keep_what_taps_keep(tiny, family, tied, batch):
    """At every token activations, and gradients where there are any: of the last layer's neurons, and of no others, in two."""
    parts = anatomy(tiny(family, tied, dtype=torch.float64))
    parameters = [each for each in parts.model.parameters() if each.requires_grad]
    with tapped(parts, sites(parts), differentiable=True) as whole:
        plain = scored_logits(parts, batch)
    before = hooks(parts.model)
    with tapped_for_logits(parts, batch) as (seen, beside):
        logits = scored_logits(parts, batch)
    assert hooks(parts.model) == before and [*seen] == sites(parts)
    close(logits, plain, 1e-12)
    expected = dict(zip([*whole, *parameters], gradients_of(plain, *whole.values(), *parameters), strict=True))
    found = dict(zip([*seen, *parameters], gradients_of(logits, *seen.values(), *parameters), strict=True))
    split = [] if parts.row.experts else [Site("neuron", parts.depth - 1)]
    assert [*beside] == split
    tokens = batch.mask.bool()
    for site, activation in seen.items():
        if site in split:
            here, there = batch.scored, tokens & ~batch.scored
            close(activation[0], whole[site][here], 1e-12)
            close(beside[site][0], whole[site][there], 1e-12)
            close(found[site][0], expected[site][here], 1e-10)
            assert expected[site][there].eq(0).all() and not beside[site].requires_grad
        else:
            close(activation[tokens], whole[site][tokens], 1e-12)
            close(found[site][tokens], expected[site][tokens], 1e-10)
    for each in parameters:
        torch.testing.assert_close(found[each], expected[each], rtol=1e-9, atol=1e-12 * plain.abs().max().item())


_SMALL = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 23}
BY_LENGTH = {
    "longrope": (
        Phi3Config, {"max_position_embeddings": 40, "original_max_position_embeddings": 5, "pad_token_id": 0},
        {"short_factor": [1.0] * 3, "long_factor": [9.0] * 3},
    ),
    "dynamic": (LlamaConfig, {"max_position_embeddings": 5}, {"factor": 8.0}),
}  # fmt: skip


@pytest.mark.parametrize("kind", BY_LENGTH)
@torch.no_grad()
def test_no_position_is_left_out_where_rotations_are_chosen_by_the_length(kind):
    """The longest sample has one token more than the length from which on others are chosen."""
    config, lengths, factors = BY_LENGTH[kind]
    rope = {"rope_type": kind, "rope_theta": 10.0, "original_max_position_embeddings": 5, **factors}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(**_SMALL, **lengths, rope_parameters=rope)).eval()
        for parameter in model.parameters():
            parameter.normal_()
    parts, batch = anatomy(model), batch_of(UNEQUAL)
    shorter = model(input_ids=batch.ids[:, :-1]).logits[batch.scored[:, :-1]]
    expected = model(input_ids=batch.ids).logits[batch.scored]
    assert not torch.allclose(shorter, expected, rtol=1e-3)
    close(logits_alone(parts, batch), expected)
    close(Replay(parts, batch).logits, expected)


@torch.enable_grad()
def test_what_has_no_graph_leaves_one_to_the_rest_under_autocast(tiny, batch, monkeypatch):
    """Weights that are cast without a graph are not kept: older torch would take them for the rest of the pass."""
    parts, kept = anatomy(tiny("llama")), set()
    modules = parts.attention_out[-1], parts.layers[-1].mlp.up_proj
    weights = [module.weight for module in modules]

    def watched(inner):
        def forward(inputs):
            kept.add((torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))
            return inner(inputs)

        return forward

    with torch.autocast("cpu", torch.bfloat16):
        plain = scored_logits(parts, batch)
    for module in modules:
        monkeypatch.setattr(module, "forward", watched(module.forward))
    with torch.autocast("cpu", torch.bfloat16), tapped_for_logits(parts, batch):
        logits = scored_logits(parts, batch)
    assert kept == {(True, True), (False, False)}
    assert not torch.allclose(plain, scored_logits(parts, batch), rtol=1e-4)  # it rounds
    for found, expected in zip(gradients_of(logits, *weights), gradients_of(plain, *weights), strict=True):
        close(found, expected, 0.05)


@torch.enable_grad()
def test_a_module_with_hooks_of_others_is_run_whole(tiny, batch):
    """They may act on positions by number."""
    parts = anatomy(tiny("llama", dtype=torch.float64))

    def last_three(_module, _args, out):
        return torch.cat([out[:, :-3], out[:, -3:] + 1], dim=1)

    plain = scored_logits(parts, batch)
    with tapped(parts, sites(parts)):  # hooks of the package are no others
        close(logits_alone(parts, batch), plain, 1e-12)
    for module in (parts.attention_out[-1], parts.layers[-1].mlp.up_proj):
        handle = module.register_forward_hook(last_three)
        with tapped(parts, sites(parts)) as whole:
            expected = scored_logits(parts, batch)
        with tapped_for_logits(parts, batch) as (seen, _beside):
            found = scored_logits(parts, batch)
        handle.remove()
        close(found, expected, 1e-12)
        assert not torch.allclose(found, plain)
        for site in (each for each in seen if seen[each].shape == whole[each].shape):
            close(seen[site][batch.mask.bool()], whole[site][batch.mask.bool()], 1e-12)


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
