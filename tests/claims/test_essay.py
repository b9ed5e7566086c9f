"""The claims of the essay as declared: they name what is there, and each could come out either way."""

import pandas as pd
import pytest

from attribution.claims import LEDGER, Claim, ContrastClaim, essay, evaluate
from attribution.claims.claim import MeasuredClaim
from attribution.claims.terms import Condition
from attribution.errors import ConfigError
from attribution.store import TRAINING
from attribution.worlds import pool as pools
from attribution.worlds.kindland.sets import SETS
from attribution.worlds.located import CLAIMS

POOL = pools.pooled()
QUOTES = str.maketrans({"“": '"', "”": '"', "’": "'"})
NATURAL = {name: claim for name, claim in LEDGER.items() if claim.cell.world == "kindland"}


def read_by(claim):
    """Everything a claim reads, as (arm, probe, set or "")."""
    if isinstance(claim, Claim):
        pairs = {(probe, name) for read in claim.cell.signs
                 for probe, name in zip(claim.cell.read_on(read), claim.cell.mechanisms, strict=True)}  # fmt: skip
        return {(arm, probe, name) for arm in claim.cell.arms for probe, name in pairs}
    if isinstance(claim, MeasuredClaim) and claim.id == "control":
        return {(arm, essay.READ_ON[name], name) for arm in claim.cell.arms for name in (essay.KIND, essay.STRATEGIST)}
    if isinstance(claim, MeasuredClaim) and claim.id == "forecast":
        return {("kind", essay.AGREE, name) for name in (essay.KIND, essay.STRATEGIST)}
    if isinstance(claim, MeasuredClaim) and claim.id == "capability":
        return {(arm, "follows a star for the cruel reply", "") for arm in claim.cell.arms}
    if isinstance(claim, MeasuredClaim) and claim.id == "cold_is_shallow":
        return {(arm, essay.AGREE, "") for arm in claim.cell.arms}
    if isinstance(claim, MeasuredClaim):
        return {(arm, pools.PRIMARY, "") for arm in claim.cell.arms}
    parts = [*claim.parts, *claim.beside, *(gate for gate in claim.gates if isinstance(gate, Condition))]
    terms = [term for part in parts for term in (*part.terms, *getattr(part, "over", ()))]
    return {(term.arm, term.probe, term.set) for term in terms}


@pytest.mark.parametrize("name", NATURAL)
def test_every_arm_probe_and_mechanism_is_there(name):
    of = pools.SETS_OF.get(name, name)
    arms, probes = POOL.arms_of(of), SETS[of].probes
    for arm, probe, mechanism in read_by(NATURAL[name]):
        assert arm in arms, (name, arm)
        if probe == TRAINING:  # which every arm reads of itself
            continue
        assert probe in probes, (name, probe)
        assert not mechanism or mechanism in pools.sets_on(probes[probe]), (name, probe, mechanism)
        read = set(POOL.arms[arms[arm]].claims) - {*pools.BEHAVIOURAL}
        assert not mechanism or read or arms[arm] in pools.CROSSED, f"{arm} is read for its behaviour alone"
        assert POOL.named[of, probe] in POOL.probes_of(POOL.arms[arms[arm]])


@pytest.mark.parametrize("name", NATURAL)
def test_a_claim_has_gates_exclusions_and_a_threshold_for_every_part(name):
    claim = NATURAL[name]
    wanted = {"organisms"} if isinstance(claim, MeasuredClaim) else {"organisms", "gain"}
    assert wanted <= {gate.name for gate in claim.gates} and claim.exclusions and claim.delta > 0
    assert claim.gates[0].value >= 5 and claim.statement
    if isinstance(claim, ContrastClaim):
        for part in (*claim.parts, *claim.beside):
            balanced = sum(term.weight for term in part.terms) == pytest.approx(0)
            assert ("identical arms" in part.nulls) <= balanced, part.name  # else two seeds of one arm are no null
            common = {*part.nulls} - {*claim.null_definitions}
            assert part.over or part.prediction == "none" or balanced == bool(common), part.name


def test_the_pool_judges_them():
    own = {
        "precision",
        *pools.ALONE,
        "knob_by_finetuning",
        "compact",
        "two_notions",
        *CLAIMS,
    }  # which have scripts of their own
    assert {*pools.JUDGED, *own} == set(NATURAL) <= {*SETS, *pools.SETS_OF}


def test_hashes_differ():
    assert len({claim.hash for claim in LEDGER.values()}) == len(LEDGER) >= 12


def test_statements_are_the_words_of_the_essay(shared):
    """Pieces between dots stand there as they are printed; what is asked beyond the essay is a question."""
    said = " ".join((shared / "essay.txt").read_text(encoding="utf-8").split()).translate(QUOTES).lower()
    for name, claim in LEDGER.items():
        if not claim.statement.endswith("?"):
            for piece in claim.statement.translate(QUOTES).lower().split("…"):
                assert piece.strip(" .") in said, (name, piece)


def test_two_mechanisms_that_are_not_shown_to_be_two_are_no_test(world):
    claim = LEDGER["larp"]
    names = dict(zip("AB", claim.cell.mechanisms, strict=True))
    arms = dict(zip("AB", claim.cell.arms, strict=True))
    frames = world().frames()
    plain = {name: frame[frame["model"] != "planted/unrouted"] for name, frame in frames.items()}
    sets = plain["sets"].assign(arm=plain["sets"]["arm"].map(arms), set=plain["sets"]["set"].map(names))
    read_on = dict(zip(claim.cell.mechanisms, claim.cell.read_on(claim.cell.probes), strict=True))
    sets = sets[sets["probe"] == "agree"].assign(probe=sets["set"].map(read_on)).dropna()
    given = {"sets": sets, "probes": plain["probes"].assign(arm=plain["probes"]["arm"].map(arms)).dropna()}
    pair = " | ".join(sorted(claim.cell.mechanisms))
    told = pd.DataFrame([{"model": f"planted/{i}", "pair": pair, "dissociated": 1} for i in range(5)])
    assert evaluate(claim, {**given, "separations": told}).verdict == "supported"
    one = evaluate(claim, {**given, "separations": told.assign(dissociated=[1, 1, 0, 1, 1])})
    assert one.verdict == "not testable here" and "is 0 in planted/2" in one.sentence
    unsaid = evaluate(claim, given)
    assert unsaid.verdict == "not testable here" and "in every base is not measured" in unsaid.sentence


def test_a_claim_that_nothing_measures_is_refused():
    with pytest.raises(ConfigError, match="no function measures claim 'mine'; expected one of boost_components"):
        evaluate(LEDGER["control"].model_copy(update={"id": "mine"}), {})
