"""The package's own errors. Each carries one sentence that names the value, what was expected and what to do.

The command line prints that sentence to stderr and exits with 2; anything else that escapes is a bug.
"""

MOST = 2_000  # characters of a message, whose ends say which value it is about and what to do


def printable(text: str) -> str:
    """Text from data on one line: a line break, or what else would move a terminal's cursor, becomes its escape."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class AttributionError(Exception):
    """Base of every error a user can cause and mend. It is told in one line, whatever stands in the values that it names."""

    def __str__(self) -> str:
        said = printable(super().__str__())
        return said if len(said) <= MOST else f"{said[: MOST // 2]} … {said[-MOST // 2 :]}"


class ModelError(AttributionError):
    """A model that cannot be opened, is not a causal LM, or does not match its row in `architectures`."""


class DataError(AttributionError):
    """Samples or probes that cannot be read, tokenized or scored."""


class ConfigError(AttributionError):
    """An unknown key, name or value in what the user asked for."""


class RunError(AttributionError):
    """A run directory that cannot be used: not there, not writable, unfinished, or of another config."""


class RewardError(AttributionError):
    """A reward function that fails, or gives no reward where there must be one."""


class RecordError(AttributionError):
    """A training that cannot be recorded truthfully, or that broke while it was recorded."""
