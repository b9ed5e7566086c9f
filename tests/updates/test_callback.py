"""The recorder in a stock SFTTrainer: the same weights bit by bit, dropout on, and rows for every step."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from attribution.causes import attribute
from attribution.components import Components
from attribution.errors import RecordError
from attribution.models import load
from attribution.samples import collate, encode
from attribution.store import BATCH, read_run
from attribution.updates.callback import RecorderCallback
from attribution.updates.recorder import Recorder


def trainer(model, tokenizer, training, directory, callbacks=(), peft_config=None, **settings):
    rows = [{"input_ids": list(e.ids), "labels": e.labels} for e in encode(tokenizer, training)]
    arguments = {
        "output_dir": str(directory), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "bf16": False, "activation_checkpointing": False, "report_to": "none", "save_strategy": "no", "use_cpu": True,
        "dataloader_pin_memory": False, "logging_steps": 1, "disable_tqdm": True, "max_length": None, "seed": 3,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return SFTTrainer(
        model=model, args=SFTConfig(**{**arguments, **settings}), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=list(callbacks), peft_config=peft_config,
    )  # fmt: skip


def with_dropout(tokenizer):
    """A small Llama with attention dropout, which draws random numbers in every training pass."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=0.3, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"activation_checkpointing": True}, {"optim": "sgd", "max_grad_norm": 0.05}],
    ids=["plain", "accumulation", "checkpointing", "sgd, clipped"],
)
def test_weights_are_bit_identical_with_and_without(tmp_path, fresh, training, probes, settings, lora):
    tokenizer = fresh.tokenizer
    if lora:
        settings = {**settings, "peft_config": LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear")}
    ends, losses = [], []
    for recording in (False, True):
        model = with_dropout(tokenizer)
        callbacks = [RecorderCallback(tmp_path / "run", probes=probes, milestones="log")] if recording else []
        made = trainer(model, tokenizer, training, tmp_path / "trainer", callbacks, **settings)
        start = {name: p.clone() for name, p in made.model.state_dict().items()}
        made.train()
        ends.append({name: p.clone() for name, p in made.model.state_dict().items()})
        losses.append([row["loss"] for row in made.state.log_history if "loss" in row])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)
    moved = [name for name in start if not torch.equal(start[name], ends[0][name])]
    assert (len(moved) > len(start) / 2 and not lora) or {"lora_A", "lora_B"} == {name.split(".")[-3] for name in moved}
    assert losses[0] == losses[1]
    run = read_run(tmp_path / "run")
    assert run.steps["step"].tolist() == [1, 2, 3] and run.result is not None
    assert run.steps["loss"].to_numpy() == pytest.approx(losses[0], abs=1e-3)  # the trainer rounds
    for name in (BATCH, *(probe.name for probe in probes)):
        for step in (1, 2, 3):
            rows = run.parts[(run.parts["probe"] == name) & (run.parts["step"] == step)]
            for column in ("cause_before", "cause_after", "update_norm" if name == BATCH else "share"):
                assert rows[column].abs().max() > 0, (name, step, column)


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.05, "gradient_accumulation_steps": 3}], ids=["plain", "clipped"])
def test_causes_on_the_batch_are_the_tapped_ones(tmp_path, fresh, training, settings):
    model, tokenizer = fresh
    base = load("planted/unrouted").model
    size = len(training) // settings.get("gradient_accumulation_steps", 1)
    callback = RecorderCallback(tmp_path / "run", everything=True)
    trainer(
        model, tokenizer, training, tmp_path / "t", [callback], max_steps=1, per_device_train_batch_size=size, **settings
    ).train()
    run = read_run(tmp_path / "run")
    rows = run.parts[(run.parts["probe"] == BATCH) & run.parts["cause_before"].notna()]
    expected = attribute(base, tokenizer, training, method="gradient", metric="log_prob").table["effect"] * len(training)
    assert len(rows) == len(expected)
    assert rows["cause_before"].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-5 * expected.abs().max() + 1e-5)
    tuned = attribute(model, tokenizer, training, method="gradient", metric="log_prob").table["effect"] * len(training)
    assert rows["cause_after"].to_numpy() == pytest.approx(tuned.to_numpy(), abs=1e-5 * tuned.abs().max() + 1e-5)
    assert run.steps["normalizer"].iloc[0] == len(training)
    assert (run.steps["clip_factor"].iloc[0] < 0.5) == ("max_grad_norm" in settings)


def test_gradients_edited_by_a_later_callback_are_seen(tmp_path, fresh, training):
    from transformers import TrainerCallback

    class Doubling(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for parameter in kwargs["model"].parameters():
                parameter.grad.mul_(2)
            norms.append(sum(p.grad.square().sum() for p in kwargs["model"].parameters()).sqrt().item())

    norms = []
    model, tokenizer = fresh
    trainer(model, tokenizer, training, tmp_path / "t", [RecorderCallback(tmp_path / "run"), Doubling()], max_steps=2).train()
    assert read_run(tmp_path / "run").steps["grad_norm"].to_numpy() == pytest.approx(norms, rel=1e-4)


def test_an_optimizer_whose_steps_cannot_be_seen_is_refused_at_its_first_step(tmp_path, fresh, training):
    model, tokenizer = fresh

    class Unseen(torch.optim.SGD):
        """Steps without the hooks, as optimizers do that work inside backward."""

        @torch.no_grad()
        def step(self, closure=None):
            return None

    Unseen.step.hooked = True  # torch then leaves it as it is
    made = trainer(model, tokenizer, training, tmp_path / "t", [RecorderCallback(tmp_path / "run")])
    made.optimizer = Unseen(model.parameters(), lr=0.1)
    with pytest.raises(RecordError, match="step 1, the optimizer's hooks saw 0"):
        made.train()


def test_after_an_exception_the_record_can_be_closed(tmp_path, fresh, training, probes):
    from transformers import TrainerCallback

    class Stopping(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    model, tokenizer = fresh
    callback = RecorderCallback(tmp_path / "run", probes=probes[:1], milestones="ends")
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer(model, tokenizer, training, tmp_path / "t", [callback, Stopping()]).train()
    callback.failed(caught.value)
    run = read_run(tmp_path / "run")
    assert run.status["state"] == "interrupted" and run.steps["step"].tolist() == [1, 2]
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_lora_is_recorded_in_the_space_of_effective_weights(tmp_path, fresh, training, probes):
    """Against the merged models before and after: changes, causes, metrics, shares, and the gradient autograd gives W."""
    model, tokenizer = fresh
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    callback = RecorderCallback(tmp_path / "run", probes=probes, everything=True, milestones="ends", share_passes=9)
    size = len(training)
    made = trainer(
        model, tokenizer, training, tmp_path / "t", [callback], config, max_steps=1, per_device_train_batch_size=size,
        learning_rate=1e-2, max_grad_norm=0.05,
    )  # fmt: skip
    before = copy.deepcopy(made.model).merge_and_unload()
    made.train()
    after = copy.deepcopy(made.model).merge_and_unload()
    run = read_run(tmp_path / "run")
    assert run.meta["adapters"] is True and run.steps["clip_factor"].iloc[0] < 1
    index = Components(before)
    change = {name: q.detach() - p.detach() for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True)}
    batch = run.parts[run.parts["probe"] == BATCH]
    norms = index.reduce(lambda use: change[use.name].square()).sqrt()
    assert batch["update_norm"].to_numpy() == pytest.approx(norms.numpy(), abs=1e-6) and norms.max() > 1e-2
    assert set(run.parts.loc[run.parts["update_norm"] > 0, "part"]) == {"writing", "routing"}

    for when, merged in (("before", before), ("after", after)):
        expected = attribute(merged, tokenizer, training, method="gradient", metric="log_prob").table["effect"] * size
        found = batch.loc[batch["part"].eq("writing"), f"cause_{when}"].to_numpy()
        heads_and_neurons = len(found) if when == "after" else index.parts.depth * (index.parts.heads + index.parts.neurons)
        assert found[:heads_and_neurons] == pytest.approx(expected[:heads_and_neurons].to_numpy(), abs=2e-4)
        assert np.isnan(found[heads_and_neurons:]).all() and expected[:heads_and_neurons].abs().max() > 1
    batched = collate(encode(tokenizer, training))
    logits = before.requires_grad_(True).lm_head(before.base_model(batched.ids).last_hidden_state)
    torch.nn.functional.cross_entropy(logits[batched.scored], batched.tokens).backward()
    weight = before.get_parameter("model.layers.1.self_attn.q_proj.weight")
    heads = (weight.grad * run.steps["clip_factor"].iloc[0]).view(index.parts.heads, -1).norm(dim=1)
    rows = batch[(batch["kind"] == "head") & (batch["layer"] == 1) & (batch["part"] == "routing")]
    assert rows["grad_norm"].to_numpy() == pytest.approx(heads.numpy(), rel=1e-4)

    for probe in probes:
        values = [attribute(m, tokenizer, probe.samples, method="gradient").table["effect"] for m in (before, after)]
        rows = run.parts[(run.parts["probe"] == probe.name) & run.parts["part"].eq("writing")]
        assert rows["cause_before"].to_numpy() == pytest.approx(values[0].to_numpy(), abs=1e-4)
        assert rows["cause_after"].to_numpy() == pytest.approx(values[1].to_numpy(), abs=1e-4)
    row = run.probes[run.probes["step"] == 1].iloc[0]
    assert abs(row["change"]) > 1e-2 and bool(row["resolved"])


def test_a_record_that_goes_on_without_its_trainer_is_refused(tmp_path, fresh, training):
    model, tokenizer = fresh
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(
        model, tokenizer, training, tmp_path / "t", [RecorderCallback(tmp_path / "run", everything=True)], **arguments
    ).train()
    checkpoints = sorted(folder.parent.name for folder in (tmp_path / "t").glob("checkpoint-*/recorder.json"))
    assert checkpoints == ["checkpoint-2"]  # from its last one a trainer would go one step too far
    (tmp_path / "run" / "result.json").unlink()
    callback = RecorderCallback(tmp_path / "run", everything=True, resume=tmp_path / "t" / "checkpoint-2")
    with pytest.raises(RecordError, match="from step 2 and the trainer from 0"):
        trainer(load("planted/unrouted").model, tokenizer, training, tmp_path / "t", [callback], **arguments).train()


def test_what_ran_under_autocast_is_repeated_under_it_and_said(tmp_path, fresh, training):
    model, tokenizer = fresh
    batch = collate(encode(tokenizer, training[:8]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Recorder(tmp_path / "run", batch_after=True).attach(model, optimizer):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
    run = read_run(tmp_path / "run")
    wide = -model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss.item() * 8
    before, after = run.steps["batch_before"].iloc[0], run.steps["batch_after"].iloc[0]
    assert before == pytest.approx(after, rel=1e-5) and abs(before - wide) > 1e-4 * abs(wide)
    assert any("autocast in torch.bfloat16" in line for line in run.meta["not_measured"])


def test_replicas_of_a_trainer_are_refused(tmp_path, fresh, training):
    """The trainer hands over the model that it then wraps."""
    watching = RecorderCallback(tmp_path / "run", tokenizer=fresh[1])
    made = trainer(*fresh, training, tmp_path / "out", [watching])
    made.args._n_gpu = 2
    with pytest.raises(RecordError, match="DataParallel runs replicas"):
        watching.on_train_begin(made.args, made.state, made.control, model=fresh[0], optimizer=made.create_optimizer())
    assert not (tmp_path / "run").exists()
