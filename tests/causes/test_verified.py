"""A ranking put to the test: the top and a random rest are ablated exactly, and what that cost is told."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from attribution.causes import attribute
from attribution.causes.verified import verified_ranking
from attribution.errors import ConfigError


@pytest.mark.parametrize("method", ["gradient", "integrated", "conductance"])
def test_the_top_is_ablated_exactly(tiny, tokenizer, samples, counterfactuals, method):
    model = tiny("llama")
    given = {"reference": "resample", "counterfactuals": counterfactuals, "metric": "log_odds_per_token"}
    plain = attribute(model, tokenizer, samples, method=method, **given)
    found = attribute(model, tokenizer, samples, method=method, verify=6, **given)
    exact = attribute(model, tokenizer, samples, **given).table.set_index(["kind", "layer", "index"])["effect"]
    pd.testing.assert_frame_equal(found.table, plain.table)
    checked = found.verified
    assert checked is not None and list(checked.table["chosen"]) == ["top"] * 6 + ["random"] * 6
    assert list(checked.table) == ["kind", "layer", "index", "first_order", "exact", "chosen"]
    ranked = plain.table.reindex(plain.table["effect"].abs().sort_values(ascending=False).index)
    assert list(checked.table["first_order"][:6]) == list(ranked["effect"][:6])
    names = list(checked.table[["kind", "layer", "index"]].itertuples(index=False, name=None))
    assert len(set(names)) == 12
    assert checked.table["exact"].to_numpy() == pytest.approx([exact[name] for name in names], abs=1e-5)
    for which, part in checked.table.groupby("chosen"):
        assert checked.spearman[which] == pytest.approx(spearmanr(part["first_order"], part["exact"]).statistic)
    assert found.passes == pytest.approx(plain.passes + checked.passes) and checked.passes > 2
    top, rest = (checked.table.loc[checked.table["chosen"] == which, "exact"].abs() for which in ("top", "random"))
    assert checked.missed == (rest > top.median()).mean()


def test_the_draw_depends_on_the_seed_alone(tiny, tokenizer, samples):
    def drawn(seed):
        found = attribute(tiny("llama"), tokenizer, samples, method="gradient", verify=4, seed=seed).verified.table
        return list(found[found["chosen"] == "random"][["kind", "layer", "index"]].itertuples(index=False, name=None))

    assert drawn(0) == drawn(0) != drawn(1)


def test_first_order_ranks_small_units_well(planted):
    from attribution.samples import Sample
    from attribution.worlds import planted as world

    model, tokenizer = planted
    samples = [Sample(**row) for row in world.prompts(16, seed=3, star="agree")]
    found = attribute(model, tokenizer, samples, method="gradient", verify=24)
    assert found.verified.spearman["top"] > 0.5 and found.verified.missed < 0.2


def test_fewer_components_than_asked_for():
    table = pd.DataFrame({"kind": "head", "layer": 0, "index": range(5), "effect": [1.0, -3.0, 2.0, 0.0, 0.5]})

    class Exact:
        passes = 7.0

        def __init__(self, chosen):
            self.table = chosen[["kind", "layer", "index"]].assign(effect=2 * chosen["effect"]).sort_values("index")

    found = verified_ranking(table, 3, 0, Exact)
    assert list(found.table["index"])[:3] == [1, 2, 0] and set(found.table["index"]) == set(range(5))
    assert list(found.table["chosen"]) == ["top"] * 3 + ["random"] * 2 and found.passes == 7.0
    assert list(found.table["exact"]) == [2 * value for value in found.table["first_order"]]
    assert found.spearman["top"] == 1 and np.isnan(found.spearman["random"]) and found.missed == 0
    every = verified_ranking(table, 9, 0, Exact)
    assert len(every.table) == 5 and set(every.table["chosen"]) == {"top"} and every.missed == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"verify": 3}, "verify=3 is not possible: ablation is exact already"),
        ({"method": "gradient", "verify": -1}, "verify=-1 is not possible: expected how many"),
    ],
)
def test_what_cannot_be_verified_is_said(tiny, tokenizer, samples, given, message):
    with pytest.raises(ConfigError, match=message):
        attribute(tiny("llama"), tokenizer, samples, **given)
