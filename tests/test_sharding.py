"""Where a model's weights lie: dispatched by accelerate over memory and disk, read by passes alone and not trained."""

import numpy as np
import pytest
import torch
from accelerate import dispatch_model

from attribution.causes import ablate, attribute
from attribution.components import Component, Components
from attribution.errors import ModelError, RecordError
from attribution.samples import Sample
from attribution.sharding import ALONE, device_of, local, present, processes, usable
from attribution.updates.recorder import Recorder
from attribution.worlds.build import word_tokenizer

SAMPLES = [Sample(prompt="w1 w2 w3", response=" w4 w5"), Sample(prompt="w7 w2", response=" w9")]
OTHERS = [Sample(prompt="w3 w1 w3", response=" w2 w5")]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer([f"w{i}" for i in range(19)])


def dispatched(model, tmp_path, everywhere=False):
    """The first layer in memory, the rest on disk; or all on disk."""
    places = dict.fromkeys(["model.rotary_emb", "model.layers.1", "model.norm", "lm_head"], "disk")
    first = "disk" if everywhere else "cpu"
    device_map = {"model.embed_tokens": first, "model.layers.0": first, **places}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path / "offloaded", force_hooks=True)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("reference", ["zero", "mean"])
def test_a_model_partly_on_disk_is_ablated_as_a_whole_one(tiny, tokenizer, tmp_path, everywhere, reference):
    given = {"reference": reference, "counterfactuals": OTHERS}
    expected = attribute(tiny("llama"), tokenizer, SAMPLES, **given)
    model = dispatched(tiny("llama"), tmp_path, everywhere)
    assert any(parameter.is_meta for parameter in model.parameters()) and device_of(model).type == "cpu"
    found = attribute(model, tokenizer, SAMPLES, **given)
    assert torch.allclose(found.per_sample, expected.per_sample, atol=1e-6) and expected.per_sample.abs().max() > 0.1
    sets = {"two": [Component("head", 0, 1), Component("neuron", 1, 3), Component("row", -1, 5)]}
    effects = [ablate(each, tokenizer, SAMPLES, sets, **given)["effect"] for each in (model, tiny("llama"))]
    np.testing.assert_allclose(*effects, atol=1e-6)
    assert all(p.is_meta for p in model.model.layers[1].parameters())  # nothing stays behind


@pytest.mark.parametrize(
    ("asked", "called"),
    [
        ({"method": "gradient"}, "method 'gradient'"),
        ({"method": "integrated"}, "method 'integrated'"),
        ({"method": "ablation", "path": "direct"}, "method 'ablation' with path='direct'"),
    ],
)
def test_other_questions_need_all_weights_in_memory(tiny, tokenizer, tmp_path, asked, called):
    model = dispatched(tiny("llama"), tmp_path)
    with pytest.raises(ModelError, match=f"offloaded; open it where all of them fit .* {called} needs"):
        attribute(model, tokenizer, SAMPLES, **asked)


def test_a_dispatched_model_is_not_trained(tiny, tmp_path):
    model = dispatched(tiny("llama"), tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RecordError, match="dispatched over cpu, disk"), Recorder(tmp_path / "run").attach(model, optimizer):
        pytest.fail("attached")
    assert not (tmp_path / "run").exists()


def test_one_process_sums_alone(tiny):
    model = tiny("llama")
    assert processes(torch.device("cpu")) is ALONE and Components(model).together is ALONE
    value = torch.arange(3.0)
    assert ALONE.sum(value) is value and ALONE.rows(value) is value and ALONE.sums(1.5) == [1.5] and ALONE.each(2.0) == [[2.0]]
    assert local(model.lm_head.weight).data_ptr() == model.lm_head.weight.data_ptr()
    with usable(model), present(model, model.lm_head):
        assert not model._forward_hooks and not model._forward_pre_hooks
