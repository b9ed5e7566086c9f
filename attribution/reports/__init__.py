"""Runs and studies as a person reads them: `report` and `study_report` write an HTML page and a Markdown summary.

Knows run and study directories; knows nothing about models, and imports plotly only once a figure is drawn. `figures` and
`study_figures` are for notebooks.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attribution.reports.summary import summary

if TYPE_CHECKING:
    from attribution.reports.comparison import diff
    from attribution.reports.page import report
    from attribution.reports.study import study_report

__all__ = ["diff", "report", "study_report", "summary"]

_HOMES = {"diff": "comparison", "report": "page", "study_report": "study"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"attribution.reports.{_HOMES[name]}"), name)
