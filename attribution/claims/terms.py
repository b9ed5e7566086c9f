"""Claims that are sums of readings: how far arms moved behaviours and influences, compared where they moved equally far.

Data alone, as `claims.claim`, whose thresholds they share. What `claims.contrast` computes from it is

    sum over terms of weight x (reading at the matched step - reading at the start) [/ influence before] [/ the same of `over`]

for every organism, seeds averaged.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from attribution.claims.claim import IDENTICAL, WRONG_PARTITIONS, Declared, Matching, Threshold


class Term(BaseModel):
    """One reading of one arm.

    Attributes:
        arm: which.
        probe: the probe set it is read on.
        set: whose influence is read, the fall of the metric when it is ablated; "": the behaviour itself.
        quantity: of behaviour: the metric, in nats, or the probability of the response.
        weight: in the sum.
        when: how far it moved from the start to the matched step, or what it is at either.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arm: str
    probe: str
    set: str = ""
    quantity: Literal["metric", "probability"] = "metric"
    weight: float = Field(default=1.0, allow_inf_nan=False)
    when: Literal["change", "start", "end"] = "change"

    def __str__(self) -> str:
        what = f"influence of {self.set}" if self.set else "probability" if self.quantity == "probability" else "metric"
        moved = {"change": "change of ", "start": "", "end": ""}[self.when]
        return f"{moved}{what} on {self.probe}, arm {self.arm}{'' if self.when == 'change' else f', at the {self.when}'}"


class Part(BaseModel):
    """One statistic with its smallest effect of interest.

    Attributes:
        name: of the part, in words.
        statistic: in one sentence.
        unit: of the statistic and of `delta`.
        terms: what is added up.
        relative: divide every influence by that set's influence on those probes before training.
        over: what the sum is divided by, a sum too; nothing if empty.
        delta: smallest effect of interest.
        prediction: greater: above delta; none: within ± delta, by the 90 % interval.
        matching: at which step arms are compared.
        nulls: names of the nulls that must come out within ± delta.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    statistic: str
    unit: str
    terms: tuple[Term, ...] = Field(min_length=1)
    relative: bool = False
    over: tuple[Term, ...] = ()
    delta: float = Field(gt=0, allow_inf_nan=False)
    prediction: Literal["greater", "none"] = "greater"
    matching: Matching = "kl"
    nulls: tuple[str, ...] = ()

    @property
    def arms(self) -> tuple[str, ...]:
        """In the order in which they are first named."""
        return tuple(dict.fromkeys(term.arm for term in (*self.terms, *self.over)))

    @model_validator(mode="after")
    def _relative_needs_influences(self) -> Part:
        if self.relative and not all(term.set for term in self.terms):
            raise ValueError(f"part {self.name!r} is relative to influences before, and some of its terms read none")
        return self


class Condition(Threshold):
    """A gate on a sum of readings: its smallest value over organisms must stand so to the threshold.

    Attributes:
        terms: the sum.
        relative: as in `Part`.
        matching: at which step their arms are read.
    """

    terms: tuple[Term, ...] = Field(min_length=1)
    relative: bool = False
    matching: Matching = "kl"


class ArmsNull(BaseModel):
    """A null whose statistic is that of other arms in the place of the claim's.

    Attributes:
        meaning: what they are.
        arms: by the claim's arm, the one in its place; an arm that is not named stays.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    meaning: str
    arms: dict[str, str]


class Place(BaseModel):
    """Where a claim is tested.

    Attributes:
        world, recipe, optimizer: which runs count.
        reference: what ablated activations are replaced by.
        fraction: the target of matching, as a fraction of the smallest arm's maximum.
        partitions: wrong partitions that an organism needs at least.
        void_below: a null whose sets have less than this fraction of the real sets' influence before says nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    world: str
    recipe: str
    optimizer: str
    reference: str
    fraction: float = Field(default=0.8, gt=0, le=1)
    partitions: int = Field(default=4, ge=1)
    void_below: float = Field(default=0.25, ge=0)


class ContrastClaim(Declared):
    """One statement whose statistic is a sum of readings; all its parts must hold.

    Attributes:
        id: name in the ledger.
        statement: the essay's words, or the question.
        cell: where it is tested.
        parts: the primary statistic first.
        beside: further readings, to which the same rule gives a word that does not count.
        gates: what must hold before there is a verdict.
        null_definitions: what each null is, by name, where it is made of arms.
        exclusions: what is left out, and listed.
        note: what a reader must know of its declaration.
    """

    id: str = Field(min_length=1)
    statement: str
    cell: Place
    parts: tuple[Part, ...] = Field(min_length=1)
    beside: tuple[Part, ...] = ()
    gates: tuple[Condition | Threshold, ...] = ()
    null_definitions: dict[str, ArmsNull] = Field(default_factory=dict)
    exclusions: tuple[str, ...] = ()
    note: str = ""

    @property
    def arms(self) -> tuple[str, ...]:
        """All that its parts and gates read."""
        gated = (term.arm for gate in self.gates if isinstance(gate, Condition) for term in gate.terms)
        instead = (arm for null in self.null_definitions.values() for arm in null.arms.values())
        read = (arm for part in (*self.parts, *self.beside) for arm in part.arms)
        return tuple(dict.fromkeys([*read, *gated, *instead]))

    @property
    def delta(self) -> float:
        """Smallest effect of interest of the primary statistic."""
        return self.parts[0].delta

    @property
    def unit(self) -> str:
        """Of the primary statistic."""
        return self.parts[0].unit

    @model_validator(mode="after")
    def _nulls_are_defined(self) -> ContrastClaim:
        known = {WRONG_PARTITIONS, IDENTICAL, *self.null_definitions}
        unknown = [null for part in (*self.parts, *self.beside) for null in part.nulls if null not in known]
        if unknown:
            raise ValueError(f"null {unknown[0]!r} is not defined; expected {', '.join(sorted(known))}")
        return self
