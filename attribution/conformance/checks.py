"""Tests that every recipe must pass: it trains, the seed decides, recording changes nothing, it goes on where it stopped.

Each run is a few steps of an embedded model. A file of tests of your own may import all of this and override the fixture
`recipe`, as the file does that `attribution new-recipe` writes.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pytest
import torch
from safetensors.torch import load_file

from attribution.cli import main
from attribution.conformance import asked
from attribution.errors import AttributionError
from attribution.models import locate
from attribution.recipes import Recipe, recipe_named
from attribution.runs import RunConfig, checkpoints, run, stages
from attribution.runs.stages import KEPT
from attribution.samples import Sample, read_samples, write_samples
from attribution.store import COLUMNS, read_run
from attribution.updates.callback import RecorderCallback
from attribution.updates.seam import plain
from attribution.worlds import planted

__all__ = [
    "of_recipe",
    "recipe",
    "test_a_learning_rate_of_zero_moves_nothing",
    "test_a_stopped_training_goes_on_to_the_same_end",
    "test_adapters_are_trained_and_recorded_as_what_they_change",
    "test_another_seed_is_another_training",
    "test_controls_can_be_applied",
    "test_half_the_batch_twice_is_the_whole_batch_once",
    "test_it_trains_and_every_step_is_recorded",
    "test_recording_changes_nothing",
    "test_settings_are_plain_and_unknown_ones_refused",
    "test_the_command_line_takes_it_and_its_config_replays",
    "test_the_same_seed_gives_the_same_weights",
    "test_what_a_mechanism_is_kept_from_it_does_not_learn",
    "test_what_is_prepared_depends_on_the_seed_alone",
    "trained",
]  # fmt: skip

STEPS, STOPPED = 6, 4
SMALL: dict[str, Any] = {  # where the recipe has these settings
    "max_steps": STEPS, "batch_size": 8, "generations": 4, "completion_length": 1, "learning_rate": 1e-3,
}  # fmt: skip


class Trained(NamedTuple):
    """What a training came to: its weights, and its record."""

    weights: dict[str, torch.Tensor]
    path: Path


class OfRecipe(NamedTuple):
    """A recipe with the settings and files of the suite.

    Attributes:
        name: as a config names it.
        settings: of every run, beside those that a test changes.
        config: of a run, given further settings of the training.
    """

    name: str
    settings: dict[str, Any]
    config: Callable[..., RunConfig]

    @property
    def type(self) -> type[Recipe]:
        return recipe_named(self.name)

    def has(self, setting: str) -> bool:
        return setting in self.type.model_fields

    def need(self, setting: str) -> None:
        """Skip the test of a recipe without this setting."""
        if not self.has(setting):
            pytest.skip(f"{self.name} has no setting {setting!r}, and need not have it")


@pytest.fixture(scope="module")
def recipe(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """The recipe's name, and the settings that it needs beside its defaults."""
    return asked(request.config)


@pytest.fixture(scope="module")
def of_recipe(
    request: pytest.FixtureRequest, recipe: tuple[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> OfRecipe:
    """The recipe, on samples that have all that samples can have: a context, a contrast, an id."""
    name, needed = recipe
    known = recipe_named(name).model_fields
    settings = {**{key: value for key, value in SMALL.items() if key in known}, **needed}
    folder = tmp_path_factory.mktemp("data")
    given = request.config.getoption("--recipe-data", default=None)
    data = given or str(write_samples(folder / "train.jsonl", _samples(24, planted.TRAINING)))
    probes = str(write_samples(folder / "probes.jsonl", _samples(6, planted.HELD_OUT)))

    def config(training: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
        return RunConfig.model_validate({
            "model": "planted", "recipe": name, "training": {**settings, **(training or {})}, "data": data,
            "probes": (probes,), "sets": "model", "singles": "heads", "heads": (), "grafts": "none", "everything": False,
            "share_passes": 2, "milestones": "ends", "keep": True, **changes,
        })  # fmt: skip

    return OfRecipe(name, settings, config)


def _samples(count: int, problems: Any) -> list[Sample]:
    """Prompts in which two cues name different replies; the first sentence is the context."""
    rows = planted.prompts(count, 1, star="conflict", problems=problems)
    cut = [row["prompt"].index(". ") + 2 for row in rows]
    return [
        Sample(**{**row, "context": row["prompt"][:end], "prompt": row["prompt"][end:]})
        for row, end in zip(rows, cut, strict=True)
    ]


@pytest.fixture(scope="module")
def trained(of_recipe: OfRecipe, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Train and record, once for every choice of settings."""
    done: dict[str, Trained] = {}

    def train(training: dict[str, Any] | None = None, again: str = "", **changes: Any) -> Trained:
        config = of_recipe.config(training, **changes)
        key = f"{config.hash} {config.seed} {again}"
        if key not in done:
            path = tmp_path_factory.mktemp("run") / "run"
            run(config, path, page=False)
            done[key] = Trained(_weights(path), path)
        return done[key]

    return train


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / KEPT / "model.safetensors")


def _start() -> dict[str, torch.Tensor]:
    return load_file(Path(locate("planted")) / "model.safetensors")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_settings_are_plain_and_unknown_ones_refused(of_recipe: OfRecipe) -> None:
    """They go through the config of a run and back, and a misspelled one is an error."""
    recipe = of_recipe.type
    made = recipe(**of_recipe.settings)
    assert recipe.model_validate_json(made.model_dump_json()) == made
    config = of_recipe.config()
    assert RunConfig.model_validate_json(config.model_dump_json()).model_dump() == config.model_dump()
    with pytest.raises(ValueError, match="no_such_setting"):
        recipe(**{**of_recipe.settings, "no_such_setting": 1})


def test_what_is_prepared_depends_on_the_seed_alone(of_recipe: OfRecipe) -> None:
    """And preparing leaves the model and all random numbers as they were."""
    given = stages.read(of_recipe.config(), False)
    samples = read_samples(given.config.data)
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), torch.get_rng_state()
    prepare = given.config.training.prepare
    one, again, other = (prepare(samples, given.model, given.tokenizer, seed) for seed in (0, 0, 1))
    assert one == again, "one seed gave two sets of samples"
    assert (random.getstate(), torch.get_rng_state().tolist()) == (states[0], states[1].tolist()), "random numbers were used up"
    assert _same(dict(given.model.state_dict()), before), "the model was changed"
    drawn = [sample.response for sample in one] != [sample.response for sample in samples]
    if drawn and one == other:
        told = "`prepare` gives other responses, the same for two seeds; if it draws them, let the seed decide"
        warnings.warn(told, stacklevel=1)


def test_it_trains_and_every_step_is_recorded(of_recipe: OfRecipe, trained: Callable[..., Trained]) -> None:
    found = trained()
    assert all(torch.isfinite(value).all() for value in found.weights.values())
    assert not _same(found.weights, _start()), "no weight has moved"
    record = read_run(found.path)
    assert record.status["state"] == "finished"
    steps = record.steps["step"].tolist()
    assert steps == list(range(1, len(steps) + 1)) and steps, "a step is missing in the record"
    moved = record.parts.groupby("step")["update_norm"].max()
    assert (moved.loc[1:] > 0).all(), "a recorded step moved nothing"
    assert record.probes["metric"].nunique() > 1, "what probes read never changed"


def test_the_same_seed_gives_the_same_weights(trained: Callable[..., Trained]) -> None:
    assert _same(trained().weights, trained(again="a second time").weights), "one seed gave two trainings"


def test_another_seed_is_another_training(trained: Callable[..., Trained]) -> None:
    assert not _same(trained().weights, trained(seed=1).weights), "`setting.seed` decides nothing; give it to the trainer"


def test_recording_changes_nothing(of_recipe: OfRecipe, trained: Callable[..., Trained], tmp_path: Path) -> None:
    """The weights after training without a recorder are those after training with it, bit by bit."""
    given = stages.read(of_recipe.config(), False)
    trainer = given.config.training.build(stages.setting(given, tmp_path / "trainer", []))
    trainer.train()
    bare = {name: value.detach() for name, value in plain(given.model).state_dict().items()}
    recorded = trained().weights
    odd = [name for name, value in recorded.items() if not torch.equal(value, bare[name])]
    assert not odd, f"{odd[0]} differs"


def test_half_the_batch_twice_is_the_whole_batch_once(of_recipe: OfRecipe, trained: Callable[..., Trained]) -> None:
    """One step of SGD without clipping, on samples that are given, of one forward pass or of two."""
    of_recipe.need("accumulation")
    of_recipe.need("optimizer")
    if of_recipe.has("completion_length"):
        pytest.skip("it trains on completions that it samples, other ones for another batch")
    plain = {"max_steps": 1, "optimizer": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}
    whole = trained({**plain, "batch_size": 8, "accumulation": 1}).weights
    halves = trained({**plain, "batch_size": 4, "accumulation": 2}).weights
    start = _start()
    for name, value in whole.items():
        moved = (value - start[name]).norm()
        assert (halves[name] - value).norm() <= 1e-3 * moved + 1e-6, (
            f"{name} moves {float((halves[name] - start[name]).norm() / moved):.2f} times as far; does the loss divide by "
            "`num_items_in_batch`?"
        )


def test_the_command_line_takes_it_and_its_config_replays(
    of_recipe: OfRecipe, trained: Callable[..., Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(of_recipe.config().model_dump_json(), encoding="utf-8")
    for place, given in (("first", file), ("again", tmp_path / "first" / "config.json")):
        ended = main(["run", str(given), "--recipe", of_recipe.name, "--out", str(tmp_path / place)])
        assert ended == 0, capsys.readouterr().err
        assert _same(_weights(tmp_path / place), trained().weights), "it came to another end than the same run from Python"


def test_a_stopped_training_goes_on_to_the_same_end(
    of_recipe: OfRecipe, trained: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = of_recipe.config({}, checkpoint_seconds=0)
    end = RecorderCallback.on_optimizer_step

    class Stopped(BaseException):
        pass

    def stop(self: Any, args: Any, state: Any, control: Any, **others: Any) -> None:
        end(self, args, state, control, **others)
        if state.global_step == STOPPED:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(RecorderCallback, "on_optimizer_step", stop)
        run(config, tmp_path / "run", page=False)
    assert checkpoints.choose(tmp_path / "run")[0], "it left no checkpoint; see Recipe.boundary"
    run(config, tmp_path / "run", page=False)
    assert "again from checkpoint" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert _same(_weights(tmp_path / "run"), trained().weights), "it went on to another end"
    whole, stopped = read_run(trained().path), read_run(tmp_path / "run")
    for frame in COLUMNS:
        one, other = (getattr(each, "parts" if frame == "components" else frame) for each in (whole, stopped))
        timed = [column for column in one if "seconds" in column]
        assert one.drop(columns=timed).equals(other.drop(columns=timed)), f"the record of {frame} is another"


def test_adapters_are_trained_and_recorded_as_what_they_change(of_recipe: OfRecipe, trained: Callable[..., Trained]) -> None:
    of_recipe.need("lora")
    found = trained({"lora": {"rank": 2}})
    assert not any("lora" in name for name in found.weights), "what is kept is not the whole weight"
    assert not _same(found.weights, _start()), "no weight has moved"
    embedding = "model.embed_tokens.weight"  # which carries no adapter
    assert torch.equal(found.weights[embedding], _start()[embedding]), "weights were trained beside the adapters"
    assert (read_run(found.path).parts.query("step > 0")["update_norm"] > 0).any()


def test_a_learning_rate_of_zero_moves_nothing(of_recipe: OfRecipe, trained: Callable[..., Trained]) -> None:
    of_recipe.need("learning_rate")
    assert _same(trained({"learning_rate": 0.0}).weights, _start()), "something moved"


def test_controls_can_be_applied(of_recipe: OfRecipe, trained: Callable[..., Trained]) -> None:
    """Every value of the setting `control` trains."""
    of_recipe.need("control")
    told = of_recipe.type.model_fields["control"].annotation
    assert getattr(told, "__origin__", None) is Literal, "`control` should be a Literal of names"
    for control in get_args(told):
        if control != of_recipe.type.model_fields["control"].default:
            assert not _same(trained({"control": control}).weights, _start()), f"control {control}: no weight has moved"


def test_what_a_mechanism_is_kept_from_it_does_not_learn(of_recipe: OfRecipe, trained: Callable[..., Trained]) -> None:
    """With the gradient of a named set stopped, its parameters stay and others move."""
    of_recipe.need("intervention")
    try:
        found = trained({"intervention": {"components": "A", "updating": "stopped"}})
    except AttributionError as error:
        pytest.fail(f"the intervention is refused: {error}")
    kept, start = found.weights, _start()
    neurons = kept["model.layers.0.mlp.down_proj.weight"] - start["model.layers.0.mlp.down_proj.weight"]
    assert (neurons[:, :128] == 0).all(), "the neurons of A moved"
    assert (neurons[:, 128:] != 0).any(), "those of B did not"
