"""Grafts against weights put together by hand."""

import pytest
import torch

from attribution.capture import evaluating, scored_logits
from attribution.components import Components
from attribution.errors import ConfigError, DataError, ModelError
from attribution.metrics import log_odds
from attribution.models import load
from attribution.samples import collate, encode
from attribution.updates.graft import graft, graft_sets, swapped


@pytest.fixture(scope="module")
def base():
    return load("planted/unrouted").model


def by_hand(model, tokenizer, probe, weights):
    """The metric of `model` with these weights, and the model as it was."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = collate(encode(tokenizer, probe.samples))
    with torch.no_grad(), evaluating(model):
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.get(name, parameter))
        value = log_odds(scored_logits(Components(model).parts, batch), batch).mean().item()
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return value


def test_graft_and_prune_of_a_head_and_a_neuron_are_those_of_weights_put_in_by_hand(recorded, base, probes):
    tuned, tokenizer, probe = recorded["model"], recorded["tokenizer"], probes[0]
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    sets = {"head": [("head", 1, 2)], "neuron": [("neuron", 3, 7)], "both": [("head", 1, 2), ("neuron", 3, 7)]}
    found = graft(base, tuned, sets, tokenizer=tokenizer, probes=[probe]).set_index("set")

    def mixed(into, source, *, head, neuron):
        weights = {}
        if head:
            name = "model.layers.1.self_attn.{}_proj.weight"
            o, q = into[name.format("o")].detach().clone(), into[name.format("q")].detach().clone()
            o[:, 64:96], q[64:96] = source[name.format("o")][:, 64:96].detach(), source[name.format("q")][64:96].detach()
            weights |= {name.format("o"): o, name.format("q"): q}
        if neuron:
            name = "model.layers.3.mlp.{}_proj.weight"
            for part in ("gate", "up", "down"):
                w = into[name.format(part)].detach().clone()
                where = (slice(None), 7) if part == "down" else (7,)
                w[where] = source[name.format(part)][where].detach()
                weights[name.format(part)] = w
        return weights

    start, end = by_hand(base, tokenizer, probe, {}), by_hand(tuned, tokenizer, probe, {})
    for name in sets:
        which = {"head": name != "neuron", "neuron": name != "head"}
        grafted = by_hand(base, tokenizer, probe, mixed(before, after, **which)) - start
        pruned = end - by_hand(tuned, tokenizer, probe, mixed(after, before, **which))
        assert abs(grafted) > 1e-6
        assert found.loc[name, "graft"] == pytest.approx(grafted, abs=1e-6)
        assert found.loc[name, "prune"] == pytest.approx(pruned, abs=1e-6)


def test_everything_grafted_is_the_whole_change_and_nothing_is_none(recorded, base, probes):
    tuned = recorded["model"]
    table = Components(base).table
    start = {name: p.clone() for name, p in base.state_dict().items()}
    sets = {"nothing": [], "components": table, "remainder": "remainder"}
    found = graft(base, tuned, sets, tokenizer=recorded["tokenizer"], probes=probes)
    for probe in probes:
        rows = found[found["probe"] == probe.name].set_index("set")
        assert rows.loc["nothing", "graft"] == rows.loc["nothing", "prune"] == 0
        change = by_hand(tuned, recorded["tokenizer"], probe, {}) - by_hand(base, recorded["tokenizer"], probe, {})
        assert abs(change) > 0.05
        # theta_1 without the remainder's change is theta_0 with the components'
        assert rows.loc["components", "graft"] + rows.loc["remainder", "prune"] == pytest.approx(change, abs=1e-5)
        assert rows.loc["remainder", "graft"] + rows.loc["components", "prune"] == pytest.approx(change, abs=1e-5)
    assert all(torch.equal(start[name], p) for name, p in base.state_dict().items())
    assert all(torch.equal(recorded["weights"][-1][name], p) for name, p in tuned.named_parameters())


def test_weights_come_back_after_an_exception_and_a_tie_stays_a_tie(tiny):
    into, source = Components(tiny("llama", tied=True)), Components(tiny("llama", tied=True))
    with torch.no_grad():
        for parameter in source.stored.values():
            parameter.add_(0.1)
    kept = {name: p.detach().clone() for name, p in into.stored.items()}
    rows = into.group_mask(into.positions([("row", -1, i) for i in range(23)]))
    with pytest.raises(KeyboardInterrupt), swapped(into, source, rows):
        assert not torch.equal(into.parts.unembedding.weight, kept["model.embed_tokens.weight"])
        assert torch.equal(into.parts.embedding.weight, kept["model.embed_tokens.weight"])  # the other use stays
        raise KeyboardInterrupt
    assert into.parts.tied
    assert all(torch.equal(kept[name], p) for name, p in into.stored.items())


@pytest.mark.parametrize(
    ("sets", "error", "named"),
    [
        ({"x": [("haed", 0, 0)]}, ConfigError, "'haed'"),
        ({"x": [("head", 9, 0)]}, ConfigError, "no head"),
        ({"x": "rest"}, ConfigError, "'rest'"),
    ],
)
def test_sets_that_do_not_exist_are_refused(recorded, base, probes, sets, error, named):
    with pytest.raises(error, match=named):
        graft(base, recorded["model"], sets, tokenizer=recorded["tokenizer"], probes=probes)


def test_models_that_do_not_correspond_and_missing_probes_are_refused(recorded, base, tiny, probes):
    arguments = {"tokenizer": recorded["tokenizer"], "probes": probes}
    with pytest.raises(ModelError, match="different parameters"):
        graft(base, tiny("llama"), {"x": [("head", 0, 0)]}, **arguments)
    with pytest.raises(ConfigError, match="no probe set"):
        graft(base, base, {"x": [("head", 0, 0)]}, tokenizer=recorded["tokenizer"], probes=[])
    bare = probes[0].model_copy(update={"samples": tuple(s.model_copy(update={"contrast": ()}) for s in probes[0].samples)})
    with pytest.raises(DataError, match="contrast"):
        graft(base, base, {"x": [("head", 0, 0)]}, tokenizer=recorded["tokenizer"], probes=[bare], metric="logit_difference")


def test_grafts_of_sets_while_another_is_ablated(recorded, base, probes):
    tuned, tokenizer, probe = recorded["model"], recorded["tokenizer"], probes[0]
    sets = {"A": [("head", 0, 0), ("head", 1, 2)], "B": [("neuron", 3, i) for i in range(40)]}
    found = graft_sets(base, tuned, sets, tokenizer=tokenizer, probes=[probe]).set_index(["set", "ablated"])["graft"]
    assert len(found) == 3 * 3
    alone = graft(base, tuned, {**sets, "remainder": "remainder"}, tokenizer=tokenizer, probes=[probe]).set_index("set")[
        "graft"
    ]
    batch = collate(encode(tokenizer, probe.samples))

    def level_without_a(model) -> float:  # by hooks of this test's own: head 0 of layer 0 and head 2 of layer 1 are silent
        def silence(start):
            def hook(_module, args):
                value = args[0].clone()
                value[..., start : start + 32] = 0
                return (value,)

            return hook

        layers = model.model.layers
        handles = [layers[0].self_attn.o_proj.register_forward_pre_hook(silence(0)),
                   layers[1].self_attn.o_proj.register_forward_pre_hook(silence(64))]  # fmt: skip
        with torch.no_grad():
            value = log_odds(scored_logits(Components(model).parts, batch), batch).mean().item()
        for handle in handles:
            handle.remove()
        return value

    before, after = Components(base), Components(tuned)
    for name in ("A", "B", "remainder"):
        assert found[name, ""] == pytest.approx(alone[name], abs=1e-6) and abs(alone[name]) > 1e-4
        mask = before.remainder_mask if name == "remainder" else before.group_mask(before.positions(sets[name]))
        start = level_without_a(base)
        with swapped(before, after, mask):
            assert found[name, "A"] == pytest.approx(level_without_a(base) - start, abs=1e-6)
    assert found["A", "A"] == 0  # what is silent cannot help
