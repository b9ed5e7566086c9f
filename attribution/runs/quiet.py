"""Keep the bars of the libraries, and their notices to each other, out of what this package says to its user."""

from __future__ import annotations

import os
import warnings


def quiet() -> None:
    """In this process: no progress bars but ours, no deprecations that only the libraries themselves can mend."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|torch)\.")
    from datasets import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
