"""Discovery: the planted sets are found without being told; curves, areas and stability are those of small cases."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attribution as at
from attribution.causes.given import Given
from attribution.cli import main
from attribution.components import Components
from attribution.errors import ConfigError, DataError
from attribution.mechanisms import discover, read_mechanisms
from attribution.mechanisms.discovery import _cued, area_under, curve_of, paired, stability
from attribution.metrics import METRICS
from attribution.models import locate
from attribution.samples import Sample, write_samples
from attribution.worlds.discovered import cued

COLUMNS = ["kind", "layer", "index"]


def shares_inside(found, planted):
    """Share of the gates of all heads, and of all neurons, inside a planted set."""
    members = found.table.merge(planted, on=COLUMNS, how="left", indicator="where")
    sums = members.groupby(["kind", members["where"] == "both"])["gate"].sum().unstack(fill_value=0)
    return (sums[True] / sums.sum(axis=1)).to_dict()


def test_a_discovery_is_whole_and_the_same_again(toy):
    model, tokenizer, prompts = toy
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, again = (discover(model, tokenizer, prompts, reference="resample", resamples=2, seed=3) for _ in range(2))
    other = discover(model, tokenizer, prompts, reference="mean", resamples=1, seed=4)
    pd.testing.assert_frame_equal(found.table, again.table)
    pd.testing.assert_frame_equal(found.curve, again.curve)
    assert not found.table.equals(other.table)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())

    table, count = found.table, 2 * (4 + 20)
    assert len(table) == len(table[COLUMNS].drop_duplicates()) == count and set(table["kind"]) == {"head", "neuron"}
    assert table["gate"].is_monotonic_decreasing and table["gate"].between(0, 1).all()
    assert table["rank"].tolist() == list(range(1, count + 1)) and set(table["frequency"]) <= {0.0, 0.5, 1.0}
    pd.testing.assert_frame_equal(found.components, table[COLUMNS].head(found.size))
    reached = found.curve[(found.curve[["kept", "lost"]] >= found.keep).all(axis=1)]
    assert found.size == reached["k"].min() > 0 and found.curve["k"].iloc[[0, -1]].tolist() == [1, count]
    assert found.curve["kept"].iloc[-1] == pytest.approx(1, abs=1e-5)  # all of them kept is the model as it is
    assert "heads and" in found.summary() and f"area {found.area:.2f}" in found.summary()
    none = replace(found, size=0)
    assert len(none.components) == 0 and "no set was found" in none.summary()
    assert found.prompts == {sample.prompt for sample in (*prompts.samples, *prompts.counterfactuals)}


def test_the_curve_is_that_of_ablating_sets(toy):
    """By `ablate`: the fall when the first k are ablated, and when all others are, on the prompts that were held out."""
    model, tokenizer, prompts = toy
    found = discover(model, tokenizer, prompts, reference="resample", resamples=1)
    held = np.random.default_rng(0).permutation(16)[8:]
    samples, others = ([listed[i] for i in held] for listed in paired(prompts))
    difference = found.intact - found.absent
    assert found.curve["lost"].iloc[-1] == pytest.approx(1, abs=1e-5)  # nothing is left of the cue but the word itself
    for row in found.curve.iloc[:-1:4].itertuples():
        sets = {"lost": found.table.head(row.k), "all others": found.table.iloc[row.k :]}
        table = at.ablate(
            model, tokenizer, samples, sets, metric="logit_difference", reference="resample", counterfactuals=others
        )
        falls = table.set_index("set")["effect"]
        assert row.lost == pytest.approx(falls["lost"] / difference, abs=1e-4)
        assert row.kept == pytest.approx(1 - falls["all others"] / difference, abs=1e-4)


def test_a_worse_ranking_has_a_smaller_area(toy):
    model, tokenizer, prompts = toy
    found = discover(model, tokenizer, prompts, reference="resample", resamples=1)
    index, metric = Components(model), METRICS[found.metric]
    asked = Given.encoded(index.parts, tokenizer, prompts.samples, metric, "resample", paired(prompts)[1])
    held = [_cued(asked, np.random.default_rng(0).permutation(16)[8:])]
    places = {component: place for place, component in enumerate(index.table.itertuples(index=False, name=None))}
    ranking = np.array([places[component] for component in found.table[COLUMNS].itertuples(index=False, name=None)])

    def area(order):
        return area_under(curve_of(index.parts, held, metric, order, found.intact, found.absent))

    assert area(ranking) == pytest.approx(found.area, abs=1e-6)
    shuffled = [area(np.random.default_rng(seed).permutation(ranking)) for seed in range(8)]
    assert found.area > max(shuffled) and found.area > area(ranking[::-1]) + 0.1


@pytest.fixture(scope="module")
def organism():
    model, tokenizer = at.load("planted")
    return model, tokenizer, read_mechanisms(locate("planted"))


def test_the_planted_heads_stand_first(organism):
    """Both routes and all of what is found: tests/worlds/test_discovered."""
    model, tokenizer, planted = organism
    inside = shares_inside(discover(model, tokenizer, cued("B", 24), resamples=1), planted["B"])
    assert inside["head"] > 0.9 and inside["neuron"] > 0.75, inside


def test_area_of_steps():
    curve = pd.DataFrame({"k": [1, 2, 4, 8], "kept": [0.0, 2.0, 1.0, 1.0], "lost": [-1.0, 0.5, 1.0, 1.0]})
    assert area_under(curve) == pytest.approx((0.25 + 0.75 + 1) / 3)
    assert area_under(curve.assign(kept=1, lost=1)) == 1


def test_stability_is_that_of_nogueira_et_al():
    same = np.tile([True, False, False, True], (5, 1))
    assert stability(same) == 1
    assert np.isnan(stability(same[:1])) and np.isnan(stability(np.zeros((3, 4), bool)))
    opposite = np.array([[True, False], [False, True]])
    assert stability(opposite) == pytest.approx(-1)  # 1 - (2 · 1/4) / (1/2 · 1/2)
    drawn = np.random.default_rng(0).random((50, 2000)) < 0.3
    assert abs(stability(drawn)) < 0.01


@given(st.integers(0, 2**20 - 1))
def test_stability_is_at_most_one(bits):
    chosen = np.array([bits >> i & 1 for i in range(20)], bool).reshape(4, 5)
    assert not stability(chosen) > 1


def test_contrary_prompts_read_the_response_of_the_cue():
    own = [Sample(prompt="a", response=" b", contrast=(" c",))]
    samples, others = paired(own, [Sample(prompt="d", response=" e")])
    assert samples == own and others == [Sample(prompt="d", response=" b", contrast=(" c",))]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"resamples": 0}, ConfigError, "0 resamples"),
        ({"keep": 0}, ConfigError, "keep=0"),
        ({"keep": 1.1}, ConfigError, "keep=1.1"),
        ({"seed": -1}, ConfigError, "seed -1"),
        ({"metric": "logits"}, ConfigError, "unknown metric 'logits'"),
        ({"reference": "one"}, ConfigError, "unknown reference 'one'"),
        ({"reference": "resample"}, DataError, "cannot be aligned"),
        ({"contrary": []}, DataError, "0 contrary prompts for 12"),
    ],
)
def test_what_a_user_can_mend_is_said(planted, change, error, said):
    with pytest.raises(error, match=said):
        discover(*planted, cued("A", 12), **change)


def test_a_cue_that_does_nothing_is_refused(planted):
    prompts = cued("A", 12)
    with pytest.raises(DataError, match="does not raise logit_difference"):
        discover(*planted, prompts, prompts)
    with pytest.raises(DataError, match="7 prompts of 'A'"):
        discover(*planted, cued("A", 7))
    with pytest.raises(DataError, match="give one for each"):
        discover(*planted, list(prompts.samples))


def test_the_command_writes_what_a_run_reads(toy, folder, tmp_path, capsys):
    _, _, prompts = toy
    files = [
        str(write_samples(tmp_path / f"{name}.jsonl", samples))
        for name, samples in (("cue", prompts.samples), ("other", prompts.counterfactuals))
    ]
    out = tmp_path / "m.json"
    out.write_text('{"mine": [{"kind": "head", "layer": 0, "from": 0, "to": 1}]}')
    given = ["discover", str(folder), "--cue", files[0], "--contrary", files[1], "--name", "fourth", "--out", str(out)]
    assert main([*given, "--resamples", "1", "--reference", "resample"]) == 0
    assert "fourth: " in (said := capsys.readouterr().out) and said.endswith(f"{out}\n")
    found = read_mechanisms(out)
    assert list(found) == ["mine", "fourth"] and len(found["mine"]) == 1 and len(found["fourth"]) > 0
    assert main([*given, "--keep", "2"]) == 2
    assert "keep=2.0" in capsys.readouterr().err
