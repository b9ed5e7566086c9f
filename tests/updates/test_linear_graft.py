"""The linear graft score where the truth is known: changes so small that grafts add up, shares that are shuffled, none."""

import copy
import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attribution.components import Components
from attribution.errors import ConfigError, DataError, ModelError
from attribution.metrics import log_odds, metric_named
from attribution.models import load
from attribution.recipes.sft import SFT
from attribution.runs import RunConfig, run
from attribution.samples import ProbeSet, Sample, batches, collate, encode, write_samples
from attribution.store import read_run
from attribution.updates import update_shares
from attribution.updates.graft import level, swapped
from attribution.updates.linear_graft import linear_graft, random_sets, scores
from attribution.updates.recorder import Recorder
from attribution.updates.share import Path, read, shares
from attribution.worlds import planted as grammar
from attribution.worlds.build import word_tokenizer

TOKENIZER = word_tokenizer([f"w{i}" for i in range(19)])
PROBES = [
    ProbeSet(name="one", samples=(Sample(prompt="w1 w2 w3", response=" w4"), Sample(prompt="w5 w6", response=" w7 w8"))),
    ProbeSet(name="other", samples=(Sample(prompt="w9 w3 w3 w1", response=" w11"),)),
]


def shifted(model, size, *, only=None):
    """A copy whose every parameter, or that of the groups in a mask, is moved at random."""
    tuned = copy.deepcopy(model)
    components = Components(tuned)
    with torch.no_grad():
        for use in components.uses:
            change = size * torch.randn_like(use.parameter)
            if only is not None:
                change *= use.spread(only[use.owners])
            use.parameter.add_(change)
    return tuned


def table_of(base, tuned, probes=PROBES, tokenizer=TOKENIZER):
    """Shares of all groups along the straight line from base to tuned, as a recorder would write one step."""
    before, after = Components(base), Components(tuned)
    path = Path(after, {name: p.detach().clone() for name, p in before.stored.items()})
    found = []
    for probe in probes:
        batches = [collate(encode(tokenizer, probe.samples))]
        ends = (path.node(s, read(each, batches, log_odds)) for s, each in ((0.0, before), (1.0, after)))
        share = shares(path, batches, log_odds, *ends).share
        found.append(before.groups.assign(probe=probe.name, share=share.numpy()))
    return pd.concat(found, ignore_index=True)


@pytest.fixture(scope="module")
def small(tiny):
    """A model in float64, a copy after a change so small that grafts are linear in it, and its shares."""
    base = tiny("llama", dtype=torch.float64)
    tuned = shifted(base, 1e-6)
    return base, tuned, table_of(base, tuned)


def score(small, table=None, **changes):
    base, tuned, own = small
    return linear_graft(base, tuned, own if table is None else table, tokenizer=TOKENIZER, probes=PROBES, **changes)


# What the score is


def test_where_grafts_are_linear_the_sum_of_shares_is_the_graft(small):
    for fraction in (0.5, 0.1):
        found = score(small, fraction=fraction)
        assert found.scores["probe"].tolist() == ["one", "other"] and found.scores["n"].tolist() == [200, 200]
        assert (found.scores["spearman"] > 0.999).all() and (found.scores["pearson"] > 0.9999).all()
        for _, own in found.table.groupby("probe"):
            assert own["number"].tolist() == list(range(200))
            assert own["graft"].std() > 1e-7
            for measured in ("graft", "prune"):  # the same, not only in order
                assert (own["predicted"] - own[measured]).abs().max() < 1e-3 * own["graft"].std()


def test_shares_of_other_components_predict_nothing(planted, probes):
    """Shuffled among components of one kind and layer, so that nothing but their place is wrong."""
    base, tokenizer = planted
    tuned = shifted(base, 2e-4)
    own = table_of(base, tuned, probes[:1], tokenizer)
    place = ["kind", "layer", "index"]
    whole = own[own["kind"] != "remainder"].groupby(place, as_index=False)["share"].sum().assign(probe=probes[0].name)

    def shuffled(seed):
        share = whole.groupby(["kind", "layer"])["share"].transform(lambda s: s.sample(frac=1, random_state=seed).to_numpy())
        return whole.assign(share=share)

    def found(table):
        return linear_graft(base, tuned, table, tokenizer=tokenizer, probes=probes[:1], sets=60).scores["spearman"].item()

    wrong = [found(shuffled(seed)) for seed in range(5)]
    assert abs(np.mean(wrong)) < 0.25 and np.abs(wrong).max() < 0.5  # chance alone: 0.15 each
    assert found(whole) > 0.99


def test_a_change_that_is_not_small_is_not_predicted_so_well(tiny):
    """The gradient at the start instead of the path: the score falls where grafts do not add up."""
    base = tiny("llama", dtype=torch.float64)
    tuned = shifted(base, 0.1)
    near = shifted(base, 0.0)
    with torch.no_grad():
        for one, other, moved in zip(base.parameters(), near.parameters(), tuned.parameters(), strict=True):
            other.copy_(one + 1e-6 * (moved - one))
    first_order = table_of(base, near)
    found = linear_graft(base, tuned, first_order, tokenizer=TOKENIZER, probes=PROBES, sets=60).scores
    assert (found["spearman"] < 0.98).all()


def test_prune_backs_are_read_at_the_end(tiny):
    """Prune-backs are those of the set taken out of the tuned model, and differ from grafts where changes interact."""
    base = tiny("llama", dtype=torch.float64)
    tuned = shifted(base, 0.3)
    table = linear_graft(base, tuned, table_of(base, tuned), tokenizer=TOKENIZER, probes=PROBES, sets=40).table
    index, read = Components(base), metric_named("log_odds")
    after = Components(tuned)
    found = batches(encode(TOKENIZER, PROBES[0].samples), 64, torch.device("cpu"))
    whole = level(after, found, read)
    for number, positions in enumerate(itertools.islice(random_sets(index, 40), 3)):
        with swapped(after, index, index.group_mask(positions)):
            expected = whole - level(after, found, read)
        row = table[(table["probe"] == PROBES[0].name) & (table["number"] == number)].iloc[0]
        assert row["prune"] == pytest.approx(expected) and abs(row["prune"] - row["graft"]) > 1e-3


def test_the_remainder_stays_at_the_start(tiny):
    base = tiny("llama", dtype=torch.float64)
    tuned = shifted(base, 0.1, only=Components(base).remainder_mask)
    assert not torch.equal(base.model.embed_tokens.weight, tuned.model.embed_tokens.weight)
    table = table_of(base, tuned)
    assert table.loc[table["kind"] == "remainder", "share"].abs().max() > 1e-3
    found = linear_graft(base, tuned, table, tokenizer=TOKENIZER, probes=PROBES, sets=5)
    assert (found.table["graft"] == 0).all() and (found.table["predicted"] == 0).all()
    assert found.scores["spearman"].isna().all() and found.scores["pearson"].isna().all()  # and without a warning


def test_both_models_end_as_they_began_and_a_seed_names_the_sets(small):
    base, tuned, _ = small
    kept = [{name: p.clone() for name, p in model.state_dict().items()} for model in (base, tuned)]
    one, again, other = (score(small, sets=6, seed=seed).table for seed in (3, 3, 4))
    assert one.equals(again) and not one["graft"].equals(other["graft"])
    for model, before in zip((base, tuned), kept, strict=True):
        assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_parts_and_steps_of_a_component_are_added_up(small):
    base, _, table = small
    expected = score(small, sets=4).table
    whole = table.groupby(["probe", "kind", "layer", "index"], as_index=False)["share"].sum()
    twice = pd.concat([table.assign(step=1, share=table["share"] / 4), table.assign(step=2, share=table["share"] * 3 / 4)])
    narrow = table.astype({"probe": "category", "kind": "category", "layer": "int16", "index": "int32"})
    for given_table in (whole, twice, narrow, table.sample(frac=1, random_state=1)):
        pd.testing.assert_frame_equal(score(small, given_table, sets=4).table, expected)
    first = next(random_sets(Components(base), 4))
    members = Components(base).table.iloc[first].merge(table[table["probe"] == "other"], on=["kind", "layer", "index"])
    assert set(members["part"]) == {"writing", "routing", "gating"}
    at_zero = expected[(expected["probe"] == "other") & (expected["number"] == 0)]["predicted"].item()
    assert at_zero == pytest.approx(members["share"].sum(), rel=1e-12)


# Random sets


@given(fraction=st.floats(0.001, 0.999), seed=st.integers(0, 5))
def test_every_set_has_as_many_distinct_members_of_each_kind_and_layer(planted, fraction, seed):
    components = Components(planted[0])
    sizes = components.table.groupby(["kind", "layer"], sort=False).size()
    expected = (sizes * fraction).round().clip(1, sizes - 1).astype(int)
    found = list(random_sets(components, 3, fraction, seed))
    assert len(found) == 3
    for positions in found:
        assert len(np.unique(positions)) == len(positions) and (np.diff(positions) > 0).all()
        drawn = components.table.iloc[positions].groupby(["kind", "layer"], sort=False).size()
        assert drawn.to_dict() == expected.to_dict()
        assert not (components.group_mask(positions) & components.remainder_mask).any()
    assert not np.array_equal(found[0], found[1])


def test_over_many_sets_every_component_is_drawn_equally_often(small):
    components = Components(small[0])
    drawn = np.bincount(np.concatenate(list(random_sets(components, 2000, 0.5))), minlength=len(components)) / 2000
    share = components.table.groupby(["kind", "layer"])["index"].transform(lambda i: round(len(i) / 2) / len(i)).to_numpy()
    assert np.abs(drawn - share).max() < 5 * 0.5 / 2000**0.5


def test_scores_are_computed_within_a_probe_set_and_are_none_of_a_constant():
    table = pd.DataFrame({
        "probe": pd.Categorical(["b"] * 4 + ["a"] * 4 + ["c"] * 4 + ["d"] * 2),
        "predicted": [1.0, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2],
        "graft": [1.0, 4, 9, 16, 4, 3, 2, 1, 5, 5, 5, 5, 1, 2],
        "prune": [9.0, 2, 1, -16, 0, 3, 6, 9, 1, 2, 3, 4, 1, 2],
    })  # fmt: skip
    found = scores(table).set_index("probe")
    assert found.index.tolist() == ["b", "a", "c", "d"] and found["n"].tolist() == [4, 4, 4, 2]
    assert found.loc["b", "spearman"] == pytest.approx(1) and 0.9 < found.loc["b", "pearson"] < 0.999
    assert found.loc["a", "spearman"] == pytest.approx(-1) and found.loc["a", "spearman_both_ends"] == pytest.approx(1)
    both = found["spearman_both_ends"]
    assert both["b"] == pytest.approx(-(0.4**0.5)) and both["c"] == pytest.approx(1)
    assert found.loc[["c", "d"], ["spearman", "pearson"]].isna().all(axis=None)


# What is refused


def _without(table, **values):
    (column, value), *_ = values.items()
    return table[table[column] != value]


WRONG = {
    "too few sets": ({"sets": 2}, lambda t: t, "2 random sets asked for; a correlation needs at least 3"),
    "all": ({"fraction": 1.0}, lambda t: t, "fraction 1.0 of the components"),
    "none": ({"fraction": 0.0}, lambda t: t, "fraction 0.0 of the components"),
    "not a number": ({"fraction": float("nan")}, lambda t: t, "fraction nan"),
    "no probe set": ({"probes": []}, lambda t: t, "no probe set"),
    "unknown metric": ({"metric": "logodds"}, lambda t: t, "unknown metric 'logodds'"),
    "another table": ({}, lambda t: t.drop(columns="index"), "no column 'index'; give what update_shares returns"),
    "another probe set": ({}, lambda t: _without(t, probe="other"), "on probe set 'other'; the table has those on one"),
    "only the remainder": ({}, lambda t: t[t["kind"] == "remainder"], "no shares of components on probe set 'one'"),
    "a component is missing": (
        {},
        lambda t: t.drop(t.index[-60]),
        r"all 71 components \(1 components have none\); record .*=True",
    ),
    "no rows": ({}, lambda t: _without(t, kind="row"), r"\(23 components have none\)"),
    "a share was not measured": ({}, lambda t: t.assign(share=t["share"].where(t["index"] != 3)), "not those of all 71"),
    "sums per layer": (
        {},
        lambda t: pd.concat([t, t[t["kind"] == "neuron"].assign(index=-1).head(2)]),
        r"\(sums per layer stand for single neurons and rows\); record the run with everything=True",
    ),
    "of a bigger model": ({}, lambda t: pd.concat([t, t.head(1).assign(index=9)]), r"there is no head \(0, 9\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_scored_is_refused_in_one_sentence(small, case):
    changes, make, named = WRONG[case]
    base, tuned, table = small
    table = table[table["part"] != "embedding"] if case != "only the remainder" else table
    if case == "a component is missing":
        table = table[(table["kind"] != "row") | (table["index"] != 5)]
        make = lambda t: t  # noqa: E731
    with pytest.raises(ConfigError, match=named):
        linear_graft(base, tuned, make(table), **{"tokenizer": TOKENIZER, "probes": PROBES, **changes})


def test_another_model_and_samples_that_cannot_be_read_are_refused(small, tiny):
    base, tuned, table = small
    with pytest.raises(ModelError, match="different parameters"):
        linear_graft(base, tiny("qwen2"), table, tokenizer=TOKENIZER, probes=PROBES)
    unknown = [ProbeSet(name="one", samples=(Sample(prompt="w1 hello", response=" w2"),))]
    with pytest.raises(DataError, match="does not know"):
        linear_graft(base, tuned, table, tokenizer=TOKENIZER, probes=unknown)


# Of records and runs
_SCORES = ("spearman", "pearson", "spearman_both_ends", "pearson_both_ends")


def test_of_a_record_the_shares_over_five_steps_predict_grafts(recorded, probes):
    base, shares_of = load("planted/unrouted").model, update_shares(recorded["path"])
    arguments = {"tokenizer": recorded["tokenizer"], "probes": probes, "sets": 40}
    found = linear_graft(base, recorded["model"], shares_of, **arguments)
    assert (found.scores["spearman"] > 0.5).all() and found.scores["n"].tolist() == [40, 40]
    parts = linear_graft(base, recorded["model"], read_run(recorded["path"]).parts, **{**arguments, "sets": 3})
    expected = found.table[found.table["number"] < 3].reset_index(drop=True)
    pd.testing.assert_frame_equal(parts.table, expected, rtol=1e-4)


def test_a_record_of_a_choice_of_components_is_refused(tmp_path, fresh, loop, training, probes):
    model, tokenizer = fresh
    base = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    recorder = Recorder(tmp_path / "run", probes=probes[:1], tokenizer=tokenizer, everything=False, singles="heads")
    with recorder.attach(model, optimizer):
        loop(model, tokenizer, training, optimizer, 1)
    with pytest.raises(ConfigError, match=r"of all 1,141 components \(sums per layer .*record the run with everything=True"):
        linear_graft(base, model, update_shares(tmp_path / "run"), tokenizer=tokenizer, probes=probes[:1], sets=3)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("data")
    forms = {"train": {"problems": grammar.TRAINING}, "conflict": {"star": "conflict"}, "agree": {"star": "agree"}}
    files = {
        name: str(write_samples(folder / f"{name}.jsonl", [Sample(**row) for row in grammar.prompts(6, 1, **form)]))
        for name, form in forms.items()
    }
    return RunConfig(
        data=files["train"], probes=(files["conflict"], files["agree"]), milestones="ends", singles="heads", grafts="sets",
        training=SFT(max_steps=2, batch_size=6, learning_rate=1e-4), linear_grafts=20,
    )  # fmt: skip


def test_a_run_writes_its_linear_grafts_and_their_score(tmp_path, config):
    run(config, tmp_path / "run", page=False)
    found = read_run(tmp_path / "run")
    table = found.linear_grafts
    assert table["probe"].value_counts().to_dict() == {"conflict": 20, "agree": 20}
    assert str(table["number"].dtype) == "int32" and sorted(set(table["number"])) == list(range(20))
    told = json.loads((tmp_path / "run" / "result.json").read_text())["linear_graft"]
    for probe in ("conflict", "agree"):
        own = table[table["probe"] == probe]
        assert told[probe]["n"] == 20 and told[probe]["spearman"] > 0.9
        assert own["predicted"].corr(own["graft"], method="spearman") == pytest.approx(told[probe]["spearman"], abs=0.01)
        assert own["predicted"].corr(own["graft"]) == pytest.approx(told[probe]["pearson"], abs=1e-4)


def test_a_learning_rate_of_zero_has_no_score_and_the_result_stays_json(tmp_path, config):
    still = SFT(max_steps=1, batch_size=6, learning_rate=0.0)
    run(config.model_copy(update={"linear_grafts": 3, "training": still}), tmp_path / "run", page=False)
    text = (tmp_path / "run" / "result.json").read_text()
    assert json.loads(text)["linear_graft"]["agree"] == {**dict.fromkeys(_SCORES), "n": 3} and "NaN" not in text
    assert (read_run(tmp_path / "run").linear_grafts["graft"] == 0).all()


@pytest.mark.parametrize(
    ("changes", "limit", "named"),
    [
        (
            {"everything": False},
            4096,
            "shares of all 1,141 components, of which this run would record a choice or none; set everything",
        ),
        ({}, 1000, "shares of all 1,141 components"),
        ({"linear_grafts": 2}, 4096, "2 random sets asked for"),
    ],
)
def test_a_run_that_could_not_be_scored_is_refused_before_it_begins(tmp_path, config, monkeypatch, changes, limit, named):
    monkeypatch.setattr("attribution.updates.recorder.ALL_UP_TO", limit)
    with pytest.raises(ConfigError, match=named):
        run(config.model_copy(update=changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_of_a_model_that_is_too_large_everything_can_be_asked_for(tmp_path, config, monkeypatch):
    monkeypatch.setattr("attribution.updates.recorder.ALL_UP_TO", 1000)
    run(config.model_copy(update={"everything": True, "linear_grafts": 3}), tmp_path / "run", page=False)
    assert (read_run(tmp_path / "run").result or {})["linear_graft"]["agree"]["n"] == 3
