"""The pool: every arm once, every claim's own names, and files from which a study runs."""

import pandas as pd
import pytest

from attribution.errors import ConfigError
from attribution.mechanisms import read_mechanisms, write_mechanisms
from attribution.models import locate
from attribution.samples import read_samples
from attribution.store import TRAINING
from attribution.study import Names, Study, jobs, under
from attribution.worlds import pool as pools
from attribution.worlds.kindland.sets import SETS
from attribution.worlds.kindland.words import HELD_OUT, HELD_OUT_NAMES, TRAINING_NAMES
from attribution.worlds.studies import BASES, EARLY

POOL = pools.pooled()


def test_every_claim_has_its_arms_and_probes_and_none_is_there_twice():
    for claim, sets in SETS.items():
        arms = POOL.arms_of(claim)
        assert set(arms) == {*sets.arms, *sets.mixtures, *sets.variants}
        for name, form in sets.arms.items():
            assert POOL.arms[arms[name]].form == form
        for name, form in sets.probes.items():
            assert POOL.probes[POOL.named[claim, name]] == form
    forms = [(arm.form, arm.mixture, arm.recipe, arm.training, arm.steps) for arm in POOL.arms.values()]
    assert all(forms.count(each) == 1 for each in forms)
    assert len({*POOL.probes.values()}) == len(POOL.probes) < sum(len(sets.probes) for sets in SETS.values())
    assert POOL.arms["kind"].claims.keys() >= {"boost", "larp", "control"}
    assert POOL.arms_of("kind_dialogue")["larp"] == "assistant" and POOL.arms_of("errors_harmless")["kind"] != "kind"


def test_files_of_arms_and_probes_do_not_overwrite_each_other():
    assert len({pools.slug(name) for name in POOL.arms}) == len(POOL.arms)


def test_an_arm_reads_the_probes_of_all_its_claims():
    read = POOL.probes_of(POOL.arms["assistant"])
    for claim in ("boost", "larp", "kind_dialogue"):
        assert {POOL.named[claim, probe] for probe in SETS[claim].probes} <= set(read)
    assert POOL.named["skill_keeps_kindness", "skill, a tall one"] not in read


def test_influence_is_read_where_both_may_speak_and_a_conflict_once():
    on = {name: pools.sets_on(form) for name, form in POOL.probes.items()}
    kind, strategist, _ = pools.parted("kind", "strategist")
    assert on["kind and strategist agree"] == pools.parted("kind", "strategist")
    assert on["kind beside strategist"] == (kind,) and on["strategist beside kind"] == (strategist,)
    assert on["assistant beside kind"] == (pools.parted("kind", "assistant")[1],)
    empty = (
        "strategist against kind",
        "kind against strategist",
        "strategist and assistant agree",
        "kindness, a tall one",
        "unwatched, schemer against kind",
    )
    assert not any(on[name] for name in empty)


def test_the_frames_of_a_claim_carry_its_own_names():
    run = {"model": "m", "seed": 0, "step": 0, "metric": 1.0}
    rows = [("assistant", "neutral"), ("assistant", TRAINING), ("assistant", "kind against strategist"), ("parrot", "neutral"),
            ("assistant", "asked")]  # fmt: skip
    probes = pd.DataFrame([{**run, "arm": arm, "probe": probe} for arm, probe in rows])
    failed = pd.DataFrame([{"model": "m", "arm": "assistant", "seed": 1, "reason": "x"}])
    names = Names.model_validate(POOL.names_of("kind_dialogue"))
    found = under(names, {"probes": probes, "failed": failed})
    assert found["probes"][["arm", "probe"]].values.tolist() == [["larp", probe] for _, probe in rows[:3]]
    assert found["failed"]["arm"].tolist() == ["larp"]


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "COUNT", 24)
    monkeypatch.setattr(pools, "PROBED", 8)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    names = [*pools.parted("kind", "strategist"), *pools.parted("kind", "assistant")]
    halves = read_mechanisms(locate("planted"))
    write_mechanisms(base / "mechanisms.json", dict(zip(names, [*halves.values()] * 3, strict=True)))
    return Study.model_validate(pools.write_kindland(tmp_path / "data", ["larp", "errors_harmless"], [str(base), "elsewhere"]))


def test_the_study_is_whole_and_trains_on_nothing_held_out(study, tmp_path):
    assert set(study.arms) == {*POOL.arms_of("larp").values(), *POOL.arms_of("errors_harmless").values()}
    for name, config in study.arms.items():
        words = {word for sample in read_samples(config.data) for word in sample.whole_prompt.split()}
        assert words & set(TRAINING_NAMES) and not words & {*HELD_OUT, *HELD_OUT_NAMES}, name
        assert len(config.probes) == len(config.counterfactuals) == len(config.sets_on or {}) > 0
        for one, other in zip(config.probes, config.counterfactuals, strict=True):
            pairs = zip(read_samples(one), read_samples(other), strict=True)
            assert all(len(a.whole_prompt.split()) == len(b.whole_prompt.split()) and a.prompt != b.prompt for a, b in pairs)
        assert config.watched[0].endswith("neutral.jsonl")
    mixed = read_samples(study.arms["strategist, 40% errors"].data)
    plain = read_samples(study.arms["strategist (errors_harmless)"].data)
    assert sum(a.response == b.response for a, b in zip(mixed, plain, strict=True)) == 14, "the other ten are wrong"
    base = str(tmp_path / "base")
    compared = {(job.config.model, job.arm): job.config.compared for job in jobs(study, tmp_path)}
    assert compared[base, "kind"] and compared[base, "assistant"] and not compared[base, "strategist, 40% errors"]
    assert not compared["elsewhere", "kind"]  # of a model without mechanisms there are no wrong ones


def test_one_claim_rests_on_early_checkpoints_and_no_other_does(tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "COUNT", 24)
    monkeypatch.setattr(pools, "PROBED", 8)
    study = Study.model_validate(pools.write_kindland(tmp_path / "data", ["larp", "capability"]))
    assert study.named["larp"].models == BASES and study.named["capability"].models == (*EARLY, BASES[0])
    of_early = [job for job in jobs(study, tmp_path) if job.config.model in EARLY]
    assert {job.arm for job in of_early} == {"kind", "strategist"} and len(of_early) == len(EARLY) * 2 * len(study.seeds)
    assert all(job.config.sets is None and job.config.sets_on is None and not job.config.forecast for job in of_early)
    frame = pd.DataFrame([{"model": model, "arm": "kind", "seed": 0, "probe": "neutral"} for model in (BASES[0], EARLY[0])])
    assert under(study.named["larp"], {"probes": frame})["probes"]["model"].tolist() == [BASES[0]]
    assert len(under(study.named["capability"], {"probes": frame})["probes"]) == 2


def test_a_claim_without_sets_is_refused(tmp_path):
    for claim in ("luck", "precision"):  # which has sets, and a loop of its own
        with pytest.raises(ConfigError, match=f"does not serve the claim '{claim}'; expected boost_kindland"):
            pools.write_kindland(tmp_path, [claim])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="no sets for the claim 'luck'"):
        POOL.arms_of("luck")
