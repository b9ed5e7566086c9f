"""Reference values are the activations they claim to be, and bad counterfactuals are refused."""

import re

import pytest
import torch

from attribution.capture import sites, tapped
from attribution.causes.reference import REFERENCES, aligned_activations, check_reference, mean_activations, zeros
from attribution.errors import ConfigError, DataError
from attribution.models import anatomy
from attribution.samples import Encoded, Sample, batches, encode


def alone(parts, encoded):
    """Activations of every sample on its own, without padding: a list of {site: [position, feature]}."""
    found = []
    for one in encoded:
        with torch.no_grad(), tapped(parts, sites(parts)) as seen:
            parts.model(input_ids=torch.tensor([one.ids]))
        found.append({site: value[0] for site, value in seen.items()})
    return found


@pytest.fixture
def others(tokenizer, counterfactuals):
    return encode(tokenizer, counterfactuals)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_mean_is_over_tokens_not_padding(tiny, family, others, agree, size):
    parts = anatomy(tiny(family))
    expected = alone(parts, others)
    found = mean_activations(parts, batches(others, size))
    assert set(found) == set(sites(parts))
    for site, value in found.items():
        agree(value, torch.cat([one[site] for one in expected]).mean(0))


def test_aligned_activations_are_those_of_each_counterfactual(tiny, family, others, agree):
    parts = anatomy(tiny(family))
    found = aligned_activations(parts, others)
    for number, one in enumerate(alone(parts, others)):
        for site, value in one.items():
            agree(found[site][number, : len(value)], value)


def test_zero_is_zero_everywhere(tiny):
    parts = anatomy(tiny("llama"))
    assert all(zeros(parts)[site] == 0 for site in sites(parts))


# Refusals


def row(prompt, response):
    return Encoded(tuple(range(1, 1 + prompt + response)), prompt, 1.0, ())


def test_an_unknown_reference_names_the_known_ones():
    with pytest.raises(ConfigError, match=re.escape("'zeros'; expected zero, mean, resample")):
        check_reference("zeros", [row(3, 1)], None)
    assert REFERENCES == ("zero", "mean", "resample")


@pytest.mark.parametrize("others", [None, []])
@pytest.mark.parametrize("reference", ["mean", "resample"])
def test_missing_counterfactuals_are_asked_for(reference, others):
    with pytest.raises(DataError, match=f"'{reference}' takes its values from counterfactual samples; give"):
        check_reference(reference, [row(3, 1)], others)


def test_resampling_needs_one_of_equal_length_for_each():
    samples = [row(3, 1), row(4, 2)]
    with pytest.raises(DataError, match="1 counterfactuals for 2 samples; resampling needs one for each"):
        check_reference("resample", samples, samples[:1])
    for bad, tokens in ((row(5, 2), r"5 \+ 2"), (row(4, 3), r"4 \+ 3"), (row(5, 1), r"5 \+ 1")):
        with pytest.raises(DataError, match=rf"counterfactual 2 cannot be aligned: {tokens} tokens, the sample has 4 \+ 2;"):
            check_reference("resample", samples, [samples[0], bad])
    check_reference("resample", samples, samples)


def test_a_mean_needs_no_alignment_and_zero_needs_nothing():
    check_reference("mean", [row(3, 1)], [row(7, 2), row(2, 2)])
    check_reference("zero", [row(3, 1)], None)
    check_reference("zero", [row(3, 1)], [row(7, 2)])


def test_resampling_shows_in_the_metric(tiny, tokenizer, samples):
    """Another counterfactual at one place changes that sample alone."""
    from attribution.causes import attribute

    given = {"reference": "resample", "components": [("head", 0, 1), ("neuron", 1, 2)]}
    one = [Sample(prompt="w5 w5 w5", response=" w5 w5"), *samples[1:]]
    expected = attribute(tiny("llama"), tokenizer, samples, counterfactuals=samples, **given).per_sample
    found = attribute(tiny("llama"), tokenizer, samples, counterfactuals=one, **given).per_sample
    assert (found[:, 0] - expected[:, 0]).abs().min() > 1e-5
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], rtol=0, atol=1e-5)
