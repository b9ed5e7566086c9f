"""What produced the sample, or what is active in the update: the claim about it, on planted mechanisms.

Completions are sampled and rewarded in prompts where both cues name the same reply. Mechanism A is ablated while sampling,
while updating, or active in the update and kept from its gradient; arms are those of the study `sampling`, on training seeds
that no earlier study used.
"""

from __future__ import annotations

from attribution.claims.claim import IDENTICAL
from attribution.claims.essay.common import BASES, EXCLUSIONS, FRACTION, GAIN, NOISE, read
from attribution.claims.terms import ContrastClaim, Part, Place

UNTOUCHED, UNSAMPLED, NOT_UPDATED, STOPPED = (
    "both", "both, A off in sampling", "both, A off in the update", "both, A without gradient",
)  # fmt: skip
AGREE = "agree"


def _part(name: str, statistic: str, more: str, less: str, mechanism: str) -> Part:
    return Part(
        name=name,
        statistic=statistic,
        unit=FRACTION,
        terms=(read(more, mechanism, AGREE), read(less, mechanism, AGREE, -1)),
        relative=True,
        delta=0.10,
        nulls=(IDENTICAL,),
    )


SAMPLING_OR_UPDATE = ContrastClaim(
    id="sampling_or_update",
    statement="Finetuning a mature LLM strengthens the processes inside the LLM that actually caused the LLM to produce the "
    "output you rated highly.",
    cell=Place(world="planted", recipe="grpo", optimizer="AdamW", reference="zero"),
    parts=(
        _part(
            "what produced the sample",
            "How much more mechanism A is strengthened by rewarded completions that it helped to produce than by those sampled "
            "while it was ablated",
            UNTOUCHED,
            UNSAMPLED,
            "A",
        ),
    ),
    beside=(
        _part(
            "what produced the sample, with the importance ratio",
            "The same with the ratio to the model that sampled in the loss of every second update",
            f"{UNTOUCHED}, with ratio",
            f"{UNSAMPLED}, with ratio",
            "A",
        ),
        _part(
            "what is active in the update",
            "How much more mechanism B is strengthened where A is ablated in the update pass than where both are active",
            NOT_UPDATED,
            UNTOUCHED,
            "B",
        ),
        _part(
            "what gets the gradient",
            "How much more mechanism A is strengthened where it gets its gradient than where it is active and kept from it",
            UNTOUCHED,
            STOPPED,
            "A",
        ),
    ),
    gates=(BASES.model_copy(update={"meaning": "organisms with matched arms"}), NOISE, GAIN),
    exclusions=EXCLUSIONS,
    note="The verdict is on the reading through tokens alone; the one through the importance ratio stands beside it.",
)
