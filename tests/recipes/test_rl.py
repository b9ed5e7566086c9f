"""Sampling recipes: the record changes nothing, and says of every completion what the trainer did with it."""

import copy
from collections import Counter
from itertools import chain

import pandas as pd
import pytest
import torch
from trl import GRPOTrainer

from attribution.causes import attribute
from attribution.errors import DataError
from attribution.models import load
from attribution.recipes.dpo import DPO
from attribution.recipes.rl import GRPO, REINFORCE, RLOO
from attribution.samples import IGNORED, ProbeSet, Sample, encode
from attribution.store import BATCH, read_run
from attribution.updates.callback import RecorderCallback
from attribution.worlds import planted as grammar

RL = {"generations": 4, "batch_size": 8, "completion_length": 4, "learning_rate": 1e-2}
CHECKPOINTING = {
    "kept": {},
    "recomputed": {"activation_checkpointing": True},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
}
TRAININGS = {
    "grpo": (GRPO, {**RL, "iterations": 2, "beta": 0.1}),
    "rloo": (RLOO, {**RL, "beta": 0.1}),
    "dpo": (DPO, {"batch_size": 4, "learning_rate": 1e-2}),
    "ablated": (GRPO, {**RL, "intervention": {"components": "mine", "sampling": "ablated", "updating": "ablated"}}),
}
MINE = pd.DataFrame([("head", 0, 1), ("neuron", 1, 5)], columns=["kind", "layer", "index"])
CASES = [
    (name, lora, accumulation, kept)
    for name in ("grpo", "dpo")
    for lora in (False, True)
    for accumulation in (1, 2)
    for kept in CHECKPOINTING
]


@pytest.mark.parametrize(
    ("name", "lora", "accumulation", "kept"),
    [*CASES, ("rloo", False, 2, "recomputed"), ("ablated", False, 2, "reentrant"), ("ablated", True, 1, "recomputed")],
)
def test_weights_are_bit_identical_with_and_without(tmp_path, small, planted, given, rewards, name, lora, accumulation, kept):
    recipe, settings = TRAININGS[name]
    if name != "dpo":
        settings = {**settings, "reward": rewards("token")}
    made = recipe(
        max_steps=3, accumulation=accumulation, disable_dropout=False, trainer=CHECKPOINTING[kept],
        lora={"rank": 4 * lora, "dropout": 0.2}, **settings,
    )  # fmt: skip
    probes = [
        ProbeSet(name=star, samples=[Sample(**row) for row in grammar.prompts(4, 6, star=star)])
        for star in ("agree", "conflict")
    ]
    ends = []
    for recording in (False, True):
        callback = RecorderCallback(
            tmp_path / "run", probes=probes, tokenizer=planted.tokenizer, milestones="ends", singles="heads", everything=True,
            batch_after=True, completions=1,
        )  # fmt: skip
        watched = {"recorder": callback.recorder, "callbacks": [callback]} if recording else {}
        trainer = made.build(given(small(), sets={"mine": MINE}, **watched))
        start = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        trainer.train()
        ends.append(trainer.model.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in start)
    moved = [key for key in start if not torch.equal(start[key], ends[0][key])]
    assert (len(moved) > len(start) / 2 and not lora) or {"lora_A", "lora_B"} == {key.split(".")[-3] for key in moved}

    run = read_run(tmp_path / "run")
    assert run.steps["step"].tolist() == [1, 2, 3] and run.result is not None and not run.steps["skipped"].any()
    completions = 8 * accumulation  # of one step, pairs counting double
    assert run.samples["step"].value_counts().sort_index().to_dict() == dict.fromkeys((1, 2, 3), completions)
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 3 * completions
    parts = run.parts
    for step in (1, 2, 3):
        for probe in (BATCH, "agree", "conflict"):
            rows = parts[(parts["probe"] == probe) & (parts["step"] == step)]
            causes = ("cause_rewarded", "cause_high", "cause_low", "update_norm")
            for column in ("cause_before", *(causes if probe == BATCH else ("cause_after", "share"))):
                assert rows[column].abs().max() > 0, (probe, step, column)


def test_it_trains_as_the_trainer_of_trl_does(tmp_path, small, planted, given, training):
    """Whatever stands before GRPOTrainer to watch it changes no weight."""

    def token(completion_ids, **_):
        return [float(ids[0] % 7) for ids in completion_ids]

    ours, stock = small(), small()
    recipe = GRPO(**RL, max_steps=8, accumulation=2, iterations=2, beta=0.1, disable_dropout=False)  # two epochs
    made = recipe.build(given(ours))
    made.reward.function = token
    made.train()
    GRPOTrainer(
        model=stock, args=made.args, processing_class=planted.tokenizer, reward_funcs=[token],
        train_dataset=made.train_dataset,
    ).train()  # fmt: skip
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), stock.parameters(), strict=True))
    assert not torch.equal(ours.lm_head.weight, small().lm_head.weight)


def normalised(rewards):
    scored = rewards[~rewards.isnan()]
    return above_mean(rewards) / (scored.std() + 1e-4 if len(scored) > 1 else torch.nan)


def above_mean(rewards):
    return rewards - rewards.nanmean()


def above_the_others(rewards):
    return rewards - (rewards.nansum() - rewards) / ((~rewards.isnan()).sum() - 1)


ADVANTAGES = {
    "grpo": (GRPO, {"accumulation": 2, "iterations": 2}, normalised),
    "grpo, groups over steps": (GRPO, {"trainer": {"steps_per_generation": 2}}, normalised),
    "grpo, not scaled": (GRPO, {"scale_rewards": "none", "accumulation": 2}, above_mean),
    "reinforce": (REINFORCE, {"accumulation": 2}, above_mean),
    "rloo": (RLOO, {"accumulation": 2, "iterations": 2}, above_the_others),
}


@pytest.mark.parametrize("reward", ["token", "sometimes"])
@pytest.mark.parametrize("case", ADVANTAGES)
def test_every_completion_has_the_reward_and_the_advantage_of_its_tokens(
    small, planted, given, training, rewards, told, case, reward
):
    recipe, settings, expected = ADVANTAGES[case]
    made = recipe(**RL, **settings, max_steps=4, reward=rewards(reward))
    made.build(given(small(), recorder=told)).train()
    accumulation, iterations = made.accumulation, made.iterations
    steps = told.steps(accumulation)
    assert [len(step) for step in steps] == [8 * accumulation] * 4
    encoded = encode(planted.tokenizer, training)
    for each in chain(*steps):
        ids, start = each.encoded.ids, each.encoded.start
        assert ids[:start] == encoded[each.sample].ids[: encoded[each.sample].start]
        assert each.prompt == training[each.sample].prompt and 1 <= len(ids) - start <= 4
        assert each.text == planted.tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert each.reward == (None if reward == "sometimes" and ids[start] % 3 == 0 else ids[start])

    at_once = 2 if case == "grpo, groups over steps" else iterations  # steps on the completions of one generation
    for first in range(0, 4, at_once):
        together = steps[first : first + at_once]
        if iterations == 2:  # the same completions again
            once, again = (Counter((e.encoded, e.reward) for e in step) for step in together)
            assert once == again
            together = together[:1]
        groups = {}
        for each in chain(*together):
            groups.setdefault(each.sample, []).append(each)
        assert {len(group) for group in groups.values()} == {4}
        for group in groups.values():
            given_rewards = torch.tensor([float("nan") if each.reward is None else each.reward for each in group])
            wanted = expected(given_rewards).nan_to_num(0.0)
            found = torch.tensor([each.advantage for each in group])
            assert found == pytest.approx(wanted, abs=1e-4)
    assert sum(each.advantage != 0 for each in chain(*steps)) > sum(map(len, steps)) / 2
    assert len({each.encoded.ids for each in chain(*steps)}) > 8  # no two generations alike


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_penalty_on_kl_is_in_the_advantages_of_rloo(small, given, rewards, told, seen, lora):
    """Against log-probabilities of the model before training and at the step, with plain passes."""
    base = small().eval()
    settings = {**RL, "learning_rate": 0.1, "optimizer": "sgd", "beta": 2.0, "lora": {"rank": 4 * lora}}
    trainer = RLOO(**settings, max_steps=3, reward=rewards("token")).build(given(small(), recorder=told, callbacks=[seen]))
    trainer.train()
    for weights, step in zip(seen.weights, told.steps(), strict=True):
        trainer.model.load_state_dict(weights, strict=False)
        now = trainer.model.eval()
        kl = torch.tensor([log_prob(now, each) - log_prob(base, each) for each in step])
        rewarded = torch.tensor([each.reward for each in step]) - 2.0 * kl
        for sample in {each.sample for each in step}:
            own = [place for place, each in enumerate(step) if each.sample == sample]
            found = torch.tensor([step[place].advantage for place in own])
            assert found == pytest.approx(above_the_others(rewarded[own]), abs=1e-3)
    assert kl.abs().max() > 0.05


def log_prob(model, completion) -> float:
    ids, start = torch.tensor([completion.encoded.ids]), completion.encoded.start
    with torch.no_grad():
        return model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :].sum().item()


def test_what_the_model_is_trained_on_are_the_tokens_that_are_told(small, planted, given, training, rewards, told):
    """Ids, mask and labels of the differentiated pass itself; the reward sees the response as `encode` has it."""
    inputs, asked = [], []
    model = small()
    handle = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: inputs.append(kwargs) if torch.is_grad_enabled() else None, with_kwargs=True
    )
    samples = [each.model_copy(update={"context": "tom is kind . "}) for each in training]
    made = GRPO(**RL, max_steps=2, accumulation=2, iterations=2, beta=0.1, reward=rewards("token"))
    trainer = made.build(given(model, samples, recorder=told))
    function = trainer.reward.function
    trainer.reward.function = lambda **columns: asked.append(columns) or function(**columns)
    trainer.train()
    handle.remove()
    assert len(inputs) == len(told.passes) == 4
    for batch, completions in zip(inputs, told.passes, strict=True):
        for row, each in enumerate(completions):
            mask = batch["attention_mask"][row].bool()
            assert tuple(batch["input_ids"][row][mask].tolist()) == each.encoded.ids
            assert batch["labels"][row][mask].tolist() == each.encoded.labels and (batch["labels"][row][~mask] == IGNORED).all()
    encoded = encode(planted.tokenizer, samples)
    assert len(asked) == 1
    for columns in asked:
        for place, sample in enumerate(columns["sample"]):
            assert columns["response_ids"][place] == list(encoded[sample].ids[encoded[sample].start :])
            assert columns["response"][place] == training[sample].response and columns["id"][place] == training[sample].id
            assert columns["contrast"][place] == list(training[sample].contrast)
            assert columns["prompts"][place] == "tom is kind . " + training[sample].prompt


def test_the_built_in_reward_is_one_where_a_completion_begins_with_the_response(given, training, told):
    GRPO(**RL, max_steps=2).build(given(load("planted/unrouted").model, recorder=told)).train()
    rows = list(chain(*told.passes))
    assert all(
        each.reward == float((each.text + " ").startswith(training[each.sample].response.strip() + " ")) for each in rows
    )
    assert {each.reward for each in rows} == {0.0, 1.0}


@pytest.mark.parametrize("recipe", [GRPO, RLOO])
def test_steps_without_advantage_are_recorded_as_what_they_are(tmp_path, small, planted, given, rewards, recipe):
    """Momentum moves the weights on, though nothing is pushed up or down."""
    callback = RecorderCallback(tmp_path / "run", tokenizer=planted.tokenizer, milestones="ends", singles="heads")
    model = small()
    made = recipe(**RL, max_steps=4, reward=rewards("constant_later"))
    made.build(given(model, recorder=callback.recorder, callbacks=[callback])).train()
    run = read_run(tmp_path / "run")
    quiet, steps = run.steps["step"] > 2, run.steps
    assert (steps.loc[quiet, ["grad_norm", "advantage", "grad_dot_update"]] == 0).all(axis=None)
    assert (steps.loc[quiet, "reward"] == 1).all() and (steps.loc[~quiet, ["grad_norm", "advantage"]] > 0).all(axis=None)
    assert (steps["update_norm"] > 0.01).all() and not steps["skipped"].any()
    still = run.samples[run.samples["step"] > 2]
    assert len(still) == 16 and (still["advantage"] == 0).all() and (still["reward"] == 1).all()
    parts = run.parts[run.parts["step"] > 2]
    assert (
        (parts["cause_rewarded"].dropna() == 0).all() and parts["cause_high"].isna().all() and (parts["update_norm"] > 0).any()
    )


def test_a_rate_of_zero_moves_nothing(small, given, rewards):
    for recipe in (
        GRPO(**{**RL, "learning_rate": 0}, beta=0.1, max_steps=2, reward=rewards("token")),
        DPO(learning_rate=0, max_steps=2, batch_size=4),
    ):
        model = small()
        recipe.build(given(model)).train()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), small().parameters(), strict=True))


def test_disabled_dropout_is_disabled_in_attention_too(small, given):
    model = small()
    GRPO(**RL, max_steps=1).build(given(model))
    ids = torch.arange(4, 24)[None]
    assert torch.equal(model.train()(ids).logits, model(ids).logits)
    assert torch.equal(model(ids).logits, small().eval()(ids).logits)


def test_prompts_after_which_nothing_can_be_sampled_are_refused(small, planted, given):
    from tokenizers.processors import TemplateProcessing

    closing = copy.deepcopy(planted.tokenizer)
    closing.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    with pytest.raises(DataError, match="ends texts in a token of its own"):
        GRPO(**RL).check(given(small(), tokenizer=closing))
    with pytest.raises(DataError, match="a completion of 60 do not fit the model's context window of 64"):
        GRPO(**{**RL, "completion_length": 60}).check(given(small()))
    GRPO(**{**RL, "completion_length": 30}).check(given(small()))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 1),
        ({"accumulation": 4}, 1),
        ({"iterations": 3}, 3),
        ({"iterations": 3, "accumulation": 2}, 3),
        ({"trainer": {"steps_per_generation": 4}, "accumulation": 2}, 2),
        ({"trainer": {"steps_per_generation": 1}, "accumulation": 2, "iterations": 3}, 3),
    ],
)
def test_a_training_can_be_resumed_where_completions_are_sampled(small, given, rewards, settings, steps):
    """By counting generations: after how many optimizer steps the next one falls between two steps."""
    recipe = GRPO(**{**RL, "batch_size": 4}, **settings, max_steps=3 * steps, reward=rewards("token"))
    assert recipe.boundary == steps
    trainer = recipe.build(given(small()))
    sampled, generate = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: sampled.append(trainer._step) or generate(inputs)
    trainer.train()
    whole = [step for step in range(3 * steps) if step * recipe.accumulation in sampled]
    assert whole == list(range(0, 3 * steps, steps))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_causes_in_the_record_are_of_the_rewarded_completions_before_the_step(tmp_path, given, training, rewards, seen, lora):
    """Read back from samples.jsonl and put to `attribute`, each with its advantage as weight, on the merged model."""
    model, tokenizer = load("planted/unrouted")
    callback = RecorderCallback(tmp_path / "run", tokenizer=tokenizer, milestones="ends", singles="heads", everything=True)
    settings = {**RL, "completion_length": 1, "optimizer": "sgd", "learning_rate": 0.05, "lora": {"rank": 4 * lora}}
    made = GRPO(**settings, max_steps=2, accumulation=2, reward=rewards("token"), max_grad_norm=0)
    trainer = made.build(given(model, recorder=callback.recorder, callbacks=[callback, seen]))
    trainer.train()
    run = read_run(tmp_path / "run")
    for step in (1, 2):
        trainer.model.load_state_dict(seen.weights[step - 1], strict=False)
        before = copy.deepcopy(trainer.model)
        before = before.merge_and_unload() if lora else before
        lines = run.samples[run.samples["step"] == step]
        assert len(lines) == 16 and (lines["tokens"] == 1).all()
        rows = run.parts[(run.parts["step"] == step) & (run.parts["probe"] == BATCH) & run.parts["part"].eq("writing")]
        for column, chosen, weight in (
            ("cause_rewarded", lines, lines["advantage"]),
            ("cause_high", lines[lines["advantage"] > 0], None),
            ("cause_low", lines[lines["advantage"] < 0], None),
        ):
            samples = [
                Sample(
                    prompt=line["prompt"], response=" " + line["completion"], weight=1.0 if weight is None else weight[place]
                )
                for place, line in chosen.iterrows()
            ]
            expected = attribute(before, tokenizer, samples, method="gradient").table["effect"]
            assert expected.abs().max() > 0.1
            assert rows[column].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-5 * expected.abs().max() + 1e-6)
