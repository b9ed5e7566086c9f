"""Every claim by its name, and the test that turns a study's frames into its finding."""

from __future__ import annotations

from attribution.claims.boost import BOOST
from attribution.claims.claim import Claim, ComponentClaim
from attribution.claims.components import component_finding
from attribution.claims.contrasting import contrast_finding
from attribution.claims.crossing import crossover_finding
from attribution.claims.essay import CLAIMS as KINDLAND
from attribution.claims.finding import Finding
from attribution.claims.frames import Frames
from attribution.claims.terms import ContrastClaim

Declared = Claim | ContrastClaim | ComponentClaim
LEDGER: dict[str, Declared] = {claim.id: claim for claim in (BOOST, *KINDLAND)}


def evaluate(claim: Declared, frames: Frames) -> Finding:
    """Test a claim on the frames of a study.

    Args:
        claim: one of the ledger, or any other that is declared as those are.
        frames: by the names of `frames.COLUMNS`: sets, probes, and where there are any grafts and failed.

    Raises:
        ConfigError: the claim names an unknown gate, null or probe set.
        RunError: frames that lack what the claim needs.
    """
    if isinstance(claim, Claim):
        return crossover_finding(claim, frames)
    if isinstance(claim, ComponentClaim):
        return component_finding(claim, frames)
    return contrast_finding(claim, frames)
