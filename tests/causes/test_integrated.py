"""Integrated gradients in unit masks add up to the joint ablation, and are what captum and a plain sum over the path say."""

import pandas as pd
import pytest
import torch
from by_name import MIXTURES, put_out
from captum.attr import IntegratedGradients
from turns import in_turn

from attribution.architectures import ARCHITECTURES
from attribution.capture import edited, scored_logits, sites
from attribution.causes import ablate, attribute, integrated
from attribution.causes.integrated import integrate
from attribution.causes.methods import Asked, caveats
from attribution.causes.reference import zeros
from attribution.causes.result import Cut, Found, largest
from attribution.components import Components
from attribution.metrics import log_odds
from attribution.models import anatomy
from attribution.samples import Sample, collate, encode
from attribution.worlds import planted as world


def check_sums(found, jointly, weights, resolved=True):
    """Effects of heads and neurons and the residual make up the joint ablation; so do rows, alone."""
    for number, (cut, units) in enumerate((("heads and neurons", True), ("rows", False))):
        mine = torch.as_tensor(((found.table["kind"] != "row") == units).to_numpy(copy=True))
        told = found.sums.iloc[number]
        assert told["cut"] == cut and told["beside"] == 0
        assert told["effects"] == pytest.approx((found.per_sample[mine].sum(0).double() * weights).mean().item(), abs=1e-5)
        assert told["effects"] + told["residual"] == pytest.approx(told["change"], abs=1e-9)
        assert told["change"] == pytest.approx(jointly[number], abs=1e-4)
        size = found.per_sample[mine].sum(0).abs().mean().item()  # per sample, of which weights may cancel the mean
        assert size > 0.1
        if resolved or not units:
            assert abs(told["residual"]) <= 2e-3 * size + 1e-5
    assert found.residual == found.sums["residual"].iloc[int(found.sums["residual"].abs().argmax())]


@pytest.mark.parametrize(("family", "reference"), in_turn(sorted(ARCHITECTURES), ["zero", "mean", "resample"]))
def test_effects_add_up_to_the_joint_ablation(tiny, family, tokenizer, samples, counterfactuals, reference):
    """Post-norms included, where the path bends most at its beginning."""
    model = tiny(family)
    given = {"reference": reference, "counterfactuals": counterfactuals}
    found = attribute(model, tokenizer, samples, method="integrated", **given)
    table = Components(model).table
    kinds = {"units": table[table["kind"] != "row"], "rows": table[table["kind"] == "row"]}
    jointly = ablate(model, tokenizer, samples, kinds, **given)["effect"].tolist()
    mixture = family in MIXTURES  # along the path the choice of experts jumps: what it misses, 5 to 35 % here, is said
    check_sums(found, jointly, torch.tensor([s.weight for s in samples]).double(), resolved=not mixture)
    assert any("not resolved" in each for each in found.caveats) == any("jump" in each for each in found.caveats) == mixture


def test_ten_nodes_resolve_the_planted_model(planted):
    model, tokenizer = planted
    samples = [Sample(**row) for row in world.prompts(8, seed=3, star="agree")]
    found = attribute(model, tokenizer, samples, method="integrated")
    assert abs(found.residual) <= 1e-3 * found.sums["change"].abs().max()
    assert found.sums["change"].abs().min() > 1


def test_captum_says_the_same(tiny, tokenizer, samples, counterfactuals, agree):
    """Integrated gradients of the metric as a function of the masks, from none to all."""
    model = tiny("gpt2", tied=True, dtype=torch.float64)
    parts, batch = anatomy(model), collate(encode(tokenizer, samples))
    width = {"head": parts.head_dim, "neuron": 1}
    counts = {"head": parts.heads, "neuron": parts.neurons}
    order = sorted(sites(parts), key=lambda site: (site.kind, site.layer))

    def score(masks):  # [step, mask]: of one path, in which all samples move together
        found = []
        for mask in masks:
            pieces = dict(zip(order, mask.split([counts[site.kind] for site in order]), strict=True))
            edits = {
                site.module(parts): lambda value, site=site, pieces=pieces: (
                    value * pieces[site].repeat_interleave(width[site.kind])
                )
                for site in order
            }
            with edited(edits):
                found.append(log_odds(scored_logits(parts, batch), batch).sum())
        return torch.stack(found)

    ones = torch.ones(1, sum(counts[site.kind] for site in order), dtype=torch.float64)
    theirs = IntegratedGradients(score).attribute(ones, torch.zeros_like(ones), n_steps=80, method="gausslegendre")[0]
    found = attribute(model, tokenizer, samples, method="integrated", nodes=40)
    units = torch.as_tensor((found.table["kind"] != "row").to_numpy(copy=True))
    agree(found.per_sample[units].sum(1), theirs, 1e-5)


def test_finite_differences_say_the_same_along_the_path(tiny, family, tokenizer, samples, agree, monkeypatch):
    """With one node, in the middle, an effect is the derivative of the metric by that unit's mask, all masks at a half."""
    monkeypatch.setattr(integrated, "PIECES", 1)
    model = tiny(family, dtype=torch.float64)
    parts, batch = anatomy(model), collate(encode(tokenizer, samples))
    index = Components(model)
    found = integrated.integrated(index, batch, zeros(parts), log_odds, 1).effect

    @torch.no_grad()
    def read(kind, layer, unit, amount):
        def mask(site):
            width = parts.head_dim if site.kind == "head" else 1
            value = torch.full((parts.heads * width if site.kind == "head" else parts.neurons,), 0.5, dtype=torch.float64)
            if (site.kind, site.layer) == (kind, layer):
                value[unit * width : (unit + 1) * width] += amount
            return value

        with edited({site.module(parts): lambda value, site=site: value * mask(site) for site in sites(parts)}):
            return log_odds(scored_logits(parts, batch), batch)

    step, chosen = 1e-5, [0, 3, 5, 7, 8, 20, 30, 47]
    units = [index.table.iloc[place] for place in chosen]
    expected = [
        (read(u["kind"], u["layer"], u["index"], step) - read(u["kind"], u["layer"], u["index"], -step)) / (2 * step)
        for u in units
    ]
    agree(found[chosen], torch.stack(expected), 1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_rows_are_integrated_alone(tiny, tokenizer, samples, agree, family):
    """A plain sum over a fine grid of the path on which what every row puts out goes from the mean to what it is."""
    model = tiny(family, dtype=torch.float64)
    parts, batch = anatomy(model), collate(encode(tokenizer, samples))
    with torch.no_grad():
        rows = put_out(model, scored_logits(parts, batch))
    centred = rows - rows.mean(-1, keepdim=True)
    total = torch.zeros_like(rows)
    bias, cap = model.lm_head.bias, 5 if family == "gemma2" else None
    for step in range(400):
        at = (rows.mean(-1, keepdim=True) + (step + 0.5) / 400 * centred).requires_grad_()
        logits = at if bias is None else at + bias.detach()
        logits = cap * torch.tanh(logits / cap) if cap else logits
        total += torch.autograd.grad(log_odds(logits, batch).sum(), at)[0] / 400
    expected = torch.zeros(rows.shape[-1], len(batch), dtype=torch.float64)
    expected.index_add_(1, batch.sample_of, (total * centred).T)
    found = attribute(model, tokenizer, samples, method="integrated")
    agree(found.per_sample[torch.as_tensor((found.table["kind"] == "row").to_numpy(copy=True))], expected, 1e-4)


def test_more_nodes_come_closer_and_the_residual_says_so(tiny, tokenizer, samples, monkeypatch):
    monkeypatch.setattr(integrated, "PIECES", 1)
    model = tiny("qwen3", dtype=torch.float64)
    found = {n: attribute(model, tokenizer, samples, method="integrated", nodes=n) for n in (2, 10, 60)}
    best = found[60]
    for nodes in (2, 10):
        error = (found[nodes].per_sample - best.per_sample).abs().max()
        assert error > 1e-3 and abs(found[nodes].residual) > 10 * abs(best.residual)
        assert any("not resolved" in each for each in found[nodes].caveats)
    assert abs(found[2].residual) > abs(found[10].residual) and not any("not resolved" in each for each in best.caveats)
    assert found[2].passes < found[10].passes < best.passes


def test_the_residual_of_a_result_is_the_one_furthest_from_zero(tiny, tokenizer, samples, monkeypatch):
    assert largest(pd.Series([0.1, -0.5, 0.2])) == -0.5
    monkeypatch.setattr(integrated, "PIECES", 1)
    found = attribute(tiny("gpt2"), tokenizer, samples, method="conductance", nodes=2)
    assert found.residual == found.sums["residual"][found.sums["residual"].abs().argmax()] != 0


def test_what_is_not_resolved_is_told_from_twice_the_tolerance(tiny):
    def told(residual):
        cut = Cut(torch.tensor([6.0 - residual, -4.0]), torch.zeros(2), torch.tensor([6.0, -4.0]))
        found = [Found(torch.zeros(0, 2), 1.0, 0, cuts={"rows": cut})]
        asked = Asked("integrated", "total", 10, False, 0, 0)
        return caveats(asked, anatomy(tiny("llama")), "logit_difference", "zero", [], found, None)

    assert told(0.015) == () == told(-0.015)  # of 10
    assert told(-0.03) == ("not resolved: the sum over rows misses 0.03 of a change of 10; give more nodes",)


def test_passes_are_those_that_ran(tiny, tokenizer, samples):
    model, ran = tiny("llama"), []
    model.model.layers[1].register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    found = attribute(model, tokenizer, samples, method="integrated")
    assert found.passes == sum(3 if grad else 1 for grad in ran)


# The integral itself


@pytest.mark.parametrize("nodes", [1, 3, 10])
def test_a_polynomial_is_integrated_exactly(nodes):
    power = 2 * nodes - 1
    found = integrate(lambda s: torch.tensor([[(power + 1) * s**power]]), lambda s: torch.tensor([s ** (power + 1)]), nodes)
    assert found.total.item() == pytest.approx(1, abs=1e-6) and found.evaluations == nodes and found.readings == 2


def test_pieces_are_split_until_the_change_is_resolved_and_no_further():
    bend = 1e-3  # s / (s + bend) rises within a thousandth of the path

    def slope(s):
        return torch.tensor([[bend / (s + bend) ** 2, 0.0]], dtype=torch.float64).T

    found = integrate(slope, lambda s: torch.tensor([s / (s + bend)], dtype=torch.float64))
    assert found.total.sum().item() == pytest.approx(1 / (1 + bend), rel=1e-3) and 10 < found.evaluations < 200
    never = integrate(lambda s: torch.zeros(1, 1), lambda s: torch.tensor([s]))  # a slope that is not the metric's
    assert never.total == 0 and never.change == 1 and never.readings == integrated.PIECES + 1


# Mutations: what the sums above must notice


def test_the_sum_notices_zeros_and_a_missing_unit(tiny, tokenizer, samples, monkeypatch):
    model = tiny("gpt2")
    honest = attribute(model, tokenizer, samples, method="integrated").sums
    whole = integrated.by_unit
    for spoil in (torch.zeros_like, lambda value: torch.cat([value[:-1], 0 * value[-1:]])):
        monkeypatch.setattr(integrated, "by_unit", lambda *args, spoil=spoil: spoil(whole(*args)))
        monkeypatch.setattr(integrated, "PIECES", 1)
        spoiled = attribute(model, tokenizer, samples, method="integrated")
        assert abs(spoiled.sums["residual"][0]) > 10 * abs(honest["residual"][0])
        assert spoiled.sums["change"][0] == pytest.approx(honest["change"][0])
        assert any("not resolved" in each for each in spoiled.caveats)
