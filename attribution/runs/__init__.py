"""One run: its config, and the run itself."""

from attribution.runs.config import FolderName, RunConfig, Seed, digests, directory, first_error
from attribution.runs.execute import run

__all__ = ["FolderName", "RunConfig", "Seed", "digests", "directory", "first_error", "run"]
