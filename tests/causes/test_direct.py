"""Direct effects are what is left when nothing after the component may change: by formulas of each norm, and by models in which
nothing does change."""

import numpy as np
import pytest
import torch
from by_name import MIXTURES, module, put_out, with_row
from torch.nn import functional

from attribution.causes import ablate, attribute, direct, self_repair
from attribution.causes.direct import FrozenNorm
from attribution.components import Component, Components
from attribution.errors import ConfigError, ModelError
from attribution.mechanisms import complement
from attribution.metrics import log_odds
from attribution.samples import collate, encode

HEADS = [Component("head", layer, head) for layer in (0, 1) for head in range(4)]
NEURONS = [Component("neuron", layer, neuron) for layer in (0, 1) for neuron in range(20)]
ROWS = [Component("row", -1, token) for token in range(23)]
CAP = "final_logit_softcapping"
SETS = {
    "heads": HEADS[2:6],
    "mixed": [HEADS[0], HEADS[7], NEURONS[3], NEURONS[33]],
    "with rows": [HEADS[1], NEURONS[30], ROWS[9], ROWS[4]],
    "nothing": [],
}


@pytest.fixture(params=["zero", "resample"])
def reference(request):
    return request.param


class ByHand:
    """Direct effects from the pieces of one forward pass, norms written out from their parameters."""

    def __init__(self, model, batch, others, reference):
        self.model, self.batch, self.kept, self.reference = model, batch, {}, {}
        self.family = model.config.model_type
        self.layers, self.final = module(model, "layers"), module(model, "final")
        self.run(batch.ids, self.kept)
        if reference == "resample":
            self.run(others.ids, self.reference)
        self.logits = self.unembed(self.normed(self.kept["end"]))

    def out(self, kind, layer):
        return module(self.model, kind, layer)

    @torch.no_grad()
    def run(self, ids, kept):
        handles = [
            self.out(kind, layer).register_forward_pre_hook(
                lambda _m, args, key=(kind, layer): kept.__setitem__(key, args[0].clone())
            )
            for kind in ("head", "neuron")
            for layer in (0, 1)
        ]
        handles += [
            self.layers[layer].mlp.gate.register_forward_hook(
                lambda _m, _a, out, key=("router", layer): kept.__setitem__(
                    key, torch.zeros_like(out[0]).scatter(1, out[2], out[1])
                )
            )
            for layer in ((0, 1) if self.family in MIXTURES else ())
        ]
        handles.append(self.final.register_forward_pre_hook(lambda _m, args: kept.__setitem__("end", args[0].clone())))
        self.model(input_ids=ids)
        for handle in handles:
            handle.remove()

    def frozen(self, norm, at, change):
        """The norm's linear part with its scale taken from `at`."""
        if isinstance(norm, torch.nn.LayerNorm):
            scale = (at.var(-1, keepdim=True, correction=0) + norm.eps).rsqrt()
            return scale * norm.weight * (change - change.mean(-1, keepdim=True))
        if self.family.startswith("gemma"):
            return (at.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * (1 + norm.weight) * change
        return (at.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight * change

    def normed(self, at):
        return self.frozen(self.final, at, at) + getattr(self.final, "bias", 0)

    def unembed(self, normed):
        logits = functional.linear(normed, self.model.lm_head.weight, self.model.lm_head.bias)
        cap = self.model.config.to_dict().get(CAP)
        return cap * torch.tanh(logits / cap) if cap else logits

    def write(self, component):
        kind, layer, index = component
        linear, activation = self.out(kind, layer), self.kept[kind, layer]
        weight = linear.weight.T if self.family != "gpt2" else linear.weight  # [feature, width]
        size = activation.shape[-1] // (4 if kind == "head" else 20)
        mine = slice(index * size, (index + 1) * size)
        value = self.reference[kind, layer] if self.reference else torch.zeros_like(activation)
        change = (value - activation)[..., mine] @ weight[mine]
        if self.family in MIXTURES and kind == "neuron":  # 5 experts of 4 neurons
            change = change * self.kept["router", layer].view(*activation.shape[:2], 5)[..., index // 4, None]
        if self.family in ("olmo2", "gemma2", "gemma3_text"):
            block = self.layers[layer]
            norm = block.post_attention_layernorm if kind == "head" else block.post_feedforward_layernorm
            change = self.frozen(norm, activation @ weight, change)
        return change

    @torch.no_grad()
    def effect(self, chosen):
        write = sum((self.write(c) for c in chosen if c.kind != "row"), torch.zeros_like(self.kept["end"]))
        logits = self.unembed(self.normed(self.kept["end"]) + self.frozen(self.final, self.kept["end"], write))
        mean = put_out(self.model, logits).mean(-1)
        for component in chosen:
            if component.kind == "row":
                logits = with_row(self.model, logits, component.index, mean)
        scored = self.batch.scored
        return log_odds(self.logits[scored], self.batch) - log_odds(logits[scored], self.batch)


def by_hand(model, tokenizer, samples, counterfactuals, reference):
    batch, others = (collate(encode(tokenizer, each)) for each in (samples, counterfactuals))
    return ByHand(model, batch, others, reference)


def test_every_component_as_by_hand(tiny, family, tied, tokenizer, samples, counterfactuals, agree, reference):
    model = tiny(family, tied)
    expected = by_hand(model, tokenizer, samples, counterfactuals, reference)
    given = {"reference": reference, "counterfactuals": counterfactuals}
    found = attribute(model, tokenizer, samples, path="direct", **given)
    total = attribute(model, tokenizer, samples, **given)
    assert found.path == "direct" and found.passes == 1 + (reference != "zero")
    for kind, members in (("head", HEADS), ("neuron", NEURONS), ("row", ROWS)):
        mine = torch.as_tensor((found.table["kind"] == kind).to_numpy(copy=True))
        agree(found.per_sample[mine], torch.stack([expected.effect([c]) for c in members]))
        far = (found.per_sample[mine] - total.per_sample[mine]).abs().max()
        assert (far < 1e-5) == (kind == "row")  # nothing comes after a row
    assert found.table["kl"].max() > 1e-3 and (found.table["kl"] > -1e-6).all()


def test_a_soft_cap_comes_after_the_change(tiny, tokenizer, samples, agree):
    model = tiny("llama")
    plain = attribute(model, tokenizer, samples, path="direct", components=HEADS)
    model.config.update({CAP: 2.0})  # of a size that bends these logits
    found = attribute(model, tokenizer, samples, path="direct", components=HEADS)
    expected = by_hand(model, tokenizer, samples, samples, "zero")
    agree(found.per_sample, torch.stack([expected.effect([c]) for c in HEADS]))
    assert (found.per_sample - plain.per_sample).abs().max() > 0.05
    assert found.caveats[0] == "this model soft-caps its logits: direct effects do not add up over components"


def test_effects_on_logits_add_up(tiny, family, tokenizer, samples, agree):
    """The difference of two logits is linear in what is written, as long as scales are held and nothing caps the logits."""
    if family == "gemma2":
        pytest.skip("its logits are capped, of which the result has a caveat")
    model = tiny(family)
    units = [*HEADS, *NEURONS]
    single = attribute(model, tokenizer, samples, path="direct", metric="logit_difference", components=units)
    table = self_repair(model, tokenizer, samples, {"all": units, "half": units[::2]}, metric="logit_difference")
    agree(table["direct"].to_numpy(), np.array([single.table["effect"].sum(), single.table["effect"][::2].sum()]), 1e-4)


def test_where_nothing_follows_direct_is_total(tiny, tokenizer, samples, agree):
    """With a second layer that writes nothing, and a last norm of constant scale, there is nothing to make up for a loss."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
        model.model.norm.variance_epsilon = 1e6
        model.model.norm.weight.mul_(1e3)
    neurons = NEURONS[:20]
    alone, total = (attribute(model, tokenizer, samples, path=p, components=neurons).per_sample for p in ("direct", "total"))
    agree(alone, total)
    table = self_repair(model, tokenizer, samples, {"neurons": neurons[:7]})
    assert table["compensation"].abs().max() < 1e-4 and table["total"].abs().max() > 1e-2


def test_a_backup_shows_as_compensation(tiny, tokenizer, samples):
    """Layer 1 takes back a part of what layer 0 wrote: made of a neuron of layer 1 that reads the stream along that write."""
    model = tiny("gpt2")
    first, second = model.transformer.h
    with torch.no_grad():
        for module in (second.attn.c_proj, second.mlp.c_proj):
            module.weight.zero_()
            module.bias.zero_()
        direction = first.mlp.c_proj.weight[3].clone()
        second.mlp.c_fc.weight.zero_()
        second.mlp.c_fc.bias.zero_()
        second.mlp.c_fc.weight[:, 0] = direction / direction.norm()  # reads the direction
        second.mlp.c_fc.bias[0] = 3.0  # where the activation function is close to linear
        second.mlp.c_proj.weight[0] = -0.5 * direction
        model.transformer.ln_f.eps = 1e6  # a last norm of constant scale
        model.transformer.ln_f.weight.mul_(1e3)
    given = {"metric": "logit_difference"}
    table = self_repair(model, tokenizer, samples, {"neuron": [Component("neuron", 0, 3)]}, **given).iloc[0]
    with torch.no_grad():
        second.mlp.c_proj.weight.zero_()
    without = self_repair(model, tokenizer, samples, {"neuron": [Component("neuron", 0, 3)]}, **given).iloc[0]
    assert abs(without["compensation"]) < 1e-4 * abs(without["direct"])
    assert table["direct"] == pytest.approx(without["direct"], rel=1e-3)
    assert table["compensation"] * table["direct"] < 0  # the second layer stands in for it
    assert abs(table["compensation"]) > 0.1 * abs(table["direct"]) > 1e-4


def test_self_repair_is_direct_total_and_complement(tiny, tokenizer, samples, counterfactuals, agree, reference):
    model = tiny("olmo2")
    given = {"reference": reference, "counterfactuals": counterfactuals}
    table = self_repair(model, tokenizer, samples, SETS, **given)
    assert list(table) == ["set", "size", "direct", "total", "compensation", "complement"]
    assert list(table["set"]) == list(SETS) and list(table["size"]) == [len(members) for members in SETS.values()]
    expected = by_hand(model, tokenizer, samples, counterfactuals, reference)
    weights = torch.tensor([s.weight for s in samples])
    agree(table["direct"].to_numpy(), torch.stack([(expected.effect(c) * weights).mean() for c in SETS.values()]))
    agree(table["total"].to_numpy(), ablate(model, tokenizer, samples, SETS, **given)["effect"].to_numpy())
    assert np.allclose(table["compensation"], table["total"] - table["direct"])
    components = Components(model)
    units = {name: [c for c in members if c.kind != "row"] for name, members in SETS.items()}
    others = {name: complement(components, components.table.iloc[components.positions(c)]) for name, c in units.items()}
    agree(table["complement"].to_numpy(), ablate(model, tokenizer, samples, others, **given)["effect"].to_numpy())
    assert table.iloc[-1]["direct"] == table.iloc[-1]["total"] == 0 and table.iloc[-1]["complement"] != 0


def test_a_set_is_written_as_one(tiny, tokenizer, samples, monkeypatch):
    """Of a layer's neurons together, not [neuron, token, width] first, which no memory holds in a large model."""
    sizes = []

    class Watched(direct.LastStream):
        def written(self, site, groups):
            found = super().written(site, groups)
            sizes.append(tuple(found.shape))
            return found

    monkeypatch.setattr(direct, "LastStream", Watched)
    self_repair(tiny("llama"), tokenizer, samples, {"all": [*HEADS, *NEURONS]})
    assert sizes == [(1, 6, 16)] * 4


def test_wrong_sets_are_refused(tiny, tokenizer, samples):
    with pytest.raises(ConfigError, match="there are no sets to compare; give at least one"):
        self_repair(tiny("llama"), tokenizer, samples, {})
    with pytest.raises(ConfigError, match="there is no head"):
        self_repair(tiny("llama"), tokenizer, samples, {"wrong": [("head", 9, 0)]})


# Frozen norms


@pytest.mark.parametrize("width", [6, 7])
@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_a_norm_is_read_by_probing(kind, width):
    norm = kind(width, eps=1e-5)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn_like(parameter))
    inputs, change = torch.randn(5, 3, width) * 2 + 1, torch.randn(5, 3, width)
    found = FrozenNorm(norm, inputs)
    layer = kind is torch.nn.LayerNorm
    statistic = inputs.var(-1, correction=0) if layer else inputs.square().mean(-1)
    centred = change - change.mean(-1, keepdim=True) if layer else change
    expected = (statistic + 1e-5).rsqrt()[..., None] * norm.weight * centred
    torch.testing.assert_close(found(change), expected, rtol=1e-4, atol=1e-4)
    assert found.centred == layer
    torch.testing.assert_close(found(change - 2 * inputs), found(change) - 2 * found(inputs), rtol=1e-4, atol=1e-4)


def test_what_is_no_such_norm_is_refused():
    class Squash(torch.nn.Module):
        def forward(self, value):
            return value.tanh()

    with pytest.raises(ModelError, match=r'Squash is not a scale times a linear map .* use path="total"'):
        FrozenNorm(Squash(), torch.randn(4, 6))
