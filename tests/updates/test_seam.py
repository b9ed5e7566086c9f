"""Trainings that cannot be seen are refused before their first step; updates that were dropped are rows that say so."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from attribution import uses
from attribution.causes import attribute
from attribution.components import Components
from attribution.errors import RecordError
from attribution.models import load
from attribution.samples import collate, encode
from attribution.store import BATCH, RunWriter, read_run
from attribution.updates.batch import BatchWatch
from attribution.updates.batch_step import BatchStep
from attribution.updates.planned import planned_step
from attribution.updates.recorder import Recorder
from attribution.updates.seam import effective, plain, recordable
from experiments.timing import LiveBytes


class LOMO(torch.optim.SGD):
    """By its name, which is how it is told."""


class AdaLomo(torch.optim.SGD):
    pass


class LayerWiseDummyOptimizer(torch.optim.Optimizer):
    def __init__(self, model):
        super().__init__([nn.Parameter(torch.zeros(1))], {})


def inside_backward(model):
    """As torchtune's optimizer_in_bwd: one optimizer per parameter, stepped when its gradient is ready."""
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: (optimizers[p].step(), optimizers[p].zero_grad()))
    return torch.optim.SGD(model.parameters(), lr=0.1)


class DeepSpeedOptimizerWrapper:
    """A stand-in: no torch optimizer."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda model: LOMO(model.parameters()), "LOMO updates layer by layer"),
        (lambda model: AdaLomo(model.parameters()), "AdaLomo updates layer by layer"),
        (LayerWiseDummyOptimizer, "LayerWiseDummyOptimizer updates layer by layer"),
        (inside_backward, "step inside the backward"),
        (lambda _: DeepSpeedOptimizerWrapper(), "is no torch optimizer"),
        (lambda _: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), "holds no parameter of this model"),
    ],
    ids=["LOMO", "AdaLomo", "layer-wise GaLore", "optimizer in backward", "DeepSpeed", "another model's"],
)
def test_refused_before_the_first_step(tmp_path, fresh, make, reason):
    model, _ = fresh
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RecordError, match=reason), Recorder(tmp_path / "run").attach(model, make(model)):
        pytest.fail("attached")
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_data_parallel_is_refused(fresh):
    model, _ = fresh
    with pytest.raises(RecordError, match="DataParallel"):
        recordable(nn.DataParallel(model), torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_model_without_adapters_is_itself(fresh):
    assert plain(fresh.model) is fresh.model


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_that_a_loss_scaler_drops_is_recorded_as_skipped(tmp_path, fresh, training, probes, fused):
    """The scale of the third step makes its gradient overflow: a fused optimizer is called and does nothing, another is not."""
    model, tokenizer = fresh
    batch = collate(encode(tokenizer, training[:4]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    weights, losses = [], {}
    recorder = Recorder(tmp_path / "run", probes=probes[:1], tokenizer=tokenizer, milestones="ends", everything=True)
    with recorder.attach(model, optimizer, scaler):
        for step in range(5):
            optimizer.zero_grad()
            loss = losses[step] = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
            scaler.scale(loss * float("inf") if step == 2 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            weights.append(next(model.parameters()).detach().clone())
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[2], weights[3])
    run = read_run(tmp_path / "run")
    assert run.steps["step"].tolist() == [1, 2, 3, 4, 5]
    assert run.steps["skipped"].tolist() == [False, False, True, False, False]
    assert run.probes["step"].tolist() == [0, 1, 2, 4, 5]
    assert set(run.parts["step"]) == {1, 2, 4, 5} and run.probes["resolved"].iloc[1:].all()
    steps = run.steps.set_index("step")
    for step in (1, 2, 4, 5):  # the scale is in none of the columns
        assert steps.loc[step, "loss"] == pytest.approx(losses[step - 1].item(), rel=1e-5)
    assert steps.loc[1, "clip_factor"] == 1 and steps.loc[1, "grad_norm_raw"] == pytest.approx(steps.loc[1, "grad_norm"])
    base, batch_rows = load("planted/unrouted").model, run.parts[(run.parts["probe"] == BATCH) & (run.parts["step"] == 1)]
    expected = attribute(base, tokenizer, training[:4], method="gradient", metric="log_prob").table["effect"] * 4
    causes = batch_rows.loc[batch_rows["part"] == "writing", "cause_before"]
    assert causes.to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-4)
    base(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in base.parameters()]).item()
    assert steps.loc[1, "grad_norm"] == pytest.approx(norm, rel=1e-4)
    moved = run.steps.set_index("step")["update_norm"]
    assert (moved[[1, 2, 4, 5]] > 0).all() and not moved[3] > 0
    assert any("skipped" in line for line in run.meta["not_measured"])


def test_gradients_that_a_loop_drops_are_a_skipped_update(tmp_path, fresh, training):
    model, tokenizer = fresh
    batch = collate(encode(tokenizer, training[:4]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run", everything=True).attach(model, optimizer):
        for step in range(4):
            optimizer.zero_grad(set_to_none=step != 2)
            model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss.backward()
            if step in (0, 3):
                optimizer.step()
    run = read_run(tmp_path / "run")
    assert run.steps["skipped"].tolist() == [False, True, True, False]
    # the batch of the last step is its own: nothing of the dropped ones is counted in it
    first, last = (run.steps.set_index("step").loc[step, "batch_before"] for step in (1, 4))
    assert abs(last - first) < abs(first) and set(run.parts.loc[run.parts["probe"] == BATCH, "step"]) == {1, 4}


def test_a_zero_gradient_is_no_dropped_one(tmp_path, fresh, training):
    """Steps of zero advantage: the gradient is 0, momentum moves the weights, both are on record, accumulated or not."""
    model, tokenizer = fresh
    batch = collate(encode(tokenizer, training[:4]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    with Recorder(tmp_path / "run").attach(model, optimizer):
        for advantage in (1.0, 0.0, 0.0):
            optimizer.zero_grad()
            for _ in range(2):
                (model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss * advantage).backward()
            optimizer.step()
    steps = read_run(tmp_path / "run").steps
    assert steps["skipped"].tolist() == [False] * 3
    assert steps["grad_norm"].tolist()[1:] == [0, 0] and (steps["update_norm"] > 1e-3).all()


def test_bf16_shows_what_was_intended_and_what_was_applied(tmp_path, fresh, training):
    model, tokenizer = fresh
    model.to(torch.bfloat16)
    batch = collate(encode(tokenizer, training[:4]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    with Recorder(tmp_path / "run", everything=True).attach(model, optimizer):
        model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss.backward()
        optimizer.step()
    rows = read_run(tmp_path / "run").parts
    heads = rows[(rows["kind"] == "head") & (rows["part"] == "writing")]
    size = (128 * 32) ** 0.5 * 1e-6  # the first step of AdamW is lr in every element
    assert heads["intended_norm"].to_numpy() == pytest.approx(size, rel=0.05)
    assert (heads["changed"] < 0.2).all() and (heads["update_norm"] != heads["intended_norm"]).all()


def test_what_was_intended_is_summed_in_blocks(fresh, training, monkeypatch):
    """The norms are those of whole planned steps, and no array is made on the way that is as large as a parameter."""
    model, tokenizer = fresh
    model.to(torch.bfloat16)
    batch = collate(encode(tokenizer, training[:4]))
    frozen, *trained = model.parameters()
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
    components = Components(model)
    step = BatchStep(components, BatchWatch(components), optimizer)
    for _ in range(2):  # the second has a state
        model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss.backward()
        optimizer.step()
    expected = components.reduce(
        lambda use: None if use.parameter is frozen else planned_step(optimizer, use.parameter).square()
    )
    largest, peaks = max(parameter.numel() for parameter in trained), []
    for block in (largest, largest // 7):
        monkeypatch.setattr(uses, "BLOCK", (block, block))
        with LiveBytes() as live:
            found = step._intended()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        peaks.append(live.peak)
    assert found.count_nonzero() > 0.9 * len(found)
    assert peaks[0] - peaks[1] > 6 * 4 * largest  # of some eleven in float32


def test_in_float32_nothing_is_intended_beyond_what_was_applied(recorded):
    assert read_run(recorded["path"]).parts["intended_norm"].isna().all()


def test_a_step_with_a_closure_is_refused(tmp_path, fresh, training):
    """Its gradient is made inside the step, after the pre-hook: what could be recorded is of the step before."""
    model, tokenizer = fresh
    batch = collate(encode(tokenizer, training[:4]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure():
        loss = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
        loss.backward()
        return loss

    with pytest.raises(RecordError, match="closure"), Recorder(tmp_path / "run").attach(model, optimizer):
        optimizer.step(closure)
    assert read_run(tmp_path / "run").status["state"] == "failed"


def test_after_a_step_that_broke_off_the_next_ones_are_recorded(tmp_path, fresh, training):
    model, tokenizer = fresh
    batch = collate(encode(tokenizer, training[:4]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run", everything=True).attach(model, optimizer):
        for step in range(4):
            optimizer.zero_grad()
            loss = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
            (loss * float("nan") if step == 1 else loss).backward()
            if step == 1:
                with pytest.raises(RecordError, match="not finite"):
                    optimizer.step()
            else:
                optimizer.step()
    steps = read_run(tmp_path / "run").steps
    assert steps["skipped"].tolist() == [False] * 3 and (steps["update_norm"] > 0).all()


def test_the_clip_factor_is_that_of_what_the_optimizer_holds(tmp_path, fresh, training):
    model, tokenizer = fresh
    batch = collate(encode(tokenizer, training[:4]))
    held = [p for name, p in model.named_parameters() if "self_attn" in name]
    optimizer = torch.optim.SGD(held, lr=0.1)
    with Recorder(tmp_path / "run").attach(model, optimizer):
        model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(held, 0.01).item()
        optimizer.step()
    row = read_run(tmp_path / "run").steps.iloc[0]
    assert row["clip_factor"] == pytest.approx(0.01 / norm, rel=1e-3) and row["grad_norm_raw"] == pytest.approx(norm, rel=1e-3)
    assert any("not in the optimizer" in line for line in read_run(tmp_path / "run").meta["not_measured"])


def test_a_recorder_records_one_training_at_a_time(tmp_path, fresh):
    model, _ = fresh
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(tmp_path / "run")
    with recorder.attach(model, optimizer), pytest.raises(RecordError, match="recording already"):
        recorder.begin(model, optimizer)
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_an_interrupt_during_the_last_reading_keeps_the_record(tmp_path, fresh, training, probes, monkeypatch):
    model, tokenizer = fresh
    batch = collate(encode(tokenizer, training[:4]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(tmp_path / "run", probes=probes[:1], tokenizer=tokenizer, kinds=("head",))
    with pytest.raises(KeyboardInterrupt), recorder.attach(model, optimizer):
        model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss.backward()
        optimizer.step()

        def interrupted(**_):
            raise KeyboardInterrupt

        monkeypatch.setattr(recorder._readings, "milestone", interrupted)
    run = read_run(tmp_path / "run")
    assert run.status["state"] == "interrupted" and len(run.steps) == 1 and len(run.probes) == 2
    RunWriter(tmp_path / "run", run.config).close()  # the directory is free


def test_a_tied_embedding_that_trains_beside_adapters_is_refused(tiny):
    model = get_peft_model(tiny("llama", tied=True), LoraConfig(r=2, target_modules=["q_proj"]))
    assert effective(model) is not None
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(RecordError, match="tied to the unembedding"):
        effective(model)


def test_what_a_loop_tells_of_its_step_stands_in_its_row(tmp_path, fresh, training):
    model, tokenizer = fresh
    batch = collate(encode(tokenizer, training[:4]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(tmp_path / "run")
    with recorder.attach(model, optimizer):
        for step in range(3):
            optimizer.zero_grad()
            model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, -1].sum().backward()  # no loss that tells itself
            optimizer.step()
            if step < 2:
                recorder.logged({"reward": 0.5 + step, "advantage": -step, "loss": 2.0, "other": 7})
    steps = read_run(tmp_path / "run").steps
    assert steps["reward"].tolist()[:2] == [0.5, 1.5] and steps["advantage"].tolist()[:2] == [0, -1]
    assert steps["loss"].tolist()[:2] == [2, 2] and steps[["reward", "advantage", "loss"]].iloc[2].isna().all()
