"""A study as Markdown: verdicts, changes per organism, nulls, other readings, where the change sits, gates, what is missing.

Knows the tables of `study_tables`; knows nothing about figures or HTML.
"""

from __future__ import annotations

from attribution.reports import study_tables as tables
from attribution.reports.quantities import shown
from attribution.reports.study_declared import gates
from attribution.reports.study_tables import Finding, Record, Table
from attribution.reports.summary import escape, markdown


def study_summary(record: Record) -> str:
    """The study as Markdown."""
    pieces = [f"# Study {escape(shown(record.name, 60))}", escape(tables.headline(record))]
    for finding in record.findings:
        pieces += _claim(finding)
    lines = "\n".join(f"- {escape(line)}" for line in tables.missing(record))
    return "\n\n".join([*pieces, "## Not measured, or left out", lines or "Nothing is missing."]) + "\n"


def _claim(finding: Finding) -> list[str]:
    word, sentences = tables.verdict_words(finding)
    statement = escape(shown(finding.claim.get("statement", ""), 600))
    first = [
        f"## {escape(shown(finding.name))}: {escape(word)}",
        f"The claim: “{statement}” (hash {escape(shown(finding.hash))}, δ = {tables.number(finding.delta)})",
        *(escape(shown(sentence, 3000)) for sentence in sentences),
    ]
    parts = {
        "Change of influence per organism (nats)" if finding.crossed else "By organism or base": tables.parts(finding),
        "Nulls of the primary reading": tables.nulls(finding, primary=True),
        "Other readings": tables.secondary(finding),
        "Where the change sits": tables.recruitment(finding),
        "Gates": gates(finding),
    }
    return first + [piece for title, table in parts.items() for piece in _titled(title, table)]


def _titled(title: str, table: Table) -> list[str]:
    return [f"### {title}", markdown(table.head, table.rows, table.words)] if table.rows else []
