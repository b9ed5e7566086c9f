"""Claims are data: closed to unknown keys, frozen, and known by a hash that any change changes."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from attribution.claims import BOOST, LEDGER, Claim


def test_the_hash_is_of_the_content():
    assert len(BOOST.hash) == 8 and int(BOOST.hash, 16) >= 0
    again = Claim.model_validate_json(BOOST.model_dump_json())
    assert again == BOOST and again.hash == BOOST.hash
    data = BOOST.model_dump()
    changed = [
        data | {"delta": 0.2},
        data | {"nulls": data["nulls"][:2]},
        data | {"cell": data["cell"] | {"probes": "conflict"}},
        data | {"cell": data["cell"] | {"fraction": 0.5}},
        data | {"gates": data["gates"][:-1]},
    ]
    assert len({Claim(**each).hash for each in changed} | {BOOST.hash}) == len(changed) + 1


def test_what_was_declared_stays():
    with pytest.raises(ValidationError, match="frozen"):
        BOOST.delta = 0.01
    with pytest.raises(ValidationError, match="Extra inputs"):
        Claim(**BOOST.model_dump(), alpha=0.1)
    for delta in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ValidationError):
            Claim(**BOOST.model_dump() | {"delta": delta})
    with pytest.raises(ValidationError, match="have no signs"):
        Claim(**BOOST.model_dump() | {"cell": BOOST.cell.model_dump() | {"probes": "own"}})


def test_the_central_claim_follows_the_rules_of_evidence():
    cell = BOOST.cell
    assert (cell.world, cell.recipe, cell.optimizer, cell.reference) == ("planted", "sft", "AdamW", "zero")
    assert (cell.probes, cell.matching, cell.fraction, cell.partitions, cell.void_below) == ("agree", "kl", 0.8, 4, 0.25)
    assert BOOST.delta == 0.10 and cell.signs == {"conflict": (1, -1), "agree": (1, 1)}
    assert {gate.name: (gate.relation, gate.value) for gate in BOOST.gates} == {
        "organisms": (">=", 5), "noise": (">", 5), "balance": ("<=", 3), "lr0": ("=", 0), "gain": (">", 0),
    }  # fmt: skip
    assert LEDGER["boost"] is BOOST


@pytest.mark.parametrize(
    ("relation", "passes", "fails"), [(">", 1.1, 1.0), (">=", 1.0, 0.9), ("<=", 1.0, 1.1), ("=", 1.0, 1.1)]
)
def test_a_gate_fails_on_what_is_not_a_number(relation, passes, fails):
    gate = BOOST.gates[0].model_copy(update={"relation": relation, "value": 1.0})
    assert gate.holds(passes) and not gate.holds(fails) and not gate.holds(float("nan"))


def test_claims_import_no_torch():
    code = "import sys, attribution.claims; print(sorted({'torch', 'transformers', 'plotly'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
