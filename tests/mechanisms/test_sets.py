"""Named sets of components: on disk, in halves, wrongly partitioned, and what is left."""

import pandas as pd
import pytest

from attribution.components import Components
from attribution.errors import DataError
from attribution.mechanisms import complement, halves, read_mechanisms, write_mechanisms, wrong_partition
from attribution.models import EMBEDDED


def members(table):
    return set(table.itertuples(index=False, name=None))


def test_halves_part_every_head_and_neuron():
    found = halves(3, 4, 10)
    assert members(found["A"]) | members(found["B"]) == {
        (kind, layer, i) for kind, count in (("head", 4), ("neuron", 10)) for layer in range(3) for i in range(count)
    }
    assert not members(found["A"]) & members(found["B"])
    assert ("head", 2, 1) in members(found["A"]) and ("head", 2, 2) in members(found["B"])
    assert ("neuron", 0, 4) in members(found["A"]) and ("neuron", 0, 5) in members(found["B"])


def test_mechanisms_make_the_round_trip_as_ranges(tmp_path):
    sets = {
        "A": pd.DataFrame(
            [("head", 0, 3), ("head", 0, 1), ("neuron", 2, 5), ("neuron", 2, 6)], columns=["kind", "layer", "index"]
        )
    }
    file = write_mechanisms(tmp_path / "m.json", sets)
    assert members(read_mechanisms(file)["A"]) == members(sets["A"])
    assert '{"kind": "neuron", "layer": 2, "from": 5, "to": 7}' in file.read_text()


@pytest.mark.parametrize("seed", range(4))
def test_wrong_partitions_keep_kind_layer_and_size_and_mix(seed):
    right = halves(4, 4, 256)
    wrong = wrong_partition(right, seed)
    for name, table in wrong.items():
        assert table.groupby(["kind", "layer"]).size().equals(right[name].groupby(["kind", "layer"]).size())
    assert members(wrong["A"]) | members(wrong["B"]) == members(right["A"]) | members(right["B"])
    assert not members(wrong["A"]) & members(wrong["B"])
    kept = wrong["A"].merge(right["A"]).groupby(["kind", "layer"]).size()
    assert (kept == wrong["A"].groupby(["kind", "layer"]).size() / 2).all()
    assert members(wrong_partition(right, seed)["A"]) == members(wrong["A"]) != members(wrong_partition(right, seed + 10)["A"])


def test_wrong_partitions_of_unequal_sets_are_half_the_one_and_half_the_other():
    small = pd.DataFrame([("head", 0, 0), *(("neuron", 1, i) for i in range(8))], columns=["kind", "layer", "index"])
    large = pd.DataFrame([("head", 0, i) for i in (1, 2, 3)] + [("neuron", 2, i) for i in range(40)], columns=small.columns)
    heads = []
    for seed in range(40):
        wrong = wrong_partition({"A": small, "B": large}, seed)
        assert len(wrong["A"].merge(wrong["B"])) == 0 and len(wrong["A"]) + len(wrong["B"]) == len(small) + len(large)
        neurons = wrong["A"][wrong["A"]["kind"] == "neuron"]
        assert len(neurons.merge(small)) == 4 and len(neurons.merge(large)) == 20
        heads.append(len(wrong["A"][wrong["A"]["kind"] == "head"].merge(small)))
    assert 10 <= sum(heads) <= 30  # a single member goes over half of the times


def test_the_complement_is_all_the_rest_but_rows(tiny):
    components = Components(tiny("llama"))
    table = pd.DataFrame([("head", 0, 1), ("neuron", 1, 2)], columns=["kind", "layer", "index"])
    rest = complement(components, table)
    assert len(rest) == 2 * (4 + 20) - 2 and not members(rest) & members(table)
    assert set(rest["kind"]) == {"head", "neuron"}


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in (EMBEDDED / "planted").glob("*/config.json")))
def test_embedded_models_know_their_mechanisms(folder):
    found = read_mechanisms(EMBEDDED / "planted" / folder)
    assert {name: members(table) for name, table in found.items()} == {
        name: members(table) for name, table in halves(4, 4, 256).items()
    }


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"A": 3}', '{"A": [{"kind": "head"}]}', '{"A": [{"kind": "head", "layer": "x", "from": 0, "to": 1}]}'],
)
def test_what_is_no_mechanism_is_a_sentence(tmp_path, content):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(DataError, match="holds no mechanisms"):
        read_mechanisms(tmp_path / "m.json")
    with pytest.raises(DataError, match="cannot read mechanisms"):
        read_mechanisms(tmp_path / "none.json")
