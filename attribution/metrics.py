"""Scalar read-outs of a response, one number per sample, from the logits at scored positions.

`log_odds` is the default: log-probability saturates as p -> 1, so its gradient vanishes just where training succeeded.
Sums grow with length: across responses of unequal length use `log_odds_per_token` or `logit_difference`.

Every function takes logits as Float [token, vocabulary], as `samples.Batch` describes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attribution.errors import ConfigError, DataError
from attribution.samples import Batch

Metric = Callable[[Tensor, Batch], Tensor]


def log_odds(logits: Tensor, batch: Batch) -> Tensor:
    """Sum over response tokens of logit(y) - logsumexp of all other logits. [sample], nats."""
    others = logits.scatter(-1, batch.tokens[:, None], float("-inf"))
    return _per_sample(_of_tokens(logits, batch.tokens) - others.logsumexp(-1), batch)


def log_odds_per_token(logits: Tensor, batch: Batch) -> Tensor:
    """Mean over response tokens of the log-odds. [sample], nats per token."""
    return log_odds(logits, batch) / batch.lengths


def log_prob(logits: Tensor, batch: Batch) -> Tensor:
    """Sum over response tokens of log p(y). [sample], nats. Saturates; kept for comparison with training losses."""
    return _per_sample(_of_tokens(logits.log_softmax(-1), batch.tokens), batch)


def logit_difference(logits: Tensor, batch: Batch) -> Tensor:
    """logit(response) - logit(contrast) at the first token where they differ, mean over contrasts. [sample], nats.

    Raises:
        DataError: a sample has no contrast.
    """
    sample, token, wanted, other = batch.contrast.unbind(1)
    counts = torch.bincount(sample, minlength=len(batch))
    if (counts == 0).any():
        raise DataError("logit_difference needs a contrast on every sample; add `contrast`, or use another metric")
    difference = _of_tokens(logits[token], wanted) - _of_tokens(logits[token], other)
    return logits.new_zeros(len(batch)).index_add(0, sample, difference) / counts


METRICS: dict[str, Metric] = {
    "log_odds": log_odds,
    "log_odds_per_token": log_odds_per_token,
    "log_prob": log_prob,
    "logit_difference": logit_difference,
}


def check_scorable(metric: Metric, batches: Sequence[Batch], vocabulary: int) -> None:
    """Apply a metric to flat logits, so that samples it cannot score fail before any model is run.

    Raises:
        DataError: as the metric.
    """
    for batch in batches:
        metric(torch.zeros(len(batch.tokens), vocabulary, device=batch.ids.device), batch)


def metric_named(name: str) -> Metric:
    """Look a metric up. Raises ConfigError with the accepted names."""
    if name not in METRICS:
        raise ConfigError(f"unknown metric {name!r}; expected {', '.join(METRICS)}")
    return METRICS[name]


def kl(logits: Tensor, reference: Tensor, batch: Batch) -> Tensor:
    """Mean over response tokens of KL(logits || reference). [sample], nats."""
    p, q = logits.log_softmax(-1), reference.log_softmax(-1)
    return _per_sample((p.exp() * (p - q)).sum(-1), batch) / batch.lengths


def _of_tokens(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(-1, tokens[:, None])[:, 0]


def _per_sample(values: Tensor, batch: Batch) -> Tensor:
    return values.new_zeros(len(batch)).index_add(0, batch.sample_of, values)
