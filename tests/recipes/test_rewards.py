"""Rewards of users, with what can go wrong in them, and the controls that take a reward's meaning away."""

from itertools import chain
from types import SimpleNamespace

import pytest

from attribution.errors import ConfigError, RewardError
from attribution.recipes.rewards import Reward, ends, response, reward_named
from attribution.recipes.rl import GRPO

RL = {"generations": 4, "batch_size": 8, "completion_length": 3, "learning_rate": 0, "max_steps": 3}
NAMES = ("first", "second", "third")


def asked(reward, sample=(0, 0, 1, 2), step=0):
    """What a trainer would get for these completions."""
    completions = [f"word{place}" for place in range(len(sample))]
    ids = [[place, 9] for place in range(len(sample))]
    state = SimpleNamespace(global_step=step)
    columns = {"response_ids": [[place % 2] for place in range(len(sample))], "trainer_state": state, "log_metric": print}
    return reward(prompts=completions, completions=completions, completion_ids=ids, sample=list(sample), **columns)


def of_file(tmp_path, text, **settings) -> Reward:
    (tmp_path / "mine.py").write_text(f"import torch\n{text}\n")
    return Reward(f"{tmp_path}/mine.py:mine", NAMES, **settings)


def test_the_built_in_reward_compares_tokens_from_the_first_on():
    assert response([[5, 6, 7], [5], [6, 5], [5, 6]], [[5, 6], [5, 6], [5], [5]]) == [1, 0, 0, 1]
    assert asked(Reward("response", NAMES)) == [1, 1, 0, 0]


def test_the_reward_of_an_end_looks_at_one_token_in_its_place():
    done = [[5, 6, 7], [8, 6, 9], [5, 7], [5, 6], [6, 7, 7]]
    assert ends(done, [[1, 7], [1, 6], [1, 7], [1, 2, 6], [1, 2, 7]]) == [0, 1, 1, 0, 1]
    assert reward_named("ends") is ends


def test_a_function_in_a_file_is_called_as_the_trainer_calls_it(tmp_path):
    text = "def mine(completions, completion_ids, sample, trainer_state, **_):\n    return {}"
    reward = of_file(
        tmp_path, text.format("[i[0] + 10 * s + trainer_state.global_step for i, s in zip(completion_ids, sample)]")
    )
    assert asked(reward, step=100) == [100, 101, 112, 123] and reward.last == [100, 101, 112, 123]
    assert reward.__name__ == "mine" and reward.texts == ["word0", "word1", "word2", "word3"]
    for given, wanted in (
        ("torch.arange(4.0)", [0, 1, 2, 3]),
        ("(True, False, 2, None)", [1, 0, 2, None]),
        ("map(len, completions)", [5, 5, 5, 5]),
        ("[completions.clear() or 1.0] * 4", [1, 1, 1, 1]),
    ):
        reward = of_file(tmp_path, text.format(given))
        assert asked(reward) == wanted and reward.texts == ["word0", "word1", "word2", "word3"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (
            "return [1 / (s - 1) for s in sample]",
            r"raises ZeroDivisionError \(division by zero\) at sample second \(completion 'word2'\)",
        ),
        ("return 1 / (len(sample) - 4)", "raises ZeroDivisionError .* batch of 4 completions that begins with sample first"),
        ("yield 1.0; yield 1.0; raise KeyError('no word')", r"raises KeyError \('no word'\) at .*sample first"),
        ("return [1, 2, float('nan'), 3]", "is nan for sample second; expected a finite number, or None"),
        ("return [1, 2, 3, float('-inf')]", "is -inf for sample third"),
        ("return [1, 'good', 2, 3]", "is 'good' for sample first"),
        ("return ['1', 2, 3, 4]", "is '1' for sample first"),
        ("return '1234'", "is '1' for sample first"),
        ("return [1, 2, 3, 10**400]", "is 1000.* for sample third"),
        ("return [1, 2, 3, -1e39]", r"is -1e\+39 for sample third"),
        ("return [1, 2, 3, torch.ones(2)]", "for sample third"),
        ("return [1, 2, 3, 1j]", "is 1j for sample third"),
        ("return [1, 2, 3]", "returned 3 rewards for 4 completions, so that there is none for sample third"),
        ("return [1] * 5", "returned 5 rewards for 4 completions"),
        ("return []", "returned 0 rewards for 4 completions, so that there is none for sample first"),
        ("return 3", "returned 3 for 4 completions that begin with sample first; expected a list"),
        ("return None", "returned None for 4 completions"),
        ("return torch.tensor(1.0)", r"returned tensor\(1\.\) for 4 completions"),
        ("pass", "returned None"),
        ("return {'reward': 1.0}", "returned 1 rewards"),
    ],
)
def test_what_is_no_reward_is_a_sentence_that_names_the_sample(tmp_path, body, named):
    reward = of_file(tmp_path, f"def mine(completions, sample, **_):\n    {body}")
    with pytest.raises(RewardError, match=named) as caught:
        asked(reward)
    assert "reward 'mine'" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert reward.last == []


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("respnse", None, "unknown reward 'respnse'; expected response, ends, or path/to/file.py:function"),
        ("{}/mine:mine", None, "unknown reward"),
        ("{}/none.py:mine", None, r"there is no reward file .*none\.py"),
        ("{}/mine.py:yours", "def mine(**_): pass", "defines no 'yours'"),
        ("{}/mine.py:mine", "mine = 3", "'mine' of .* is no plain function"),
        ("{}/mine.py:mine", "async def mine(**_): return [1.0]", "'mine' of .* is no plain function"),
        ("{}/mine.py:mine", "1 / 0", "fails on import"),
        ("{}/mine.py:mine", "def mine(", "fails on import"),
    ],
)
def test_what_is_no_reward_function_is_refused_before_training(tmp_path, small, given, name, text, named):
    if text:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=named):
        reward_named(name.format(tmp_path))
    with pytest.raises(ConfigError, match=named):
        GRPO(reward=name.format(tmp_path)).check(given(small()))


# Controls


def test_random_rewards_depend_on_seed_step_and_place_alone(rewards):
    def drawn(seed, step, sample=(0, 0, 1, 2) * 8, name="token"):
        return asked(Reward(rewards(name), NAMES, "random_reward", seed), sample, step)

    assert drawn(1, 0) == drawn(1, 0) == drawn(1, 0, sample=(2,) * 32, name="sometimes") and drawn(1, 0)[:4] == drawn(
        1, 0, (1,) * 4
    )
    assert len({tuple(drawn(seed, step)) for seed in range(4) for step in range(4)}) == 16
    every = list(chain(*(drawn(seed, step) for seed in range(8) for step in range(16))))
    assert set(every) == {0.0, 1.0} and abs(sum(every) / len(every) - 0.5) < 0.04  # 4,096 draws: five standard errors
    with pytest.raises(RewardError, match="breaks"):  # the function is asked all the same
        drawn(1, 0, name="breaks")


def trained(small, given, rewards, told, recipe=GRPO, **settings):
    told.passes.clear()
    recipe(**{**RL, **settings}, reward=rewards("token")).build(given(small(), recorder=told)).train()
    return list(chain(*told.passes))


def test_a_flipped_reward_gives_the_negative_advantages(small, given, rewards, told):
    plain, flipped = (trained(small, given, rewards, told, control=control) for control in ("none", "flipped_reward"))
    assert [(e.encoded.ids, -e.reward, -e.advantage) for e in plain] == [
        (e.encoded.ids, e.reward, e.advantage) for e in flipped
    ]
    assert len({each.advantage for each in plain}) > 8


@pytest.mark.parametrize("settings", [{}, {"accumulation": 2, "iterations": 2}])
def test_a_shuffled_advantage_is_dealt_out_anew_and_rewards_stay(small, given, rewards, told, settings):
    plain = trained(small, given, rewards, told, **settings)
    shuffled = trained(small, given, rewards, told, control="shuffled_advantage", **settings)
    assert [(e.encoded.ids, e.reward) for e in plain] == [(e.encoded.ids, e.reward) for e in shuffled]
    generation = 8 * settings.get("accumulation", 1)
    for start in range(0, len(plain), generation):
        one, other = ([each.advantage for each in every[start : start + generation]] for every in (plain, shuffled))
        assert sorted(one) == sorted(other) and one != other
    assert [e.encoded for e in trained(small, given, rewards, told, control="shuffled_advantage", **settings)] == [
        e.encoded for e in shuffled
    ]


def test_a_random_reward_reaches_the_advantages(small, given, rewards, told):
    drawn = trained(small, given, rewards, told, control="random_reward")
    assert {each.reward for each in drawn} == {0.0, 1.0} and any(each.advantage for each in drawn)
    assert all((each.advantage > 0) == (each.reward == 1) for each in drawn if each.advantage)
