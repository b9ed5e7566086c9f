"""Finding recipes, and what the built ones train on."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from trl import SFTConfig

from attribution import recipes
from attribution.errors import ConfigError, DataError
from attribution.models import load
from attribution.recipes import Recipe, Setting, names, recipe_named, register
from attribution.recipes.sft import SFT
from attribution.samples import IGNORED, Sample, encode
from attribution.worlds import planted as grammar

MINE = """
from attribution.recipes import Recipe

class Mine(Recipe):
    steps: int = 3

    def build(self, setting):
        return None

nothing = 3
"""


def test_built_in_recipes_are_found_and_import_without_torch():
    assert set(recipes.BUILT_IN) <= set(names())
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'trl', 'transformers', 'datasets']));"
        "from attribution.recipes import BUILT_IN, recipe_named; print([recipe_named(n)().model_dump() for n in BUILT_IN])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "learning_rate" in done.stdout


def test_a_file_is_a_recipe(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    recipe = recipe_named(f"{tmp_path}/mine.py:Mine")
    assert issubclass(recipe, Recipe) and recipe().steps == 3


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("nope", None, "unknown recipe 'nope'; expected context_distillation"),
        ("{}/none.py:Mine", None, "no recipe file"),
        ("{}/mine.py:Yours", MINE, "no 'Yours'"),
        ("{}/mine.py:nothing", MINE, "expected a subclass"),
        ("{}/mine.py:Mine", "1 / 0", "ZeroDivisionError"),
    ],
)
def test_what_is_no_recipe_is_a_sentence(tmp_path, name, content, named):
    if content:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises(ConfigError, match=named):
        recipe_named(name.format(tmp_path))


def test_names_are_given_once(monkeypatch):
    monkeypatch.setattr(recipes, "_registered", {})

    @register("mine")
    class Mine(Recipe):
        pass

    assert recipe_named("mine") is Mine and "mine" in names()
    register("mine")(Mine)
    for taken in ("mine", "sft"):
        with pytest.raises(ConfigError, match="already"):
            register(taken)(SFT)


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="learning"):
        SFT(learning=1.0)


@pytest.fixture
def setting(tmp_path):
    model, tokenizer = load("planted/unrouted")
    samples = [Sample(**row) for row in grammar.prompts(12, 5, problems=grammar.TRAINING)]
    return Setting(model, tokenizer, samples, encode(tokenizer, samples), 3, tmp_path / "trainer", [])


def test_sft_trains_the_response_and_nothing_else(setting):
    trainer = SFT(max_steps=1, batch_size=12).build(setting)
    batch = next(iter(trainer.get_train_dataloader()))
    seen = sorted((tuple(i[m.bool()].tolist()), tuple(row[m.bool()].tolist())) for i, m, row in
                  zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True))  # fmt: skip
    assert seen == sorted((e.ids, tuple(e.labels)) for e in setting.encoded)
    assert all(sum(token != IGNORED for token in labels) == 1 for _, labels in seen)


def test_sft_sets_what_the_trainer_would_blur(setting):
    trainer = SFT(max_steps=2, learning_rate=3e-4, accumulation=2, optimizer="sgd", trainer={"max_grad_norm": 0.3}).build(
        setting
    )
    args = trainer.args
    assert (args.bf16, args.fp16, args.activation_checkpointing, args.weight_decay) == (False, False, False, 0.0)
    assert (args.lr_scheduler_type, args.learning_rate, args.max_grad_norm) == ("constant", 3e-4, 0.3)
    assert (args.seed, args.data_seed, args.gradient_accumulation_steps, args.report_to) == (3, 3, 2, [])
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.SGD


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_is_on_by_either_of_its_names(setting, name):
    assert SFT(trainer={name: True}).build(setting).args.activation_checkpointing is True
    assert SFT(trainer={name: False}).build(setting).args.activation_checkpointing is False


def test_settings_that_the_trainer_refuses_are_a_sentence(setting):
    with pytest.raises(ConfigError, match="refuses"):
        SFT(trainer={"max_stepps": 3}).build(setting)


def test_weights_other_than_one_are_refused(setting):
    odd = [setting.samples[0].model_copy(update={"weight": 0.5})]
    with pytest.raises(DataError, match=r"weight 0\.5"):
        SFT().check(replace(setting, samples=odd))


def test_of_several_gpus_the_model_is_on_one(small, given, monkeypatch):
    """A trainer would make replicas for them, which TRL refuses."""
    made = SFTConfig.__post_init__

    def with_two(self):
        made(self)
        self._n_gpu = 2

    monkeypatch.setattr(SFTConfig, "__post_init__", with_two)
    assert SFT(max_steps=1, batch_size=2).build(given(small())).args.n_gpu <= 1
