"""Whether bf16 hides changes: by fractions made of numbers, and by one training in both formats."""

import pandas as pd
import pytest

from attribution.claims import LEDGER
from attribution.claims.hidden import hidden
from attribution.claims.measured import measured_finding
from attribution.errors import RunError
from experiments import precision
from experiments.precision import changed

CLAIM = LEDGER["precision"]


def frames(half):
    rows = [(f"m{i}", dtype, rate, value + 0.01 * i) for i in range(5) for rate in (1e-5, 1e-3)
            for dtype, value in (("float32", 0.9), ("bfloat16", half if rate == 1e-5 else 0.9))]  # fmt: skip
    return {"changed": pd.DataFrame(rows, columns=["model", "dtype", "rate", "changed"])}


@pytest.mark.parametrize(("half", "word"), [(0.1, "supported"), (0.8, "contradicted")])
def test_what_is_hidden(half, word):
    found = measured_finding(CLAIM, hidden(CLAIM, frames(half)), {})
    assert found.verdict == word and found.estimate.mean == pytest.approx(0.9 - half)
    assert found.secondary["mean"].tolist() == pytest.approx([0.0])
    with pytest.raises(RunError, match="no fractions of changed weights"):
        hidden(CLAIM, {"changed": frames(half)["changed"].query("dtype == 'float32'")})
    with pytest.raises(RunError, match="no rows of 'changed'"):
        hidden(CLAIM, {})


def test_small_steps_vanish_in_bf16_and_large_ones_do_not(monkeypatch):
    monkeypatch.setattr(precision, "STEPS", 4)
    small = {dtype: changed("kindland", dtype, 1e-6) for dtype in ("float32", "bfloat16")}
    assert small["bfloat16"] < 0.2 < 0.5 < small["float32"]
    assert changed("kindland", "bfloat16", 1e-3) > 0.5
