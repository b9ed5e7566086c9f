"""The claim `precision`: do few components change, or does bf16 hide the change?

The same finetuning of every base with weights in float32 and in bfloat16, at several learning rates: which fraction of the
weights differs from what it was. Takes a minute.

    python -m experiments.precision [--model …] [--quick]
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from attribution.claims.hidden import HALF, RATE, WHOLE
from attribution.models import load
from attribution.runs.quiet import quiet
from attribution.samples import Sample, collate, encode
from attribution.worlds.kindland.prompts import rows
from attribution.worlds.kindland.sets import SETS
from experiments.alone import concluded
from experiments.claims import Asked, told_in_a_sentence

RATES = (1e-6, RATE, 1e-4, 1e-3)
STEPS, BATCH = 10, 32


def main(asked: Asked, out: Path | None = None) -> None:
    """Train, count what changed, and judge the claim.

    Args:
        asked: on what.
        out: directory for table and page; below `runs` if it is not given.
    """
    quiet()
    found = pd.DataFrame([
        {"model": name, "dtype": dtype, "rate": rate, "changed": changed(name, dtype, rate)}
        for name in asked.models for dtype in (WHOLE, HALF) for rate in RATES
    ])  # fmt: skip
    print(found.pivot_table(index=["model", "dtype"], columns="rate", values="changed").to_string(float_format="{:.3f}".format))
    place = out or asked.runs / "claims" / "precision"
    concluded(place, ("precision",), {"changed": found}, name="precision", arms=["kind"], models=asked.models)


def changed(name: str, dtype: str, rate: float) -> float:
    """Fraction of the weights that ten steps of AdamW on the kind arm changed, of a model whose weights are of this type."""
    model, tokenizer = load(name, dtype=dtype)
    given = [Sample(**row) for row in rows(SETS["precision"].arms["kind"], STEPS * BATCH, 1, training=True)]
    encoded = encode(tokenizer, given)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
    for step in range(STEPS):
        batch = collate(encoded[step * BATCH : (step + 1) * BATCH])
        optimizer.zero_grad()
        model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    pairs = list(zip(model.parameters(), start, strict=True))
    return sum(int((now != then).sum()) for now, then in pairs) / sum(then.numel() for _, then in pairs)


if __name__ == "__main__":
    told_in_a_sentence(main, __doc__)
