"""Claims of the essay as data, and the tests that turn a study's frames into verdicts. Runs nothing, imports no torch."""

from attribution.claims.boost import BOOST
from attribution.claims.claim import Cell, Claim, Threshold
from attribution.claims.finding import Finding
from attribution.claims.frames import COLUMNS
from attribution.claims.ledger import LEDGER, evaluate
from attribution.claims.statistics import Interval
from attribution.claims.terms import ContrastClaim

__all__ = ["BOOST", "COLUMNS", "LEDGER", "Cell", "Claim", "ContrastClaim", "Finding", "Interval", "Threshold", "evaluate"]
