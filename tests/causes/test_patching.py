"""Pasting activations across models: as plain hooks do it, and nnsight's values are those that hooks see."""

import copy
import re

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from by_name import DENSE, module
from transformers import AutoModelForCausalLM

from attribution.capture import Site, sites, tapped
from attribution.causes import given, patching
from attribution.causes.patching import STREAM, patch, wrapped
from attribution.components import Component, Components
from attribution.errors import ConfigError, DataError, ModelError
from attribution.metrics import log_odds
from attribution.models import anatomy
from attribution.samples import Sample, collate, encode

HEADS, NEURONS, DEPTH = 4, 20, 2
SETS = {
    "mixed": [Component("head", 0, 1), Component("head", 1, 3), Component("neuron", 1, 4), Component("neuron", 0, 19)],
    "all": [*(Component("head", layer, h) for layer in (0, 1) for h in range(4)),
            *(Component("neuron", layer, n) for layer in (0, 1) for n in range(20))],
    "nothing": [],
}  # fmt: skip


@pytest.fixture(params=DENSE)
def family(request):
    """Mixtures are refused, see test_experts.py."""
    return request.param


@pytest.fixture
def pair(tiny, family):
    return of(tiny(family))


def of(base, spared="nothing"):
    """A model and what a training of its layers alone could have made of it."""
    tuned = copy.deepcopy(base)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for name, parameter in tuned.named_parameters():
            if ("layers" in name or ".h." in name) and spared not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return base, tuned


class ByHand:
    """One sample alone, without padding, in both models, by hooks on modules found by name."""

    def __init__(self, base, tuned, ids):
        self.models, self.ids = {"base": base, "tuned": tuned}, torch.tensor([ids])
        self.kept = {name: self.run(name)[1] for name in self.models}

    def modules(self, name):
        model = self.models[name]
        blocks = module(model, "layers")
        return {
            **{("head", n): module(model, "head", n) for n in range(len(blocks))},
            **{("mlp", n): module(model, "neuron", n) for n in range(len(blocks))},
            **{("residual", n): b for n, b in enumerate([*blocks, module(model, "final")])},
        }

    @torch.no_grad()
    def run(self, name, pastes=()):
        """(kind, layer, position or all, features, value) each."""
        kept, handles = {}, []

        def look(key):
            def hook(_module, args):
                value = args[0].clone()
                kept[key] = args[0].clone()
                for kind, layer, where, mine, source in pastes:
                    if (kind, layer) == key:
                        value[:, where, mine] = source[:, where, mine]
                return (value, *args[1:])

            return hook

        for key, place in self.modules(name).items():
            handles.append(place.register_forward_pre_hook(look(key)))
        logits = self.models[name](input_ids=self.ids).logits
        for handle in handles:
            handle.remove()
        return logits, kept

    def effect(self, into, units, one):
        """Of pasting these (kind, layer, where, features) jointly."""
        batch, donor = collate([one]), self.kept["tuned" if into == "base" else "base"]
        pastes = [(kind, layer, where, mine, donor[kind, layer]) for kind, layer, where, mine in units]
        before, after = (self.run(into, p)[0][batch.scored] for p in ((), pastes))
        return (log_odds(after, batch) - log_odds(before, batch)).item()


def features(model, component):
    kind, _, index = component
    if kind == "neuron":
        return slice(index, index + 1)
    width = getattr(model.config, "head_dim", None) or model.config.hidden_size // HEADS
    return slice(index * width, (index + 1) * width)


def test_every_unit_and_set_as_by_hooks(pair, family, tokenizer, samples, agree):
    found = patch(*pair, tokenizer, samples, sets=SETS)
    encoded = encode(tokenizer, samples)
    hands = [ByHand(*pair, list(one.ids)) for one in encoded]
    every, expected = slice(None), torch.zeros(found.per_sample.shape)
    for row, (into, kind, layer, index) in enumerate(found.table[["into", "kind", "layer", "index"]].itertuples(index=False)):
        for number, (hand, one) in enumerate(zip(hands, encoded, strict=True)):
            if kind == "residual":
                where = one.start - 1 + index
                if not 0 <= where < len(one.ids):
                    expected[row, number] = torch.nan
                    continue
                unit = (kind, layer, where, every)
            else:
                unit = (kind, layer, every, features(pair[0], ("head", layer, index)) if kind == "head" else every)
            expected[row, number] = hand.effect(into, [unit], one)
    assert torch.equal(found.per_sample.isnan(), expected.isnan()) and expected.isnan().any()
    for kind in patching.KINDS:
        mine = torch.as_tensor((found.table["kind"] == kind).to_numpy(copy=True))
        seen, by_hand = (values[mine][~expected[mine].isnan()] for values in (found.per_sample, expected))
        assert (seen - by_hand).abs().max() < 5e-6 and by_hand.abs().max() > 0.05
    weights = torch.tensor([s.weight for s in samples])
    assert found.table["effect"].to_numpy() == pytest.approx((expected * weights).nanmean(1).numpy(), abs=1e-5)
    for into, name, effect in found.sets[["into", "set", "effect"]].itertuples(index=False):
        units = [("head" if c.kind == "head" else "mlp", c.layer, every, features(pair[0], c)) for c in SETS[name]]
        values = [hand.effect(into, units, one) for hand, one in zip(hands, encoded, strict=True)]
        assert effect == pytest.approx((torch.tensor(values) * weights).mean().item(), abs=1e-5)


def test_in_float64_hooks_and_nnsight_are_equal(tiny, tokenizer, samples):
    base, tuned = of(tiny("llama", dtype=torch.float64))
    found = patch(base, tuned, tokenizer, samples[:1], kinds=["head", "mlp"])
    (one,) = encode(tokenizer, samples[:1])
    hand = ByHand(base, tuned, list(one.ids))
    for row, (into, kind, layer, index) in enumerate(found.table[["into", "kind", "layer", "index"]].itertuples(index=False)):
        mine = features(base, ("head", layer, index)) if kind == "head" else slice(None)
        assert found.per_sample[row, 0].item() == pytest.approx(
            hand.effect(into, [(kind, layer, slice(None), mine)], one), abs=1e-9
        )


def test_the_values_are_those_that_taps_see(pair, tokenizer, samples):
    parts, batch = anatomy(pair[0]), collate(encode(tokenizer, samples))
    with torch.no_grad(), tapped(parts, sites(parts)) as seen:
        parts.model(input_ids=batch.ids)
    found = patching._activations(parts, batch)
    assert set(found) == {*sites(parts), *(Site(STREAM, layer) for layer in range(DEPTH + 1))}
    assert all(torch.equal(found[site], value) for site, value in seen.items())


# What it means


def test_a_model_pasted_into_itself_changes_nothing(tiny, tokenizer, samples):
    model = tiny("qwen3")
    found = patch(model, model, tokenizer, samples, sets=SETS)
    assert found.per_sample.nan_to_num().abs().max() < 1e-5 and found.sets["effect"].abs().max() < 1e-5
    assert found.gap == 0 and found.table["share"].isna().all()


def test_the_whole_carries_the_whole_gap(tiny, tokenizer):
    """Where layers alone differ: all heads and neurons, if what they write with is the same; the last stream anyhow."""
    base, tuned = of(tiny("llama"))
    _, reading = of(tiny("llama"), spared="o_proj")
    for one, other in zip(reading.model.layers, base.model.layers, strict=True):
        one.mlp.down_proj.load_state_dict(other.mlp.down_proj.state_dict())
    samples = [Sample(prompt="w1 w2 w3", response=" w4"), Sample(prompt="w7 w2", response=" w9", weight=2.0)]
    found = patch(base, tuned, tokenizer, samples, sets=SETS)
    weights = torch.tensor([1.0, 2.0])
    metric = {}
    for name, model in (("base", base), ("tuned", tuned)):
        batch = collate(encode(tokenizer, samples))
        with torch.no_grad():
            metric[name] = (log_odds(model(input_ids=batch.ids).logits[batch.scored], batch) * weights).mean().item()
    assert found.gap == pytest.approx(metric["tuned"] - metric["base"], abs=1e-5) and abs(found.gap) > 0.05
    shares = patch(base, reading, tokenizer, samples, kinds=[], sets=SETS).sets.set_index(["into", "set"])["share"]
    assert shares["base", "all"] == pytest.approx(1, abs=1e-3) == shares["tuned", "all"]
    assert shares["base", "nothing"] == 0 and abs(shares["base", "mixed"]) > 1e-3
    table = found.table.set_index(["into", "kind", "layer", "index"])["share"]
    for into in ("base", "tuned"):
        assert table[into, "residual", DEPTH, 0] == pytest.approx(1, abs=1e-3)
        assert table[into, "residual", DEPTH, -1] == 0 == table[into, "residual", 0, 0]  # embeddings are the same


def test_a_share_is_of_the_samples_that_have_the_position(tiny, tokenizer):
    """Before the first layer the first token carries all, where only it has another embedding; the shorter sample has none."""
    base, tuned = tiny("llama"), tiny("llama")
    with torch.no_grad():
        tuned.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("w1")] += 0.5
    long, short = Sample(prompt="w1 w2 w3", response=" w4", weight=2.0), Sample(prompt="w1", response=" w9")
    alone, both = (patch(base, tuned, tokenizer, s, kinds=["residual"]) for s in ([long], [long, short]))
    one, two = (found.table.set_index(["into", "kind", "layer", "index"])["share"] for found in (alone, both))
    for into in ("base", "tuned"):
        assert one[into, "residual", 0, -2] == pytest.approx(1, abs=1e-3) == two[into, "residual", 0, -2]
    assert abs(alone.gap - both.gap) > 0.05


def test_passes_are_those_that_ran(tiny, tokenizer, samples):
    base, tuned = of(tiny("llama"))
    ran = []
    for model in (base, tuned):
        model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    found = patch(base, tuned, tokenizer, samples, sets=SETS)
    assert found.passes == len(ran) == 4 + len(found.table) + len(found.sets)
    assert found.bytes == sum(
        v.nbytes for v in patching._activations(anatomy(tuned), collate(encode(tokenizer, samples))).values()
    )


@pytest.mark.parametrize("size", [1, 2])
def test_batches_give_the_same_as_one(tiny, tokenizer, samples, monkeypatch, size):
    base, tuned = of(tiny("gpt2"))
    expected = patch(base, tuned, tokenizer, samples, sets=SETS)
    for room in (given, patching):
        monkeypatch.setattr(room, "BATCH_SIZE", size)
    found = patch(base, tuned, tokenizer, samples, sets=SETS)
    torch.testing.assert_close(found.per_sample, expected.per_sample, equal_nan=True, rtol=0, atol=1e-5)
    assert np.allclose(found.sets["effect"], expected.sets["effect"], atol=1e-5)


# The models are left as they were


@pytest.mark.parametrize("fails", [False, True], ids=["finishes", "raises"])
def test_nothing_of_nnsight_stays_on_the_models(tiny, tokenizer, samples, fails, monkeypatch):
    base, tuned = (model.train() for model in of(tiny("llama")))
    add_hook_to_module(base.model.layers[0], AlignDevicesHook(execution_device="cpu"))  # has a forward of its own
    before = [dict(module.__dict__) for model in (base, tuned) for module in model.modules()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for model in (base, tuned) for m in model.modules()]
    logits = tuned.eval()(input_ids=torch.arange(6)[None]).logits
    tuned.train()
    if fails:
        monkeypatch.setattr(patching, "_paste_at", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            patch(base, tuned, tokenizer, samples)
    else:
        patch(base, tuned, tokenizer, samples)
    after = [module.__dict__ for model in (base, tuned) for module in model.modules()]
    assert [{k: id(v) for k, v in one.items()} for one in before] == [{k: id(v) for k, v in one.items()} for one in after]
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for model in (base, tuned) for m in model.modules()]
    assert torch.equal(tuned.eval()(input_ids=torch.arange(6)[None]).logits, logits)
    with wrapped(anatomy(base)):
        assert "forward" in base.model.layers[0].__dict__  # what there was to take off


# Refusals


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"kinds": ["neuron"]}, ConfigError, "unknown kind 'neuron' to paste; expected head, mlp, residual"),
        ({"metric": "loss"}, ConfigError, "unknown metric 'loss'"),
        ({"sets": {"a": [("head", 7, 0)]}}, ConfigError, "there is no head (7, 0)"),
        ({"sets": {"a": [("row", -1, 3)]}}, ConfigError, "set 'a' holds rows, which are not pasted; give heads and neurons"),
        ({"samples": []}, DataError, "there are no samples"),
    ],
)
def test_a_wrong_argument_is_named(tiny, tokenizer, samples, asked, error, message):
    with pytest.raises(error, match=re.escape(message)):
        patch(tiny("llama"), tiny("llama"), tokenizer, asked.pop("samples", samples), **asked)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_hidden_layers": 3}, "differ in layers (2 and 3)"),
        ({"num_attention_heads": 2}, "differ in heads (4 and 2)"),
        ({"head_dim": 8}, "differ in head width (6 and 8)"),
        ({"intermediate_size": 24}, "differ in neurons (20 and 24)"),
        ({"hidden_size": 32}, "differ in width (16 and 32)"),
        ({"vocab_size": 30}, "differ in vocabulary (23 and 30)"),
    ],
)
def test_models_of_another_shape_are_named(tiny, tokenizer, samples, changed, message):
    config = tiny("llama").config
    config.update(changed)
    other = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=re.escape(message)):
        patch(tiny("llama"), other, tokenizer, samples)


def test_models_that_do_not_fit_are_named(tiny, tokenizer, samples):
    with pytest.raises(ModelError, match=re.escape("differ in architecture (llama and gpt2), so that activations")):
        patch(tiny("llama"), tiny("gpt2"), tokenizer, samples)
    with pytest.raises(ModelError):
        patch(torch.nn.Linear(2, 2), tiny("gpt2"), tokenizer, samples)
    assert len(Components(tiny("llama"))) > 0
