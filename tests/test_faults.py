"""What can happen to a run from outside: a full disk, damaged files, a clock set back, memory that runs out, signals, kills.

In each case what was recorded is kept, the run says in one sentence what happened, and the next start goes on to the same end
or says why it cannot.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from injection import config as small_run
from under_fire import KINDS, recorded

from attribution.cli import VERBS, main
from attribution.errors import AttributionError, RecordError, RunError
from attribution.launch import Job, slots
from attribution.models import load
from attribution.runs import RunConfig, checkpoints, run
from attribution.runs.stopping import Terminated, terminable
from attribution.samples import ProbeSet, Sample, collate, encode
from attribution.store import RunWriter, hold, is_finished, read_run
from attribution.updates import share
from attribution.updates.callback import RecorderCallback
from attribution.updates.memory import out_of_memory
from attribution.updates.recorder import STATE, Recorder
from attribution.worlds import planted as grammar

TESTS = Path(__file__).parent
CONFIG = {"model": "planted"}
ROWS = pd.DataFrame(
    {"step": [1, 2], "probe": ["a", "batch"], "kind": "head", "layer": 0, "index": [0, 1], "share": [0.5, 0.25]}
)


def same(one: Path, other: Path) -> None:
    expected = recorded(one)
    assert len(expected["steps"]) == 3 and len(expected["components"]) and len(expected["sets"])
    for name, frame in recorded(other).items():
        pd.testing.assert_frame_equal(frame, expected[name], check_exact=True, check_categorical=False, obj=name)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> RunConfig:
    return small_run(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    path = tmp_path_factory.mktemp("whole") / "run"
    run(given, path, page=False)
    return path


class Killed(BaseException):
    """Stands for a process that ends between two steps."""


@pytest.fixture(scope="module")
def stopped(given, tmp_path_factory) -> Path:
    """A run that broke off in its third step, with two checkpoints."""
    path = tmp_path_factory.mktemp("stopped") / "run"
    end = RecorderCallback.on_step_end

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Killed
        end(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RecorderCallback, "on_step_end", stop)
        run(given, path, page=False)
    assert sorted(folder.name for folder in (path / "trainer").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    return path


@pytest.fixture
def broken_off(stopped, tmp_path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def outcome(act: Callable[[], Any]) -> tuple[Any, str]:
    """What it gave, or None and the package's error."""
    try:
        return act(), ""
    except AttributionError as error:
        return None, str(error)


# Damaged files


@pytest.mark.parametrize("finished", [False, True])
def test_no_flipped_bit_is_read_as_another_number(tmp_path, finished):
    """In the pages of any record; in the footer too once it is finished, and where an unfinished one goes on."""
    writer = RunWriter(tmp_path / "run", CONFIG)
    writer.add("components", ROWS)
    writer.flush()
    writer.finish({}) if finished else writer.close()
    file = tmp_path / "run" / "components.parquet" / "part-00000.parquet"
    data, expected = file.read_bytes(), read_run(tmp_path / "run").parts
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    seen = set()
    for at in np.random.default_rng(0).permutation(len(data) if finished else footer)[:150]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(at) % 8
        file.write_bytes(flipped)
        found, said = outcome(lambda: read_run(tmp_path / "run").parts)
        if found is None:
            seen.add("told")
            assert f"{file} is damaged" in said and "restore it from a copy, or move" in said
        else:  # a header that says less of the same
            assert not finished
            pd.testing.assert_frame_equal(found, expected)
    file.write_bytes(data[:-20])
    with pytest.raises(RunError, match=r"part-00000\.parquet is (cut off|damaged)"):
        read_run(tmp_path / "run").parts  # noqa: B018
    assert seen == {"told"}
    file.write_bytes(data)
    pd.testing.assert_frame_equal(read_run(tmp_path / "run").parts, expected)


def test_completions_of_a_finished_run_are_what_was_written(whole, tmp_path):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    assert len(read_run(path).samples) == 12
    text = (path / "samples.jsonl").read_bytes()
    (path / "samples.jsonl").write_bytes(text.replace(b'advantage": 0.', b'advantage": 1.', 1))
    assert text != (path / "samples.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"samples\.jsonl is damaged; restore it from a copy, or move .* away and run it again"):
        read_run(path).samples  # noqa: B018


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


DAMAGED = {  # what happens to the record or to its newest checkpoint, and from where it goes on
    "nothing": (lambda path: None, "checkpoint-2", ""),
    "part flipped": (lambda path: _flip(path / "sets.parquet" / "part-00001.parquet"), "checkpoint-1", "is damaged"),
    "part cut off": (lambda path: os.truncate(path / "probes.parquet" / "part-00001.parquet", 9), "checkpoint-1", "is cut off"),
    "part gone": (lambda path: (path / "steps.parquet" / "part-00001.parquet").unlink(), "checkpoint-1", "is missing"),
    "checkpoint cut off": (
        lambda path: os.truncate(path / "trainer" / "checkpoint-2" / "optimizer.pt", 99), "checkpoint-1", "missing or cut off"
    ),
    "state cut off": (lambda path: os.truncate(path / "trainer" / "checkpoint-2" / STATE, 9), "checkpoint-1", "cannot be read"),
    "first part flipped": (lambda path: _flip(path / "sets.parquet" / "part-00000.parquet"), "anew", "is damaged"),
    "lines flipped": (lambda path: _flip(path / "samples.jsonl"), "checkpoint-1", "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", ["nothing", "part flipped", "first part flipped"])
def test_a_damaged_record_goes_on_from_before_the_damage(given, whole, broken_off, case):
    damage, begins, _ = DAMAGED[case]
    damage(broken_off)
    told = []
    run(given, broken_off, page=False, tell=told.append)
    assert told[0].startswith("the attempt before failed, at step 3 or after (Killed") or case == "nothing"
    assert any(f"going on from {begins}" in line or f"beginning {begins}" in line for line in told)
    same(whole, broken_off)
    assert not (broken_off / "trainer").exists()
    aside = broken_off.with_name("run.interrupted-1")
    assert aside.exists() == (begins == "anew")


@pytest.mark.parametrize("case", DAMAGED)
def test_the_checkpoint_to_go_on_from_is_whole_and_so_is_what_it_knew(broken_off, case):
    damage, begins, named = DAMAGED[case]
    damage(broken_off)
    found, said = checkpoints.choose(broken_off)
    assert (found.name if found else "anew") == begins
    assert named in " ".join(said[1:]) and len(said) == 1 + {"checkpoint-2": 0, "checkpoint-1": 1, "anew": 2}[begins]
    left = {folder.name for folder in (broken_off / "trainer").glob("checkpoint-*")}
    assert (found.name if found else None) == max(left, default=None)  # what is damaged is gone


# The clock


def test_a_clock_that_goes_back_changes_nothing(given, tmp_path, monkeypatch):
    """An hour back at every look: durations stay positive, and the newest checkpoints are kept, not the latest dates."""
    now = [2e9]

    def back() -> float:
        now[0] -= 3600
        return now[0]

    saved, folders = RecorderCallback.on_save, []

    def save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        os.utime(folder, (back(), now[0]))
        saved(self, args, state, control, **kwargs)
        folders.append(sorted(each.name for each in folder.parent.glob("checkpoint-*")))

    monkeypatch.setattr(time, "time", back)
    monkeypatch.setattr(RecorderCallback, "on_save", save)
    longer = given.model_copy(update={"training": given.training.model_copy(update={"max_steps": 5})})
    run(longer, tmp_path / "run", page=False)
    assert folders[-1] == ["checkpoint-3", "checkpoint-4"]
    found = read_run(tmp_path / "run")
    assert 0 < found.result["seconds"] < 600 and (found.steps["seconds"] > 0).all()
    assert found.steps["step"].tolist() == [1, 2, 3, 4, 5]


# Two processes


def test_a_run_that_another_process_finishes_meanwhile_is_left_alone(tmp_path, monkeypatch):
    """It was unfinished when it was looked at, and finished when the lock was free."""
    writer = RunWriter(tmp_path / "run", CONFIG)
    writer.add("components", ROWS)
    locked = hold.__globals__["locked"]

    def late(path):
        writer.finish({})
        return locked(path)

    monkeypatch.setitem(hold.__globals__, "locked", late)
    with pytest.raises(RunError, match="holds a finished run"):
        RunWriter(tmp_path / "run", CONFIG, parts={})
    assert len(read_run(tmp_path / "run").parts) == 2


def test_a_second_process_in_a_run_is_told_so(given, broken_off):
    lock = hold(broken_off, json.loads((broken_off / "config.json").read_text()))
    before = sorted(broken_off.rglob("*"))
    with pytest.raises(RunError, match="is being written by another process"):
        run(given, broken_off, page=False)
    assert sorted(broken_off.rglob("*")) == before
    assert lock is not None
    lock.close()


def test_an_interrupt_between_two_writes_of_a_flush_doubles_nothing(tmp_path, monkeypatch):
    writer = RunWriter(tmp_path / "run", CONFIG)
    replace, after = os.replace, []

    def interrupted(source, path):
        replace(source, path)
        if "part-" in str(path) and not after:
            after.append(path)
            raise KeyboardInterrupt

    writer.add("components", ROWS)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.flush()
    writer.fail(KeyboardInterrupt())
    assert len(read_run(tmp_path / "run").parts) == 2 and read_run(tmp_path / "run").status["state"] == "interrupted"


# Memory, and what is no number

OUT = {
    "python": MemoryError(),
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "processor": RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
    "windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
}


@pytest.mark.parametrize("kind", ["cuda", "processor"])
def test_memory_that_runs_out_in_a_reading_is_told_and_the_next_start_goes_on(given, whole, tmp_path, monkeypatch, kind):
    path, count, read = tmp_path / "run", [0], share.glance

    def scarce(*args, **kwargs):
        count[0] += 1
        if count[0] == 3:  # the start, after step 1, after step 2
            raise OUT[kind]
        return read(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("attribution.updates.probes.glance", scarce)
        with pytest.raises(RecordError, match=r"out of memory while reading probe set 'agree' after step 2; .*fewer") as told:
            run(given, path, page=False)
    assert told.value.__cause__ is OUT[kind]
    found = read_run(path)
    assert found.status["state"] == "failed" and "out of memory" in found.status["error"] and found.status["step"] == 2
    assert found.steps["step"].tolist() == [1] and found.probes["step"].max() == 1
    said = []
    run(given, path, page=False, tell=said.append)
    assert "out of memory" in said[0] and said[1] == "going on from checkpoint-1"
    same(whole, path)


def test_what_says_that_memory_ran_out():
    assert all(map(out_of_memory, OUT.values())) and not out_of_memory(RuntimeError("shapes differ"))


def test_memory_that_runs_out_elsewhere_is_a_sentence(given, tmp_path, monkeypatch):
    def scarce(*_, **__):
        raise OUT["cuda"]

    monkeypatch.setattr("attribution.runs.stages.causes", scarce)
    with pytest.raises(RunError, match=r"out of memory while ablating every head .*the same command goes on"):
        run(given, tmp_path / "run", page=False)
    assert read_run(tmp_path / "run").status["state"] == "failed"


def test_memory_that_runs_out_in_a_loop_of_ones_own_leaves_weights_and_record(tmp_path, monkeypatch):
    model, tokenizer = load("planted/unrouted")
    samples = [Sample(**row) for row in grammar.prompts(8, 1)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch, weights = collate(encode(tokenizer, samples)), []
    recorder = Recorder(tmp_path / "run", probes=[ProbeSet(name="p", samples=samples)], tokenizer=tokenizer, everything=False)

    def scarce(*_, **__):
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        raise MemoryError

    with (
        pytest.raises(RecordError, match="out of memory while reading probe set 'p' after step 1"),
        recorder.attach(model, optimizer),
    ):
        model(input_ids=batch.ids, labels=batch.labels).loss.backward()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        monkeypatch.setattr("attribution.updates.probes.shares", scarce)
        optimizer.step()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in weights[0].items())
    assert any(not torch.equal(now[name], value) for name, value in start.items())  # the step itself was made
    assert read_run(tmp_path / "run").probes["step"].tolist() == [0] and not optimizer._optimizer_step_post_hooks


def test_a_batch_without_labels_is_a_step_without_a_loss(tmp_path):
    """The optimizer moves on by its momentum; nothing of the training breaks."""
    model, tokenizer = load("planted/unrouted")
    samples = [Sample(**row) for row in grammar.prompts(8, 1)]
    batch, optimizer = collate(encode(tokenizer, samples)), torch.optim.AdamW(model.parameters(), lr=1e-3)
    recorder = Recorder(tmp_path / "run", probes=[ProbeSet(name="p", samples=samples)], tokenizer=tokenizer, everything=False)
    with recorder.attach(model, optimizer):
        for labels in (batch.labels, torch.full_like(batch.labels, -100), batch.labels):
            optimizer.zero_grad()
            model(input_ids=batch.ids, labels=labels).loss.backward()
            optimizer.step()
    found = read_run(tmp_path / "run")
    assert found.status["state"] == "finished" and found.steps["loss"].isna().tolist() == [False, True, False]
    assert (found.steps["grad_norm"] > 0).tolist() == [True, False, True] and (found.steps["update_norm"] > 0).all()
    assert found.probes["resolved"].dropna().all() and found.probes["metric"].nunique() == 4


def test_a_batch_without_samples_leaves_what_was_recorded(tmp_path):
    """The model refuses it; its error is the one that is seen."""
    model, tokenizer = load("planted/unrouted")
    batch = collate(encode(tokenizer, [Sample(**row) for row in grammar.prompts(8, 1)]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(RuntimeError, match="0 elements"), Recorder(tmp_path / "run").attach(model, optimizer):
        for size in (8, 0):
            optimizer.zero_grad()
            model(input_ids=batch.ids[:size], labels=batch.labels[:size]).loss.backward()
            optimizer.step()
    found = read_run(tmp_path / "run")
    assert found.steps["step"].tolist() == [1] and found.status["state"] == "failed" and "0 elements" in found.status["error"]


# Signals


def test_sigterm_waits_for_the_step_and_a_second_one_does_not():
    with terminable() as stopping, pytest.raises(Terminated, match="after the step"), stopping.after_the_step():
        os.kill(os.getpid(), signal.SIGTERM)
        assert isinstance(stopping(), Terminated)
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
    with terminable() as stopping:
        assert stopping() is None
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_ones_own_is_left_alone():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with terminable():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def ctrl_c():
    """Python's own handler, which a shell takes away from what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_training_leaves_a_record_that_goes_on(given, whole, tmp_path, monkeypatch, number):
    """SIGTERM: the step under way and its checkpoint are whole. Ctrl-C: at once, and the checkpoint before it is there."""
    path, step_ends = tmp_path / "run", Recorder._step_ends

    def signalled(self):
        step_ends(self)
        if self.steps == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Recorder, "_step_ends", signalled)
        run(given, path, page=False)
    status = read_run(path).status
    assert status["state"] == "interrupted" and status["step"] == 2
    told = []
    run(given, path, page=False, tell=told.append)
    assert told[0].startswith("the attempt before was interrupted, at step 2 or after")
    assert told[1] == f"going on from checkpoint-{2 if number == signal.SIGTERM else 1}"
    same(whole, path)


# The disk


def test_a_disk_that_is_full_is_told_and_hides_no_other_error(tmp_path, monkeypatch):
    writer = RunWriter(tmp_path / "run", CONFIG)
    writer.add("components", ROWS)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        writer.fail(ValueError("the first"))  # raises nothing
    assert read_run(tmp_path / "run").status["state"] == "running"
    writer.close()
    assert "ValueError: the first" in (tmp_path / "run" / "log.txt").read_text()


def mounted(folder: Path, kilobytes: int, again: bool = False) -> bool:
    how = ["-o", f"{'remount,' if again else ''}size={kilobytes}k"]
    return subprocess.run(["mount", "-t", "tmpfs", *how, "tmpfs", str(folder)], capture_output=True).returncode == 0


@pytest.mark.long
def test_a_small_disk_that_grows_whenever_it_is_full(given, whole, tmp_path):
    """What torch and safetensors write meets the end of the disk too; every start goes a little further, to the same end."""
    disk, size, failures = tmp_path / "disk", 100, []
    disk.mkdir()
    if not mounted(disk, size):
        pytest.skip("no right to mount a file system")
    try:
        while not is_finished(disk / "run"):
            _, said = outcome(lambda: run(given, disk / "run", page=False))
            if said:
                assert "cannot write" in said and len(failures) < 200, said
                failures.append(said)
                for aside in disk.glob("run.interrupted-*"):
                    shutil.rmtree(aside)
                size += 400
                assert mounted(disk, size, again=True)
        same(whole, disk / "run")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert len(failures) >= 4
    print(f"{len(failures)} times full, at {size} KiB whole")


@pytest.mark.parametrize("known", [{"parts": {}}, [], {"parts": {}, "files": {}, "checksums": {"sets.parquet/part-0": [1, 2]}}])
def test_a_checkpoint_that_cannot_be_gone_on_from_is_left_out_and_said(tmp_path, known):
    """Of an earlier version, of another shape, or of a record whose parts are gone."""
    folder = tmp_path / checkpoints.CHECKPOINTS / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / STATE).write_text(json.dumps(known))
    found, said = checkpoints.choose(tmp_path)
    assert found is None and "checkpoint-3 is left out" in said[-1] and not folder.exists()


# Processes of a study


class Lasts(NamedTuple):
    """Stands for the config of a run that lasts so many seconds, is killed (below 0), or breaks (0)."""

    seconds: float

    def model_dump_json(self) -> str:
        return json.dumps(self.seconds)


def work(config: str, path: str) -> str | None:
    """Stands for doing it."""
    seconds = json.loads(config)
    if seconds < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds)
    Path(path).touch()
    return None if seconds else "broken"


def lasting(folder: Path, *seconds: float) -> list[Job]:
    return [Job("A", Lasts(each), folder / str(number)) for number, each in enumerate(seconds)]  # type: ignore[arg-type]


def test_of_a_study_one_worker_may_be_killed(tmp_path, monkeypatch):
    """The others end as they would, and the next run gets a process of its own."""
    monkeypatch.setattr(slots, "START", "fork")
    monkeypatch.setattr(slots, "_one_thread", lambda: None)
    monkeypatch.setattr(slots, "attempt", work)
    found = {job.path.name: error for job, error in slots.outcomes_in_slots(lasting(tmp_path, 0.4, -1, 0.01, 0), 2)}
    assert found["0"] is None and found["2"] is None and found["3"] == "broken" and "SIGKILL" in found["1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2", "3"]


def test_a_study_that_is_terminated_leaves_no_worker(tmp_path, monkeypatch):
    """The signal reached the study's own process alone."""
    monkeypatch.setattr(slots, "START", "fork")
    monkeypatch.setattr(slots, "_one_thread", lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    monkeypatch.setattr(slots, "attempt", work)
    begun = time.monotonic()
    Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with terminable(), pytest.raises(Terminated):
        list(slots.outcomes_in_slots(lasting(tmp_path, 60, 60, 60), 2))
    assert 0.9 < time.monotonic() - begun < 15 and not multiprocessing.active_children()


def test_the_command_tells_a_scheduler_that_it_was_terminated(monkeypatch, capsys):
    def stop(_):
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(VERBS, "ls", stop)
    assert main(["ls"]) == 143 and "the same command goes on" in capsys.readouterr().err


def script(code: str, folder: Path, seconds: int) -> str:
    """What a script prints last; in a process of its own, which forks."""
    whole = f"import sys, json; sys.path.insert(0, {str(TESTS)!r}); import under_fire, injection; from pathlib import Path; "
    done = subprocess.run(
        [sys.executable, "-c", f"{whole}under_fire.ready(); folder = Path({str(folder)!r}); print(json.dumps({code}))"],
        capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_study_that_is_killed_and_a_run_whose_files_fail(tmp_path):
    """A kill of each kind, and every hundred-and-fortieth file operation; all of both are long tests."""
    (tmp_path / "files").mkdir()
    found = json.loads(script(
        "[under_fire.under_fire(folder, 3, arms=('sft', 'grpo'), in_turn=True), "
        "injection.injected(folder / 'files', 140, ('full', 'crash'))]", tmp_path, 900,
    ))  # fmt: skip
    assert sum(found[0]["whom"].values()) == 3 and set(found[0]["whom"]) <= set(KINDS)
    assert found[1]["operations"] > 100 and found[1]["crash, broke off"] >= 1 and found[1]["full, broke off"] >= 1


@pytest.mark.long
def test_a_study_that_is_killed_a_hundred_times(tmp_path):
    print(script("under_fire.under_fire(folder, 100, seed=1)", tmp_path, 7200))


@pytest.mark.long
def test_every_file_operation_of_a_run_fails_in_its_turn(tmp_path):
    print(script("injection.injected(folder, 1)", tmp_path, 7200))
