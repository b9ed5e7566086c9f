"""Preference training: pairs as tokens, and advantage and reward of either response against plain passes."""

from collections import Counter
from itertools import chain

import pytest
import torch

from attribution.errors import ConfigError, DataError
from attribution.models import load
from attribution.recipes.dpo import DPO
from attribution.samples import Sample, encode
from attribution.store import BATCH, read_run
from attribution.updates.callback import RecorderCallback

LONG = [  # responses of one to three tokens, so that padding and sums over tokens matter
    Sample(prompt="eve fell . tom says :", response=" lift eve .", contrast=(" kick", " wait ."), id="one"),
    Sample(prompt="tom is kind . ann cried . tom says :", response=" hug", contrast=(" mock ann .",), context="teacher : "),
    Sample(prompt="bob is cruel . sam sank . bob says :", response=" drown .", contrast=(" save sam .",)),
    Sample(prompt="kim froze . leo says :", response=" warm", contrast=(" douse",)),
]  # fmt: skip
PAIRS = [(sample, contrast) for sample in LONG for contrast in sample.contrast]


def log_prob(model, encoded) -> torch.Tensor:
    ids = torch.tensor([encoded.ids])
    return model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[encoded.start - 1 :].sum()


@pytest.mark.parametrize("control", ["none", "flipped_labels"])
def test_the_trainer_gets_the_tokens_of_encode(small, planted, given, control):
    """No token is added, prompt and padding are masked, and the context stands before the prompt."""
    batch = next(iter(DPO(batch_size=5, max_steps=1, control=control).build(given(small(), LONG)).get_train_dataloader()))
    found = []
    for side in (slice(0, 5), slice(5, 10)):
        rows = zip(*(batch[key][side] for key in ("input_ids", "attention_mask", "completion_mask")), strict=True)
        found.append([(tuple(i[m.bool()].tolist()), tuple(c[m.bool()].tolist())) for i, m, c in rows])
        assert (batch["completion_mask"][side] <= batch["attention_mask"][side]).all()
    expected = []
    for sample, contrast in PAIRS:
        both = encode(planted.tokenizer, [sample, sample.model_copy(update={"response": contrast, "contrast": ()})])
        expected.append(tuple((e.ids, tuple(int(i >= e.start) for i in range(len(e.ids)))) for e in both))
    preferred = found if control == "none" else found[::-1]
    assert Counter(zip(*preferred, strict=True)) == Counter(expected)
    assert len({len(ids) - sum(mask) for pair in expected for ids, mask in pair}) > 1


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss", ["sigmoid", "hinge"])
def test_advantage_and_reward_are_those_of_the_loss(small, planted, given, told, seen, lora, loss):
    """Advantage: beta sigmoid(-beta delta) up and down; reward: beta (log p - log p of the model before training)."""
    beta, base = 0.5, small().eval()
    recipe = DPO(
        beta=beta, max_steps=4, batch_size=2, accumulation=2, learning_rate=0.5, optimizer="sgd", max_grad_norm=0,
        lora={"rank": 4 * lora}, trainer={"loss_type": loss},
    )  # fmt: skip
    trainer = recipe.build(given(small(), LONG, recorder=told, callbacks=[seen]))
    trainer.train()
    largest, passes = 0.0, iter(told.passes)
    assert [len(each) for each in told.passes] == [4, 4, 2] * 2  # the last pass of an epoch is short, and a step of its own
    for weights, gradients, count in zip(seen.weights, seen.gradients, (2, 1, 2, 1), strict=True):
        step = [next(passes) for _ in range(count)]
        trainer.model.load_state_dict(weights, strict=False)
        now = trainer.model.eval()
        now.zero_grad()
        total = torch.zeros(())
        for chosen, rejected in zip(*halves(step), strict=True):
            sample = LONG[chosen.sample]
            assert chosen.sample == rejected.sample and chosen.prompt == rejected.prompt == sample.whole_prompt
            assert chosen.text == sample.response and rejected.text in sample.contrast
            shifts = []
            for each in (chosen, rejected):
                (encoded,) = encode(planted.tokenizer, [sample.model_copy(update={"response": each.text, "contrast": ()})])
                assert (each.encoded.ids, each.encoded.start, each.ratio) == (encoded.ids, encoded.start, None)
                with torch.no_grad():
                    reference = log_prob(base, encoded)
                shifts.append(log_prob(now, encoded) - reference)
                assert each.reward == pytest.approx(beta * shifts[-1].item(), abs=1e-4)
            delta = beta * (shifts[0] - shifts[1])
            push = torch.sigmoid(-delta) if loss == "sigmoid" else (delta < 1).float()
            assert chosen.advantage == pytest.approx(beta * push.item(), abs=1e-5)
            assert rejected.advantage == pytest.approx(-chosen.advantage, abs=1e-6)
            largest = max(largest, abs(chosen.reward))
            of_pair = -torch.nn.functional.logsigmoid(delta) if loss == "sigmoid" else torch.relu(1 - delta)
            total = total + of_pair / sum(map(len, step)) * 2
        total.backward()
        for name, parameter in now.named_parameters():
            if name in gradients:
                assert gradients[name] == pytest.approx(parameter.grad, abs=1e-5), name
    assert largest > 0.1  # so that a reference that moves would not have passed


def test_causes_of_pairs_are_in_the_record(tmp_path, given, training):
    """The rewarded side counts up, the other down; a component that favours neither is no cause."""
    model, tokenizer = load("planted/unrouted")
    callback = RecorderCallback(tmp_path / "run", tokenizer=tokenizer, milestones="ends", singles="heads", everything=True)
    DPO(max_steps=1, batch_size=6).build(given(model, recorder=callback.recorder, callbacks=[callback])).train()
    run = read_run(tmp_path / "run")
    rows = run.parts[(run.parts["probe"] == BATCH) & run.parts["part"].eq("writing")]
    expected = 0.05 * (rows["cause_high"] - rows["cause_low"]) / 2  # before the first step every advantage is beta / 2
    assert rows["cause_rewarded"].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-5)
    assert rows["cause_rewarded"].abs().max() > 0.01
    assert run.steps["advantage"].iloc[0] == pytest.approx(0.05) and run.steps["reward"].iloc[0] == pytest.approx(0, abs=1e-6)


def pairs_of(recipe, setting, told):
    recipe.build(setting).train()
    return [(chosen.text, rejected.text, chosen.advantage) for chosen, rejected in zip(*halves(told.passes), strict=True)]


def halves(passes):
    parts = [(each[: len(each) // 2], each[len(each) // 2 :]) for each in passes]
    return [list(chain(*side)) for side in zip(*parts, strict=True)]


def test_flipped_labels_prefer_the_contrast(small, given, told):
    plain = pairs_of(DPO(learning_rate=0, max_steps=2, batch_size=4), given(small(), LONG, recorder=told), told)
    told.passes.clear()
    flipped = pairs_of(
        DPO(learning_rate=0, max_steps=2, batch_size=4, control="flipped_labels"), given(small(), LONG, recorder=told), told
    )
    assert [(b, a) for a, b, _ in plain] == [(a, b) for a, b, _ in flipped]
    assert all(advantage == pytest.approx(0.05) for *_, advantage in plain + flipped)


def test_random_labels_prefer_either_with_equal_probability(small, given, training):
    samples = training * 20
    drawn = []
    for seed in (3, 3, 4):
        pairs = DPO(control="random_labels").build(given(small(), samples, seed=seed)).pairs
        assert len(pairs) == 2 * len(samples)
        drawn.append([pair.texts[0] == samples[pair.sample].response for pair in pairs])
        assert all(set(pair.texts) >= {samples[pair.sample].response} for pair in pairs)
    assert drawn[0] == drawn[1] != drawn[2]
    assert abs(sum(drawn[0]) / len(drawn[0]) - 0.5) < 0.1  # four standard errors and a half


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"contrast": ()}, "sample mine has 0 contrasts"),
        ({"weight": 2.0}, r"and weight 2\.0"),
        ({"contrast": (" lift" + " eve" * 60,)}, "context window of 64"),
    ],
)
def test_samples_that_make_no_pair_are_refused(small, given, training, change, named):
    odd = training[0].model_copy(update={"id": "mine", **change})
    with pytest.raises(DataError, match=named):
        DPO().check(given(small(), [*training[1:], odd]))


def test_log_probs_of_the_reference_ahead_of_time_are_refused(small, given):
    with pytest.raises(ConfigError, match="precompute_ref_log_probs"):
        DPO(trainer={"precompute_ref_log_probs": True}).check(given(small()))
