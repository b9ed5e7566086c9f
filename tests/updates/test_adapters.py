"""LoRA in the space of effective weights: the twin computes as the adapted model, and the gradients are autograd's."""

import copy
import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from attribution.components import Components
from attribution.errors import RecordError
from attribution.models import anatomy, check
from attribution.samples import encode
from attribution.updates.adapters import Effective, EffectiveGradients, adapted

FAMILIES = ("gpt2", "llama", "qwen2")
QV = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "qwen2": ["q_proj", "v_proj"]}
IDS = torch.arange(16).view(2, 8)
REENTRANT = {"plain": None, "checkpointed": False, "reentrant": True}


def lora(family: str, targets: Any = "all-linear", **settings) -> LoraConfig:
    targets = QV[family] if targets == "q, v" else targets
    return LoraConfig(target_modules=targets, **{"r": 2, "lora_alpha": 3, "fan_in_fan_out": family == "gpt2", **settings})


@torch.no_grad()
def randomise(model: nn.Module) -> Any:
    """B starts at zero, where nothing differs from the base model."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.3)
    return model


@pytest.fixture
def with_lora(tiny):
    """`with_lora("llama", "q, v", r=3)`: a tiny model with random adapters, in eval mode; a GPT-2 has dropout when trained."""

    def build(family="llama", targets: Any = "all-linear", tied=False, dtype=torch.float32, **settings) -> Any:
        return randomise(get_peft_model(tiny(family, tied, dtype), lora(family, targets, **settings)).eval())

    return build


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=["all-linear", "q, v"])
def targets(request):
    return request.param


@pytest.fixture(params=REENTRANT)
def mode(request):
    return request.param


def norm_of(family: str) -> list[str]:
    return ["ln_f" if family == "gpt2" else "norm"]


def checkpointed(model, mode: str) -> None:
    if REENTRANT[mode] is not None:
        model.activation_checkpointing_enable({"use_reentrant": REENTRANT[mode]})


def merged(model) -> dict[str, nn.Parameter]:
    """Parameters of the model that PEFT itself makes of the active adapters."""
    plain = copy.deepcopy(model).merge_and_unload(adapter_names=model.active_adapters)
    return dict(plain.named_parameters(remove_duplicate=False))


def layer_of(effective: Effective, name: str) -> Any:
    return effective.originals[effective.model.get_submodule(name.removesuffix(".weight"))]


def close(found, expected, tolerance=1e-5) -> None:
    """Relative in norm, so that a wrong small matrix does not pass beside a large one."""
    assert found.shape == expected.shape and expected.norm() > 0
    assert (found - expected).norm() <= tolerance * expected.norm()


def same_logits(effective, model) -> None:
    with torch.no_grad():
        torch.testing.assert_close(effective.model(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def loss_of(model, ids=IDS, items=None) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False, **({"num_items_in_batch": items} if items else {})).loss


def state_of(model) -> list:
    """Whatever building the twin, or hooks, could change in the model."""

    def of(module):
        hooks = [list(found) for key, found in vars(module).items() if "hooks" in key and isinstance(found, dict)]
        parameters = [(id(p), p.requires_grad, p._version) for p in module._parameters.values() if p is not None]
        return hooks, parameters, [id(b) for b in module._buffers.values()], module.training, sorted(vars(module))

    return [(name, id(module), of(module)) for name, module in model.named_modules()]


# The twin


def test_the_twin_computes_as_the_adapted_model(with_lora, family, targets, tied):
    model = with_lora(family, targets, tied)
    effective = Effective(model)
    same_logits(effective, model)
    with model.disable_adapter(), torch.no_grad():
        assert (model(IDS).logits - effective.model(IDS).logits).abs().max() > 0.05
    assert adapted(model) and adapted(effective.original) and not adapted(effective.model)
    assert type(effective.model) is type(effective.original) and effective.model.config is effective.original.config
    components = Components(effective.model)
    assert components.parts.tied == tied and effective.moving <= set(components.stored)
    assert components.sizes.sum() == sum(use.parameter.numel() for use in components.uses)
    assert max(check(effective.model).values()) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "r": 3}], ids=["lora", "rslora"])
def test_its_weights_are_those_that_peft_merges(with_lora, family, targets, settings):
    model = with_lora(family, targets, **settings)
    effective = Effective(model)
    found, expected = dict(effective.model.named_parameters(remove_duplicate=False)), merged(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    names = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    assert effective.moving == {f"{name}.weight" for name in names} and len(names) > 1
    assert {type(effective.model.get_submodule(name)) for name in names} == {Conv1D if family == "gpt2" else nn.Linear}
    assert all(found[name].requires_grad for name in effective.moving)
    r = settings.get("r", 2)
    for name in names:  # against the formula, not PEFT
        layer = layer_of(effective, name)
        change = torch.einsum("or,ri->oi", layer.lora_B["default"].weight, layer.lora_A["default"].weight)
        change = 3 / (math.sqrt(r) if settings else r) * (change.T if family == "gpt2" else change)
        torch.testing.assert_close(found[f"{name}.weight"], layer.base_layer.weight + change, atol=1e-6, rtol=1e-6)


def test_it_adds_up_several_active_adapters(with_lora, family):
    model = with_lora(family, "q, v")
    model.add_adapter("second", lora(family, r=4))  # in other layers too
    model.add_adapter("inactive", lora(family))
    model.base_model.set_adapter(["default", "second"])
    effective = Effective(randomise(model))
    same_logits(effective, model)
    for name, expected in merged(model).items():
        torch.testing.assert_close(effective.model.get_parameter(name), expected, atol=1e-6, rtol=1e-6)


def test_refresh_follows_training_in_place(with_lora, family):
    model = with_lora(family, modules_to_save=norm_of(family))
    effective = Effective(model)
    places = {name: p.data_ptr() for name, p in effective.model.named_parameters()}
    before = {name: p.detach().clone() for name, p in effective.model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    loss_of(model).backward()
    optimizer.step()
    shared = {name for name in effective.moving if norm_of(family)[0] in name}
    for name in effective.moving:
        assert torch.equal(effective.model.get_parameter(name), before[name]) != (name in shared)
    effective.refresh()
    expected = merged(model)
    for name, parameter in effective.model.named_parameters():
        assert torch.equal(parameter, expected[name]) and parameter.data_ptr() == places[name], name
        assert torch.equal(parameter, before[name]) != (name in effective.moving), name


def test_everything_else_is_shared(with_lora, family, targets):
    effective = Effective(with_lora(family, targets))
    originals = {name.replace(".base_layer", ""): p for name, p in effective.original.named_parameters() if "lora_" not in name}
    for name, parameter in effective.model.named_parameters():
        assert (parameter is originals[name]) != (name in effective.moving), name
    buffers = dict(effective.original.named_buffers())
    assert all(buffer is buffers[name] for name, buffer in effective.model.named_buffers())
    with torch.no_grad():
        before = effective.model(IDS).logits
        effective.original.get_input_embeddings().get_parameter("weight")[3] += 1
        assert not torch.equal(effective.model(IDS).logits[:, 3:], before[:, 3:])


def test_building_leaves_the_original_as_it_was_and_takes_none_of_its_hooks(with_lora, family):
    model, fired = with_lora(family, modules_to_save=norm_of(family)), []
    checkpointed(model, "checkpointed")  # puts a hook on the embedding
    for module in model.modules():
        module.register_forward_hook(lambda *_: fired.append(1))
        module.register_full_backward_hook(lambda *_: fired.append(2))
    add_fused_lm_head(model.get_base_model())
    model.train()
    before = state_of(model)
    effective = Effective(model)
    assert state_of(model) == before
    effective.model.eval()
    effective.model(IDS).logits.sum().backward()
    assert not fired and state_of(model) == before
    assert effective.original.training and not hasattr(effective.model, "peft_config")
    assert "forward" in vars(effective.original) and "forward" not in vars(effective.model)


def test_modes_follow_at_refresh_and_are_the_twins_own(with_lora):
    model = with_lora("gpt2").train()
    effective = Effective(model)
    blocks, twins = model.get_base_model().transformer.h, effective.model.get_submodule("transformer.h")
    blocks[1].eval()
    assert all(module.training for module in effective.model.modules())
    effective.refresh()
    assert [{module.training for module in twins.get_submodule(i).modules()} for i in "01"] == [{True}, {False}]
    effective.model.eval()
    dropout, twin = blocks[0].attn.resid_dropout, twins.get_submodule("0.attn.resid_dropout")
    assert dropout.training and effective.originals[twin] is dropout is not twin and vars(twin)["p"] == 0.1


def test_modules_to_save_become_the_active_ones(with_lora):
    model = with_lora("llama", "q, v", modules_to_save=["lm_head", "norm"])
    wrapper = model.get_base_model().lm_head
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(2)
    effective = Effective(model)
    same_logits(effective, model)
    assert effective.model.get_parameter("lm_head.weight") is wrapper.modules_to_save["default"].weight
    assert {"lm_head.weight", "model.norm.weight"} <= effective.moving and "model.embed_tokens.weight" not in effective.moving
    model.add_adapter("second", lora("llama", "q, v"))
    model.set_adapter("second")
    assert Effective(model).model.get_parameter("lm_head.weight") is wrapper.original_module.weight


def test_biases_that_train_are_shared_and_moving(with_lora):
    effective = Effective(with_lora("qwen2", "q, v", bias="all"))
    names = {f"model.layers.{layer}.self_attn.{which}_proj.bias" for layer in (0, 1) for which in "qkv"}
    assert names < effective.moving
    layer = layer_of(effective, "model.layers.0.self_attn.q_proj")
    assert effective.model.get_parameter("model.layers.0.self_attn.q_proj.bias") is layer.base_layer.bias


def test_injected_and_wrapped_models_are_looked_into(tiny, with_lora):
    model = tiny("llama")
    assert not adapted(model)
    model.add_adapter(lora("llama"))
    effective = Effective(randomise(model))
    assert effective.original is model and adapted(model)
    same_logits(effective, model)
    inside = with_lora()
    assert Effective(nn.DataParallel(inside)).original is inside.get_base_model() and adapted(nn.DataParallel(inside))


def test_weights_are_computed_in_float32_and_then_cast(with_lora):
    effective = Effective(with_lora("llama", dtype=torch.bfloat16))
    for name in effective.moving:
        layer, found = layer_of(effective, name), effective.model.get_parameter(name)
        change = 1.5 * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
        assert found.dtype == torch.bfloat16 and torch.equal(found, (layer.base_layer.weight.float() + change).bfloat16())


# Gradients


def run(model, batches, **settings) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Training passes; returns the random state that each began from, and its ids."""
    seen = []
    for ids in batches:
        seen.append((torch.get_rng_state(), ids))
        loss_of(model, ids, **settings).backward()
    return seen


def compare(found, effective, seen, **settings) -> None:
    """With autograd on the twin, under the same random states; frozen weights get a gradient for the while."""
    weights = {name: effective.model.get_parameter(name) for name in found}
    frozen = [p.requires_grad_() for p in weights.values() if not p.requires_grad]
    expected = {name: torch.zeros_like(p) for name, p in weights.items()}
    effective.model.activation_checkpointing_disable()  # torch.autograd.grad does not go with the reentrant kind
    effective.refresh()
    for state, ids in seen:
        torch.set_rng_state(state)
        gradients = torch.autograd.grad(loss_of(effective.model, ids, **settings), list(weights.values()))
        expected = {name: expected[name] + g for name, g in zip(weights, gradients, strict=True)}
    for p in frozen:
        p.requires_grad_(False)
    for name, gradient in found.items():
        close(gradient, expected[name])


@pytest.fixture
def taught(with_lora):
    """`taught(..., mode="plain")`: a model in training mode, its twin, and its gradients, started."""
    started = []

    def build(*args, mode="plain", **settings):
        model = with_lora(*args, **settings)
        checkpointed(model, mode)
        effective = Effective(model.train())
        started.append(EffectiveGradients(effective))
        started[-1].start()
        return model, effective, started[-1]

    yield build
    for gradients in started:
        gradients.stop()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_are_those_of_autograd_on_effective_weights(taught, family, targets, tied, accumulation, mode):
    model, effective, gradients = taught(family, targets, tied, mode=mode)
    parts = anatomy(effective.model)
    outputs = {f"{n}.weight" for n, m in effective.model.named_modules() if m in {*parts.attention_out, *parts.mlp_out}}
    assert gradients.names == outputs | effective.moving and len(outputs) == 4
    items = 14 * accumulation if accumulation > 1 else None
    seen = run(model, [(IDS + 3 * i) % 23 for i in range(accumulation)], items=items)
    found = gradients.take()
    assert found.keys() == gradients.names and gradients.take() == {}
    compare(found, effective, seen, items=items)
    seen = run(model, [IDS])
    compare(gradients.take(), effective, seen)


@pytest.mark.parametrize("mode", ["plain", "checkpointed"])
def test_layers_below_the_first_adapter_have_gradients_too(taught, mode):
    model, effective, gradients = taught("llama", ["layers.1.mlp.down_proj"], mode=mode)
    if mode == "checkpointed":
        model.get_base_model().disable_input_require_grads()
    seen = run(model, [IDS])
    found = gradients.take()
    assert len(found) == 4
    compare(found, effective, seen)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_dropout_in_the_adapter_leaves_the_gradient_of_the_base_weight(taught):
    model, effective, gradients = taught("llama", lora_dropout=0.5)
    for name in effective.moving:
        layer_of(effective, name).base_layer.weight.requires_grad_()
    run(model, [IDS])
    for name, found in gradients.take().items():
        close(found, layer_of(effective, name).base_layer.weight.grad)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_adds_up_in_float32(taught, autocast):
    model, _, gradients = taught("llama", dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        run(model, [IDS])
        once = gradients.take()
        run(model, [IDS] * 3)
    for name, found in gradients.take().items():
        assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
        close(found, 3 * once[name], 1e-6)


def test_passes_that_do_not_train_leave_nothing(taught, mode):
    model, effective, gradients = taught(mode=mode)
    outputs = []
    handles = [layer_of(effective, n).register_forward_hook(lambda *at: outputs.append(at[2])) for n in gradients.names]
    with torch.no_grad():
        loss_of(model)
        model.generate(input_ids=IDS[:, :3], max_new_tokens=3, do_sample=False)
    assert len(outputs) >= 4 * len(handles) and not any(output.requires_grad for output in outputs)
    for handle in handles:
        handle.remove()
    loss = loss_of(model)  # differentiated, if at all, while looked away from
    with gradients.paused():
        loss.backward()
        with gradients.paused():
            run(model, [IDS])
        run(model, [IDS])
    assert gradients.take() == {}
    run(model, [IDS])
    assert gradients.take().keys() == gradients.names


def test_a_second_backward_pass_counts_again(taught):
    model, _, gradients = taught(mode="checkpointed")
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    once = gradients.take()
    loss.backward()
    for name, found in gradients.take().items():
        close(found, once[name])


def test_training_is_undisturbed_and_hooks_go(with_lora, family, mode):
    trained = []
    for watched in (False, True):
        torch.manual_seed(3)
        model = with_lora(family)
        checkpointed(model, mode)
        gradients = EffectiveGradients(Effective(model.train()))
        before = state_of(model)
        if watched:
            gradients.start()
            assert state_of(model) != before
        run(model, [IDS, IDS + 2])
        gradients.stop()
        assert state_of(model) == before and bool(gradients.take()) == watched
        trained.append([torch.get_rng_state(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        run(model, [IDS])
        assert gradients.take() == {}
    assert len(trained[0]) > 2 and all(torch.equal(*pair) for pair in zip(*trained, strict=True))


def test_checkpointed_activations_are_not_held(taught):
    """What the hooks need is recomputed with the rest; held, it would undo checkpointing."""
    held = {}
    for mode in ("plain", "checkpointed"):
        model, effective, gradients = taught(mode=mode)
        inputs = []
        for name in gradients.names:
            layer_of(effective, name).register_forward_pre_hook(
                lambda _, args, to=inputs: to.append(StorageWeakRef(args[0].untyped_storage()))
            )
        loss = loss_of(model)
        held[mode] = sum(not storage.expired() for storage in inputs)
        loss.backward()
        assert gradients.take().keys() == gradients.names
    assert held == {"plain": 14, "checkpointed": 0}


class Checked(TrainerCallback):
    """Compares, at the optimizer's step, what LoRA's matrices got with the chain rule from effective gradients."""

    compared = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.effective = Effective(kwargs["model"])
        self.gradients = EffectiveGradients(self.effective)
        self.gradients.start()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        found = self.gradients.take()
        for name in self.effective.moving:
            layer = layer_of(self.effective, name)
            a, b, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
            close(b.grad, s * found[name] @ a.detach().T, 1e-4)
            if b.detach().norm() > 0:
                close(a.grad, s * b.detach().T @ found[name], 1e-4)
                self.compared += 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_a_stock_trainer(tmp_path, fresh, training, reentrant):
    rows = [{"input_ids": list(e.ids), "labels": e.labels} for e in encode(fresh.tokenizer, training)]
    config = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2, bf16=False,
        learning_rate=0.01, max_grad_norm=0, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        max_length=None, dataloader_pin_memory=False, activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    checked = Checked()
    trainer = SFTTrainer(
        model=fresh.model, args=config, train_dataset=Dataset.from_list(rows), processing_class=fresh.tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0), callbacks=[checked],
    )  # fmt: skip
    trainer.train()
    assert checked.compared == len(checked.effective.moving) > 0  # at the first step B is zero
    model: Any = trainer.model
    model.eval()
    checked.effective.refresh()
    same_logits(checked.effective, model)


# What is refused


class Quantized(nn.Linear):
    """Stands for a linear of a quantization library."""


O_PROJ = "model.layers.0.self_attn.o_proj"


def of(config):
    return lambda model: get_peft_model(model, config)


def on(base: nn.Module):
    """LoRA whose first attention-out stands on another module."""

    def make(model):
        model = get_peft_model(model, lora("llama"))
        model.get_base_model().get_submodule(O_PROJ).base_layer = base
        return model

    return make


def then(change, **settings):
    """LoRA, changed afterwards."""

    def make(model):
        model = get_peft_model(model, lora("llama", **settings))
        change(model)
        return model

    return make


def with_a_second(model):
    model.add_adapter("second", lora("llama"))
    model.set_adapter("second")


def convolution(model):
    model.conv = nn.Conv2d(1, 1, 1)
    return get_peft_model(model, lora("llama", ["conv"]))


PROMPT = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
REFUSED = {
    "DoRA": (of(lora("llama", use_dora=True)), r"'default' at model.layers.0.*DoraLinearVariant.*use_dora"),
    "another variant": (of(lora("llama", alora_invocation_tokens=[1])), "ALoraLinearVariant"),
    "lora_bias": (of(lora("llama", ["q_proj"], lora_bias=True)), "trains a bias beside B.*lora_bias=False"),
    "AdaLoRA": (of(AdaLoraConfig(target_modules=["q_proj"], total_step=9)), "q_proj is peft.tuners.adalora.layer.SVDLinear"),
    "IA3": (of(IA3Config(target_modules=["k_proj"], feedforward_modules=[])), "k_proj is peft.tuners.ia3.layer.Linear"),
    "prompt tuning": (of(PROMPT), "'default' is of a PromptTuningConfig, which changes the prompt"),
    "an embedding": (of(lora("llama", ["embed_tokens"])), "model.embed_tokens is peft.tuners.lora.layer.Embedding"),
    "a convolution": (convolution, "conv is peft.tuners.lora.layer.Conv2d"),
    "tokens": (of(lora("llama", trainable_token_indices=[1])), "model.embed_tokens is peft.utils.other.TrainableTokensWrapper"),
    "a parameter": (of(LoraConfig(target_modules=[], target_parameters=["q_proj.weight"])), "q_proj is .*ParamWrapper"),
    "the head": (of(lora("llama", ["lm_head", "q_proj"])), "fused head.*modules_to_save"),
    "the head, by IA3": (of(IA3Config(target_modules=["lm_head"], feedforward_modules=[])), "fused head.*modules_to_save"),
    # PEFT takes the head that was wrapped for the first adapter for a linear like any other.
    "the head, wrapped": (then(with_a_second, modules_to_save=["lm_head"]), "fused head.*modules_to_save"),
    "another linear": (on(Quantized(24, 16)), f"{O_PROJ} is LoRA on .*Quantized"),
    "float8": (on(nn.Linear(24, 16).to(torch.float8_e4m3fn)), f"{O_PROJ} is LoRA on .*Linear .*float8.*quantized"),
    "merged": (then(lambda model: model.merge_adapter()), r"merged into the base weight.*unmerge_adapter\(\)"),
    "disabled": (then(lambda model: model.base_model.disable_adapter_layers()), "disabled.*enable"),
    "no transformers model": (lambda model: nn.Linear(2, 2), "Linear holds no transformers model"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_is_refused(tiny, case):
    make, message = REFUSED[case]
    model = make(tiny("llama"))
    with pytest.raises(RecordError, match=message):
        Effective(model)


CHANGES = {
    "were default and are now second": lambda model: model.set_adapter("second"),
    "merged": lambda model: model.merge_adapter(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("message", CHANGES)
def test_adapters_that_change_meanwhile_are_refused_at_refresh(with_lora, message):
    model = with_lora()
    model.add_adapter("second", lora("llama"))
    effective = Effective(model)
    CHANGES[message](model)
    with pytest.raises(RecordError, match=message):
        effective.refresh()
