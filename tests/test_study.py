"""The embedded study: what it trains on, what it reads, and that the two are apart."""

import pytest

from attribution.models import load
from attribution.samples import encode, read_samples
from attribution.study import EMBEDDED, embedded
from attribution.worlds import planted as grammar


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_study_is_written_encodable_and_holds_probes_apart(tmp_path, name):
    study = embedded(name, tmp_path)
    again = embedded(name, tmp_path)
    assert study == again
    for config in study.arms.values():
        tokenizer = load(config.model).tokenizer
        training = read_samples(config.data)
        encode(tokenizer, training)
        for file in config.probes:
            probes = read_samples(file)
            encode(tokenizer, probes)
            assert not {s.prompt for s in probes} & {s.prompt for s in training}
            assert all(any(f" {problem} ." in s.prompt for problem in grammar.HELD_OUT) for s in probes)
            assert not any(f" {problem} ." in s.prompt for s in training for problem in grammar.HELD_OUT)
