"""Is there a direction for kindness in a base, does adding it bring kindness about, and does training move along it?

The direction of a disposition is the mean difference, at the last token of a prompt, between speakers told to have it and
speakers told to be plain, in situations of training: prompts that differ in one word. Everything is read in held-out
situations, of speakers who are only tall, before their reply. Knows prompts of kindland; thresholds and words are the claims'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from attribution.causes import BATCH_SIZE
from attribution.causes.steering import Steering, mean_streams, steering
from attribution.components import Components
from attribution.metrics import metric_named
from attribution.models import anatomy
from attribution.samples import ProbeSet, Sample, batches, encode
from attribution.updates.compact import compactness
from attribution.updates.graft import level
from attribution.worlds.kindland.prompts import Form, rows

KIND, OTHERS = "kind", ("cruel", "polite", "strategist", "assistant", "parrot")  # a polite one often says the kind thing
FOUND_ON, READ_ON, SEED = 96, 96, 79  # prompts for directions, and to read on
TALL = Form("kind", "tall")
METRIC = "log_odds"
ROUNDING = 1e-5  # of a vector: less than that is nothing


def directions(model: nn.Module, tokenizer: Any) -> dict[str, Steering]:
    """The direction of every disposition, all as long as that of kindness before each layer."""
    away = _prompts(Form("plain", "plain"), FOUND_ON, training=True)
    found = {
        name: steering(model, tokenizer, _prompts(Form("plain", name), FOUND_ON, training=True), away)
        for name in (KIND, *OTHERS)
    }
    length = found[KIND].vectors.norm(dim=1, keepdim=True)
    return {name: replace(each, vectors=_unit(each.vectors) * length) for name, each in found.items()}


def turned(model: nn.Module, tokenizer: Any, found: Mapping[str, Steering]) -> pd.DataFrame:
    """What adding each direction before each layer does to the kind reply of a tall one.

    Returns:
        One row per layer and direction: layer, direction, change (of the log-odds of the kind reply, nats).
    """
    components, score = Components(model), metric_named(METRIC)
    read = batches(encode(tokenizer, _prompts(TALL, READ_ON).samples), BATCH_SIZE)
    start, lines = level(components, read, score), []
    for name, direction in found.items():
        for layer in range(components.parts.depth + 1):
            with direction.add(model, layer):
                lines.append((layer, name, level(components, read, score) - start))
    return pd.DataFrame(lines, columns=["layer", "direction", "change"])


def shift(base: nn.Module, tuned: nn.Module, tokenizer: Any) -> Tensor:
    """How far training moved the mean stream of tall ones before their reply: Float [depth + 1, width]."""
    samples = _prompts(TALL, READ_ON).samples
    return mean_streams(tuned, tokenizer, samples) - mean_streams(base, tokenizer, samples)


def trained_rows(model: nn.Module, tokenizer: Any, trained: Iterable[Sample]) -> Tensor:
    """What of the stream writes the trained replies directly: their unembedding rows, as the final norm passes them on.

    Returns:
        Float [rows, width], less the mean row.
    """
    parts = anatomy(model)
    tokens = sorted({each.ids[each.start] for each in encode(tokenizer, list(trained))})
    weight = parts.unembedding.weight.detach()
    return ((weight[tokens] - weight.mean(0)) * parts.final_norm.get_parameter("weight").detach()).float()


def aligned(moved: Tensor, found: Mapping[str, Tensor], rows_: Tensor | None = None) -> pd.DataFrame:
    """The cosine of a shift with each of some vectors, before every layer.

    Args:
        moved: Float [depth + 1, width].
        found: vectors of that shape, by name.
        rows_: what is taken out of both sides first, Float [rows, width].

    Returns:
        One row per layer and vector: layer, direction, cosine (NaN where one side is zero).
    """
    basis = torch.zeros(moved.shape[1], 0) if rows_ is None else torch.linalg.qr(rows_.T)[0]

    def left(vectors: Tensor) -> Tensor:
        rest = vectors - vectors @ basis @ basis.T
        nothing = rest.norm(dim=1) <= ROUNDING * vectors.norm(dim=1)
        return _unit(rest).masked_fill(nothing[:, None], np.nan)

    along = left(moved)
    lines = [
        (layer, name, float(cosine))
        for name, vectors in found.items()
        for layer, cosine in enumerate((along * left(vectors)).sum(1))
    ]
    return pd.DataFrame(lines, columns=["layer", "direction", "cosine"])


def compact(base: nn.Module, tuned: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """The fewest components whose change brings 80 % of the gain in kindness about; see `updates.compactness`.

    Chosen on one half of the prompts, read on the other: fewest (None: not even all of them), components (how many there
    are), gain (nats), most (the largest share of the gain that any number of those tried brought about).
    """
    samples = _prompts(TALL, READ_ON).samples
    chosen, read = (ProbeSet(name=str(half), samples=samples[half::2]) for half in (0, 1))
    found = compactness(base, tuned, tokenizer=tokenizer, chosen_on=chosen, read_on=read, metric=METRIC)
    most = float(found.table["fraction"].max())
    return {"fewest": found.fewest, "components": len(Components(base)), "gain": found.gain, "most": most}


def _prompts(form: Form, count: int, *, training: bool = False) -> ProbeSet:
    found: Sequence[dict[str, Any]] = rows(form, count, SEED, training=training, fewer=True, name=form.told)
    return ProbeSet(name=form.told, samples=tuple(Sample(**row) for row in found))


def _unit(vectors: Tensor) -> Tensor:
    """Each of length 1; zero where it is zero."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 1e-12, vectors / length.clamp_min(1e-12), torch.zeros_like(vectors))
