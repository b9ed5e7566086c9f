"""What the gradient of a training batch says of causes, against taps on the same samples."""

import pytest
import torch

from attribution.capture import scored_logits
from attribution.causes.gradient import first_order
from attribution.causes.reference import zeros
from attribution.components import Components
from attribution.metrics import log_prob
from attribution.samples import Encoded, collate
from attribution.updates.batch import BatchWatch


def batch_of(count: int, vocabulary: int):
    generator = torch.Generator().manual_seed(5)
    lengths = [5 + i % 3 for i in range(count)]
    draw = [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [Encoded(tuple(ids), 2 + i % 2, 1.0, ()) for i, ids in enumerate(draw)]


def backward(model, encoded, *, parts=1, scale=1.0, elsewhere=False):
    for part in range(parts):
        batch = collate(encoded[part::parts])
        if elsewhere:
            logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
            loss = -torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()).neg()
        else:
            items = sum(len(e.ids) - e.start for e in encoded) if parts > 1 else None
            kwargs = {} if items is None else {"num_items_in_batch": items}
            loss = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels, **kwargs).loss
        (loss * scale).backward()


def tapped(components, encoded):
    return first_order(components, collate(encoded), zeros(components.parts), log_prob).sum(1).double()


def causes_of(watch, found):
    gradients = watch.gradients(found)
    return watch.causes(found, gradients, watch.components.first_order(gradients))


@torch.no_grad()
def logits(components, encoded):
    return scored_logits(components.parts, collate(encoded))


@pytest.fixture
def watch(tiny, family, tied):
    components = Components(tiny(family, tied=tied))
    watch = BatchWatch(components)
    watch.start()
    yield watch
    watch.stop()


@pytest.mark.parametrize(("parts", "scale", "clip"), [(1, 1.0, None), (1, 0.25, 0.01), (3, 1.0, 0.1)])
def test_causes_are_the_tapped_ones_with_clip_scale_and_normalizer_undone(watch, parts, scale, clip):
    components, model = watch.components, watch.components.parts.model
    encoded = batch_of(6, components.parts.vocabulary)
    backward(model, encoded, parts=parts, scale=scale)
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    found = watch.take()
    tokens = sum(len(e.ids) - e.start for e in encoded)
    assert found.normalizer == pytest.approx(tokens / scale, rel=1e-5)
    assert (found.clip_factor < 0.5) if clip else (found.clip_factor == 1.0)
    causes = causes_of(watch, found)
    expected = tapped(components, encoded)
    assert causes.abs().max() > 0.1
    torch.testing.assert_close(causes, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    direct = log_prob(logits(components, encoded), collate(encoded)).sum().item()
    assert found.log_prob == pytest.approx(direct, rel=1e-5)
    assert found.loss == pytest.approx(-direct * scale / tokens, rel=1e-5)


def test_again_is_the_same_where_nothing_moved_and_follows_where_it_did(watch):
    components, model = watch.components, watch.components.parts.model
    encoded = batch_of(6, components.parts.vocabulary)
    backward(model, encoded, parts=2)
    found = watch.take()
    before = causes_of(watch, found)
    total, causes = watch.again(found)
    assert total == pytest.approx(found.log_prob, rel=1e-5)
    torch.testing.assert_close(causes, before, rtol=1e-4, atol=1e-5 * before.abs().max().item())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * (parameter.grad if parameter.grad is not None else 0)
    assert watch.again(found)[0] > total


def test_again_repeats_the_dropout_of_the_training_pass(tiny):
    model = tiny("gpt2").train()
    components = Components(model)
    watch = BatchWatch(components)
    watch.start()
    encoded = batch_of(6, components.parts.vocabulary)
    backward(model, encoded)
    found = watch.take()
    state = torch.get_rng_state()
    first, second = (watch.again(found)[0] for _ in range(2))
    watch.stop()
    assert first == second == pytest.approx(found.log_prob, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    assert first != pytest.approx(log_prob(logits(components, encoded), collate(encoded)).sum().item(), rel=1e-3)


def test_a_loss_made_elsewhere_is_recorded_as_optimized(watch):
    components, model = watch.components, watch.components.parts.model
    encoded = batch_of(6, components.parts.vocabulary)
    backward(model, encoded, elsewhere=True)
    found = watch.take()
    assert len(found.passes) == 1
    assert found.normalizer is None and found.log_prob is None and watch.again(found) is None
    tokens = sum(len(e.ids) - e.start for e in encoded)
    expected = tapped(components, encoded) / tokens
    causes = causes_of(watch, found)
    torch.testing.assert_close(causes, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_no_clip_factor_where_no_single_one_explains_the_gradient(watch):
    model = watch.components.parts.model
    backward(model, batch_of(6, watch.components.parts.vocabulary))
    largest = watch.components.parts.final_norm.weight.grad.abs().max().item()
    torch.nn.utils.clip_grad_value_(model.parameters(), largest / 2)
    assert watch.take().clip_factor is None


def test_passes_without_a_backward_or_without_gradients_are_not_the_batch(watch):
    components, model = watch.components, watch.components.parts.model
    encoded = batch_of(6, components.parts.vocabulary)
    batch = collate(encoded[:2])
    model(input_ids=batch.ids, labels=batch.labels)
    with torch.no_grad():
        model(input_ids=batch.ids, labels=batch.labels)
    with watch.paused():
        model(input_ids=batch.ids, labels=batch.labels).loss.backward()
    model.zero_grad()
    backward(model, encoded)
    found = watch.take()
    assert len(found.passes) == 1
    assert found.normalizer == sum(len(e.ids) - e.start for e in encoded)
    assert watch.take().passes == []


def test_the_parts_of_a_tied_matrix_add_up(tiny):
    model = tiny("llama", tied=True)
    components = Components(model)
    watch = BatchWatch(components)
    watch.start()
    backward(model, batch_of(6, components.parts.vocabulary))
    gradients = watch.gradients(watch.take())
    watch.stop()
    embedding, unembedding = gradients["model.embed_tokens.weight"], gradients["lm_head.weight"]
    torch.testing.assert_close(embedding + unembedding, model.lm_head.weight.grad)
    assert embedding.abs().sum() > 0 and unembedding.abs().sum() > 0


def test_hooks_are_gone_after_stop(tiny):
    components = Components(tiny("gpt2", tied=True))
    watch = BatchWatch(components)
    watch.start()
    watch.stop()
    model = components.parts.model
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(module, kind) for module in model.modules() for kind in kinds)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_batch_is_repeated_under_checkpointing(tiny, reentrant):
    """Where segments are reentrant, gradients of their parameters cannot be asked for: they are repeated without."""
    causes = []
    for checkpointing in (False, True):
        model = tiny("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        watch = BatchWatch(Components(model))
        watch.start()
        ids = torch.arange(3, 17).view(2, 7)
        model(input_ids=ids, labels=ids).loss.backward()
        found = watch.again(watch.take())
        watch.stop()
        assert found is not None
        causes.append(found[1])
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == checkpointing
    torch.testing.assert_close(causes[0], causes[1], rtol=1e-5, atol=1e-7)
    assert causes[0][:8].abs().min() > 1e-5
