"""What projections put out with one vector more in the stream they read: in closed form, and by running the norm and them."""

import pytest
import torch
from torch import nn

from attribution.causes.projected import Norm, Projected
from attribution.components import Components
from attribution.models import anatomy
from attribution.replay import Replay
from attribution.samples import collate, encode

WITH_NORMS_BEFORE = ("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gpt2", "gpt_neo", "gpt_neox")


@pytest.fixture
def replay(tiny, family, tokenizer, samples):
    return Replay(Components(tiny(family)).parts, collate(encode(tokenizer, samples)))


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_outputs_are_those_of_running_them(replay, family, agree, size):
    if family not in WITH_NORMS_BEFORE:
        pytest.skip("no norm before the projections")
    with torch.no_grad():
        found = Projected.of(replay, 1)
        assert found is not None, "no projection was found"
        hidden, generator = replay.hidden[1], torch.Generator().manual_seed(0)
        change = size * torch.randn(3, *hidden.shape[:2], generator=generator)
        written = torch.randn(3, hidden.shape[-1], generator=generator)
        streams = (hidden + change[..., None] * written[:, None, None]).flatten(0, 1)
        outputs = found(change, written)
        for projection, norm in replay.through[1].items():
            agree(outputs[projection], projection(norm(streams)))
            assert outputs[norm].isnan().all() and outputs[norm].shape == streams.shape


def test_projections_of_the_attention_are_found_and_those_after_it_only_where_they_read_the_same(replay, family):
    if family not in WITH_NORMS_BEFORE:
        assert Projected.of(replay, 1) is None or family in ("gemma2", "gemma3_text") or replay.parts.row.experts
        return
    parts = replay.parts
    wanted = {
        parts.projection(1, each) for each in parts.row.projections if parts.parallel or not {"gate", "up"} & {*each.parts}
    }
    assert {*replay.through[1]} == wanted


def test_after_the_last_layer_and_in_half_precision_there_is_none(tiny, tokenizer, samples):
    parts, batch = anatomy(tiny("llama")), collate(encode(tokenizer, samples))
    assert Projected.of(Replay(parts, batch), parts.depth) is None
    half = anatomy(tiny("llama").bfloat16())
    assert Projected.of(Replay(half, batch), 1) is None


def test_a_norm_of_another_formula_is_not_taken_for_one():
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert Norm.of(nn.RMSNorm(8, eps=1e-6), hidden) and Norm.of(nn.LayerNorm(8), hidden)

    class Other(nn.RMSNorm):
        def forward(self, x):
            return super().forward(x) * (1 + 1e-3)

    assert Norm.of(Other(8, eps=1e-6), hidden) is None
    assert Norm.of(nn.Identity(), hidden) is None
    assert Norm.of(nn.RMSNorm(8, eps=1e-6, device="meta"), hidden) is None


def test_where_one_vector_is_most_of_the_stream_what_is_left_is_still_right():
    torch.manual_seed(0)
    norm, projection, rest, vector = (
        nn.RMSNorm(16, eps=1e-6),
        nn.Linear(16, 4, bias=False),
        torch.randn(1, 2, 16),
        torch.randn(16),
    )
    with torch.no_grad():
        hidden = rest + 300 * vector
        formula = Norm.of(norm, hidden)
        assert formula is not None
        change = torch.full((1, 1, 2), -300.0)
        out = Projected(norm, hidden, {norm: (formula, [projection])})(change, vector[None])[projection]
        expected = projection(norm(rest))
    assert (out - expected).abs().max() < 3e-4 * expected.abs().max()  # what float32 keeps of the sum
