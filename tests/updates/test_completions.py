"""Completions in the record: their lines, and which components brought them about, against plain hooks one by one."""

import copy
import random

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

from attribution.models import load
from attribution.samples import Completion, collate, encode
from attribution.store import BATCH, SAMPLES, read_run
from attribution.updates.completions import lines, told
from attribution.updates.recorder import Recorder

COLUMNS = ("cause_rewarded", "cause_high", "cause_low")


def drawn(tokenizer, training, seed) -> list[Completion]:
    """Completions of one to three random tokens to the first prompts, with rewards and advantages of both signs."""
    draw = random.Random(seed)
    found = []
    for place, each in enumerate(encode(tokenizer, training[:6])):
        said = tuple(draw.choices(range(4, len(tokenizer)), k=1 + place % 3))
        advantage = (0.3, -0.9, 0.0, 1.4, -0.2, 0.6)[place] * (seed + 1)
        ids = type(each)((*each.ids[: each.start], *said), each.start, advantage, ())
        found.append(Completion(place, training[place].prompt, tokenizer.decode(said), ids, draw.random(), 1.0))
    return found


def push(model, optimizer, completions) -> None:
    """One step on the advantage-weighted log-probabilities."""
    optimizer.zero_grad()
    batch = collate([each.encoded for each in completions])
    logits = model(input_ids=batch.ids).logits[batch.scored]
    taken = logits.log_softmax(-1).gather(1, batch.tokens[:, None])[:, 0]
    (-(taken * batch.weights[batch.sample_of]).sum()).backward()
    optimizer.step()


def by_hand(model, completion) -> torch.Tensor:
    """Activation x gradient of the log-odds of one completion: heads, neurons and rows, Float64 [components]."""
    kept = []

    def keep(_module, args):
        value = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()  # frozen under adapters
        kept.append(value)
        return (value, *args[1:])

    layers, heads = model.model.layers, model.config.num_attention_heads
    where = [layer.self_attn.o_proj for layer in layers] + [layer.mlp.down_proj for layer in layers]
    handles = [module.register_forward_pre_hook(keep) for module in where]
    ids, start = torch.tensor([completion.encoded.ids]), completion.encoded.start
    logits = model(ids).logits[0, start - 1 : -1]
    for handle in handles:
        handle.remove()
    said = ids[0, start:, None]
    odds = logits.gather(1, said)[:, 0] - logits.scatter(1, said, -torch.inf).logsumexp(1)
    gradients = torch.autograd.grad(odds.sum(), [*kept, logits])
    products = {value.shape[-1]: [] for value in kept}
    for value, gradient in sorted(zip(kept, gradients, strict=False), key=lambda pair: pair[0].shape[-1]):
        products[value.shape[-1]].append((value * gradient).sum((0, 1)))
    narrow, wide = sorted(products)
    assert (narrow, wide) == (model.config.hidden_size, model.config.intermediate_size)
    of_rows = ((logits - logits.mean(1, keepdim=True)) * gradients[-1]).sum(0)
    of_heads = torch.cat([each.view(heads, -1).sum(1) for each in products[narrow]])
    return torch.cat([of_heads, *products[wide], of_rows]).detach().double()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_causes_of_completions_are_those_of_plain_hooks_before_the_step(tmp_path, fresh, training, lora):
    """Under adapters against the merged model."""
    model, tokenizer = fresh
    if lora:
        torch.manual_seed(5)
        config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    weights = []
    with Recorder(tmp_path / "run", tokenizer=tokenizer, milestones="ends", everything=True).attach(
        model, optimizer
    ) as recorder:
        for step in range(2):
            completions = drawn(tokenizer, training, step)
            weights.append({name: value.clone() for name, value in model.state_dict().items()})
            recorder.completed(completions[:2])
            recorder.completed(completions[2:])
            push(model, optimizer, completions)
    weights.append(model.state_dict())

    def expected(moment: int, step: int) -> torch.Tensor:
        """Float64 [components, completions] of a step's completions, with the weights of some moment."""
        then = copy.deepcopy(model)
        then.load_state_dict(weights[moment])
        then = then.merge_and_unload() if lora else then
        return torch.stack([by_hand(then, each) for each in drawn(tokenizer, training, step)], dim=1)

    run = read_run(tmp_path / "run")
    for step in range(2):
        causes = expected(step, step)
        advantage = torch.tensor([each.advantage for each in drawn(tokenizer, training, step)], dtype=torch.float64)
        rows = run.parts[(run.parts["probe"] == BATCH) & (run.parts["step"] == step + 1) & run.parts["part"].eq("writing")]
        wanted = ((causes * advantage).mean(1), causes[:, advantage > 0].mean(1), causes[:, advantage < 0].mean(1))
        for column, values in zip(COLUMNS, wanted, strict=True):
            assert rows[column].to_numpy() == pytest.approx(values.numpy(), abs=1e-5 * values.abs().max().item() + 1e-6), column
            assert values.abs().max() > 0.1
    moved = (expected(2, 1) - causes).abs().max() / causes.abs().max()
    assert moved > 0.01  # so that causes after the step would not have passed


def test_lines_and_steps_say_what_was_trained_on(tmp_path, fresh, training):
    model, tokenizer = fresh
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(tmp_path / "run", tokenizer=tokenizer, milestones=[4], everything=True, steps=3, completions=2)
    with recorder.attach(model, optimizer):
        for step in range(5):
            recorder.completed(completions := drawn(tokenizer, training, step))
            push(model, optimizer, completions)
        push(model, optimizer, completions)  # of which it is told nothing
    run = read_run(tmp_path / "run")
    assert run.samples["step"].tolist() == [step for step in range(1, 6) for _ in range(6)]
    assert list(run.samples.columns) == list(SAMPLES)
    for step in range(5):
        completions, rows = drawn(tokenizer, training, step), run.samples[run.samples["step"] == step + 1]
        assert rows.to_dict("records") == lines(completions, step + 1)
        assert rows["tokens"].tolist() == [1, 2, 3] * 2 and rows["advantage"].iloc[2] == 0
        row = run.steps.iloc[step]
        assert row["reward"] == pytest.approx(rows["reward"].mean()) and row["advantage"] == pytest.approx(
            rows["advantage"].abs().mean()
        )
    assert run.steps[["reward", "advantage"]].iloc[5].isna().all()
    batch = run.parts[run.parts["probe"] == BATCH]
    assert sorted(batch["step"].unique()) == [3, 4, 6]  # recorded whole
    assert batch.loc[batch["cause_rewarded"].notna(), "step"].unique().tolist() == [4]  # and, of those, every second step


@pytest.mark.parametrize(("completions", "everything", "read"), [(0, True, 0), (None, True, 2), (None, None, 0), (1, None, 2)])
def test_causes_of_completions_are_read_at_every_step_of_a_small_model(
    tmp_path, fresh, training, monkeypatch, completions, everything, read
):
    """Of a large one at every tenth."""
    if everything is None:
        monkeypatch.setattr("attribution.updates.recorder.ALL_UP_TO", 1000)
    model, tokenizer = fresh
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(tmp_path / "run", tokenizer=tokenizer, milestones="ends", completions=completions, singles="heads")
    with recorder.attach(model, optimizer):
        for step in range(2):
            recorder.completed(given := drawn(tokenizer, training, step))
            push(model, optimizer, given)
    found = read_run(tmp_path / "run").parts
    assert found.loc[found["cause_rewarded"].notna(), "step"].nunique() == read


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_reading_causes_of_completions_changes_nothing_else_in_the_record(tmp_path, training, probes, lora):
    found = []
    for every in (0, 1):
        model, tokenizer = load("planted/unrouted")
        if lora:
            torch.manual_seed(5)
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        recorder = Recorder(
            tmp_path / str(every), tokenizer=tokenizer, probes=probes[:1], completions=every, milestones="ends", singles="heads"
        )
        with recorder.attach(model, optimizer):
            for step in range(3):
                recorder.completed(given := drawn(tokenizer, training, step))
                push(model, optimizer, given)
        found.append(read_run(tmp_path / str(every)))
    without, with_causes = (run.parts.drop(columns=list(COLUMNS)) for run in found)
    pd.testing.assert_frame_equal(without, with_causes, check_exact=True)
    batch = without[without["probe"] == BATCH]
    assert (batch["activation_before"] > 0).any() and (batch["gradient_before"] > 0).any()
    assert found[1].parts["cause_rewarded"].abs().max() > 0 and found[0].parts["cause_rewarded"].isna().all()


def test_completions_without_a_reward_and_one_sided_ones(tmp_path, fresh, training):
    model, tokenizer = fresh
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    given = [each for each in drawn(tokenizer, training, 1) if each.advantage > 0]
    unscored = [Completion(each.sample, each.prompt, each.text, each.encoded, None) for each in given]
    with Recorder(tmp_path / "run", tokenizer=tokenizer, metric="logit_difference", milestones="ends").attach(
        model, optimizer
    ) as recorder:
        for each in (given, unscored):
            recorder.completed(each)
            push(model, optimizer, given)
    run = read_run(tmp_path / "run")
    assert run.steps["reward"].isna().tolist() == [False, True] and run.samples["ratio"].isna().any()
    first, second = (run.parts[run.parts["step"] == step].reset_index() for step in (1, 2))
    assert first["cause_low"].isna().all() and first["cause_high"].abs().max() > 0
    assert first["cause_high"].equals(second["cause_high"])
    assert told([]) == {} and told(unscored)["reward"] is None
