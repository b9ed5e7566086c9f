"""Recruitment of idle parts: by grafts made of numbers, by grafts of a model that was never trained, and as a script."""

import pandas as pd
import pytest

from attribution.claims import LEDGER
from attribution.claims.measured import measured_finding
from attribution.claims.recruited import THERE, recruited
from attribution.errors import RunError
from attribution.mechanisms import halves
from experiments import recruited as script
from experiments.recruited import halved

CLAIM = LEDGER["recruited"]
SETS = ("A", "A, early", "A, late", "B", "B, early", "B, late", "remainder")


def frames(feeding, staying=0.0, own=2.0, anyway=0.0):
    """Grafts of five organisms: idle early halves bring `feeding` through the mechanism at work, and `staying` without it.

    Where they were themselves at work their change brings `anyway` through it.
    """
    rows = []
    for organism in range(5):
        for arm, idle in (("A", "B"), ("B", "A")):
            for probe in ("A alone", "B alone", "agree"):
                at_work = probe[0] if probe != "agree" else arm
                for name in SETS:
                    through = {arm: own, f"{idle}, early": feeding, f"{idle}, late": 0.1, "remainder": 0.4}.get(name, 0.0)
                    if at_work == idle:  # what this arm's own early half came to feed to the other mechanism
                        through = anyway if name == f"{arm}, early" else 0.0
                    left = staying if name == f"{idle}, early" else 0.0
                    noise = 0.01 * (organism - 2)
                    for ablated in ("", "A", "B"):
                        gain = left + (0.0 if ablated == at_work else through + (noise if through else 0))
                        rows.append((f"m{organism}", arm, 2, probe, name, ablated, gain))
    columns = ["model", "arm", "seed", "probe", "set", "ablated", "graft"]
    return {"recruited": pd.DataFrame(rows, columns=columns)}


@pytest.mark.parametrize(
    ("feeding", "staying", "anyway", "word"),
    [(1.0, 0.3, 0.0, "supported"), (0.1, 0.9, 0.0, "contradicted"), (1.0, 0.0, 0.9, "contradicted")],
)
def test_what_feeds_the_mechanism_counts_where_it_came_by_that_in_this_arm(feeding, staying, anyway, word):
    found = measured_finding(CLAIM, recruited(CLAIM, frames(feeding, staying, anyway=anyway)), {})
    assert found.verdict == word and found.estimate.mean == pytest.approx((feeding - anyway) / 2, abs=0.01)
    beside = found.secondary.set_index("reading")["mean"]
    assert beside["early half, fed"] == pytest.approx(feeding / 2, abs=0.01)
    assert beside[f"early half, {THERE}"] == pytest.approx(anyway / 2, abs=0.01)
    assert beside["late half"] == pytest.approx(0.05, abs=0.01) and beside["remainder, fed"] == pytest.approx(0.2, abs=0.01)
    assert found.parts["gain"].tolist() == pytest.approx([(feeding + staying) / 2] * 5, abs=0.02)
    assert beside["arm A"] == pytest.approx(beside["arm B"])


def test_an_own_change_that_brings_nothing_is_no_test():
    assert measured_finding(CLAIM, recruited(CLAIM, frames(0.02, own=0.02)), {}).verdict == "not testable here"


def test_what_is_not_measured_is_said():
    with pytest.raises(RunError, match="no rows of 'recruited'"):
        recruited(CLAIM, {})
    left = frames(1.0)["recruited"].query("not (set == 'B, early' and ablated == 'A' and probe == 'A alone')")
    with pytest.raises(RunError, match="no graft of 'B, early' is measured on 'A alone' in arm 'A' of m0 with A ablated"):
        recruited(CLAIM, {"recruited": left})


def test_halves_of_mechanisms_share_nothing_and_miss_nothing():
    whole = halves(4, 4, 256)
    found = halved(whole, 4)
    for name in "AB":
        early, late = found[f"{name}, early"], found[f"{name}, late"]
        assert set(early["layer"]) == {0, 1} and set(late["layer"]) == {2, 3}
        pd.testing.assert_frame_equal(pd.concat([early, late]).sort_index(), whole[name])


def test_from_arms_to_a_page_where_nothing_is_learned_nothing_is_grafted(tmp_path, monkeypatch, capsys):
    """One organism, two steps of one arm with a learning rate and of one without."""
    study = script.arms(tmp_path).only(seeds=1, models=1)
    short = {
        name: arm.model_copy(update={"training": arm.training.model_copy(update={"max_steps": 2, "learning_rate": rate})})
        for (name, arm), rate in zip(study.arms.items(), (1e-3, 0.0), strict=True)
    }
    monkeypatch.setattr(script, "arms", lambda runs: study.model_copy(update={"arms": short}))
    monkeypatch.setattr(script, "PROBED", 12)
    script.main(seeds=1, runs=tmp_path, slots=1, out=tmp_path / "page")
    assert "recruited: Not testable here" in capsys.readouterr().out and (tmp_path / "page" / "report.html").exists()
    table = pd.read_parquet(tmp_path / "page" / "frames" / "recruited.parquet")
    assert len(table) == 2 * len(SETS) * 3 * 3 and set(table["set"]) == set(SETS) and set(table["seed"]) == {2}
    learned = table[table["arm"] == "A"].set_index(["probe", "set", "ablated"])["graft"]
    assert (table.loc[table["arm"] == "B", "graft"] == 0).all() and learned["A alone", "A", ""] > 0
    assert learned["A alone", "A", "A"] == pytest.approx(0, abs=1e-6)  # where its output is replaced it brings nothing


def test_where_no_run_ended_there_is_a_sentence(tmp_path):
    with pytest.raises(RunError, match="no run of A, B is finished"):
        script.grafted(script.arms(tmp_path), tmp_path)
