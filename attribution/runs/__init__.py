"""One run: its config, and the run itself."""

from attribution.runs.config import RunConfig, digests, directory, first_error
from attribution.runs.execute import run

__all__ = ["RunConfig", "digests", "directory", "first_error", "run"]
