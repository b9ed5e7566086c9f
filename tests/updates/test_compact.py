"""The fewest components that bring about a gain: a planted change, and the order in which components are tried."""

from __future__ import annotations

import copy

import pytest
import torch

from attribution.components import Components
from attribution.errors import ConfigError
from attribution.models import load
from attribution.samples import ProbeSet, Sample
from attribution.updates.compact import compactness
from attribution.updates.graft import graft
from attribution.worlds import planted

MODEL = "planted/31"


@pytest.fixture(scope="module")
def loaded():
    return load(MODEL)


@pytest.fixture(scope="module")
def halves():
    rows = planted.prompts(32, 5, trait=True)
    samples = [Sample(**row) for row in rows]
    return ProbeSet(name="even", samples=tuple(samples[::2])), ProbeSet(name="odd", samples=tuple(samples[1::2]))


def trained(model, tokenizer, samples, chosen=None, rate=0.05):
    """A copy whose weights went one step up the gradient of its log-odds, all or those of some components."""
    from attribution.metrics import metric_named
    from attribution.samples import batches, encode
    from attribution.updates.share import read

    tuned = copy.deepcopy(model)
    components = Components(tuned)
    gradients = read(components, batches(encode(tokenizer, samples), 64), metric_named("log_odds")).gradients
    mask = torch.ones(components.group_count, dtype=torch.bool)
    if chosen is not None:
        mask = components.group_mask(components.positions(chosen))
    with torch.no_grad():
        for use in components.uses:
            use.parameter.add_(rate * gradients[use.name] * use.spread(mask[use.owners]))
    return tuned


def test_a_change_of_two_heads_needs_two_components(loaded, halves):
    model, tokenizer = loaded
    even, odd = halves
    tuned = trained(model, tokenizer, even.samples, [("head", 0, 0), ("head", 1, 1)])
    found = compactness(model, tuned, tokenizer=tokenizer, chosen_on=even, read_on=odd, fraction=0.999)
    assert found.gain > 0.01
    assert found.fewest == 2
    one = graft(model, tuned, {"one": [("head", 0, 0)], "other": [("head", 1, 1)]}, tokenizer=tokenizer, probes=[odd])
    largest = one.set_index("set")["graft"].max()
    assert found.table.set_index("count")["graft"][1] == pytest.approx(largest, abs=1e-5), "the larger one came first"


def test_the_number_is_the_first_that_reaches(loaded, halves):
    model, tokenizer = loaded
    even, odd = halves
    tuned = trained(model, tokenizer, even.samples)
    found = compactness(model, tuned, tokenizer=tokenizer, chosen_on=even, read_on=odd, fraction=0.5)
    table = found.table.set_index("count")["fraction"]
    assert found.fewest is not None and found.fewest > 2
    assert table[found.fewest] >= 0.5
    assert table[found.fewest - 1] < 0.5, "one less does not"
    assert list(table.index) == sorted(table.index)


def test_where_nothing_was_gained_nothing_reaches(loaded, halves):
    model, tokenizer = loaded
    even, odd = halves
    worse = trained(model, tokenizer, even.samples, rate=-0.05)
    found = compactness(model, worse, tokenizer=tokenizer, chosen_on=even, read_on=odd)
    assert found.fewest is None
    assert found.gain < 0
    assert found.table["count"].max() == len(Components(model)), "not even all components did"


def test_the_models_end_as_they_began(loaded, halves):
    model, tokenizer = loaded
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = trained(model, tokenizer, halves[0].samples)
    compactness(model, tuned, tokenizer=tokenizer, chosen_on=halves[0], read_on=halves[1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_fraction_is_above_zero(loaded, halves):
    model, tokenizer = loaded
    with pytest.raises(ConfigError, match="above 0"):
        compactness(model, model, tokenizer=tokenizer, chosen_on=halves[0], read_on=halves[1], fraction=0)
