"""The conformance suite: what works passes, and what breaks one rule fails the test of that rule, each in a file of its own."""

import pytest

from attribution.cli import main
from attribution.errors import ConfigError
from attribution.recipes import recipe_named
from attribution.recipes.files import named
from attribution.recipes.new import write_recipe

pytestmark = pytest.mark.slow

HEAD = """
import random
from dataclasses import replace
import torch
from attribution.recipes import Setting
from attribution.recipes.sft import SFT
from attribution.recipes.trainer import TrainerRecipe

class Mine(SFT):
"""
BROKEN = {  # by the test that must fail, what a recipe does wrong
    "test_it_trains_and_every_step_is_recorded": """
    def build(self, setting):
        return super().build(replace(setting, callbacks=[]))
""",
    "test_another_seed_is_another_training": """
    def build(self, setting):
        return super().build(replace(setting, seed=0))
""",
    "test_the_same_seed_gives_the_same_weights": """
    def build(self, setting):
        torch.seed()
        with torch.no_grad():
            setting.model.lm_head.weight += 1e-3 * torch.randn_like(setting.model.lm_head.weight)
        return super().build(setting)
""",
    "test_recording_changes_nothing": """
    def build(self, setting):
        rate = self.learning_rate * (1 if setting.recorder is None else 2)
        return SFT.build(self.model_copy(update={"learning_rate": rate}), setting)
""",
    "test_half_the_batch_twice_is_the_whole_batch_once": """
    def build(self, setting):
        trainer = super().build(setting)
        trainer.model_accepts_loss_kwargs, whole = True, trainer.compute_loss
        trainer.compute_loss = lambda model, inputs, **given: whole(model, inputs)
        return trainer
""",
    "test_what_is_prepared_depends_on_the_seed_alone": """
    def prepare(self, samples, model, tokenizer, seed):
        return random.sample(samples, len(samples))
""",
    "test_adapters_are_trained_and_recorded_as_what_they_change": """
    def build(self, setting):
        return SFT.build(self.model_copy(update={"lora": type(self.lora)()}), setting)
""",
}  # fmt: skip


class Outcomes:
    """Which tests of an inner run passed, failed or were skipped."""

    def __init__(self):
        self.of = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid.rpartition("::")[2]] = report.outcome


def suite(folder, recipe, *given):
    """The outcome of every test of the suite, and the exit code."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    found = Outcomes()
    code = pytest.main(
        ["-q", "-c", str(folder / "pytest.ini"), "-p", "no:cacheprovider", "-p", "no:xdist", "--recipe", recipe, *given],
        plugins=[found],
    )
    return found.of, code


def test_the_template_is_a_recipe_under_any_name(tmp_path, capfd):
    assert main(["new-recipe", "my_recipe", "--folder", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    assert f"{tmp_path}/my_recipe.py:MyRecipe" in said and f"pytest {tmp_path}/test_my_recipe.py" in said
    found, code = suite(tmp_path, f"{tmp_path}/my_recipe.py:MyRecipe")
    assert code == 0 and len(found) == 13, found
    assert {name for name, outcome in found.items() if outcome != "passed"} == {"test_controls_can_be_applied"}


@pytest.mark.parametrize("test", BROKEN)
def test_what_breaks_a_rule_fails_its_test(tmp_path, test):
    (tmp_path / "mine.py").write_text(HEAD + BROKEN[test])
    found, code = suite(tmp_path, f"{tmp_path}/mine.py:Mine", "-k", test)
    assert code == 1 and found == {test: "failed"}


def test_the_file_of_tests_that_is_written_runs_the_suite(tmp_path):
    _, test = write_recipe("Mine", tmp_path)
    found, code = suite(tmp_path, "sft", str(test), "-k", "plain or sense")  # its own recipe stands before that of the flag
    assert code == 0 and set(found.values()) == {"passed"} and len(found) == 2


def test_a_worked_example_conforms(tmp_path):
    found, code = suite(tmp_path, "experiments/recipes/best_of_n.py:BestOfN", "-k", "trains or prepared or stopped or plain")
    assert code == 0 and len(found) == 4 and set(found.values()) == {"passed"}


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("3rd", "cannot be the name of a recipe"),
        ("a-b", "cannot be the name"),
        ("taken", "is there already; remove it, or choose"),
    ],
)
def test_names_that_cannot_be_taken(tmp_path, name, named):
    (tmp_path / "test_taken.py").write_text("")
    with pytest.raises(ConfigError, match=named):
        write_recipe(name, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test_taken.py"]


@pytest.mark.parametrize("name", ["my_recipe", "MyRecipe", "myRecipe"])
def test_however_it_is_spelled_it_is_the_same_recipe(tmp_path, name):
    file, test = write_recipe(name, tmp_path)
    assert (file.name, test.name) == ("my_recipe.py", "test_my_recipe.py")
    assert recipe_named(f"{file}:MyRecipe")(fading=0.25).fading == 0.25
    assert recipe_named(f"{file}:MyRecipe") is recipe_named(f"{file}:MyRecipe")  # so that a config is itself again


def test_settings_may_be_of_a_type_defined_below_and_of_no_other(tmp_path):
    lines = ["from __future__ import annotations", "from typing import Literal", "from attribution.recipes.sft import SFT"]
    lines += ["class Mine(SFT):", "    more: Later = 'a'"]
    (tmp_path / "without.py").write_text("\n".join(lines) + "\n")
    (tmp_path / "below.py").write_text("\n".join([*lines, "Later = Literal['a', 'b']"]) + "\n")
    assert recipe_named(f"{tmp_path / 'below.py'}:Mine").model_validate({"more": "b"})
    with pytest.raises(ConfigError, match="name 'Later' is not defined; define it in the recipe's file"):
        recipe_named(f"{tmp_path / 'without.py'}:Mine")


def test_other_content_is_another_recipe_and_is_hashed_into_the_run(tmp_path):
    file, _ = write_recipe("mine", tmp_path)
    first = recipe_named(f"{file}:Mine")
    file.write_text(file.read_text().replace("default=0.5", "default=0.75"))
    assert recipe_named(f"{file}:Mine") is not first and recipe_named(f"{file}:Mine")().fading == 0.75
    assert named({"recipe": f"{file}:Mine", "deep": [{"reward": f"{file}:f"}, "x.py:g", 3, None]}) == [str(file)]
