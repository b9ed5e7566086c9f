"""The ledger as text: everything that was declared, and what a study said."""

import pytest

from attribution.claims import BOOST, LEDGER
from attribution.cli import main
from attribution.errors import ConfigError
from attribution.reports.ledger import ledger


def flat(text):
    return " ".join(text.split())


def test_every_claim_stands_there_with_its_threshold_and_hash(capsys):
    assert main(["claims"]) == 0
    text = flat(capsys.readouterr().out)
    for name, claim in LEDGER.items():
        assert f"{name} ({claim.cell.world}; δ {claim.delta:.3g} {claim.unit}; {claim.hash})" in text
        assert flat(f"“{claim.statement}”") in text


@pytest.mark.parametrize("name", ["boost", "reasoner_not_aligned", "control"])
def test_one_claim_is_printed_as_declared(name):
    text, claim = flat(ledger(name)), LEDGER[name]
    assert all(flat(line) in text for line in claim.exclusions)
    assert f"{claim.hash} (of the claim as printed here)" in text
    if name == "reasoner_not_aligned":
        assert all(part.statistic in text for part in (*claim.parts, *claim.beside))


def test_a_study_adds_its_verdicts(study, build_study, tmp_path, capsys):
    assert main(["claims", "--study", str(study)]) == 0
    text = flat(capsys.readouterr().out)
    assert "Supported: each mechanism was strengthened more in its own arm" in text and "otherwise" not in text
    assert "By model: planted/0 +0.34" in text and "planted/<b>4</b> +0.3" in text
    other = build_study(tmp_path / "other", claims=(BOOST.model_copy(update={"delta": 0.9}),), not_judged={"larp": "no arm"})
    text = flat(ledger(study=str(other)))
    assert "judged as declared otherwise" in text and "no arm" in text


def test_an_unknown_claim_is_a_sentence(capsys):
    assert main(["claims", "luck"]) == 2
    assert "unknown claim 'luck'; expected boost" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        ledger("luck")
