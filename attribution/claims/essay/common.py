"""What declarations of claims in `kindland` share: its names, gates and exclusions, and the forms of a reading and a claim."""

from __future__ import annotations

from typing import Any

from attribution.claims.claim import IDENTICAL, WRONG_PARTITIONS, Cell, Claim, Threshold
from attribution.claims.terms import ContrastClaim, Part, Place, Term

KIND, STRATEGIST, ASSISTANT = "kind, not strategist", "strategist, not kind", "assistant, not kind"
KIND_BESIDE_ASSISTANT = "kind, not assistant"
AGREE, LARP_AGREE = "kind and strategist agree", "kind and assistant agree"
OWN = "own replies in conflict"  # each mechanism's reply against those that neither gives
READ_ON = {  # where a mechanism is read
    KIND: "kind beside strategist",
    STRATEGIST: "strategist beside kind",
    ASSISTANT: "assistant beside kind",
    KIND_BESIDE_ASSISTANT: "kind beside assistant",
}
TALL = "kindness, a tall one"
KINDLAND = Place(world="kindland", recipe="sft", optimizer="AdamW", reference="resample")
FRACTION = "fraction of the influence before"

BASES = Threshold(name="organisms", meaning="bases with matched arms", relation=">=", value=5)
NOISE = Threshold(name="noise", meaning="smallest influence before, in units of its split-half error", relation=">", value=5)
GAIN = Threshold(
    name="gain", meaning="smallest rise of the metric on an arm's own training samples (nats)", relation=">", value=0
)
EXCLUSIONS = (
    "A set of arms (one base, one seed) of which one does not reach the matching target is listed and left out.",
    "Training runs that failed are listed; a set that lacks an arm is left out.",
    "Nothing else is left out: a value that is not a number makes the estimate not a number.",
)


def read(arm: str, name: str, probe: str = "", weight: float = 1.0, **others: Any) -> Term:
    """The influence of a mechanism in an arm, on its own probe set if none is named."""
    return Term(arm=arm, set=name, probe=probe or READ_ON[name], weight=weight, **others)


def behaves(arm: str, probe: str, weight: float = 1.0, **others: Any) -> Term:
    return Term(arm=arm, probe=probe, weight=weight, **others)


def claim(name: str, statement: str, *parts: Part, gates: tuple[Threshold, ...] = (), **others: Any) -> ContrastClaim:
    influences = any(term.set for part in parts for term in part.terms)
    common = (BASES, *([NOISE] if influences else []), GAIN)
    return ContrastClaim(
        id=name, statement=statement, cell=KINDLAND, parts=parts, gates=(*common, *gates), exclusions=EXCLUSIONS, **others
    )


def crossed(
    name: str,
    statement: str,
    arms: tuple[str, str],
    mechanisms: tuple[str, str],
    agree: str,
    nulls: tuple[str, ...],
    *,
    delta: float = 0.10,
    gates: tuple[Threshold, ...] = (),
    **matched: Any,
) -> Claim:
    """A crossover of two mechanisms in kindland, each read on its own; where they agree beside it."""
    return Claim(
        id=name,
        statement=statement,
        statistic=(
            "How much more each mechanism is strengthened in its own arm than in the other's, as a fraction of its influence "
            "before: [dI_A(arm A) - dI_A(arm B)] / I_A(before) + [dI_B(arm B) - dI_B(arm A)] / I_B(before)."
        ),
        unit=FRACTION,
        cell=Cell(
            world="kindland", recipe="sft", optimizer="AdamW", arms=arms, mechanisms=mechanisms, reference="resample",
            probes=OWN, signs={OWN: (1, 1), agree: (1, 1)}, readings={OWN: tuple(READ_ON[each] for each in mechanisms)},
            **{"matching": "kl", **matched},
        ),
        delta=delta,
        nulls=nulls,
        null_definitions={
            WRONG_PARTITIONS: "mean over eight partitions that are half the one mechanism and half the other in every layer "
            "and kind, in units of the real mechanisms' influences before",
            IDENTICAL: "two seeds of one arm, as if they were the two arms",
        },
        gates=(
            BASES,
            NOISE,
            Threshold(name="balance", meaning="largest ratio of the two influences before", relation="<=", value=3),
            GAIN,
            *gates,
        ),
        exclusions=EXCLUSIONS,
    )  # fmt: skip
