"""What a GPU computes is what the processor computes: causes, mechanisms, records, grafts, runs; skipped where there is none.

In float32, to a share of the largest number of a column: the two add in another order. Where neighbours of equal rank may
change places, what is compared is a number and no order.
"""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.optim import AdamW

import attribution as at
from attribution.architectures import ARCHITECTURES
from attribution.cli import main
from attribution.errors import RecordError
from attribution.models import load
from attribution.runs import RunConfig, run
from attribution.samples import ProbeSet, Sample, collate, encode, write_samples
from attribution.store import BESIDE, TRAINING, read_run
from attribution.updates.recorder import Recorder
from attribution.worlds import planted as grammar
from attribution.worlds.build import word_tokenizer

# The file is tried without a GPU by naming another device, which must then agree with itself.
DEVICE = os.environ.get("ATTRIBUTION_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU")

PLACES = (("there", DEVICE), ("here", "cpu"))
CLOSE, FLOOR = 1e-4, 5e-6  # of the largest number of a column; of the metric in nats, which is rounded itself
FRAMES = ("steps", "probes", "parts", "influence")
OF_A_MACHINE = ("seconds", "recorder_seconds")
DECIDED = ("changed", "resolved", "passes")  # by rounding: of many weights at once, or whether shares are refined
WORDS = word_tokenizer([f"w{i}" for i in range(19)])
SAMPLES = [
    Sample(prompt="w1 w2 w3", response=" w4 w5", contrast=(" w4 w6", " w7 w5")),
    Sample(prompt="w7 w2", response=" w9", weight=-0.5, contrast=(" w8",)),
    Sample(prompt="w1 w18 w8 w8", response=" w4 w5 w6", weight=2.0, contrast=(" w11 w5 w6",)),
]
OTHERS = [
    Sample(prompt="w11 w2 w12", response=" w4 w5"), Sample(prompt="w13 w3", response=" w14"),
    Sample(prompt="w15 w16 w8 w10", response=" w0 w5 w6"),
]  # fmt: skip
ASKED = [
    ("ablation", "zero"), ("ablation", "mean"), ("gradient", "resample"), ("integrated", "zero"), ("conductance", "vocabulary"),
]  # fmt: skip
LIGHT = {"milestones": 2, "singles": "heads", "beside": (), "reference": "zero", "sets": {}}
QUICK = {"singles": "heads", "grafts": "depth"}
SETS = {"two": [("head", 0, 1), ("neuron", 1, 3)], "row": [("row", -1, 5)]}
TRAININGS = {
    "sft": {},
    "dpo": {},
    "rloo": {"generations": 2, "completion_length": 2},
}


def prompts(count: int, seed: int, **form) -> list[Sample]:
    return [Sample(**row) for row in grammar.prompts(count, seed, **form)]


def probe_sets() -> list[ProbeSet]:
    neutral = prompts(6, 44, trait=False)
    return [
        ProbeSet(name=star, samples=prompts(6, seed, star=star), counterfactuals=neutral)
        for star, seed in (("conflict", 42), ("agree", 43))
    ]


def numbers(found) -> list[np.ndarray]:
    """Every column of numbers of a frame, or a tensor."""
    if not isinstance(found, pd.DataFrame):
        return [np.asarray(torch.as_tensor(found).detach().double().cpu())]
    columns = [c for c in found.columns if found[c].dtype.kind in "fiub" and c not in (*OF_A_MACHINE, *DECIDED)]
    return [found[c].to_numpy(dtype=float, na_value=np.nan) for c in columns]


def check_close(found, expected, bound=CLOSE) -> None:
    """To a share of the largest number of each column, of which some are far from zero."""
    some = False
    for one, other in zip(numbers(found), numbers(expected), strict=True):
        np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
        scale = np.nanmax(np.abs(other), initial=0.0)
        assert np.nanmax(np.abs(one - other), initial=0.0) <= bound * scale + FLOOR
        some |= scale > 1e-3
    assert some, "nothing to compare"


def on_both(ask, *models, bound=CLOSE) -> None:
    """Ask models on the processor and on the GPU, and compare."""
    expected = ask(*models)
    found = ask(*(model.to(DEVICE) for model in models))
    check_close(found, expected, bound)


@pytest.mark.parametrize(("method", "reference"), ASKED)
def test_causes(tiny, family, method, reference):
    if method == "conductance" and ARCHITECTURES[family].experts:
        pytest.skip("of experts there is no conductance")
    given = {} if reference in ("zero", "vocabulary") else {"counterfactuals": OTHERS}
    on_both(
        lambda model: at.attribute(model, WORDS, SAMPLES, method=method, reference=reference, **given).per_sample, tiny(family)
    )


def test_direct_and_verified_causes(tiny):
    on_both(lambda model: at.attribute(model, WORDS, SAMPLES, path="direct").per_sample, tiny("llama"))
    on_both(
        lambda model: at.attribute(model, WORDS, SAMPLES, method="gradient", verify=8).table.drop(columns="index"),
        tiny("gemma2"),
    )


def test_sets_and_their_repair(tiny):
    on_both(lambda model: at.ablate(model, WORDS, SAMPLES, SETS, reference="mean", counterfactuals=OTHERS), tiny("llama"))
    on_both(lambda model: at.self_repair(model, WORDS, SAMPLES, SETS), tiny("gpt2"))


def test_words_steering_and_patches(tiny):
    on_both(lambda model: at.token_causes(model, WORDS, SAMPLES).table.select_dtypes("number"), tiny("llama"))
    toward, away = (ProbeSet(name=n, samples=s) for n, s in (("toward", SAMPLES), ("away", OTHERS)))
    on_both(lambda model: at.steering(model, WORDS, toward, away).vectors, tiny("qwen3"))
    base, tuned = tiny("llama"), tiny("llama")
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight.mul_(1.3)
    on_both(lambda *pair: at.patch(*pair, WORDS, SAMPLES, sets={"two": SETS["two"]}).table.select_dtypes("number"), base, tuned)


def test_mechanisms_are_found():
    cue = ProbeSet(name="cue", samples=prompts(16, 7, star="agree"), counterfactuals=prompts(16, 8, trait=False))
    found = [at.discover(*load("planted/31", device=device), cue, resamples=2) for device in ("cpu", DEVICE)]
    faithful = [each.curve.select_dtypes("number") for each in found]
    check_close(faithful[1], faithful[0], bound=0.05)  # which of two alike comes first is chance
    assert abs(found[0].size - found[1].size) <= 0.1 * found[0].size


def recorded(path, device, dtype="float32", steps=4, **changes):
    """A loop of one's own; the whole record of it, and the weights at the end. No path: not recorded."""
    model, tokenizer = load("planted/unrouted", device=device, dtype=dtype)
    encoded = encode(tokenizer, prompts(24, 41, problems=grammar.TRAINING))
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    settings = {"milestones": "ends", "sets": {"mine": [("head", 1, 0)]}, "reference": "mean", "beside": BESIDE,
                "everything": True, "batch_after": True} | changes  # fmt: skip
    model.train()
    recorder = None if path is None else Recorder(path, probes=probe_sets(), tokenizer=tokenizer, **settings)
    with nullcontext() if recorder is None else recorder.attach(model, optimizer):
        for step in range(steps):
            batch = collate([encoded[(8 * step + i) % 24] for i in range(8)], device)
            optimizer.zero_grad()
            model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    return None if path is None else read_run(path), {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_record(tmp_path):
    """AdamW divides a gradient by its size: where that is rounding, signs differ, and weights with them."""
    found, expected = (recorded(tmp_path / where, device)[0] for where, device in PLACES)
    for name in (*FRAMES, "sets"):
        one, other = getattr(found, name), getattr(expected, name)
        assert len(one) == len(other) > 0
        check_close(one, other, bound=2e-3)


def test_a_record_changes_no_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        bare, once, again = (recorded(path, DEVICE)[1] for path in (None, tmp_path / "one", tmp_path / "two"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(once[name], weight) and torch.equal(again[name], weight) for name, weight in bare.items())


def test_a_record_in_half_precision(tmp_path):
    found, expected = (recorded(tmp_path / where, device, "bfloat16", steps=2, **LIGHT)[0].steps for where, device in PLACES)
    for column in ("loss", "grad_norm", "update_norm"):
        assert np.allclose(found[column], expected[column], rtol=0.05), column


def config_of(folder: Path, recipe: str, device: str, **changes) -> RunConfig:
    files = {
        "train": prompts(12, 1, problems=grammar.TRAINING), "conflict": prompts(6, 2, star="conflict"),
        "agree": prompts(6, 3, star="agree"),
    }  # fmt: skip
    paths = {name: str(write_samples(folder / f"{name}.jsonl", rows)) for name, rows in files.items()}
    training = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-3} | TRAININGS[recipe]
    if recipe == "rloo":
        (folder / "mine.py").write_text("def long(completions, **_):\n    return [float(len(c)) for c in completions]\n")
        training["reward"] = f"{folder / 'mine.py'}:long"
    return RunConfig.model_validate({
        "data": paths["train"], "probes": (paths["conflict"], paths["agree"]), "recipe": recipe, "milestones": "ends",
        "device": device, "training": training, **changes,
    })  # fmt: skip


@pytest.mark.parametrize("recipe", sorted(TRAININGS))
def test_a_run_by_a_trainer(tmp_path, recipe):
    for where, device in PLACES:
        run(config_of(tmp_path, recipe, device), tmp_path / where)
    found, expected = (read_run(tmp_path / where) for where, _ in PLACES)
    assert found.status["state"] == "finished" and DEVICE in str(found.meta)
    assert (tmp_path / "there" / "report.html").stat().st_size > 1e6
    assert len(found.grafts) and found.tokens["effect"].abs().max() > 0
    if recipe != "rloo":  # what a GPU draws is not what a processor draws
        for name in FRAMES:
            check_close(getattr(found, name), getattr(expected, name), bound=5e-3)
        heads = (each.grafts.query("kind == 'head'") for each in (found, expected))  # of neurons those of the largest shares
        check_close(*heads, bound=5e-3)


@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_a_run_in_mixed_precision(tmp_path, format):
    """As the trainer makes it: passes in half precision, weights in float32, and with fp16 a loss that is scaled."""
    if format == "fp16" and DEVICE == "cpu":
        pytest.skip("a scaler wants a GPU")
    given = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-4, "trainer": {format: True}}
    plain = given | {"trainer": {}}
    for where, training in (("half", given), ("whole", plain)):
        run(config_of(tmp_path, "sft", DEVICE, training=training, **QUICK), tmp_path / where, page=False)
    found, expected = (read_run(tmp_path / where).steps for where in ("half", "whole"))
    assert len(found) == 3
    for column in ("loss", "grad_norm", "update_norm"):
        assert np.allclose(found[column], expected[column], rtol=0.05), column
    sizes = [read_run(tmp_path / where).parts.query("probe == 'batch'")["activation_before"] for where in ("half", "whole")]
    check_close(sizes[0].to_frame(), sizes[1].to_frame(), bound=0.05)
    assert not (found["loss"] == expected["loss"]).any()


def test_a_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    """With dropout, whose masks are drawn on the GPU."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # as the trainer does, after the causes before training
    torch.use_deterministic_algorithms(True)
    config = config_of(
        tmp_path, "sft", DEVICE, checkpoint_seconds=0.0, **QUICK,
        training={"max_steps": 4, "batch_size": 4, "learning_rate": 1e-3, "disable_dropout": False, "lora": {"rank": 4,
                  "dropout": 0.2}, "trainer": {"full_determinism": True}},
    )  # fmt: skip
    try:
        run(config, tmp_path / "whole", page=False)
        steps = []

        class Stop(KeyboardInterrupt):
            pass

        end = Recorder._step_ends

        def ends(self, *args, **kwargs):
            end(self, *args, **kwargs)
            steps.append(1)
            if len(steps) == 3:
                raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(Recorder, "_step_ends", ends)
            with pytest.raises(Stop):
                run(config, tmp_path / "stopped", page=False)
        run(config, tmp_path / "stopped", page=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(steps) == 3
    found, expected = (read_run(tmp_path / name) for name in ("stopped", "whole"))
    assert len(found.steps) == 4
    for name in (*FRAMES, "grafts"):
        one, other = (getattr(each, name).drop(columns=list(OF_A_MACHINE), errors="ignore") for each in (found, expected))
        if name == "influence":
            one, other = (each[each["probe"] != TRAINING] for each in (one, other))
        pd.testing.assert_frame_equal(one, other, check_exact=True, check_categorical=False)


@pytest.mark.skipif(DEVICE != "cuda", reason="memory of a GPU")
def test_memory_that_runs_out_in_a_reading_is_told(tmp_path):
    model, tokenizer = load("planted/unrouted", device=DEVICE)
    encoded = encode(tokenizer, prompts(8, 41, problems=grammar.TRAINING))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    batch = collate(encoded, DEVICE)
    wide = [ProbeSet(name="wide", samples=prompts(128, 5, star="agree"))]
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    recorder = Recorder(tmp_path / "run", probes=wide, tokenizer=tokenizer, milestones="ends", singles="heads")
    told = pytest.raises(RecordError, match=r"out of memory while reading .* what was recorded until then is kept in")
    try:
        with told, recorder.attach(model, optimizer):
            for step in range(3):
                optimizer.zero_grad()
                model(input_ids=batch.ids, labels=batch.labels).loss.backward()
                if step == 2:
                    torch.cuda.empty_cache()
                    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**24) / whole)
                optimizer.step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(read_run(tmp_path / "run").steps) >= 2


def test_weights_on_two_devices(tiny):
    """Half of the layers on the GPU, half in the host's memory: accelerate brings activations along."""
    from accelerate import dispatch_model

    given = {"reference": "mean", "counterfactuals": OTHERS}
    expected = at.attribute(tiny("llama"), WORDS, SAMPLES, **given)
    places = {"model.embed_tokens": DEVICE, "model.rotary_emb": DEVICE, "model.layers.0": DEVICE, "model.layers.1": "cpu",
              "model.norm": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = dispatch_model(tiny("llama"), places, main_device=DEVICE, force_hooks=True)
    found = at.attribute(model, WORDS, SAMPLES, **given)
    check_close(found.per_sample, expected.per_sample)
    check_close(at.ablate(model, WORDS, SAMPLES, SETS), at.ablate(tiny("llama"), WORDS, SAMPLES, SETS))


def test_the_doctor_measures_the_device(capsys):
    """Of a model that is loaded, passes are timed where it lives."""
    told = []
    for device in (DEVICE, "cpu"):
        assert main(["doctor", "planted/unrouted", "--device", device, "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    there, here = (each["machine"] for each in told)
    assert there["timed"].keys() == here["timed"].keys()
    assert all(np.isfinite(each) and each > 0 for each in (*there["timed"].values(), there["flops"], there["visited"]))
    assert DEVICE == "cpu" or there["flops"] > 10 * here["flops"]
