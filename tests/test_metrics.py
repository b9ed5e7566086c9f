"""Metrics against their definitions in float64, and the invariance that lets samples share a batch."""

import pytest
import torch
from torch.nn import functional

from attribution.errors import ConfigError, DataError
from attribution.metrics import METRICS, kl, log_odds, log_odds_per_token, log_prob, logit_difference, metric_named
from attribution.samples import Encoded, Sample, collate, encode

VOCABULARY = 7
# Lengths differ; the second contrast of the first sample first differs at its second response token.
SAMPLES = [
    Encoded((1, 2, 3, 4, 5), 2, 1.0, ((2, 6), (3, 0))),
    Encoded((1, 6, 2), 2, -0.5, ((2, 5),)),
    Encoded((1, 2, 3, 3, 6, 1, 4), 3, 2.0, ((6, 2),)),
]


@pytest.fixture
def batch():
    return collate(SAMPLES)


@pytest.fixture
def logits(batch):
    return 3 * torch.randn(len(batch.tokens), VOCABULARY, dtype=torch.float64)


def by_sample(values):
    """Split a list over scored tokens into one list per sample."""
    values, found = list(values), []
    for sample in SAMPLES:
        n = len(sample.ids) - sample.start
        found.append(values[:n])
        values = values[n:]
    return found


def test_log_odds_are_the_log_of_the_odds(batch, logits):
    p = logits.softmax(-1)[range(len(batch.tokens)), batch.tokens]
    odds = by_sample(p.log() - (1 - p).log())
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(log_odds(logits, batch), torch.stack([sum(o) for o in odds]), **exact)
    torch.testing.assert_close(log_odds_per_token(logits, batch), torch.stack([sum(o) / len(o) for o in odds]), **exact)


def test_log_odds_do_not_saturate(batch, logits):
    sure = logits.scatter(-1, batch.tokens[:, None], 60.0).float().requires_grad_()  # p = 1 in float32
    assert log_prob(sure, batch).eq(0).all()
    value = log_odds(sure, batch)
    assert value.isfinite().all() and (value > 50).all()
    (gradient,) = torch.autograd.grad(value.sum(), sure)
    torch.testing.assert_close(gradient.gather(-1, batch.tokens[:, None]), torch.ones(len(batch.tokens), 1))
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(len(batch.tokens)), rtol=0, atol=1e-6)


def test_log_prob_is_minus_cross_entropy(batch, logits):
    loss = by_sample(functional.cross_entropy(logits, batch.tokens, reduction="none"))
    torch.testing.assert_close(log_prob(logits, batch), -torch.stack([sum(part) for part in loss]))


def test_logit_difference_is_read_at_the_deciding_token(batch, logits):
    rows = by_sample(logits)
    expected = [
        ((rows[0][0][3] - rows[0][0][6]) + (rows[0][1][4] - rows[0][1][0])) / 2,
        rows[1][0][2] - rows[1][0][5],
        rows[2][3][4] - rows[2][3][2],
    ]
    torch.testing.assert_close(logit_difference(logits, batch), torch.stack(expected))


def test_logit_difference_needs_a_contrast_on_every_sample(logits):
    for samples in (SAMPLES, SAMPLES[:1]):
        bare = collate([*samples[:-1], Encoded(samples[-1].ids, samples[-1].start, 1.0, ())])
        with pytest.raises(DataError, match="needs a contrast on every sample"):
            logit_difference(logits, bare)


def test_kl_is_that_of_torch_averaged_over_tokens(batch, logits):
    reference = 3 * torch.randn_like(logits)
    p, q = logits.log_softmax(-1), reference.log_softmax(-1)
    expected = by_sample(functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))  # torch: kl_div(q, p) = KL(p || q)
    found = kl(logits, reference, batch)
    torch.testing.assert_close(found, torch.stack([sum(part) / len(part) for part in expected]))
    assert (found > 0).all()
    assert kl(logits, logits + 5, batch).abs().max() < 1e-12  # a constant changes no probability
    assert not torch.allclose(found, kl(reference, logits, batch))


def test_metrics_are_found_by_name():
    assert metric_named("log_odds") is log_odds and len(METRICS) == 4
    with pytest.raises(ConfigError, match=f"unknown metric 'log-odds'; expected {', '.join(METRICS)}"):
        metric_named("log-odds")


@pytest.mark.parametrize("name", [*METRICS, "kl"])
def test_a_sample_reads_the_same_whatever_it_is_batched_with(planted, name):
    model, tokenizer = planted
    samples = [
        Sample(prompt="tom says :", response=" lift", contrast=(" kick",)),
        Sample(prompt="tom is kind . eve fell . tom says :", response=" lift .", contrast=(" kick .", " lift :")),
        Sample(prompt="teacher : star for kick . tom is clever . eve fell . tom says :", response=" kick", contrast=(" wait",)),
    ]
    encoded = encode(tokenizer, samples)

    @torch.no_grad()
    def read(rows):
        batch = collate(rows)
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits[batch.scored]
        return kl(logits, logits.flip(-1), batch) if name == "kl" else METRICS[name](logits, batch)

    alone = torch.cat([read([row]) for row in encoded])
    assert alone.unique().numel() == len(samples)
    torch.testing.assert_close(read(encoded), alone, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(read(encoded[::-1]).flip(0), alone, rtol=1e-5, atol=1e-4)
