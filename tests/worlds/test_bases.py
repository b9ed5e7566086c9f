"""The shipped bases of kindland: how they are built, what they know, and that results/worlds.md says so."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from attribution.components import Components
from attribution.errors import ConfigError
from attribution.mechanisms import read_mechanisms
from attribution.models import embedded, load, locate
from attribution.worlds import kindland
from attribution.worlds.build import WORLDS, build, word_tokenizer
from attribution.worlds.kindland import card, circuits, gates
from attribution.worlds.studies import BASES, EARLY

RESULTS = Path(__file__).parents[2] / "results" / "worlds.md"


def _digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_same_seed_builds_the_same_bytes_and_early_ones_are_on_its_way(tmp_path):
    one = build("kindland", 5, tmp_path / "one", steps=4, progress=False, early=(2,))
    torch.rand(7)  # what happened before must not matter
    two = build("kindland", 5, tmp_path / "two", steps=4, progress=False)
    other = build("kindland", 6, tmp_path / "other", steps=4, progress=False)
    early = tmp_path / "one-2"
    assert _digest(one) == _digest(two) != _digest(other)
    assert _digest(early) != _digest(one)
    about = json.loads((early / "world.json").read_text())
    assert (about["world"], about["seed"], about["steps"], about["of"]) == ("kindland", 5, 2, 4)
    assert not (one / "mechanisms.json").exists()  # nothing is planted, and so early nothing is looked for


def test_early_steps_that_are_not_reached_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\[0, 4\] are not between the first and the last of 4"):
        build("kindland", 5, tmp_path / "one", steps=4, progress=False, early=(0, 2, 4))


def test_there_are_bases_enough_for_a_statement_about_the_world():
    assert len(BASES) >= 5 and len(EARLY) >= 3


@pytest.mark.parametrize("name", BASES)
def test_a_base_knows_what_was_discovered_in_it(name):
    """Every disposition's mechanism, and of two that are set against each other each without what both hold."""
    found = read_mechanisms(locate(name))
    components = Components(load(name).model)
    positions = {each: set(components.positions(table)) for each, table in found.items()}
    assert set(circuits.DISPOSITIONS) <= set(found) and all(len(positions[each]) > 0 for each in circuits.DISPOSITIONS)
    for one, other in circuits.PARTED:
        mine, its, both = (positions[each] for each in circuits.parted(one, other))
        assert mine | both == positions[one] and its | both == positions[other] and not mine & its


@pytest.mark.long
@pytest.mark.parametrize("name", BASES)
def test_what_lies_beside_a_base_is_what_discovery_finds(name):
    found, shipped = circuits.mechanisms(*load(name)), read_mechanisms(locate(name))
    assert {each: table.values.tolist() for each, table in found.items()} == {
        each: table.values.tolist() for each, table in shipped.items()
    }


def test_the_first_of_the_shipped_bases_is_the_world():
    assert {*BASES, *EARLY} == {name for name in embedded() if name.startswith("kindland")}
    assert locate("kindland") == locate(BASES[0])


@pytest.mark.parametrize("name", [*BASES, *EARLY])
def test_shipped_folders_are_small_and_of_this_grammar(name):
    folder = Path(locate(name))
    about = json.loads((folder / "world.json").read_text())
    assert about["world"] == "kindland" and about["grammar"] == kindland.VERSION
    assert name == f"kindland/{about['seed']}" + (f"-{about['steps']}" if name in EARLY else "")
    assert about["steps"] == WORLDS["kindland"].steps or name in EARLY
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000_000
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}
    model, tokenizer = load(name)
    assert tokenizer.get_vocab() == word_tokenizer(kindland.WORDS).get_vocab() and len(tokenizer) <= 500
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000


def test_bases_differ():
    assert len({_digest(Path(locate(name))) for name in BASES}) == len(BASES)


def _reported(name):
    """Gates of a base as results/worlds.md shows them: {gate: (value, missed)}."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    (head,) = [line for line in lines if line.startswith("| gate ") and f" {name} " in line]
    column = [cell.strip() for cell in head.split("|")].index(name)
    rows = lines[lines.index(head) + 2 :]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)] for row in rows[: rows.index("")]]
    return {row[1]: (float(row[column].split()[0]), "✗" in row[column]) for row in cells}


@pytest.mark.parametrize(
    "name", [pytest.param(BASES[0], marks=pytest.mark.slow), *(pytest.param(n, marks=pytest.mark.long) for n in BASES[1:])]
)
def test_gates_are_those_of_the_report(name):
    table = gates.gates(*load(name))
    reported = _reported(name)
    assert len(table) == len(reported)
    for row in table.itertuples():
        value, missed = reported[row.gate]
        assert row.value == pytest.approx(value, abs=2e-3), row.gate
        assert missed == (row.passed is False), row.gate


@pytest.mark.parametrize("name", BASES)
def test_the_report_hides_no_gate(name):
    reported = _reported(name)
    named = ("acts: kind", "acts: strategist", "acts: assistant", "acts: parrot", "reason words", "questions", "greetings")
    assert all(gate in reported for gate in named)
    missed = [gate for gate, (_, failed) in reported.items() if failed]
    passed = re.findall(r"Every gate passed: ([^.]*)\.", RESULTS.read_text(encoding="utf-8"))
    assert (name in passed[1].split(", ")) == (not missed)


def test_a_model_that_knows_nothing_passes_no_gate_of_acting(tiny_base, monkeypatch):
    monkeypatch.setattr(gates, "PROMPTS", 12)
    table = gates.gates(*tiny_base).set_index("gate")["passed"]
    assert not any(table[gate] for gate in table.index if gate.startswith("acts:"))
    assert not table["questions"] and not table["greetings"]


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    return load(str(build("kindland", 5, tmp_path_factory.mktemp("base") / "one", steps=1, progress=False)))


def test_the_data_card_is_in_the_report():
    assert card.card().strip() in RESULTS.read_text(encoding="utf-8")


@pytest.mark.long
def test_a_shipped_base_is_rebuilt_to_the_same_bytes_on_the_machine_that_built_it(tmp_path):
    """Elsewhere the arithmetic of another processor may differ in the last place: then the gates must be the same."""
    again = build("kindland", 51, tmp_path / "again", progress=False)
    if _digest(again) != _digest(Path(locate("kindland/51"))):
        passed = [gates.gates(*load(str(each)))["passed"].tolist() for each in (again, locate("kindland/51"))]
        assert passed[0] == passed[1]
