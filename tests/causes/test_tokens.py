"""Effects of prompt tokens add up to the metric's change, are what a plain sum over the path says, and exact ones are exact."""

import re

import pytest
import torch

from attribution.causes.tokens import token_causes
from attribution.errors import ConfigError, DataError, ModelError
from attribution.metrics import METRICS, log_odds
from attribution.samples import Sample, collate, encode
from attribution.worlds import planted as world
from attribution.worlds.build import word_tokenizer

SAMPLES = [
    Sample(prompt="w1 w2 w3", response=" w4 w5", contrast=(" w4 w6",)),
    Sample(prompt="w7 w2", response=" w9", weight=-0.5, contrast=(" w8",)),
    Sample(prompt="", response=" w3", contrast=(" w8",)),
]


def metric_of(model, one, embeddings, metric=log_odds):
    batch = collate([one])
    return metric(model(inputs_embeds=embeddings).logits[batch.scored], batch)[0]


def embeddings_of(model, one, token):
    """Real ones, and those with every prompt token replaced: [1, position, width]."""
    ids = torch.tensor([one.ids])
    empty = ids.clone()
    empty[:, : one.start] = token
    with torch.no_grad():  # Gemma scales what it looks up
        return model.get_input_embeddings()(ids), model.get_input_embeddings()(empty)


@pytest.mark.parametrize("metric", ["log_odds", "logit_difference"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "olmo2"])
def test_effects_are_the_integral_along_the_path(tiny, tokenizer, agree, name, metric):
    model = tiny(name, dtype=torch.float64)
    found = token_causes(model, tokenizer, SAMPLES[:2], metric=metric, reference="w12", steps=60)
    expected = []
    for one in encode(tokenizer, SAMPLES[:2]):
        end, start = embeddings_of(model, one, tokenizer.convert_tokens_to_ids("w12"))
        total = torch.zeros_like(end)
        for step in range(150):
            at = (start + (step + 0.5) / 150 * (end - start)).requires_grad_()
            total += torch.autograd.grad(metric_of(model, one, at, METRICS[metric]), at)[0] / 150
        expected.append((total * (end - start)).sum(-1)[0, : one.start])
    agree(found.table["effect"].to_numpy(), torch.cat(expected), 2e-3)


def test_effects_and_residual_make_up_the_change(tiny, family, tied, tokenizer):
    model = tiny(family, tied)
    found = token_causes(model, tokenizer, SAMPLES)
    assert list(found.table) == ["model", "sample", "position", "token", "effect", "exact"]
    assert found.reference == "<eos>" and found.metric == "log_odds"
    for number, one in enumerate(encode(tokenizer, SAMPLES)):
        mine, told = found.table[found.table["sample"] == number], found.sums.iloc[number]
        assert [*mine["position"]] == [*range(one.start)] and "".join(mine["token"]).startswith("<bos>")
        end, start = embeddings_of(model, one, tokenizer.eos_token_id)
        with torch.no_grad():
            change = (metric_of(model, one, end) - metric_of(model, one, start)).item()
        assert told["change"] == pytest.approx(change, abs=1e-4)
        assert told["effects"] == pytest.approx(mine["effect"].sum(), abs=1e-4)
        assert told["effects"] + told["residual"] == pytest.approx(told["change"], abs=1e-9)
    assert found.residual == found.sums["residual"][found.sums["residual"].abs().argmax()]
    assert found.sums["change"].abs().max() > 0.1


def test_exact_is_one_replacement_each(tiny, family, tokenizer, agree):
    model = tiny(family)
    found = token_causes(model, tokenizer, SAMPLES, reference="w12", steps=2)
    token, expected = tokenizer.convert_tokens_to_ids("w12"), []
    for one in encode(tokenizer, SAMPLES):
        batch = collate([one])
        with torch.no_grad():
            before = log_odds(model(input_ids=batch.ids).logits[batch.scored], batch)
            for place in range(one.start):
                ids = batch.ids.clone()
                ids[0, place] = token
                expected.append(before - log_odds(model(input_ids=ids).logits[batch.scored], batch))
    agree(found.table["exact"].to_numpy(), torch.cat(expected))
    assert "exact" not in token_causes(model, tokenizer, SAMPLES, steps=2, exact=False).table


def test_before_and_after(tiny, tokenizer):
    base, tuned = tiny("gpt2"), tiny("gpt2")
    with torch.no_grad():
        tuned.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    found = token_causes(base, tokenizer, SAMPLES, after=tuned)
    before, after = (token_causes(model, tokenizer, SAMPLES) for model in (base, tuned))
    for name, alone in (("before", before), ("after", after)):
        mine = found.table[found.table["model"] == name].reset_index(drop=True)
        assert mine["effect"].to_numpy() == pytest.approx(alone.table["effect"].to_numpy(), abs=1e-5)
        assert found.sums.loc[found.sums["model"] == name, "change"].to_numpy() == pytest.approx(alone.sums["change"], abs=1e-5)
    assert (before.table["effect"] - after.table["effect"]).abs().max() > 1e-2


def test_a_token_equal_to_the_reference_causes_nothing(tiny, tokenizer):
    table = token_causes(tiny("llama"), tokenizer, SAMPLES[:2], reference="w2").table.set_index(["sample", "token"])
    assert table.loc[[(0, "w2"), (1, "w2")], ["effect", "exact"]].abs().to_numpy().max() < 1e-5
    assert table["effect"].abs().max() > 1e-2


def test_the_cue_of_the_planted_model_is_found(planted):
    model, tokenizer = planted
    samples = [Sample(**row) for row in world.prompts(3, seed=3, star="agree")]
    found = token_causes(model, tokenizer, samples)
    assert abs(found.residual) < 0.05 * found.sums["change"].abs().max()
    assert found.table[["effect", "exact"]].corr().iloc[0, 1] > 0.5


def test_passes_and_bytes(tiny, tokenizer, monkeypatch):
    model, rows = tiny("llama"), []
    model.model.layers[0].register_forward_hook(
        lambda _m, args, _o: rows.append(len(args[0]) * (3 if torch.is_grad_enabled() else 1))
    )
    found = token_causes(model, tokenizer, SAMPLES[:1], steps=8, after=model)
    assert found.passes == pytest.approx(sum(rows) / 2, abs=5) and found.bytes > 0  # captum looks at the embeddings, too


def test_the_model_is_left_as_it_was(tiny, tokenizer):
    model = tiny("gpt2").train()
    weights = [p.clone() for p in model.parameters()]
    token_causes(model, tokenizer, SAMPLES[:1], steps=4)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"reference": "w1 w2"}, ConfigError, "reference 'w1 w2' is not one token of this tokenizer (2 tokens)"),
        ({"reference": "nobody"}, ConfigError, "reference 'nobody' is not one token"),
        ({"metric": "loss"}, ConfigError, "unknown metric 'loss'"),
        ({"steps": 0}, ConfigError, "0 steps asked for; an integral takes at least 1"),
        ({"samples": []}, DataError, "there are no samples"),
    ],
)
def test_a_wrong_argument_is_named(tiny, tokenizer, asked, error, message):
    with pytest.raises(error, match=re.escape(message)):
        token_causes(tiny("llama"), tokenizer, asked.pop("samples", SAMPLES), **asked)


def test_what_stands_for_nothing_must_be_named_where_the_tokenizer_has_nothing(tiny, tokenizer):
    bare = word_tokenizer([f"w{i}" for i in range(19)])
    bare.eos_token = bare.pad_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence or padding token to stand for nothing; name a reference"):
        token_causes(tiny("llama"), bare, SAMPLES)
    with pytest.raises(ModelError):
        token_causes(torch.nn.Linear(2, 2), tokenizer, SAMPLES)
