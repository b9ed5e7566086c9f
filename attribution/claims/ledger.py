"""Every claim by its name, and the test that turns a study's frames into its finding."""

from __future__ import annotations

from attribution.claims.boost import BOOST
from attribution.claims.claim import Claim
from attribution.claims.contrasting import contrast_finding
from attribution.claims.crossing import crossover_finding
from attribution.claims.finding import Finding
from attribution.claims.frames import Frames
from attribution.claims.terms import ContrastClaim
from attribution.errors import ConfigError

LEDGER: dict[str, Claim | ContrastClaim] = {claim.id: claim for claim in (BOOST,)}


def evaluate(claim: Claim | ContrastClaim, frames: Frames) -> Finding:
    """Test a claim on the frames of a study.

    Args:
        claim: one of the ledger, or one with another cell or delta.
        frames: by the names of `frames.COLUMNS`: sets, probes, and where there are any grafts and failed.

    Raises:
        ConfigError: no test belongs to the claim, or it names an unknown gate, null or probe set.
        RunError: frames that lack what the claim needs.
    """
    if claim.id not in LEDGER:
        raise ConfigError(f"unknown claim {claim.id!r}; expected {', '.join(LEDGER)}")
    if isinstance(claim, Claim):
        return crossover_finding(claim, frames)
    return contrast_finding(claim, frames)
