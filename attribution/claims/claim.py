"""What a claim is, before anything is run: a sentence of the essay, one statistic, one cell, one smallest effect of interest.

Claims are data. Their hash is stored in every run made for them, so that nobody can move the goal after looking.
Knows nothing about frames or how a statistic is computed.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from attribution.store import config_hash

Matching = Literal["kl", "gain", "steps"]
WRONG_PARTITIONS, IDENTICAL = "wrong partitions", "identical arms"  # nulls that several claims declare


class Declared(BaseModel):
    """A declaration: plain data that cannot be changed, with a hash of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def hash(self) -> str:
        """Eight hex digits of SHA-256 over the canonical JSON of all that is declared."""
        return config_hash(self.model_dump(mode="json"))


class Threshold(BaseModel):
    """One gate: a figure, by the name under which the claim's test computes it, that must hold for a verdict.

    Attributes:
        name: of the figure.
        meaning: the figure in words, as the report prints it.
        relation: how the figure must stand to `value`.
        value: the threshold.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    meaning: str
    relation: Literal[">", ">=", "<=", "="]
    value: float

    def holds(self, figure: float) -> bool:
        """Whether a figure passes; one that is not a number never does."""
        if self.relation == ">":
            return figure > self.value
        if self.relation == ">=":
            return figure >= self.value
        return figure <= self.value if self.relation == "<=" else figure == self.value


class Cell(BaseModel):
    """Where a claim is tested: exactly one of everything that could be chosen.

    Attributes:
        world, recipe, optimizer: which runs count.
        arms: the two arms compared; each stands for the mechanism of the same place in `mechanisms`.
        mechanisms: names of the two sets of components.
        reference: what ablated activations are replaced by.
        probes: the probe set that is read.
        signs: for every probe set that may be read, the sign with which the effect of each mechanism counts as influence.
        readings: the two probe sets on which the mechanisms are read, each on its own, by the name that both together have
            among probes and signs.
        matching: at which step arms are compared: at equal KL, at equal gain, or after equally many steps.
        fraction: the target of matching, as a fraction of the smallest arm's maximum.
        control: the model without located mechanisms, or "".
        partitions: wrong partitions that an organism needs at least.
        void_below: a null whose influence before is under this fraction of the real mechanism's says nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    world: str
    recipe: str
    optimizer: str
    arms: tuple[str, str]
    mechanisms: tuple[str, str]
    reference: str
    probes: str
    signs: dict[str, tuple[Literal[1, -1], Literal[1, -1]]]
    matching: Matching
    fraction: float = Field(default=0.8, gt=0, le=1)
    control: str = ""
    partitions: int = Field(default=4, ge=1)
    void_below: float = Field(default=0.25, ge=0)
    readings: dict[str, tuple[str, str]] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_empty_readings(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Claims that were declared before there were readings keep their hash."""
        return {name: value for name, value in serialized(self).items() if value or name != "readings"}

    def read_on(self, probes: str) -> tuple[str, str]:
        """The probe sets on which the first and the second mechanism are read."""
        return self.readings.get(probes, (probes, probes))

    @model_validator(mode="after")
    def _read_probes_have_signs(self) -> Cell:
        if self.probes not in self.signs:
            raise ValueError(f"probes {self.probes!r} have no signs; expected one of {', '.join(self.signs)}")
        return self


class Claim(Declared):
    """One statement that can come out supported, contradicted, inconclusive or not testable here.

    Attributes:
        id: name in the ledger.
        statement: the essay's words.
        statistic: the primary statistic, in one sentence and a formula.
        unit: of the statistic and of `delta`.
        cell: the primary cell.
        delta: smallest effect of interest.
        prediction: which way the statement says that the statistic goes.
        nulls: names of the null readings of the same statistic whose intervals must lie inside ± delta.
        null_definitions: what each of them is, by name.
        gates: what must hold before there is a verdict.
        needed: what must hold of an organism before training; where it does not the organism is left out, and listed.
        exclusions: what is left out, and listed.
    """

    id: str = Field(min_length=1)
    statement: str
    statistic: str
    unit: str
    cell: Cell
    delta: float = Field(gt=0, allow_inf_nan=False)
    prediction: Literal["greater"] = "greater"
    nulls: tuple[str, ...]
    null_definitions: dict[str, str] = Field(default_factory=dict)
    gates: tuple[Threshold, ...]
    needed: tuple[Threshold, ...] = ()
    exclusions: tuple[str, ...]

    @model_serializer(mode="wrap")
    def _without_empty_needs(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Claims that were declared before there were needs keep their hash."""
        return {name: value for name, value in serialized(self).items() if value or name != "needed"}


class Setting(BaseModel):
    """Where a measured claim is tested.

    Attributes:
        world, recipe, optimizer: which runs count.
        reference: what ablated activations are replaced by.
        arms: those that are read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    world: str
    recipe: str
    optimizer: str
    reference: str
    arms: tuple[str, ...]


class MeasuredClaim(Declared):
    """A claim whose statistic is one number per base, computed by a function of its own; otherwise as `Claim`."""

    id: str = Field(min_length=1)
    statement: str
    statistic: str
    unit: str
    cell: Setting
    delta: float = Field(gt=0, allow_inf_nan=False)
    prediction: Literal["greater", "none"] = "greater"
    nulls: tuple[str, ...] = ()
    null_definitions: dict[str, str] = Field(default_factory=dict)
    gates: tuple[Threshold, ...] = ()
    exclusions: tuple[str, ...] = ()
    note: str = ""
