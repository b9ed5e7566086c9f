"""Every claim by its name, and the test that turns a study's frames into its finding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from attribution.claims import essay, knob
from attribution.claims.boost import BOOST
from attribution.claims.capability import capability
from attribution.claims.claim import Claim, MeasuredClaim
from attribution.claims.components import components
from attribution.claims.concentration import concentration
from attribution.claims.contrasting import contrast_finding
from attribution.claims.control import control
from attribution.claims.crossing import crossover_finding
from attribution.claims.finding import Finding
from attribution.claims.foretold import foretold
from attribution.claims.frames import Frames
from attribution.claims.hidden import hidden
from attribution.claims.measured import Measured, measured_finding
from attribution.claims.notions import notions
from attribution.claims.recruited import recruited
from attribution.claims.returning import returning
from attribution.claims.scored import scored
from attribution.claims.shallow import shallow
from attribution.claims.terms import ContrastClaim
from attribution.errors import ConfigError

AnyClaim = Claim | ContrastClaim | MeasuredClaim
LEDGER: dict[str, AnyClaim] = {claim.id: claim for claim in (BOOST, *essay.CLAIMS)}

MEASURES: dict[str, Callable[[MeasuredClaim, Frames], Measured]] = {  # by claim
    "boost_components": components,
    "cold_is_shallow": shallow,
    "forecast": partial(foretold, mechanisms=essay.MECHANISMS),
    "sum_of_many": concentration,
    "precision": hidden,
    "knob": knob.turned,
    "knob_by_finetuning": knob.moved,
    "compact": knob.few,
    "accuracy": scored,
    "dormant": partial(returning, elicited="elicited, a kind one", mechanism=essay.KIND, read_on=essay.READ_ON[essay.KIND]),
    "two_notions": notions,
    "recruited": recruited,
    "capability": partial(capability, probe="follows a star for the cruel reply"),
    "control": partial(control, mechanisms={name: essay.READ_ON[name] for name in (essay.KIND, essay.STRATEGIST)}),
}


def evaluate(claim: AnyClaim, frames: Frames) -> Finding:
    """Test a claim on the frames of a study.

    Args:
        claim: one of the ledger, or another crossover or sum of readings; of those measured by a function, one of the ledger.
        frames: by the names of `frames.COLUMNS`: sets, probes, and where there are any grafts and failed.

    Raises:
        ConfigError: the claim names an unknown gate, null or probe set, or no function measures it.
        RunError: frames that lack what the claim needs.
    """
    if isinstance(claim, Claim):
        return crossover_finding(claim, frames)
    if isinstance(claim, MeasuredClaim):
        if claim.id not in MEASURES:
            raise ConfigError(f"no function measures claim {claim.id!r}; expected one of {', '.join(MEASURES)}")
        return measured_finding(claim, MEASURES[claim.id](claim, frames), frames)
    return contrast_finding(claim, frames)
