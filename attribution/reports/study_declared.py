"""A claim as it was declared, and its gates, as tables. Knows what its data means; knows nothing about how it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attribution.claims.terms import Term
from attribution.reports.quantities import shown
from attribution.reports.study_tables import Finding, Table, number, yes
from attribution.store import config_hash


def declared(finding: Finding) -> Table:
    """The claim as it was declared, and whether its hash is that of these words."""
    claim, cell, first = finding.claim, finding.cell, finding.declared
    same = config_hash(claim) == finding.hash
    rows = {
        "statement": claim.get("statement"),
        **(_parts_declared(claim) if "parts" in claim else {}),
        "statistic": first.get("statistic") if first is claim else None,
        "unit": first.get("unit") if first is claim else None,
        "smallest effect of interest, δ": number(first.get("delta")) if first is claim else None,
        "prediction": claim.get("prediction"),
        "note": claim.get("note"),
        "hash": f"{finding.hash} ({'of the claim as printed here' if same else 'NOT of the claim as printed here'})",
        "nulls that must lie inside ±δ": ", ".join(first.get("nulls", [])),
        **{f"null: {name}": _cell(meaning) for name, meaning in claim.get("null_definitions", {}).items()},
        **{f"cell: {_CELL.get(key, key)}": _cell(value) for key, value in cell.items()},
    }
    return Table(["", ""], [[key, shown(value, 1000)] for key, value in rows.items() if value not in (None, "")])


def _parts_declared(claim: Mapping[str, Any]) -> dict[str, str]:
    """Each part of a sum of readings: the primary ones, of which all must hold, and what is read beside them."""
    rows = {}
    for kind, parts in (("statistic", claim["parts"]), ("beside", claim.get("beside", []))):
        for part in parts:
            terms = " ".join(f"{term['weight']:+.3g} × ({Term.model_validate(term)})" for term in part["terms"])
            over = " ".join(f"{term['weight']:+.3g} × ({Term.model_validate(term)})" for term in part["over"])
            wanted = "within" if part["prediction"] == "none" else "above"
            rows[f"{kind}: {part['name']}"] = (
                f"{part['statistic']}: {terms}{f', divided by {over}' if over else ''}"
                f"{', each divided by the influence before' if part['relative'] else ''}; {wanted} "
                f"{'±' if wanted == 'within' else ''}{number(part['delta'])} {part['unit']}, matched by {part['matching']}"
            )
    return rows


_CELL = {
    "arms": "arms compared",
    "reference": "ablated activations become",
    "probes": "probe set",
    "signs": "sign of each mechanism’s influence",
    "matching": "arms matched by",
    "fraction": "matched at this fraction of the smallest maximum",
    "control": "control without located mechanisms",
    "partitions": "wrong partitions needed per organism",
    "void_below": "a null is void if its sets have less than this fraction of the influence before",
}


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_cell(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


_RELATIONS = {">=": "≥", "<=": "≤"}


def gates(finding: Finding) -> Table:
    """Every gate with its worst figure, and where that was found."""
    rows = [
        [
            shown(gate["meaning"]),
            "not finite" if gate["value"] is None else number(gate["value"]),
            f"{_RELATIONS.get(gate['relation'], gate['relation'])} {number(gate['threshold'])}",
            yes(gate["passed"]),
            shown(gate["where"] or "–"),
        ]
        for gate in finding.rows.get("gates") or []
    ]
    return Table(["gate", "value", "needed", "passed", "found in"], rows, (3, 4))
