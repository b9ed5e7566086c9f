"""The run: cause, train and record, graft, report; and what a user can get wrong, which leaves nothing behind."""

import json
import shutil
from itertools import combinations_with_replacement
from pathlib import Path

import pandas as pd
import pytest
import torch

import attribution as at
from attribution.cli import main
from attribution.errors import ConfigError, RunError
from attribution.mechanisms import write_mechanisms
from attribution.models import EMBEDDED
from attribution.recipes.sft import SFT
from attribution.runs import RunConfig, checkpoints, directory, run, stages
from attribution.runs.forecast import forecast_of
from attribution.samples import Sample, write_samples
from attribution.store import BATCH, COLUMNS, TRAINING, read_run
from attribution.store.singles import COLUMNS as SINGLES
from attribution.store.singles import singles
from attribution.updates.callback import RecorderCallback
from attribution.worlds import planted as grammar


def config_of(data, **changes) -> RunConfig:
    settings = {"data": data["train"], "probes": (data["conflict"], data["agree"]), "milestones": "ends",
                "training": SFT(max_steps=2, batch_size=6, learning_rate=1e-3)}  # fmt: skip
    return RunConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    told = []
    config = config_of(data)
    path = directory(config, tmp_path_factory.mktemp("runs"))
    report = run(config, path, tell=told.append)
    return path, report, told


def test_a_run_holds_causes_record_grafts_and_report(finished, data):
    path, report, told = finished
    found = read_run(path)
    assert report == path / "report.html" and report.stat().st_size > 1e6 and (path / "summary.md").exists()
    assert found.status["state"] == "finished" and found.result["steps"] == 2
    causes = found.influence[(found.influence["probe"] == TRAINING)]
    assert causes["kind"].value_counts().to_dict() == {"neuron": 1024, "row": 101, "head": 16}
    assert set(found.influence["probe"]) == {TRAINING, "conflict", "agree"}
    assert set(found.parts["probe"]) == {BATCH, "conflict", "agree"}
    words = found.tokens.astype({"when": str})
    assert words.groupby("when")["sample"].nunique().to_dict() == {"after": 4, "before": 4} and words["effect"].abs().max() > 0
    assert len(told) == 4 and all(line in (path / "log.txt").read_text() for line in told)
    assert not (path / "trainer").exists()
    inputs = json.loads((path / "config.json").read_text())["inputs"]
    assert set(inputs) == set(data.values()) and all(len(digest) == 64 for digest in inputs.values())


def test_causes_of_the_run_are_those_of_the_python_face(finished, data):
    found = read_run(finished[0])
    causes = found.influence[found.influence["probe"] == TRAINING].reset_index()
    expected = at.attribute(*at.load("planted"), at.read_samples(data["train"])).table
    assert expected["effect"].abs().max() > 0.1
    assert causes["effect"].to_numpy() == pytest.approx(expected["effect"].to_numpy(), abs=1e-5)


def test_grafts_of_the_run_are_of_heads_and_of_the_largest_shares(finished):
    found = read_run(finished[0])
    counts = found.grafts[found.grafts["probe"] == "agree"]["kind"].value_counts().to_dict()
    assert counts["head"] == 16 and 64 <= counts["neuron"] <= 128 and 24 <= counts["row"] <= 48
    shares = at.update_shares(found.path)
    for probe in ("agree", "conflict"):
        layer = shares[(shares["probe"] == probe) & (shares["kind"] == "neuron") & (shares["layer"] == 2)]
        largest = layer.loc[layer["share"].abs().nlargest(16).index, "index"]
        grafted = found.grafts[(found.grafts["kind"] == "neuron") & (found.grafts["layer"] == 2)]["index"]
        assert set(largest) <= set(grafted)
    assert (found.grafts["graft"] != 0).mean() > 0.9 and (found.grafts["prune"] != 0).mean() > 0.9
    # over two small steps a graft and a share of the same component are nearly the same thing
    both = found.grafts.astype({"probe": object, "kind": object}).merge(shares, on=["probe", "kind", "layer", "index"])
    assert both["graft"].corr(both["share"], method="spearman") > 0.7


def test_components_one_by_one_in_one_table(finished, tmp_path, data):
    found = read_run(finished[0])
    table = singles(found)
    assert list(table) == list(SINGLES) and table["kind"].value_counts().to_dict() == {"neuron": 1024, "head": 16}
    row = table[(table["kind"] == "neuron") & (table["layer"] == 2) & (table["index"] == 7)].iloc[0]
    here = found.influence[(found.influence["kind"] == "neuron") & (found.influence["layer"] == 2)]
    here = here[here["index"] == 7].astype({"probe": str}).set_index(["probe", "step"])["effect"]
    for column, key in (("before", ("conflict", 0)), ("after", ("conflict", 2)), ("cause", (TRAINING, 0))):
        assert row[column] == pytest.approx(here[key]) and here[key] != 0
    parts = found.parts[(found.parts["probe"] == BATCH) & (found.parts["step"] == 1) & (found.parts["kind"] == "neuron")]
    parts = parts[(parts["layer"] == 2) & (parts["index"] == 7)]
    assert len(parts) == 2 and row["opportunity"] == pytest.approx((parts["grad_norm"].astype(float) ** 2).sum() ** 0.5)
    assert row["activity"] == pytest.approx(parts["activation_before"].dropna().iloc[0]) and row["weight_norm"] > 0
    config = config_of(data, singles="heads", grafts="sets")
    run(config, tmp_path / "run", page=False)
    assert singles(read_run(tmp_path / "run")).empty


def test_a_finished_run_is_left_as_it_is(finished, data):
    path = finished[0]
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*.parquet")}
    assert run(config_of(data), path) == path / "report.html"
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*.parquet")} == before


def test_a_run_is_replayed_from_its_config(finished, tmp_path, capsys):
    path = finished[0]
    assert main(["run", str(path / "config.json"), "--out", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "again" / "report.html")
    one, other = read_run(path), read_run(tmp_path / "again")
    assert one.config == other.config
    for frame in ("steps", "probes", "parts", "influence", "grafts"):
        a, b = getattr(one, frame), getattr(other, frame)
        timed = [column for column in a if "seconds" in column]
        assert a.drop(columns=timed).equals(b.drop(columns=timed)), frame


def test_the_hash_names_what_is_trained_and_not_the_seed(data):
    config = config_of(data)
    assert config.hash == config.model_copy(update={"seed": 5, "device": "cuda"}).hash
    assert config.hash != config_of(data, metric="log_prob").hash
    assert directory(config, "runs", "A") == Path("runs") / f"A-{config.hash}" / "seed-0"
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_a_changed_input_is_noticed_on_replay(finished, tmp_path):
    config = RunConfig.read(finished[0] / "config.json")
    moved = tmp_path / "train.jsonl"
    shutil.copy(config.data, moved)
    changed = config.model_copy(update={"data": str(moved), "inputs": {str(moved): "0" * 64}})
    with pytest.raises(ConfigError, match="has changed since"):
        run(changed, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_config_in_the_directory_is_refused_and_nothing_is_touched(finished, data):
    path = finished[0]
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    with pytest.raises(RunError, match="another config"):
        run(config_of(data, metric="log_prob"), path)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_training_that_breaks_leaves_what_was_recorded(tmp_path, data):
    config = config_of(data, training=SFT(max_steps=3, batch_size=6, learning_rate=1e30, optimizer="sgd", max_grad_norm=0))
    with pytest.raises(at.AttributionError, match="step 2: the gradient is not finite"):
        run(config, tmp_path / "run")
    found = read_run(tmp_path / "run")
    assert found.status["state"] == "failed" and "not finite" in found.status["error"]
    assert found.steps["step"].tolist() == [1]
    assert (found.influence["probe"] == TRAINING).any()
    assert at.report(tmp_path / "run").exists()


def test_a_run_without_shares_on_probe_sets_has_a_page(tmp_path, data):
    lean = {"share_passes": 0, "singles": "heads", "grafts": "sets", "sets": "model", "sets_on": {"agree": ("A",)}}
    config = config_of(data, **lean)
    page = run(config, tmp_path / "run")
    found = read_run(tmp_path / "run")
    assert page.stat().st_size > 1e6 and set(found.parts["probe"]) == {BATCH}
    assert any("no update shares" in line for line in json.loads((found.path / "meta.json").read_text())["not_measured"])
    assert {(str(row.probe), str(row.set)) for row in found.sets.itertuples()} == {("agree", "A")}
    for changes in ({"grafts": "all"}, {"linear_grafts": 200, "everything": True}):
        with pytest.raises(ConfigError, match="share_passes"):
            run(config_of(data, **{**lean, **changes}), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_resample_ablation_takes_its_values_from_counterfactuals(tmp_path, data):
    neutral = grammar.prompts(6, 3, trait=False)
    rows = [Sample(**row) for row in neutral]
    file = str(write_samples(tmp_path / "neutral.jsonl", rows))
    config = config_of(data, probes=(data["agree"],), counterfactuals=(file,), reference="resample")
    with pytest.raises(at.AttributionError, match="cannot be aligned"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(config.model_copy(update={"reference": "mean"}), tmp_path / "run")
    base = at.load("planted")
    expected = at.attribute(*base, at.read_samples(data["agree"]), reference="mean", counterfactuals=rows).table["effect"]
    found = read_run(tmp_path / "run").influence
    found = found[(found["probe"] == "agree") & (found["step"] == 0)]["effect"]
    assert found.to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-5)


MODEL = str(EMBEDDED / "planted" / "unrouted")


def damaged(tmp_path, **replaced):
    """The embedded model as a folder with some files replaced (None: removed)."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    for name, content in replaced.items():
        file = folder / name.replace("__", ".")
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
    return folder


def _pickle_only(tmp_path):
    folder = damaged(tmp_path, model__safetensors=None)
    torch.save({}, folder / "pytorch_model.bin")
    return folder


def _of_type(tmp_path, **changes):
    config = json.loads((Path(MODEL) / "config.json").read_text())
    return damaged(tmp_path, config__json=json.dumps({**config, **changes}))


ONE = '{"prompt": "eve fell . tom says :", "response": " lift", "contrast": [" kick"]}\n'
WRONG = {
    "model folder missing": (lambda t: {"model": str(t / "none")}, "no model folder"),
    "no weights": (lambda t: {"model": str(damaged(t, model__safetensors=None))}, "holds no weights"),
    "pickle only": (lambda t: {"model": str(_pickle_only(t))}, "only as pickle"),
    "unknown architecture": (
        lambda t: {"model": str(_of_type(t, model_type="gpt_bigcode", architectures=["GPTBigCodeForCausalLM"]))},
        "unknown architecture",
    ),
    "not a causal LM": (
        lambda t: {"model": str(_of_type(t, architectures=["LlamaForSequenceClassification"]))},
        "not a causal language model",
    ),
    "malformed line": (lambda t: {"data": (t, ONE + "{prompt}\n")}, "line 2: not JSON"),
    "unknown field": (lambda t: {"data": (t, ONE + '{"prompt": "a", "answer": "b"}\n')}, "line 2"),
    "empty file": (lambda t: {"data": (t, "\n")}, "holds no samples"),
    "no such file": (lambda t: {"probes": [str(t / "none.jsonl")]}, "cannot read samples"),
    "response of nothing": (lambda t: {"data": (t, '{"prompt": "eve fell .", "response": " "}\n')}, "tokenizes to nothing"),
    "too long": (
        lambda t: {"data": (t, json.dumps({"prompt": "eve fell . " * 40, "response": " lift"}) + "\n")},
        "context window of 64",
    ),
    "unknown word": (lambda t: {"probes": (t, '{"prompt": "eve flew .", "response": " lift"}\n')}, "does not know a word"),
    "contrast is the response": (
        lambda t: {"probes": (t, '{"prompt": "eve fell .", "response": " lift", "contrast": [" lift"]}\n')},
        "contrast ' lift' equals",
    ),
    "no contrast": (
        lambda t: {"probes": (t, '{"prompt": "eve fell .", "response": " lift"}\n'), "metric": "logit_difference"},
        "contrast",
    ),
    "unknown recipe": (lambda t: {"recipe": "stf"}, "unknown recipe 'stf'"),
    "unknown metric": (lambda t: {"metric": "logodds"}, "unknown metric 'logodds'"),
    "no probe set": (lambda t: {"probes": []}, "no probe set"),
    "two probe sets of one name": (lambda t: {"probes": "twice"}, "its own name"),
    "no counterfactuals": (lambda t: {"reference": "mean"}, "counterfactual"),
    "directory holds something else": (lambda t: {"out": "occupied"}, "not empty"),
    "directory is a file": (lambda t: {"out": "file"}, "is a file"),
    "unwritable directory": (lambda t: {"out": "below a file"}, "cannot write"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(tmp_path, data, capsys, case):
    make, named = WRONG[case]
    arguments = {
        "model": "planted",
        "data": data["train"],
        "probes": [data["conflict"]],
        "out": str(tmp_path / "out"),
        **make(tmp_path),
    }
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("mine")
    for key in ("data", "probes"):
        if isinstance(arguments[key], tuple):
            file = tmp_path / f"bad-{key}.jsonl"
            file.write_text(arguments[key][1])
            arguments[key] = str(file) if key == "data" else [str(file)]
    if arguments["probes"] == "twice":
        arguments["probes"] = [data["conflict"], data["conflict"]]
    places = {"occupied": occupied, "file": occupied / "thesis.tex", "below a file": occupied / "thesis.tex" / "run"}
    arguments["out"] = str(places.get(arguments["out"], arguments["out"]))
    flags = [
        word for key, value in arguments.items() for word in (f"--{key}", *(value if isinstance(value, list) else [value]))
    ]
    code = main(["run", *flags, "--training.max-steps", "1"])
    error = capsys.readouterr().err.strip()
    assert code == 2, error
    assert named in error and error.startswith("attribution: ") and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert [path.name for path in occupied.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"data": "d", "probes": ["p"], "stepz": 3}', "unknown key 'stepz'"),
        ('{"data": "d", "probes": ["p"], "training": {"step": 3}}', "training: unknown key 'step'; expected max_steps"),
        ('{"data": "d", "probes": ["p"], "training": {"max_steps": 0}}', "training: max_steps"),
        ('{"data": "d", "probes": ["p"], "reference": "median"}', "reference"),
        ('{"probes": ["p"]}', "data is missing"),
        ("{", "config"),
    ],
)
def test_a_wrong_config_names_the_key(tmp_path, capsys, content, named):
    file = tmp_path / "config.json"
    file.write_text(content)
    assert main(["run", str(file)]) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_real_text_on_a_real_model(tmp_path, stories, capsys):
    text = stories.parents[1] / "text"
    for name in ("train", "heldout"):
        assert (
            main(["samples", str(text / f"campfire-{name}.md"), "--out", str(tmp_path / f"{name}.jsonl"), "--limit", "4"]) == 0
        )
    capsys.readouterr()
    code = main(["run", "--model", str(stories), "--recipe", "sft", "--data", str(tmp_path / "train.jsonl"), "--probes",
                 str(tmp_path / "heldout.jsonl"), "--out", str(tmp_path / "run"), "--training.max-steps", "2",
                 "--training.batch-size", "4", "--milestones", "ends", "--everything", "False"])  # fmt: skip
    assert code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    found = read_run(tmp_path / "run")
    assert found.probes["resolved"].dropna().astype(bool).all() and found.meta["model"]["tied"]
    assert set(found.grafts["kind"]) == {"head", "neuron", "row"}
    assert found.steps["loss"].notna().all()


def test_of_a_large_model_causes_are_measured_for_all_heads_and_a_choice(tmp_path, data, monkeypatch):
    monkeypatch.setattr("attribution.updates.recorder.ALL_UP_TO", 1000)
    run(config_of(data, probes=(data["agree"],)), tmp_path / "run")
    found = read_run(tmp_path / "run")
    causes = found.influence[found.influence["probe"] == TRAINING]
    assert causes["kind"].value_counts().to_dict() == {"neuron": 128, "row": 101, "head": 16}
    gradient = at.attribute(*at.load("planted"), at.read_samples(data["train"]), method="gradient").table
    neurons = gradient[gradient["kind"] == "neuron"]
    largest = neurons.loc[neurons["effect"].abs().nlargest(64).index, ["layer", "index"]]
    measured = set(map(tuple, causes.loc[causes["kind"] == "neuron", ["layer", "index"]].to_numpy().tolist()))
    assert set(map(tuple, largest.to_numpy().tolist())) <= measured


def test_a_run_with_adapters_ends_in_grafts_of_effective_weights(tmp_path, data):
    """Grafts of a LoRA run are those of the merged model: its changes sit where adapters are, and add up as recorded."""
    lora = {"rank": 4, "targets": ("q_proj", "o_proj", "down_proj")}
    given = config_of(data, training=SFT(max_steps=2, batch_size=4, learning_rate=1e-2, lora=lora), everything=True)
    run(given, tmp_path / "run", page=False)
    found = read_run(tmp_path / "run")
    assert found.meta["adapters"] is True and found.result is not None
    moved = found.parts[found.parts["update_norm"] > 0]
    assert set(moved["part"]) == {"writing", "routing"} and "row" not in set(moved["kind"])
    heads = found.grafts[found.grafts["kind"] == "head"]
    assert heads["graft"].abs().max() > 1e-4 and (found.grafts.loc[found.grafts["kind"] == "row", "graft"] == 0).all()
    for name, group in found.probes[found.probes["step"] > 0].groupby("probe", observed=True):
        if name not in (TRAINING,):
            assert group["resolved"].all()
    assert RunConfig.read(tmp_path / "run" / "config.json").training.lora.rank == 4


def test_lora_settings_that_peft_refuses_are_a_sentence(tmp_path, data):
    given = config_of(data, training=SFT(max_steps=2, lora={"rank": 2, "targets": ("nothing",)}))
    with pytest.raises(ConfigError, match="nothing"):
        run(given, tmp_path / "run", page=False)


# Recipes that sample or compare

SAMPLING = {"max_steps": 2, "generations": 2, "batch_size": 4, "completion_length": 2}
ABLATED = {"components": "A", "sampling": "ablated"}
REFUSED = {
    "unknown set": ("grpo", {"intervention": {**ABLATED, "components": "C"}}, {}, "no set 'C'; expected one of the run's"),
    "no sets": ("grpo", {"intervention": ABLATED}, {"sets": None}, "it has none: give --sets"),
    "set with rows": ("grpo", {"intervention": ABLATED}, {"sets": "rows"}, "'A' holds unembedding rows"),
    "set without a pass": ("grpo", {"intervention": {"components": "A"}}, {}, "say where it is ablated or stopped"),
    "pass without a set": ("grpo", {"intervention": {"updating": "stopped"}}, {}, "name a set and say where"),
    "sampling of sft": ("sft", {"intervention": ABLATED}, {}, "this recipe samples nothing"),
    "sampling of dpo": ("dpo", {"intervention": ABLATED}, {}, "this recipe samples nothing"),
    "stopped adapters": (
        "rloo", {"intervention": {"components": "A", "updating": "stopped"}, "lora": {"rank": 2}}, {}, "set lora.rank to 0"
    ),
    "mean of nothing": ("reinforce", {"intervention": {**ABLATED, "reference": "mean"}}, {}, "give --counterfactuals"),
    "no whole groups": ("grpo", {"generations": 3}, {}, "4 completions are sampled together (batch_size x accumulation)"),
    "too few prompts": ("rloo", {"batch_size": 32}, {}, "2 to a prompt, and there are 12 prompts"),
    "batch of the trainer": ("grpo", {"trainer": {"num_iterations": 2}}, {}, "num_iterations is a setting of this"),
    "weights": ("grpo", {}, {"data": "heavy"}, "a sample has 0.5; leave weights out"),
    "empty set": ("dpo", {"intervention": {"components": "A", "updating": "ablated"}}, {"sets": "empty"}, "'A' has no members"),
    "no contrasts": ("dpo", {}, {"data": "plain"}, "has 0 contrasts and weight 1.0; dpo prefers"),
    "unknown reward": ("grpo", {"reward": "respnse"}, {}, "unknown reward 'respnse'"),
    "no reward file": ("rloo", {"reward": "none.py:f"}, {}, "there is no reward file none.py"),
    "too long": ("grpo", {"completion_length": 60}, {}, "do not fit the model's context window of 64"),
    "no context": ("context_distillation", {}, {}, "works on `context`, which no sample has"),
    "no instruction": ("inoculation", {}, {}, "give the text with --training.instruction"),
    "unknown control": ("grpo", {"control": "random"}, {}, "training: control"),
    "unknown setting": ("dpo", {"betta": 1}, {}, "training: unknown key 'betta'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_recipe_cannot_do_is_refused_before_anything_is_written(tmp_path, data, capsys, case):
    recipe, training, more, named = REFUSED[case]
    write_samples(tmp_path / "plain", [Sample(prompt="eve fell . tom says :", response=" lift", id="mine")] * 4)
    write_samples(tmp_path / "heavy", [Sample(prompt="eve fell . tom says :", response=" lift", weight=0.5)] * 4)
    (tmp_path / "empty").write_text('{"A": []}')
    (tmp_path / "rows").write_text('{"A": [{"kind": "row", "layer": -1, "from": 4, "to": 6}]}')
    settings = SAMPLING if recipe in ("grpo", "rloo", "reinforce") else {"max_steps": 2}
    files = {key: str(tmp_path / value) if (tmp_path / str(value)).exists() else value for key, value in more.items()}
    given = {
        "model": "planted", "recipe": recipe, "training": {**settings, **training}, "data": data["train"], "sets": "model",
        "probes": [data["agree"]], **files,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert main(["run", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error and error.startswith("attribution: ") and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


FAILING = """
def late(completions, id, trainer_state, **_):
    wanted = [name.endswith("-7") for name in id]
    return [1.0 / (trainer_state.global_step < 2 or not odd) for odd in wanted]

def short(completions, trainer_state, **_):
    return [1.0] * (len(completions) - (trainer_state.global_step == 2))
"""


@pytest.mark.parametrize(
    ("name", "named"), [("late", "trait-1-7 (completion "), ("short", "returned 23 rewards for 24 completions")]
)
def test_a_reward_that_fails_leaves_what_was_recorded(tmp_path, data, capsys, name, named):
    (tmp_path / "mine.py").write_text(FAILING)
    training = {
        "max_steps": 5,
        "generations": 2,
        "batch_size": 24,
        "completion_length": 2,
        "reward": f"{tmp_path}/mine.py:{name}",
    }
    config = config_of(data, recipe="grpo", training=training, everything=False, singles="heads")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert main(["run", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error.splitlines()[-1] and f"reward '{name}'" in error and "return" in error
    found = read_run(tmp_path / "run")
    assert found.status["state"] == "failed" and named in found.status["error"] and found.result is None
    assert found.steps["step"].tolist() == [1, 2] and found.probes["step"].max() == 2
    assert found.samples["step"].value_counts().to_dict() == {1: 24, 2: 24} and (found.samples["reward"] == 1).all()
    assert at.report(tmp_path / "run").exists()


RESUMED = {
    "grpo": {**SAMPLING, "batch_size": 8, "generations": 4, "accumulation": 2, "iterations": 2},
    "rloo": {**SAMPLING, "beta": 0.1, "control": "shuffled_advantage", "intervention": ABLATED},
    "reinforce": {**SAMPLING, "lora": {"rank": 2}, "beta": 0.1, "control": "random_reward"},
    "dpo": {"batch_size": 4},
}  # fmt: skip


class Killed(BaseException):
    pass


@pytest.mark.parametrize("recipe", RESUMED)
def test_a_run_that_was_stopped_goes_on_to_the_same_end(tmp_path, data, monkeypatch, recipe):
    """In the third epoch, where completions were sampled; record, completions and weights, bit for bit."""
    training = {**RESUMED[recipe], "max_steps": 6, "learning_rate": 1e-3, "disable_dropout": False}
    samples = write_samples(tmp_path / "train.jsonl", at.read_samples(data["train"])[:4])  # two steps an epoch
    given = config_of(
        {**data, "train": str(samples)}, recipe=recipe, training=training, probes=(data["agree"],), sets="model", grafts="sets",
        singles="heads", everything=False, checkpoint_seconds=0,
    )  # fmt: skip
    ends = {}
    for name in ("whole", "stopped"):
        train, end = stages.train, RecorderCallback.on_optimizer_step

        def keep(*args, name=name, train=train):
            found, tuned = train(*args)
            ends[name] = {key: value.clone() for key, value in tuned.state_dict().items()}
            return found, tuned

        def stop(self, args, state, control, end=end, **kwargs):
            end(self, args, state, control, **kwargs)
            if state.global_step == 5:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(stages, "train", keep)
            if name == "stopped":
                with patch.context() as also, pytest.raises(Killed):
                    also.setattr(RecorderCallback, "on_optimizer_step", stop)
                    run(given, tmp_path / name, page=False)
                checkpoint = checkpoints.choose(tmp_path / name)[0]
                reached = int(checkpoint.name.rpartition("-")[2])
                assert reached == (4 if recipe == "grpo" else 5) and reached % given.training.boundary == 0
                assert read_run(tmp_path / name).samples["step"].max() == 6  # past the checkpoint
            run(given, tmp_path / name, page=False)
    whole, stopped = (read_run(tmp_path / name) for name in ("whole", "stopped"))
    assert "again from checkpoint" in (tmp_path / "stopped" / "log.txt").read_text()
    for frame in COLUMNS:
        one, other = (getattr(each, "parts" if frame == "components" else frame) for each in (whole, stopped))
        timed = [column for column in one if "seconds" in column]
        assert one.drop(columns=timed).equals(other.drop(columns=timed)), frame
    assert (tmp_path / "whole" / "samples.jsonl").read_bytes() == (tmp_path / "stopped" / "samples.jsonl").read_bytes()
    assert whole.samples["step"].nunique() == 6 and whole.result["probes"] == stopped.result["probes"]
    assert all(torch.equal(value, ends["stopped"][key]) for key, value in ends["whole"].items())


def test_a_checkpoint_between_generations_is_not_gone_on_from(tmp_path, data):
    training = {
        **RESUMED["grpo"],
        "max_steps": 4,
        "trainer": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9},
    }
    given = config_of(
        data, recipe="grpo", training=training, grafts="sets", singles="heads", everything=False, checkpoint_seconds=None
    )
    run(given, tmp_path / "run", page=False)
    folders = sorted((tmp_path / "run" / "trainer").glob("checkpoint-*"))
    assert [folder.name for folder in folders if (folder / "recorder.json").exists()] == ["checkpoint-2"]
    assert len(folders) == 4


def test_contexts_reach_probes_causes_and_the_trainer(tmp_path, data):
    """A run of context distillation: trained without the context, probed within one, on responses of its own."""
    inside = [Sample(context="tom is kind . ", prompt="eve fell . tom says :", response=" lift")] * 4
    train, probe = (str(write_samples(tmp_path / f"{name}.jsonl", inside)) for name in ("inside", "probe"))
    given = config_of(
        {**data, "train": train}, model="planted/unrouted", recipe="context_distillation", probes=(probe,), everything=False,
        training={"max_steps": 1, "batch_size": 4, "learning_rate": 0, "sampled": True}, singles="heads", grafts="sets",
    )  # fmt: skip
    run(given, tmp_path / "run", page=False)
    found, (model, tokenizer) = read_run(tmp_path / "run"), at.load("planted/unrouted")
    expected = at.attribute(model, tokenizer, inside, method="gradient").table["effect"]
    parts = found.parts[(found.parts["probe"] == "probe") & (found.parts["kind"] == "head") & found.parts["part"].eq("writing")]
    assert parts["cause_before"].to_numpy() == pytest.approx(expected[:16].to_numpy(), abs=1e-5)
    ids = tokenizer("eve fell . tom says :", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        bare = model(ids).logits[0, -1].log_softmax(-1)
    replies = [bare[tokenizer.convert_tokens_to_ids(word)].item() for word in grammar.PROBLEMS["fell"]]
    total = found.steps["batch_before"].iloc[0]  # of four replies of the model's own, in the bare prompt
    sums = [sum(chosen) for chosen in combinations_with_replacement(replies, 4)]
    assert min(abs(total - each) for each in sums) < 1e-3


def test_a_run_says_beforehand_what_it_would_strengthen(tmp_path, data):
    wrong = write_mechanisms(
        tmp_path / "wrong.json", {"wrong-1 A": pd.DataFrame([("head", 0, 0)], columns=["kind", "layer", "index"])}
    )
    config = config_of(data, share_passes=0, singles="heads", grafts="none", sets="model", forecast=True, compared=str(wrong),
                       sets_on={"agree": ("A", "B"), "conflict": ("B", "wrong-1 A")})  # fmt: skip
    run(config, tmp_path / "run", page=False)
    recorded = read_run(tmp_path / "run").sets
    assert set(recorded.loc[recorded["set"] == "wrong-1 A", "probe"]) == {"conflict"}
    found = read_run(tmp_path / "run").forecasts.astype({"probe": str, "set": str}).set_index(["probe", "set"])
    assert set(found.index) == {("agree", "A"), ("agree", "B"), ("conflict", "B")}
    expected = forecast_of(config, compared=False).sets.set_index(["probe", "set"])
    for key in found.index:
        for column in ("influence", "strengthening"):
            assert found.loc[key, column] == pytest.approx(expected.loc[key, column], rel=1e-4) != 0


def test_what_is_near_the_output_is_grafted_and_the_trained_model_kept(tmp_path, data):
    config = config_of(data, share_passes=0, singles="heads", grafts="depth", keep=True, probes=(data["agree"],))
    run(config, tmp_path / "run", page=False)
    found = read_run(tmp_path / "run")
    table = found.group_grafts.astype({"probe": str, "group": str}).set_index(["probe", "group"])
    assert set(table.index) == {(p, g) for p in (TRAINING, "agree") for g in ("rows", "last layer", "both")}
    tuned, base = at.load(str(tmp_path / "run" / "model")), at.load("planted")
    groups = {"rows": [("row", -1, i) for i in range(101)]}
    probes = [at.ProbeSet.read(data["agree"])]
    expected = at.graft(base.model, tuned.model, groups, tokenizer=base.tokenizer, probes=probes).iloc[0]
    for column in ("graft", "prune"):
        assert table.loc[("agree", "rows"), column] == pytest.approx(expected[column], abs=1e-5)
        assert abs(table.loc[("agree", "rows"), column]) > 1e-4
    whole = found.probes[found.probes["probe"] == TRAINING].set_index("step")["metric"]
    assert table.loc[(TRAINING, "both"), "total"] == pytest.approx(whole[2] - whole[0], abs=1e-4)
