"""Directions are differences of means of the stream, and adding or projecting out does to the stream what it says."""

import re

import pytest
import torch
from by_name import names

from attribution.capture import streamed
from attribution.causes import given, steering
from attribution.causes.steering import Steering
from attribution.errors import ConfigError, DataError, ModelError
from attribution.metrics import METRICS
from attribution.models import anatomy
from attribution.samples import ProbeSet, Sample, collate, encode

DEPTH = 2
TOWARD = [Sample(prompt="w1 w2 w3", response=" w4"), Sample(prompt="w7", response=" w9 w8 w7")]
AWAY = [
    Sample(prompt="w11 w2", response=" w4"),
    Sample(prompt="w5 w6 w8 w3", response=" w9"),
    Sample(prompt="w2", response=" w9"),
]


@pytest.fixture
def sets():
    return ProbeSet(name="kind", samples=tuple(TOWARD)), ProbeSet(name="plain", samples=tuple(AWAY))


def streams(model, ids):
    """[depth + 1, position, width], by hooks on the layers and the final norm."""
    kept = []
    modules = [*model.get_submodule(names(model).layers), model.get_submodule(names(model).final)]
    handles = [module.register_forward_pre_hook(lambda _m, args: kept.append(args[0][0])) for module in modules]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(kept)


@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("position", ["last", "mean"])
def test_a_direction_is_the_difference_of_means(tiny, family, tokenizer, sets, agree, position, size, monkeypatch):
    monkeypatch.setattr(steering, "BATCH_SIZE", size)
    model = tiny(family)
    means = []
    for samples in (TOWARD, AWAY):
        found = [streams(model, tokenizer(s.prompt)["input_ids"]) for s in samples]  # each alone, without its response
        means.append(torch.stack([f[:, -1] if position == "last" else f.mean(1) for f in found]).mean(0))
    found = steering.steering(model, tokenizer, *sets, position=position)
    assert found.vectors.shape == (DEPTH + 1, 16) and (found.toward, found.away) == ("kind", "plain")
    agree(found.vectors, means[0] - means[1])
    normalized = steering.steering(model, tokenizer, *sets, position=position, normalized=True).vectors
    agree(normalized.norm(dim=1), torch.ones(DEPTH + 1))
    agree(normalized, found.vectors / found.vectors.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("layer", range(DEPTH + 1))
def test_adding_moves_the_stream_there_and_nowhere_before(tiny, family, tokenizer, sets, layer):
    model, ids = tiny(family), [1, 5, 9, 11]
    found = steering.steering(model, tokenizer, *sets)
    before = streams(model, ids)
    with found.add(model, layer, -1.5):
        after = streams_inside(model, ids)
    assert torch.equal(after[:layer], before[:layer])
    torch.testing.assert_close(after[layer], before[layer] - 1.5 * found.vectors[layer])
    if layer < DEPTH:
        assert (after[-1] - before[-1]).abs().max() > 1e-3
    assert torch.equal(streams(model, ids), before)  # nothing stays


def streams_inside(model, ids):
    """Streams as the layers get them, seen after the hooks that are there already."""
    parts, kept = anatomy(model), {}
    with streamed(parts, {n: lambda value, n=n: kept.setdefault(n, value) for n in range(DEPTH + 1)}), torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    return torch.stack([kept[n][0] for n in range(DEPTH + 1)])


@pytest.mark.parametrize("everywhere", [False, True])
def test_projecting_out_leaves_nothing_along_the_direction(tiny, family, tokenizer, sets, everywhere):
    model, ids = tiny(family), [1, 5, 9, 11]
    found = steering.steering(model, tokenizer, *sets)
    unit = found.vectors[1] / found.vectors[1].norm()
    before = streams(model, ids)
    with found.project_out(model, 1, everywhere=everywhere):
        after = streams_inside(model, ids)
    along = (after @ unit).abs().amax(1)
    assert along[1] < 1e-5 and (before[1] @ unit).abs().max() > 1e-2
    assert (along.max() < 1e-5) == everywhere
    if not everywhere:
        torch.testing.assert_close(after[1], before[1] - (before[1] @ unit)[:, None] * unit)
        assert torch.equal(after[0], before[0])


@pytest.mark.parametrize("size", [1, 64])
def test_the_reader_reads_the_metric_under_steering(tiny, tokenizer, sets, samples, monkeypatch, size):
    monkeypatch.setattr(steering, "BATCH_SIZE", size)
    model = tiny("llama").train()
    found = steering.steering(model, tokenizer, *sets)
    table = found.read(model, tokenizer, samples, 1, coefficients=[-2, 0, 1.5], metric="logit_difference")
    assert list(table["intervention"]) == ["add"] * 3 + ["project out"] and list(table["coefficient"][:3]) == [-2, 0, 1.5]
    weights, values = torch.tensor([s.weight for s in samples]), []
    batch = collate(encode(tokenizer, samples))
    for amount in (0, -2, 0, 1.5, None):
        layer = model.eval().model.layers[1]

        def move(_module, args, amount=amount):
            direction = found.vectors[1]
            if amount is None:
                unit = direction / direction.norm()
                return (args[0] - (args[0] @ unit)[..., None] * unit, *args[1:])
            return (args[0] + amount * direction, *args[1:])

        handle = layer.register_forward_pre_hook(move)
        with torch.no_grad():
            values.append(METRICS["logit_difference"](model(input_ids=batch.ids).logits[batch.scored], batch))
        handle.remove()
    assert table["metric"].to_numpy() == pytest.approx([v.mean().item() for v in values[1:]], abs=1e-5)
    assert table["change"].to_numpy() == pytest.approx(
        [((v - values[0]) * weights).mean().item() for v in values[1:]], abs=1e-5
    )
    assert table["change"][1] == 0 and table["change"].abs()[[0, 2, 3]].min() > 1e-3


def test_it_saves_and_loads(tiny, tokenizer, sets, tmp_path):
    found = steering.steering(tiny("llama"), tokenizer, *sets, position="mean", normalized=True)
    again = Steering.load(found.save(tmp_path / "kind.safetensors"))
    assert torch.equal(again.vectors, found.vectors)
    assert (again.position, again.normalized, again.toward, again.away) == ("mean", True, "kind", "plain")


def test_no_hook_outlives_its_block(tiny, tokenizer, sets):
    model = tiny("llama")
    found = steering.steering(model, tokenizer, *sets)

    def hooks():
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    assert hooks() == 0
    for inside in (found.add(model, 0), found.project_out(model, 2, everywhere=True)):
        with pytest.raises(ZeroDivisionError), inside:
            assert hooks() > 0
            _ = 1 / 0
        assert hooks() == 0


# Refusals


def test_wrong_arguments_are_named(tiny, tokenizer, sets, tmp_path):
    model = tiny("llama")
    with pytest.raises(ConfigError, match="unknown position 'first'; expected last, mean"):
        steering.steering(model, tokenizer, *sets, position="first")
    with pytest.raises(ConfigError, match=r"do not differ before layer 0 at position 'last'.*give sets that differ there"):
        steering.steering(model, tokenizer, sets[0], sets[0], normalized=True)
    found = steering.steering(model, tokenizer, *sets)
    for layer in (-1, DEPTH + 1):
        with pytest.raises(ConfigError, match=f"no stream before layer {layer}; expected 0 to 2"), found.add(model, layer):
            pass
    none = steering.steering(model, tokenizer, sets[0], sets[0])
    with pytest.raises(ConfigError, match="direction before layer 1 has length zero"), none.project_out(model, 1):
        pass
    wide = Steering(torch.zeros(3, 5), "last", False, "a", "b")
    with pytest.raises(ModelError, match="2 layers of width 5 do not fit a model of 2 layers of width 16"), wide.add(model, 0):
        pass
    with pytest.raises(DataError, match="does not know a word"):
        found.read(model, tokenizer, [Sample(prompt="w1", response=" nobody")], 1)
    with pytest.raises(ConfigError, match="unknown metric 'loss'"):
        found.read(model, tokenizer, TOWARD, 1, metric="loss")
    (tmp_path / "bad").write_text("nothing")
    for path in ("bad", "absent"):
        with pytest.raises(DataError, match=re.escape(f"{path} holds no steering directions")):
            Steering.load(tmp_path / path)
    with pytest.raises(DataError, match="cannot write"):
        found.save(tmp_path / "no" / "such" / "place")
    assert given.BATCH_SIZE > 0
