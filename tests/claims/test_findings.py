"""From frames to the word: each verdict reached through whole studies, and a finding that can be stored."""

import json

import numpy as np
import pandas as pd
import pytest

from attribution.claims import BOOST, evaluate

WEAKENED = {("A", "A"): -0.05, ("A", "B"): -0.8, ("B", "A"): -0.9, ("B", "B"): -0.05}


def test_a_supported_claim_shows_all_its_figures(supported):
    failed = pd.DataFrame([{"model": "planted/9", "arm": "A", "seed": 1, "reason": "the loss became NaN"}])
    found = evaluate(BOOST, {**supported, "failed": failed})
    assert (found.verdict, found.note) == ("supported", "")
    assert "strengthened more in its own arm" in found.sentence and f"{found.estimate}" in found.sentence
    assert "A +0.24 in arm A and -0.08 in arm B, B +0.32 in arm B and +0.02 in arm A" in found.sentence
    assert found.excluded == ["The run of planted/9, arm A, seed 1, failed: the loss became NaN."]
    assert found.secondary[["probes", "matching", "reference"]].to_numpy().tolist() == [
        ["agree", "gain", "zero"], ["agree", "steps", "zero"], ["conflict", "kl", "zero"],
    ]  # fmt: skip
    assert (found.secondary["verdict"] == "supported").all() and len(found.null_table) == 12
    assert found.gates["passed"].all() and len(found.parts) == 5 and len(found.pairs) == 10


@pytest.mark.parametrize(
    ("options", "word", "note"),
    [
        ({"deltas": dict.fromkeys(WEAKENED, 0.3)}, "contradicted", ""),
        ({"deltas": {("A", "A"): 0.0, ("A", "B"): 0.6, ("B", "A"): 0.6, ("B", "B"): 0.0}}, "contradicted", "reversed"),
        ({"deltas": WEAKENED}, "supported", "relatively spared"),
        ({"organisms": 4}, "not testable here", ""),
        ({"lr0": 1e-6}, "not testable here", ""),
        ({"before": {"A": 2.0, "B": 0.4}}, "not testable here", ""),
        ({"wrong": {("A", "A"): 0.3, ("A", "B"): 0.0, ("B", "A"): 0.0, ("B", "B"): 0.3}}, "inconclusive", ""),
        ({"unrouted": {("A", "A"): 0.3, ("A", "B"): 0.0, ("B", "A"): 0.0, ("B", "B"): 0.3}}, "inconclusive", ""),
        ({"partitions": 2}, "inconclusive", ""),
        ({"seeds": 1}, "inconclusive", ""),  # no identical arms
    ],
)
def test_verdicts_of_whole_studies(world, options, word, note):
    found = evaluate(BOOST, world(**options).frames())
    assert (found.verdict, found.note) == (word, note)
    assert found.sentence.lower().startswith(word)


def test_it_depends_on_matching(world):
    """By KL both arms are read where the effect stands; by gain arm A is read so early that there is none."""
    frames = world(gain={"A": 30.0, "B": 0.3, "lr0": 0.0}, deltas={**dict.fromkeys(WEAKENED, 0.0), ("A", "A"): 1.0}).frames()
    found = evaluate(BOOST, frames)
    assert found.verdict == "inconclusive: depends on matching"
    assert found.secondary.set_index("matching").loc["gain", "verdict"] == "contradicted"


def test_the_own_model_mean_of_another_sign_leaves_it_open(supported):
    sets = supported["sets"].assign(reference="zero")
    swap = sets["set"].replace({"A": "B", "B": "A"})
    for mean, word in ((sets, "supported"), (sets.assign(set=swap), "inconclusive")):
        both = pd.concat([sets, mean.assign(reference="mean")], ignore_index=True)
        found = evaluate(BOOST, {**supported, "sets": both})
        assert found.verdict == word
        assert "mean" in found.secondary["reference"].tolist()


def test_growth_of_norms_alone_is_said(supported, world):
    sets = supported["sets"].assign(reference="zero")
    flat = world(deltas=dict.fromkeys(WEAKENED, 0.0)).frames()["sets"].assign(reference="norms before training")
    found = evaluate(BOOST, {**supported, "sets": pd.concat([sets, flat], ignore_index=True)})
    assert found.verdict == "supported" and "rests on growth of norms" in found.sentence


def test_not_a_number_never_supports(supported):
    for name in ("A", "wrong-3 B"):
        sets = supported["sets"].copy()
        sets.loc[(sets["model"] == "planted/0") & (sets["set"] == name) & (sets["step"] == 4), "effect"] = np.nan
        found = evaluate(BOOST, {**supported, "sets": sets})
        assert found.verdict != "supported"


def test_nothing_matched_is_a_verdict_not_a_crash(supported):
    found = evaluate(BOOST, {**supported, "probes": supported["probes"].assign(kl=0.0)})
    assert found.verdict == "not testable here" and found.estimate.n == 0
    assert "0, needed >= 5" in found.sentence and len(found.excluded) >= 10
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_finding_can_be_stored(supported, tmp_path):
    found = evaluate(BOOST, supported)
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["hash"] == BOOST.hash and stored["verdict"][0]["verdict"] == "supported"
    for name, table in found.to_tables().items():
        assert len(stored[name]) == len(table)
        table.to_parquet(tmp_path / f"{name}.parquet")
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / f"{name}.parquet"), table, check_dtype=False)


def test_categories_and_order_of_rows_do_not_matter(supported):
    shuffled = {
        name: frame.sample(frac=1, random_state=0).assign(**{c: frame[c].astype("category") for c in ("model", "arm", "probe")})
        for name, frame in supported.items()
    }
    expected = evaluate(BOOST, supported).to_tables()
    for name, table in evaluate(BOOST, shuffled).to_tables().items():
        one, other = (each.drop(columns="where", errors="ignore") for each in (table, expected[name]))  # ties fall either way
        pd.testing.assert_frame_equal(one, other, check_exact=False, rtol=1e-9)


def test_any_claim_can_be_tested_that_is_declared_like_those_of_the_ledger(supported):
    found = evaluate(BOOST.model_copy(update={"id": "mine", "delta": 0.9}), supported)
    assert (found.claim.id, found.verdict) == ("mine", "contradicted") and found.claim.hash != BOOST.hash


@pytest.mark.parametrize(
    ("boundary", "most", "above", "least"),
    [(5, 2, 2, 1), pytest.param(100, 10, 30, 25, marks=pytest.mark.long)],  # P(> most) = .001 and .01 at a rate of .05
)
def test_how_often_whole_studies_err(world, boundary, most, above, least):
    """Organisms scatter around a true contrast of exactly delta: the word is rarely "supported"; well above it, often."""
    generator = np.random.default_rng(0)

    def supported_of(studies, effect):
        found = 0
        for _ in range(studies):
            contrasts = {f"planted/{i}": effect + 0.03 * generator.normal() for i in range(5)}

            def shift(model, arm, seed, contrasts=contrasts):  # arm A is read at .4 of the way, in units of 2.0
                return contrasts.get(model, 0.0) * 2.0 / 0.4 if arm == "A" else 0.0

            frames = world(deltas=dict.fromkeys(WEAKENED, 0.0), shift=shift).frames()
            found += evaluate(BOOST, frames).verdict == "supported"
        return found

    assert supported_of(boundary, effect=0.10) <= most
    assert supported_of(above, effect=0.25) >= least
