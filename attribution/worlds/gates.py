"""What an organism must do before anything is concluded from it: the gates of `planted`, measured on fresh prompts.

Thresholds were set on organisms that are not shipped. That of the share inside the mechanism was meant to be .9 and
failed on the throw-away organism (seed 99) that was to confirm it: heads .85 (A) and .77 (B), neurons .50 and .52. It is
set from that organism alone: heads at its smaller value less a tenth; neurons are shown and not gated, since half of all
neurons are members of each mechanism and .5 is chance. Ablated jointly, each mechanism leaves the other's route alone; one
head or neuron at a time does not, and what single neurons do to a reply says nothing of where they belong.

Knows mechanisms and prompts; knows nothing about training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from attribution.causes import attribute
from attribution.causes.ablation import logits_without
from attribution.causes.reference import zeros
from attribution.components import Components
from attribution.mechanisms import Mechanisms
from attribution.samples import Sample, collate, encode
from attribution.worlds import planted

SEED, PROMPTS = 31, 216  # of the prompts that gates are measured on
ACCURACY, ABLATED, SPARED, SHARE = 0.98, (0.30, 0.37), 0.95, 0.67
_CUE = {"A": {"trait": True}, "B": {"trait": False, "star": True}}  # prompts on which one mechanism alone can know
NOISE = 0.01  # heads below this fraction of the largest effect are left out of the AUROC


def gates(model: nn.Module, tokenizer: Any, mechanisms: Mechanisms, kinds: Sequence[str] = ("head", "neuron")) -> pd.DataFrame:
    """Measure every gate.

    Args:
        model, tokenizer: an organism.
        mechanisms: A and B.
        kinds: of components, for the shares inside a mechanism; single neurons take most of the time.

    Returns:
        One row per gate: gate, mechanism, value, needed (in words), passed (None where nothing is needed).
    """
    rows = []
    for name in mechanisms:
        other = next(each for each in mechanisms if each != name)
        p, accuracy = _replies(model, tokenizer, mechanisms, _CUE[name], "")
        own, _ = _replies(model, tokenizer, mechanisms, _CUE[name], name)
        spared, _ = _replies(model, tokenizer, mechanisms, _CUE[name], other)
        rows += [
            ("intact: share of prompts answered as the cue says", name, accuracy, f"≥ {ACCURACY}", accuracy >= ACCURACY),
            ("own mechanism ablated: p(reply)", name, own, f"{ABLATED[0]} – {ABLATED[1]}", ABLATED[0] <= own <= ABLATED[1]),
            ("other mechanism ablated: p(reply) / intact", name, spared / p, f"≥ {SPARED}", spared / p >= SPARED),
        ]
        table = membership(model, tokenizer, mechanisms, name, kinds)
        for kind, share in inside(table).items():
            gated = kind == "head"
            needed, passed = (f"≥ {SHARE}", share >= SHARE) if gated else ("not gated", None)
            rows.append((f"share of Σ|C| of {kind}s inside the mechanism", name, share, needed, passed))
        rows += [(f"AUROC of |C|, {kind}s", name, value, "not gated", None) for kind, value in auroc(table).items()]
    return pd.DataFrame(rows, columns=["gate", "mechanism", "value", "needed", "passed"])


def inside(table: pd.DataFrame) -> dict[str, float]:
    """Share of Σ|C| inside a mechanism among all heads, and among all neurons, from the table of `membership`."""
    sums = table.assign(size=table["effect"].abs()).groupby(["kind", "member"])["size"].sum().unstack("member")
    return {str(kind): float(row[True] / row.sum()) for kind, row in sums.iterrows()}


def membership(
    model: nn.Module, tokenizer: Any, mechanisms: Mechanisms, name: str, kinds: Sequence[str] = ("head", "neuron")
) -> pd.DataFrame:
    """Effect of every head and neuron on the reply of one mechanism: kind, layer, index, effect, member.

    Exact zero ablation, on conflict prompts, of logit(own reply) - logit(the reply neither cue names), which the other
    cue does not move.
    """
    samples = _samples({"star": "conflict", "reply": planted.MECHANISMS[name], "third": True}, 64)
    every = pd.concat(mechanisms.values(), ignore_index=True)
    every = every[every["kind"].isin(kinds)]
    table = attribute(model, tokenizer, samples, metric="logit_difference", components=every).table
    own = set(mechanisms[name].itertuples(index=False, name=None))
    return table.assign(member=[row in own for row in table[["kind", "layer", "index"]].itertuples(index=False, name=None)])


def auroc(table: pd.DataFrame) -> dict[str, float]:
    """Probability that a member's |effect| exceeds a non-member's, per kind; effects below the noise floor left out."""
    found = {}
    for kind, rows in table.groupby("kind"):
        size = rows["effect"].abs()
        kept = rows[size >= NOISE * size.max()]
        member = kept.loc[kept["member"], "effect"].abs().to_numpy()
        other = kept.loc[~kept["member"], "effect"].abs().to_numpy()
        pairs = member[:, None] - other[None, :]
        found[str(kind)] = float(np.mean((pairs > 0) + 0.5 * (pairs == 0))) if pairs.size else float("nan")
    return found


def _replies(
    model: nn.Module, tokenizer: Any, mechanisms: Mechanisms, cue: Mapping[str, Any], ablated: str
) -> tuple[float, float]:
    """Mean probability of the reply that the cue names, and how often it is the most probable one."""
    components = Components(model)
    batch = collate(encode(tokenizer, _samples(cue, PROMPTS)))
    positions = components.positions(mechanisms[ablated] if ablated else [])
    logits = logits_without(components, positions, batch, zeros(components.parts))
    probability = logits.softmax(-1).gather(1, batch.tokens[:, None]).mean().item()
    return probability, (logits.argmax(-1) == batch.tokens).float().mean().item()


def _samples(form: Mapping[str, Any], count: int) -> Sequence[Sample]:
    return [Sample(**row) for row in planted.prompts(count, SEED, **form)]
