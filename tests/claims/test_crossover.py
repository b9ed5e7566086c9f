"""The contrast against closed forms, what leaves it unchanged, and the nulls that must notice what it cannot."""

import numpy as np
import pandas as pd
import pytest

from attribution.claims import BOOST
from attribution.claims.claim import Threshold
from attribution.claims.crossing import crossover_finding
from attribution.claims.crossover import Crossover, View
from attribution.claims.frames import checked
from attribution.errors import ConfigError, RunError

PRIMARY = View("conflict", "kl", "zero")
DELTAS = ["A_in_A", "A_in_B", "B_in_A", "B_in_B"]


def crossover(frames, claim=BOOST, view=PRIMARY, **cell):
    claim = claim.model_copy(update={"cell": claim.cell.model_copy(update=cell)})
    return Crossover(claim, checked(frames, "zero"), view)


def gates(found):
    return {gate.threshold.name: gate for gate in found.gates()}


def of_model(frames, model, change):
    """The frames with the effects of one model changed by a function of its rows."""
    sets = frames["sets"].copy()
    mask = sets["model"] == model
    sets.loc[mask] = change(sets[mask].copy())
    return {**frames, "sets": sets}


def renamed(frames, column, names):
    return {key: f.assign(**{column: f[column].replace(names)}) if column in f else f for key, f in frames.items()}


@pytest.mark.parametrize(
    ("view", "read"),
    [
        (PRIMARY, (0.4, 0.8)),  # 80 % of B's KL: A, which moves twice as fast, is there at .4 of the way
        (View("conflict", "gain", "zero"), (0.4, 0.8)),
        (View("agree", "kl", "zero"), (0.4, 0.8)),
        (View("conflict", "steps", "zero"), (1.0, 1.0)),
    ],
)
def test_the_contrast_is_the_closed_form(supported, view, read):
    found = crossover(supported, BOOST, view)
    in_a, in_b = read
    expected = (0.6 * in_a + 0.1 * in_b) / 2.0 + (0.4 * in_b - 0.05 * in_a) / 1.6
    assert len(found.pairs) == 10 and not found.excluded
    row = found.organisms().iloc[0]
    assert row[DELTAS].tolist() == pytest.approx([0.6 * in_a, -0.1 * in_b, 0.05 * in_a, 0.4 * in_b])
    assert row[["before_A", "before_B", "error_A", "error_B"]].tolist() == pytest.approx([2.0, 1.6, 0.1, 0.1])
    assert row[["step_A", "step_B"]].tolist() == pytest.approx([10 * in_a, 10 * in_b])
    assert row["gain_A"] == pytest.approx(1.5 * in_a) and row["seeds"] == 2
    assert row["strengthening"] == pytest.approx(0.6 * in_a / 2.0 + (0.4 * in_b - 0.05 * in_a) / 1.6)
    assert found.estimate().mean == pytest.approx(expected) and found.estimate().n == 5


def test_rescaled_logits_cancel(world):
    """Every influence times 1 + s, by another s in each arm, is no contrast; in a unit of nats it would be one."""
    scaled = {("A", "A"): 0.5 * 2.0, ("A", "B"): -0.2 * 2.0, ("B", "A"): 0.5 * 1.6, ("B", "B"): -0.2 * 1.6}
    found = crossover(world(deltas=scaled).frames())
    assert found.estimate().mean == pytest.approx(0, abs=1e-12)
    row = found.organisms().iloc[0]
    assert abs(row["A_in_A"] - row["A_in_B"] + row["B_in_B"] - row["B_in_A"]) > 0.1


def test_rescaling_what_was_trained_changes_the_contrast_as_the_formula_says(supported):
    base = crossover(supported).organisms().set_index("model").loc["planted/2"]

    def double(rows):
        tuned = (rows["arm"] == "A") & (rows["step"] > 0)
        rows.loc[tuned, ["effect", "effect_even", "effect_odd"]] *= 1.5
        return rows

    row = crossover(of_model(supported, "planted/2", double)).organisms().set_index("model").loc["planted/2"]
    assert row["A_in_A"] == pytest.approx(1.5 * base["A_in_A"] + 0.5 * 2.0)
    assert row["B_in_A"] == pytest.approx(1.5 * base["B_in_A"] + 0.5 * 1.6)
    # the factor adds .5 to both terms, which cancels, and scales what stood there
    assert row["contrast"] - base["contrast"] == pytest.approx(0.5 * (base["A_in_A"] / 2.0 - base["B_in_A"] / 1.6))
    whole = of_model(supported, "planted/2", lambda rows: rows.assign(**{c: 3 * rows[c] for c in ["effect"]}))
    again = crossover(whole).organisms().set_index("model").loc["planted/2"]
    assert again["contrast"] == pytest.approx(base["contrast"]) and again["A_in_A"] == pytest.approx(3 * base["A_in_A"])


@pytest.mark.parametrize("probes", ["conflict", "agree"])
def test_swapping(supported, probes):
    view = View(probes, "kl", "zero")
    base = crossover(supported, BOOST, view).estimate().mean
    names = {"A": "B", "B": "A"}
    table = renamed(supported, "set", names)
    assert crossover(table, BOOST, view).estimate().mean == pytest.approx(-base)
    both = renamed(table, "arm", names)
    signs = {probe: pair[::-1] for probe, pair in BOOST.cell.signs.items()}
    assert crossover(both, BOOST, view, signs=signs).estimate().mean == pytest.approx(base)
    assert base > 0.1


def test_gates_show_the_worst_organism(supported):
    def weaken(rows):
        rows.loc[rows["set"] == "B", ["effect", "effect_even", "effect_odd"]] *= 0.25
        return rows

    base = gates(crossover(supported))
    assert all(gate.passed for gate in base.values())
    assert base["noise"].value == pytest.approx(16) and base["balance"].value == pytest.approx(1.25)
    assert (base["organisms"].value, base["lr0"].value) == (5, 0) and base["gain"].value == pytest.approx(0.6)
    found = gates(crossover(of_model(supported, "planted/3", weaken)))
    assert found["balance"].value == pytest.approx(5) and found["balance"].where == "planted/3"
    assert not found["balance"].passed
    noisy = of_model(
        supported, "planted/4", lambda rows: rows.assign(effect_even=rows["effect"] + 0.4, effect_odd=rows["effect"] - 0.4)
    )
    found = gates(crossover(noisy))
    assert found["noise"].value == pytest.approx(4) and found["noise"].where == "planted/4" and not found["noise"].passed


@pytest.mark.parametrize("before", [{"A": -2.0, "B": 1.6}, {"A": 0.0, "B": 1.6}])
def test_a_mechanism_without_influence_passes_no_gate(world, before):
    found = crossover(world(before=before).frames())
    assert not gates(found)["noise"].passed and not gates(found)["balance"].passed
    if not before["A"]:
        assert np.isnan(found.estimate().mean)


def test_gates_fail_where_a_figure_is_missing(supported):
    sets, probes = supported["sets"], supported["probes"]
    cases = {
        "noise": {**supported, "sets": sets.assign(effect_even=np.nan)},
        "lr0": {**supported, "sets": sets[sets["arm"] != "lr0"]},
        "gain": {**supported, "probes": probes[(probes["probe"] != "training samples") | (probes["arm"] != "B")]},
        "organisms": {**supported, "sets": sets[sets["model"] != "planted/0"]},
    }
    for name, frames in cases.items():
        assert not gates(crossover(frames))[name].passed, name


def test_learning_rate_0_is_exactly_0(world, supported):
    assert gates(crossover(world(lr0=1e-7).frames()))["lr0"].value == pytest.approx(1e-7)
    sets = supported["sets"].copy()
    sets.loc[(sets["arm"] == "lr0") & (sets["step"] == 4) & (sets["set"] == "A"), "effect"] -= 1e-7
    assert not gates(crossover({**supported, "sets": sets}))["lr0"].passed
    sets.loc[(sets["arm"] == "lr0") & (sets["step"] == 4) & (sets["set"] == "B"), "effect"] = np.nan
    assert not gates(crossover({**supported, "sets": sets}))["lr0"].passed


def test_pairs_that_cannot_be_matched_are_listed(supported):
    probes, sets = supported["probes"].copy(), supported["sets"]
    still = (probes["model"] == "planted/1") & (probes["arm"] == "B") & (probes["seed"] == 0)
    probes.loc[still, "kl"] = 0.0
    sets = sets[~((sets["model"] == "planted/2") & (sets["arm"] == "A") & (sets["seed"] == 1))]
    found = crossover({"sets": sets, "probes": probes})
    assert len(found.pairs) == 8 and found.estimate().n == 5
    (still_there, still_why), (lost, lost_why) = found.excluded
    assert still_there == "Seed 0 of planted/1" and still_why.startswith("arm B has a KL that never rises")
    assert lost == "Seed 1 of planted/2" and lost_why == "arm A was not recorded"
    told = crossover_finding(BOOST, {**supported, "sets": sets, "probes": probes}).excluded
    assert any(line.startswith("Seed 1 of planted/2 is left out (every reading): arm A was not") for line in told)
    assert any("Seed 0 of planted/1 is left out (" in line and "KL-matched" in line and "gain-m" not in line for line in told)
    assert len(told) == len(set(told))


def needing(**values):
    found = {name: ("<=" if name == "balance" else ">", value) for name, value in values.items()}
    needed = [Threshold(name=name, meaning=name, relation=sign, value=value) for name, (sign, value) in found.items()]
    return BOOST.model_copy(update={"needed": tuple(needed)})


def test_organisms_that_lack_what_is_needed_before_training_are_left_out_whatever_training_did(world):
    frames = world().frames()
    sets = frames["sets"]
    weak = (sets["model"] == "planted/1") & (sets["set"] == "B")  # half an influence: out of balance with A's 2
    noisy = (sets["model"] == "planted/3") & (sets["set"] == "A")
    for column in ("effect", "effect_even", "effect_odd"):
        sets.loc[weak, column] -= 1.1 * sets.loc[weak, "probe"].map({"agree": 1, "conflict": -1})
    sets.loc[noisy, "effect_even"] += 0.8
    found = crossover(frames, needing(noise=5, balance=3))
    assert sorted(found.pairs["model"].unique()) == ["planted/0", "planted/2", "planted/4"] and found.estimate().n == 3
    assert set(found.partitions()["model"]) == {*found.pairs["model"]} == set(found.alike()["model"])
    assert [model for model, _ in found.excluded] == ["planted/1", "planted/3"]
    assert "balance is 4" in found.excluded[0][1] and found.excluded[1][1] == "noise is 4"
    assert len(crossover(frames).organisms()) == 5  # nobody is left out where a claim needs nothing
    with pytest.raises(ConfigError, match="unknown need 'size' of claim 'boost'; expected noise, balance"):
        crossover(frames, needing(size=1)).estimate()


def test_a_claim_without_needs_keeps_its_hash():
    assert BOOST.hash == "112a14a8" != needing(noise=5).hash


def test_a_value_that_is_not_a_number_is_not_dropped(supported):
    sets = supported["sets"].copy()
    sets.loc[(sets["model"] == "planted/0") & (sets["arm"] == "A") & (sets["set"] == "A") & (sets["step"] == 4), "effect"] = (
        np.nan
    )
    assert np.isnan(crossover({**supported, "sets": sets}).estimate().low)


def test_nulls_are_null_where_nothing_is_located(supported):
    nulls = crossover(supported).nulls()
    assert list(nulls) == ["wrong partitions", "unrouted control", "identical arms"]
    # wrong sets change by .2 in both arms, read at .4 and .8 of the way, in units of influences of 2.0 and 1.6
    expected = 0.2 * (0.4 - 0.8) / 2.0 + 0.2 * (0.8 - 0.4) / 1.6
    assert [null.interval.mean for null in nulls.values()] == pytest.approx([expected, expected, 0], abs=1e-12)
    assert all(null.inside(0.1) and not null.void for null in nulls.values())
    assert [null.interval.n for null in nulls.values()] == [5, 3, 5]
    assert nulls["unrouted control"].interval.unit == "training seed, this base only, mean over 5 partitions"


def test_wrong_partitions_are_read_as_the_real_ones(world):
    deltas = {("A", "A"): 0.6, ("A", "B"): -0.1, ("B", "A"): 0.05, ("B", "B"): 0.4}
    found = crossover(world(wrong=deltas, wrong_before=2.0).frames())
    rows, null = found.partitions(), found.nulls()["wrong partitions"]
    expected = (0.6 * 0.4 + 0.1 * 0.8) / 2.0 + (0.4 * 0.8 - 0.05 * 0.4) / 1.6  # of the real influences before
    assert len(rows) == 20 and rows["contrast"].tolist() == pytest.approx([expected] * 20)
    assert rows["size"].tolist() == pytest.approx([(2.0 / 2.0 + 2.0 / 1.6) / 2] * 20)
    assert expected == pytest.approx(found.estimate().mean)
    assert null.interval.mean == pytest.approx(expected) and not null.inside(0.1)


@pytest.mark.parametrize("options", [{"wrong_before": 0.3}, {"partitions": 3}, {"partitions": 0}])
def test_wrong_partitions_that_cannot_fail_are_void(world, options):
    found = crossover(world(**options).frames())
    null = found.nulls()["wrong partitions"]
    assert null.void and not null.inside(0.1)
    assert crossover(world(wrong_before=0.55).frames()).nulls()["wrong partitions"].void == ""


def test_a_wrong_set_without_influence_does_not_blow_the_null_up(world):
    frames = world(partitions=5, wrong=dict.fromkeys([("A", "A"), ("A", "B"), ("B", "A"), ("B", "B")], 0.0)).frames()
    sets = frames["sets"]
    weak = sets["set"].isin(["wrong-2 A"])
    sets.loc[weak, "effect"] = 1e-3 * (1 + sets.loc[weak, "step"] * (sets.loc[weak, "arm"] == "A"))  # a contrast of thousands
    found = crossover(frames)
    assert found.partitions()["contrast"].abs().max() < 0.01
    null = found.nulls()["wrong partitions"]
    assert null.inside(0.1) and not null.void


def test_the_unrouted_control_counts_training_seeds(world):
    located = {("A", "A"): 0.5, ("A", "B"): 0.0, ("B", "A"): 0.0, ("B", "B"): 0.5}
    null = crossover(world(unrouted=located).frames()).nulls()["unrouted control"]
    assert null.interval.mean == pytest.approx(0.5 * 0.4 / 2.0 + 0.5 * 0.8 / 1.6) and not null.inside(0.1) and not null.void
    weak = crossover(world(unrouted_before=0.4).frames()).nulls()["unrouted control"]
    assert "of the real mechanisms' influence before, 25% is needed" in weak.void
    half = crossover(world(unrouted=located, unrouted_wrong=dict.fromkeys(located, 0.0)).frames()).nulls()["unrouted control"]
    assert half.interval.mean == pytest.approx(null.interval.mean / 5)  # one partition of five
    few = crossover(world(partitions=2).frames()).nulls()["unrouted control"]
    assert few.void and not few.inside(0.1)
    frames = world().frames()
    absent = {name: frame[frame["model"] != "planted/unrouted"] for name, frame in frames.items()}
    assert crossover(absent).nulls()["unrouted control"].void


def test_identical_arms_see_what_seeds_do(world):
    found = crossover(world(seeds=4, shift=lambda model, arm, seed: 0.5 * (seed == 0)).frames())
    null = found.nulls()["identical arms"]
    # seeds 0 and 1 differ by .5 of 2.0 at .8 of the way, seeds 2 and 3 not at all
    assert null.interval.mean == pytest.approx(0.5 * 0.5 * 0.8 / 2.0) and "20 pairs" in null.interval.unit
    assert crossover(world(seeds=1).frames()).nulls()["identical arms"].void


def additive(frames, shares):
    """Wrong sets whose effects are those of their members: a share of A's and the rest of B's, as if effects added up."""
    sets = frames["sets"]
    keys = ["model", "arm", "seed", "step", "probe"]
    values = ["effect", "effect_even", "effect_odd"]
    real = {name: sets[sets["set"] == name].set_index(keys) for name in "AB"}
    made = [sets[sets["set"].isin(["A", "B"])]]
    for number, share in enumerate(shares, start=1):
        for name, part in (("A", share), ("B", 1 - share)):
            rows = real["A"].assign(set=f"wrong-{number} {name}")
            rows[values] = part * real["A"][values] + (1 - part) * real["B"][values]
            made.append(rows.reset_index())
    return {**frames, "sets": pd.concat(made, ignore_index=True)}


@pytest.mark.parametrize("shares", [(0.7, 0.4, 0.55, 0.35), (0.9, 0.7, 0.8, 0.85), (0.85, 0.15) * 2])
def test_on_conflict_probes_a_mere_change_of_behaviour_is_a_contrast(world, shares):
    """Both sets lean to the arm's reply by the same amount: nothing is located, and this contrast cannot tell.

    In conflicts the effect of B counts negatively, so where effects add up the sum of the changes is that of behaviour,
    however the components are divided: every wrong partition shows the same contrast, and the null notices. Agreeing probes
    are free of this.
    """
    lean = {("A", "A"): 0.4, ("B", "A"): -0.4, ("A", "B"): -0.2, ("B", "B"): 0.2}
    found = crossover(additive(world(deltas=lean, before={"A": 2.0, "B": 2.0}).frames(), shares))
    contrast = found.estimate().mean
    rows = found.partitions().query("model == 'planted/0'")
    assert contrast == pytest.approx(0.32)
    assert rows["contrast"].tolist() == pytest.approx([contrast] * 4)
    assert not found.nulls()["wrong partitions"].inside(0.1)


def test_on_agreeing_probes_it_is_no_contrast(world):
    lean = dict.fromkeys([("A", "A"), ("B", "A"), ("A", "B"), ("B", "B")], 0.4)
    frames = additive(world(deltas=lean, before={"A": 2.0, "B": 2.0}, kl={"A": 0.1, "B": 0.1, "lr0": 0}).frames(), (0.7, 0.3))
    assert crossover(frames, BOOST, View("agree", "kl", "zero")).estimate().mean == pytest.approx(0, abs=1e-12)


def test_what_a_study_lacks_is_said_in_one_sentence(supported):
    sets = supported["sets"]
    for frames, words in (
        ({**supported, "sets": sets[sets["arm"] != "B"]}, "no rows of arm 'B'"),
        ({**supported, "sets": sets[(sets["arm"] != "B") | (sets["model"] == "planted/unrouted")]}, "no rows of arm 'B'"),
        ({**supported, "sets": sets[sets["set"] != "A"]}, "no rows of set 'A'"),
        ({**supported, "sets": sets[sets["probe"] != "conflict"]}, "on probes 'conflict'"),
        ({**supported, "sets": sets.iloc[:0]}, "no rows of 'sets'"),
        ({"sets": sets}, "no rows of 'probes'"),
        ({**supported, "sets": sets.drop(columns="effect_odd")}, "lacks the column 'effect_odd'"),
        ({**supported, "sets": pd.concat([sets, sets.iloc[:1]])}, "holds one row twice"),
        ({**supported, "set": sets}, "unknown frame 'set'"),
        ({**supported, "sets": sets.assign(seed=sets["seed"].where(sets["seed"] > 0))}, "without a key"),
    ):
        with pytest.raises(RunError, match=words) as error:
            crossover(frames).estimate()
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="no signs for probes 'own'"):
        crossover(supported, BOOST, View("own", "kl", "zero"))
    for part, words in (("gates", "unknown gate"), ("nulls", "unknown null")):
        odd = (BOOST.gates[0].model_copy(update={"name": "luck"}),) if part == "gates" else ("luck",)
        claim = BOOST.model_copy(update={part: odd})
        with pytest.raises(ConfigError, match=words):
            getattr(Crossover(claim, checked(supported, "zero"), PRIMARY), part)()


def test_mechanisms_that_are_read_on_probe_sets_of_their_own_give_the_same_contrast(supported):
    """The rows of A and of the wrong partitions in its place moved to one probe set, those of B to another."""
    agreeing = supported["sets"][supported["sets"]["probe"] == "agree"]
    apart = agreeing.assign(probe=np.where(agreeing["set"].str.endswith("A"), "own of A", "own of B"))
    elsewhere = agreeing.assign(probe=np.where(agreeing["set"].str.endswith("A"), "own of B", "own of A"), effect=9.0)
    frames = {**supported, "sets": pd.concat([apart, elsewhere], ignore_index=True)}
    cell = {"probes": "own", "signs": {"own": (1, 1)}, "readings": {"own": ("own of A", "own of B")}}
    found = crossover(frames, BOOST, View("own", "kl", "zero"), **cell)
    one = crossover(supported, BOOST, View("agree", "kl", "zero"))
    pd.testing.assert_frame_equal(found.organisms(), one.organisms())
    pd.testing.assert_frame_equal(found.partitions(), one.partitions())
    assert len(found.partitions()) == 20


def test_a_cell_without_readings_is_declared_as_before():
    assert "readings" not in BOOST.cell.model_dump() and BOOST.hash == "112a14a8"
    assert BOOST.cell.read_on("agree") == ("agree", "agree")
