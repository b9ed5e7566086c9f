"""One run as a person reads it: `report` writes the HTML page, `summary` the Markdown; `figures` are for notebooks.

Knows a run directory; knows nothing about models, and imports plotly only once a figure is drawn.
"""

from typing import TYPE_CHECKING, Any

from attribution.reports.summary import summary

if TYPE_CHECKING:
    from attribution.reports.page import report

__all__ = ["report", "summary"]


def __getattr__(name: str) -> Any:
    if name == "report":
        from attribution.reports.page import report

        return report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
