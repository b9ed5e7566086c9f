"""Exact ablation, the fast way, equals one forward pass per component, written here with plain hooks.

The loop runs every sample alone and without padding, finds modules by their names, and computes log-odds, KL and
references itself: it shares nothing with the package.
"""

import platform
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from by_name import module, put_out, with_row
from torch.nn import functional
from turns import in_turn

from attribution.capture import sites
from attribution.causes import ablate, ablation, attribute
from attribution.causes import given as given_samples
from attribution.causes.projected import Projected
from attribution.components import Component, Components
from attribution.metrics import log_odds
from attribution.models import anatomy
from attribution.samples import collate, encode

CASES = [
    ("llama", False), ("mistral", True), ("qwen2", True), ("qwen3", False), ("gpt2", True), ("gpt2", False), ("gpt_neo", True),
    ("gpt_neox", False), ("gemma2", True), ("gemma3_text", True), ("olmo2", False), ("phi", False), ("phi3", False),
]  # fmt: skip
HEADS, NEURONS, DEPTH, VOCABULARY = 4, 20, 2, 23
EVERY = [
    *(Component("head", layer, head) for layer in range(DEPTH) for head in range(HEADS)),
    *(Component("neuron", layer, neuron) for layer in range(DEPTH) for neuron in range(NEURONS)),
    *(Component("row", -1, token) for token in range(VOCABULARY)),
]
SETS = {
    "heads": [EVERY[0], EVERY[3], EVERY[6]],
    "one layer": [Component("head", 1, h) for h in range(HEADS)] + [Component("neuron", 1, n) for n in range(NEURONS)],
    "neurons of both layers": EVERY[HEADS * DEPTH + 5 : HEADS * DEPTH + 30],
    "with rows": [EVERY[1], EVERY[12], EVERY[40], Component("row", -1, 8), Component("row", -1, 9), Component("row", -1, 3)],
    "nothing": [],
}


class Loop:
    """One forward pass for every ablation of every sample."""

    def __init__(self, model, tokenizer, samples, counterfactuals, reference):
        self.model = model
        self.samples = [self.tokens(tokenizer, sample) for sample in samples]
        others = [self.activations(self.tokens(tokenizer, sample)[0]) for sample in counterfactuals]
        if reference == "zero":
            self.references = [{site: torch.zeros_like(others[0][site][0]) for site in others[0]} for _ in samples]
        elif reference == "mean":
            self.references = [{site: torch.cat([o[site] for o in others]).mean(0) for site in others[0]} for _ in samples]
        else:
            self.references = others

    @staticmethod
    def tokens(tokenizer, sample):
        return tokenizer(sample.prompt + sample.response)["input_ids"], len(tokenizer(sample.prompt)["input_ids"])

    def module(self, site):
        return module(self.model, *site)

    @torch.no_grad()
    def activations(self, ids):
        kept = {}
        places = [(kind, layer) for kind in ("head", "neuron") for layer in range(DEPTH)]
        handles = [
            self.module(site).register_forward_pre_hook(lambda _m, args, site=site: kept.__setitem__(site, args[0][0].clone()))
            for site in places
        ]
        self.model(input_ids=torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        return kept

    @torch.no_grad()
    def logits(self, number, chosen):
        ids, start = self.samples[number]
        handles = []
        for kind, layer, index in chosen:
            if kind != "row":
                size = self.module((kind, layer)).weight.shape[0 if self.model.config.model_type == "gpt2" else 1] // HEADS
                mine = slice(index * size, (index + 1) * size) if kind == "head" else slice(index, index + 1)
                value = self.references[number][kind, layer].expand(len(ids), -1)

                def put(_module, args, mine=mine, value=value):
                    changed = args[0].clone()
                    changed[0, :, mine] = value[:, mine]
                    return (changed,)

                handles.append(self.module((kind, layer)).register_forward_pre_hook(put))
        logits = self.model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].double()
        for handle in handles:
            handle.remove()
        mean = put_out(self.model, logits).mean(-1)
        for kind, _layer, index in chosen:
            if kind == "row":
                logits = with_row(self.model, logits, index, mean)
        return logits

    def log_odds(self, number, logits):
        ids, start = self.samples[number]
        p = logits.softmax(-1)[range(len(ids) - start), ids[start:]]
        return (p.log() - torch.log1p(-p)).sum()

    def __call__(self, sets):
        """Effects and KL, [set, sample]."""
        intact = [self.logits(n, []) for n in range(len(self.samples))]
        effect, kl = torch.zeros(2, len(sets), len(self.samples), dtype=torch.float64)
        for row, chosen in enumerate(sets):
            for n, before in enumerate(intact):
                after = self.logits(n, chosen)
                effect[row, n] = self.log_odds(n, before) - self.log_odds(n, after)
                p, q = after.log_softmax(-1), before.log_softmax(-1)
                kl[row, n] = functional.kl_div(q, p, log_target=True, reduction="sum") / len(before)
        return effect, kl


REFERENCES = ["zero", "mean", "resample"]


@pytest.fixture(params=REFERENCES)
def reference(request):
    return request.param


def test_projections_combined_or_run_give_the_same(tiny, tokenizer, samples, agree, monkeypatch):
    combined = attribute(tiny("llama"), tokenizer, samples)
    monkeypatch.setattr(Projected, "of", lambda *_: None)
    run = attribute(tiny("llama"), tokenizer, samples)
    agree(combined.per_sample, run.per_sample)
    assert combined.passes == run.passes


@pytest.mark.parametrize(("case", "reference"), in_turn(CASES, REFERENCES))
def test_every_component_as_by_one_pass_each(tiny, tokenizer, samples, counterfactuals, agree, case, reference):
    model = tiny(*case)
    effect, kl = Loop(model, tokenizer, samples, counterfactuals, reference)([[c] for c in EVERY])
    found = attribute(model, tokenizer, samples, reference=reference, counterfactuals=counterfactuals)
    assert [*found.table[["kind", "layer", "index"]].itertuples(index=False, name=None)] == EVERY
    weights = torch.tensor([s.weight for s in samples])
    for kind in ("head", "neuron", "row"):
        mine = torch.tensor(found.table["kind"].to_numpy() == kind)
        agree(found.per_sample[mine], effect[mine])
        agree(found.table["effect"][mine.numpy()].to_numpy(), (effect * weights).mean(1)[mine])
        assert abs(found.table["kl"][mine.numpy()].to_numpy() - kl.mean(1)[mine].numpy()).max() < 1e-5
        assert kl[mine].max() > 1e-3


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gpt2", True)])
def test_whole_sets_as_by_one_pass_each(tiny, tokenizer, samples, counterfactuals, agree, family, tied, reference):
    model = tiny(family, tied)
    effect, kl = Loop(model, tokenizer, samples, counterfactuals, reference)([*SETS.values()])
    found = ablate(model, tokenizer, samples, SETS, reference=reference, counterfactuals=counterfactuals)
    assert list(found["set"]) == list(SETS) and list(found["size"]) == [len(members) for members in SETS.values()]
    agree(found["effect"].to_numpy(), (effect * torch.tensor([s.weight for s in samples])).mean(1))
    agree(found["kl"].to_numpy(), kl.mean(1))
    assert found["effect"].iloc[-1] == found["kl"].iloc[-1] == 0  # nothing ablated


def test_a_set_of_one_is_the_single_ablation(tiny, tokenizer, samples, counterfactuals, agree, reference):
    given = {"reference": reference, "counterfactuals": counterfactuals}
    model = tiny("qwen3")
    single = attribute(model, tokenizer, samples, **given).table
    sets = ablate(model, tokenizer, samples, {str(c): [c] for c in EVERY}, **given)
    agree(sets["effect"].to_numpy(), single["effect"].to_numpy())
    assert np.abs(sets["kl"] - single["kl"]).max() < 1e-5


def test_the_logit_difference_falls_by_what_the_loop_says(tiny, tokenizer, samples, agree):
    model = tiny("llama")
    loop = Loop(model, tokenizer, samples, samples, "zero")

    def read(n, chosen):
        logits = loop.logits(n, chosen)
        ids, start = loop.samples[n]
        total = 0.0
        for contrast in samples[n].contrast:
            other = tokenizer(samples[n].prompt + contrast)["input_ids"]
            at = next(i for i, (a, b) in enumerate(zip(ids, other, strict=True)) if a != b)
            total += logits[at - start, ids[at]] - logits[at - start, other[at]]
        return total / len(samples[n].contrast)

    chosen = EVERY[: HEADS * DEPTH]
    expected = torch.tensor([[read(n, []) - read(n, [c]) for n in range(len(samples))] for c in chosen])
    agree(attribute(model, tokenizer, samples, metric="logit_difference", components=chosen).per_sample, expected)


# Ways that must not matter


@pytest.mark.parametrize("tokens", [1, 50, 10_000])
def test_copies_run_together_or_apart_give_the_same(tiny, tokenizer, samples, agree, monkeypatch, tokens):
    expected = attribute(tiny("llama"), tokenizer, samples)
    monkeypatch.setattr(ablation, "TOKENS_AT_ONCE", tokens)
    found = attribute(tiny("llama"), tokenizer, samples)
    agree(found.per_sample, expected.per_sample)
    assert found.passes == pytest.approx(expected.passes)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("method", ["ablation", "gradient"])
def test_batches_give_the_same_as_one(tiny, tokenizer, samples, counterfactuals, agree, monkeypatch, reference, method, size):
    given = {"method": method, "reference": reference, "counterfactuals": counterfactuals}
    expected = attribute(tiny("gpt2"), tokenizer, samples, **given)
    sets = {"some": EVERY[2:20]}
    jointly = ablate(tiny("gpt2"), tokenizer, samples, sets, reference=reference, counterfactuals=counterfactuals)
    monkeypatch.setattr(given_samples, "BATCH_SIZE", size)
    found = attribute(tiny("gpt2"), tokenizer, samples, **given)
    agree(found.per_sample, expected.per_sample)
    assert found.passes == pytest.approx(expected.passes)
    pd.testing.assert_frame_equal(found.table, expected.table, rtol=1e-4, atol=1e-5)
    again = ablate(tiny("gpt2"), tokenizer, samples, sets, reference=reference, counterfactuals=counterfactuals)
    pd.testing.assert_frame_equal(again, jointly, rtol=1e-4, atol=1e-5)


def test_a_neuron_by_its_written_vector_as_by_its_own_layer(tiny, family, tokenizer, samples, agree):
    """A row with a norm after the MLP, or of a mixture, takes the long way; elsewhere the two must agree."""
    parts = anatomy(tiny(family))
    if parts.row.mlp_post_norm or parts.row.experts:
        pytest.skip("this family has a norm there, or routes")
    batch = collate(encode(tokenizer, samples))
    short, long = (Components(p) for p in (parts, replace(parts, row=replace(parts.row, mlp_post_norm="mlp"))))
    positions = short.positions([c for c in EVERY if c.kind == "neuron"])
    values = {site: torch.full((), 0.3) for site in sites(parts)}
    one, other = (ablation.ablate_each(index, positions, batch, values, log_odds) for index in (short, long))
    agree(one.effect, other.effect)
    assert one.passes < other.passes


def test_passes_are_the_layers_that_ran(tiny, tokenizer, samples):
    model = tiny("llama")
    ran = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, args, _out: ran.append(len(args[0])))
    found = attribute(model, tokenizer, samples)
    assert found.passes == pytest.approx(sum(ran) / DEPTH / len(samples))
    assert found.passes == 1 + HEADS * (1 + 1 / 2) + NEURONS * (1 / 2 + 0)  # a neuron's own layer and rows are free
    assert found.passes < 1 + HEADS * DEPTH + NEURONS * DEPTH
    ran.clear()
    assert attribute(model, tokenizer, samples, method="gradient").passes == 3
    assert sum(ran) == DEPTH * len(samples)


# What an effect means


def test_a_component_that_does_nothing_has_no_effect(tiny, tokenizer, samples):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, :6] = 0  # head 0 writes nothing
        model.model.layers[1].mlp.up_proj.weight[3] = 0  # neuron 3 is never active
    for method in ("ablation", "gradient"):
        table = attribute(model, tokenizer, samples, method=method).table.set_index(["kind", "layer", "index"])["effect"]
        assert abs(table["head", 0, 0]) < 1e-6 and abs(table["neuron", 1, 3]) < 1e-6
        assert abs(table["head", 0, 1]) > 1e-3 and abs(table["neuron", 1, 4]) > 1e-4


def test_a_sample_is_its_own_counterfactual_without_effect(tiny, tokenizer, samples):
    found = attribute(tiny("qwen2"), tokenizer, samples, reference="resample", counterfactuals=samples).table
    units = found[found["kind"] != "row"]
    assert units["effect"].abs().max() < 1e-5 and units["kl"].abs().max() < 1e-6
    assert found[found["kind"] == "row"]["effect"].abs().max() > 1e-2


AGAIN = """
import resource
import torch
from attribution.causes import attribute
from attribution.components import Components
from attribution.models import load
from attribution.samples import Sample
from attribution.worlds import planted

torch.set_num_threads(1)
model, tokenizer = load("planted/31")
samples = [Sample(**row) for row in planted.prompts(64, 1)]
chosen = Components(model).table.query("kind == 'neuron' and layer == 0").iloc[:48]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    attribute(model, tokenizer, samples, components=chosen)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library keeps what is freed as it likes")
def test_pages_are_not_asked_for_anew_in_every_pass():
    done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000
