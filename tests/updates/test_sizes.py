"""Sizes of activations and gradients, against plain hooks and a plain backward pass."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attribution.components import Components
from attribution.metrics import log_odds
from attribution.samples import Sample, batches, encode
from attribution.updates import sizes
from attribution.updates.share import read
from attribution.updates.sizes import TrainingSizes
from attribution.worlds.build import word_tokenizer


def by_hand(model, ids, mask, scalar):
    """Root mean squares over real tokens, one site at a time: activations and gradients of `scalar(model)`."""
    parts = Components(model).parts
    seen, handles = {}, []
    for kind, modules in (("head", parts.attention_out), ("neuron", parts.mlp_out)):
        for layer, module in enumerate(modules):

            def keep(_module, args, key=(kind, layer)):
                args[0].retain_grad()
                seen[key] = args[0]

            handles.append(module.register_forward_pre_hook(keep))
    scalar().backward()
    for handle in handles:
        handle.remove()
    found = []
    for (kind, _layer), value in sorted(seen.items()):
        width = parts.head_dim if kind == "head" else 1
        found.append(
            [
                (each[mask.bool()].unflatten(-1, (-1, width)).square().sum(-1).mean(0).sqrt())
                for each in (value.detach(), value.grad)
            ]
        )
    return torch.cat([one for one, _ in found]), torch.cat([two for _, two in found])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 23])
@pytest.mark.parametrize("block", [1, 12, 35, 10_000])
@pytest.mark.parametrize("threads", [1, 2])
def test_squares_are_the_same_in_blocks_and_by_one_thread(monkeypatch, threads, block, tokens, kind):
    monkeypatch.setattr(sizes, "BLOCK", (block, block))
    monkeypatch.setattr(sizes, "BLOCK_OF_ONE", block)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    value, real = torch.randn(tokens, 1, 5).to(kind), torch.arange(tokens).remainder(3).clamp(max=1).float()
    every, some = sizes.squares(value, None), sizes.squares(value, real)
    assert every.dtype == some.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    wide = value.flatten(0, 1).double().square()
    assert torch.allclose(every.double(), wide.sum(0), rtol=1e-5)
    assert torch.allclose(some.double(), wide[real.bool()].sum(0), rtol=1e-5)


def test_tokens_are_counted_in_half_precision_too():
    mask = torch.ones(8, 1024, dtype=torch.bfloat16)
    assert sizes.counted(mask) == (8192, None)
    mask[3, -1] = 0  # the sum of the others in bf16 is 8192
    tokens, real = sizes.counted(mask)
    assert tokens == 8191 and real is not None and real.sum() == 8191


@pytest.fixture(scope="module")
def words():
    return word_tokenizer([*"abcdefghijklmnopqrs"])  # with the four special tokens, as many as the tiny models know


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_of_a_reading_in_several_batches(tiny, words, family):
    model = tiny(family)
    samples = [Sample(prompt=p, response=r) for p, r in (("a b", " c"), ("b c d e", " a b"), ("c", " d"), ("e d c b", " a"))]
    encoded = encode(words, samples)
    components = Components(model)
    sizes = read(components, batches(encoded, 3, torch.device("cpu")), log_odds, sized=True).sizes
    assert sizes is not None
    (whole,) = batches(encoded, 4, torch.device("cpu"))

    def scalar():
        logits = components.parts.unembed(model.base_model(whole.ids).last_hidden_state[whole.scored])
        kept.append(logits)
        logits.retain_grad()
        return log_odds(logits, whole).sum()  # every sample's own metric

    kept: list[torch.Tensor] = []
    activation, gradient = by_hand(model, whole.ids, whole.mask, scalar)
    units = len(activation)
    torch.testing.assert_close(sizes.activation[:units].float(), activation, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sizes.gradient[:units].float(), gradient, rtol=1e-4, atol=1e-6)
    (logits,) = kept
    centred = logits.detach() - logits.detach().mean(-1, keepdim=True)
    torch.testing.assert_close(sizes.activation[units:].float(), centred.square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sizes.gradient[units:].float(), logits.grad.square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)
    assert activation.min() > 1e-4 and gradient.min() > 1e-8


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "checkpointed, reentrant"])
def test_of_training_passes(tiny, checkpointing):
    """Two micro-batches of unequal length; a pass without a backward and one without gradients add nothing."""
    model = tiny("llama").train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    components = Components(model)
    watch = TrainingSizes(components)
    ids = torch.randint(3, 23, (5, 7))
    mask = torch.ones_like(ids)
    mask[3:, 4:] = 0
    labels = ids.where(mask.bool(), -100)
    watch.start()
    for part in (slice(0, 2), slice(2, 5)):
        watch.begin(mask[part])
        with torch.no_grad():
            model(ids[part])
        model(ids[part])
        loss = model(ids[part], attention_mask=mask[part], labels=labels[part]).loss * (labels[part][:, 1:] != -100).sum()
        loss.backward()
    watch.stop()
    sizes = watch.take().measured()
    model.gradient_checkpointing_disable()

    def scalar():
        return model(ids, attention_mask=mask, labels=labels).loss * (labels[:, 1:] != -100).sum()

    activation, gradient = by_hand(model, ids, mask, scalar)
    units = len(activation)
    torch.testing.assert_close(sizes.activation[:units].float(), activation, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sizes.gradient[:units].float(), gradient, rtol=1e-4, atol=1e-6)
    assert sizes.activation[units:].isnan().all()
    assert watch.take().measured().activation.isnan().all() and not any(
        module._forward_pre_hooks for module in components.parts.mlp_out
    )


def test_squares_are_summed_by_no_product_that_autocast_rounds(monkeypatch):
    """They are taken in training passes, under the trainer's autocast: that of a GPU rounds `mv`, that of a CPU does not."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # of one thread numpy sums them
    ran = set()

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    value = torch.full((3, 400, 6), 20.0)
    with Ops():
        found = sizes.squares(value, torch.ones(1200))
    assert torch.equal(found, torch.full((6,), 1200 * 400.0))
    assert "aten::addmv_" in ran and not torch._C._dispatch_has_kernel_for_dispatch_key("aten::addmv_", "AutocastCUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::mv", "AutocastCUDA")
    assert not ran & {f"aten::{name}" for name in ("mv", "mm", "bmm", "addmv", "addmm", "matmul", "einsum")}
