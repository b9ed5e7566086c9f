"""Claims of the essay as data, and the tests that turn a study's frames into verdicts. Runs nothing, imports no torch."""

from attribution.claims.boost import BOOST
from attribution.claims.claim import Cell, Claim, Threshold
from attribution.claims.findings import LEDGER, Finding, evaluate
from attribution.claims.frames import COLUMNS
from attribution.claims.statistics import Interval

__all__ = ["BOOST", "COLUMNS", "LEDGER", "Cell", "Claim", "Finding", "Interval", "Threshold", "evaluate"]
