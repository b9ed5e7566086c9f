"""Studies on a Slurm cluster: one array, failures apart, what waits is waited for again, what is preempted goes on."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

import attribution
from attribution.cli import main
from attribution.errors import ConfigError
from attribution.launch import Ticket, slurm
from attribution.launch.slurm import Slurm, Task, minutes, outcomes_on_slurm
from attribution.store import RunWriter, is_finished, read_run, write_json

submitit = pytest.importorskip("submitit")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The stand-in's commands on the PATH; its folder."""
    state = tmp_path / "cluster"
    state.mkdir()
    monkeypatch.setenv("STAND_IN", str(state))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import stand_in

    stand_in.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(attribution.__file__).parents[1]))
    monkeypatch.setattr(slurm, "ASK_SECONDS", 0.3)
    monkeypatch.setattr(slurm, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(submitit.SlurmJob, "watcher", type(submitit.SlurmJob.watcher)(delay_s=600))
    yield state
    del sys.modules["stand_in"]


def submitted(cluster: Path, number: int) -> dict[str, str]:
    import stand_in

    return stand_in.options(cluster / str(number) / "script")


def at_once(cluster: Path, number: int) -> int:
    now, most = 0, 0
    for line in (cluster / str(number) / "times").read_text().splitlines():
        now += 1 if json.loads(line)[1] == "begun" else -1
        most = max(most, now)
    return most


@pytest.mark.slow
def test_a_study_is_one_array_and_what_fails_is_told_with_its_log(job, cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arms = {arm: job(arm).config.model_dump(mode="json", exclude={"seed"}) for arm in ("A", "missing")}
    (tmp_path / "mine.json").write_text(json.dumps({"name": "mine", "arms": arms, "seeds": [0, 1]}))
    (tmp_path / "slurm.json").write_text(json.dumps({"partition": "cpu", "time": "1:30:00", "extra": {"qos": "low"}}))
    (cluster / "lost").write_text("7_2")  # arm A, seed 1
    command = ["study", "mine.json", "--slurm", "--slurm-file", "slurm.json", "--time", "45", "--memory", "4G"]
    assert main(command) == 2
    shown = capsys.readouterr()
    asked = submitted(cluster, 7)
    wanted = {"array": "0-3%2", "partition": "cpu", "time": "45", "mem": "4G", "qos": "low", "requeue": "", "job-name": "mine"}
    assert {key: asked.get(key) for key in wanted} == wanted
    assert "gpus-per-node" not in asked and "account" not in asked
    assert at_once(cluster, 7) == 2
    runs = {path: path.parent.name.rpartition("-")[0] for path in Path("runs/mine").glob("*/seed-*")}
    assert list(runs.values()) == ["A"], "a run without samples is never begun, and a lost one was not"
    assert is_finished(next(iter(runs))) and "3 runs failed" in shown.err
    for name, why in (("7_1_0_log.err", "cannot read samples"), ("7_3_0_log.err", "cannot read samples")):
        assert name in shown.err and why in (tmp_path / "runs" / "mine" / "slurm" / name).read_text()
    assert "Slurm ended job 7_2 (OUT_OF_MEMORY) before the run did" in shown.err
    assert main(["ls", "runs", "--every"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines[1:]] == ["finished", "failed", "failed", "failed"]

    (cluster / "lost").unlink()
    assert main([*command, "--arms", "A"]) == 0  # one job that is left is no array
    shown = capsys.readouterr()
    assert "1 of 2 runs are finished already" in shown.err and "1 runs submitted as job 8" in shown.err
    assert "array" not in submitted(cluster, 8)
    assert shown.out.strip().endswith("report.html")


def test_what_is_put_back_into_the_queue_is_the_same_task(job):
    todo = job("A")
    again = Task(todo.config.model_dump_json(), str(todo.path), threads=3).checkpoint()
    assert vars(again.function) == {"config": todo.config.model_dump_json(), "path": str(todo.path), "threads": 3}
    Ticket(todo.path).ask({"job": "7"})
    assert Ticket(todo.path).state == "queued again"


@pytest.mark.long
def test_a_job_that_is_preempted_goes_on_from_its_checkpoint(job, tmp_path):
    todo = job("A", training={"max_steps": 40, "batch_size": 6}, checkpoint_seconds=0)
    executor = submitit.LocalExecutor(tmp_path / "local")
    executor.update_parameters(timeout_min=10)
    ticket = Ticket(todo.path)
    submitted = executor.submit(Task(todo.config.model_dump_json(), str(todo.path)))
    ticket.ask({"job": submitted.job_id, "log": str(submitted.paths.stderr)})
    for _ in range(3000):
        if list((todo.path / "trainer").glob("checkpoint-[1-9]*/recorder*")):
            break
        assert not submitted.done(), submitted.stderr()
        time.sleep(0.1)
    (task,) = psutil.Process(int(submitted.job_id)).children()
    task.send_signal(signal.SIGUSR2)  # as Slurm does before it takes a node away
    submitted.wait()
    log = (todo.path / "log.txt").read_text()
    assert "again from checkpoint-" in log and "SystemExit" in log
    assert is_finished(todo.path) and len(read_run(todo.path).steps) == 40
    assert "Calling checkpoint method" in submitted.stdout() + submitted.stderr()


def test_what_waits_is_waited_for_and_not_submitted_again(job, cluster, study, monkeypatch):
    waits, runs = job("A"), job("A", seed=1)
    told = []
    for number, each in enumerate((waits, runs)):
        Ticket(each.path).ask({"job": f"7_{number}", "log": "", "seed": number, "recipe": "sft", "model": "m"})
        (cluster / "7").mkdir(exist_ok=True)
        (cluster / "7" / f"7_{number}.state").write_text("PENDING")
    Ticket(runs.path).write("running")
    found = outcomes_on_slurm([waits, runs], 2, Slurm(), study, told.append)
    write_json(runs.path / "result.json", {})
    assert next(found) == (runs, None)
    assert told == ["2 runs wait or run already, as job 7"] and not list(cluster.glob("*/script"))
    (cluster / "7" / "7_0.state").write_text("CANCELLED")
    assert next(found) == (waits, "Slurm ended job 7_0 (CANCELLED) before the run did")
    assert Ticket(waits.path).state == "failed" and next(found, None) is None
    (cluster / "deaf").touch()
    Ticket(waits.path).write("running")
    with pytest.raises(ConfigError, match="squeue does not say"):
        next(outcomes_on_slurm([waits], 2, Slurm(), study, told.append))


def test_a_silent_queue_is_no_failure(job, cluster):
    waits = job("A")
    Ticket(waits.path).ask({"job": "7_0", "log": ""})
    (cluster / "deaf").touch()
    found = slurm._waited({waits: "7_0"})
    looks = iter(range(40))

    def sleep(_):
        if next(looks, None) is None:
            write_json(waits.path / "result.json", {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm, "ASK_SECONDS", 0.0)
        patch.setattr(slurm, "_known", lambda ids: sleep(None))  # None, again and again
        assert list(found) == [(waits, None)]


def test_what_slurm_refuses_is_told(job, cluster, study):
    (cluster / "full").touch()
    with pytest.raises(ConfigError, match=r"Slurm refuses an array of 2 runs: .*Invalid account"):
        next(outcomes_on_slurm([job("A"), job("A", seed=1)], 2, Slurm(), study, print))


def test_an_interrupt_leaves_the_jobs_and_says_so(job, cluster, study, monkeypatch):
    Ticket(job("A").path).ask({"job": "7_0", "log": ""})
    (cluster / "7").mkdir()
    (cluster / "7" / "7_0.state").write_text("RUNNING")
    told = []

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(outcomes_on_slurm([job("A")], 2, Slurm(), study, told.append))
    assert told[-1] == "job 7 of Slurm go on; the same command waits for them again, and scancel stops them"


def test_what_is_missing_is_told(job, study, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="finds no sbatch here"):
        next(outcomes_on_slurm([job("A")], 2, Slurm(), study, print))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"pip install 'attribution\[slurm\]'"):
        next(outcomes_on_slurm([job("A")], 2, Slurm(), study, print))


@pytest.mark.parametrize(
    ("given", "expected"),
    [("90", 90), ("1:30", 2), ("0:30:00", 30), ("2:00:01", 121), ("1-0", 1440), ("1-12:30", 2190), ("2-00:00:00", 2880)],
)
def test_time_limits_are_those_of_sbatch(given, expected):
    assert minutes(given) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"time": "soon"}, "time 'soon' is no limit"),
        ({"time": "0"}, "'0' is no time"),
        ({"memory": "much"}, "'much' is no amount"),
        ({"gpu": 1}, "unknown key 'gpu'; expected partition, time, memory"),
        ({"gpus": -1}, "gpus: Input should be greater"),
    ],
)
def test_wrong_options_are_told(tmp_path, given, said, capsys):
    (tmp_path / "slurm.json").write_text(json.dumps(given))
    with pytest.raises(ConfigError, match=said):
        Slurm.read(tmp_path / "slurm.json")
    assert main(["study", "--slurm", "--slurm-file", str(tmp_path / "slurm.json")]) == 2
    assert said in capsys.readouterr().err


def test_a_wrong_flag_is_told(capsys):
    assert main(["study", "--slurm", "--time", "soon"]) == 2
    assert "time 'soon' is no limit" in capsys.readouterr().err


def test_options_of_slurm_need_slurm(capsys):
    assert main(["study", "--partition", "gpu"]) == 2
    assert "--slurm is not" in capsys.readouterr().err


def test_runs_that_wait_are_listed_before_they_begin(job, study, tmp_path, capsys):
    waits, again, lost = job("A"), job("A", seed=1), job("A", seed=2)
    for number, each in enumerate((waits, again, lost)):
        Ticket(each.path).ask({"job": f"7_{number}", "log": "", "seed": number, "recipe": "sft", "model": "m"})
    writer = RunWriter(again.path, {"model": "m", "recipe": "sft", "seed": 1})
    writer.status("interrupted", step=3)
    writer.close()
    Ticket(again.path).write("queued again")
    writer = RunWriter(lost.path, {"model": "m", "recipe": "sft", "seed": 2})
    writer.status("running", step=5)
    Ticket(lost.path).write("running")
    assert main(["ls", str(tmp_path / "runs")]) == 0
    arm = "queued: seed 0; queued again: seed 1 at step 3; running: seed 2 at step 5"
    assert capsys.readouterr().out.strip() == f"{lost.path.parent}  {arm}  sft  m"
    long_ago = time.time() - 3 * 3600
    for file in lost.path.rglob("*"):
        os.utime(file, (long_ago, long_ago))
    assert main(["ls", str(tmp_path / "runs"), "--every"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{waits.path}  queued (Slurm job 7_0)  0 steps  sft  m"
    assert lines[2] == f"{lost.path}  running (nothing written for 3 h)  5 steps  sft  m"
    Ticket(lost.path).write("failed", "Slurm ended it")
    assert main(["ls", str(tmp_path / "runs")]) == 0
    assert "failed: seed 2 at step 5" in capsys.readouterr().out


@pytest.mark.long
def test_a_task_of_the_array_that_is_preempted_is_requeued(job, cluster, study):
    todo = [job("A", seed=seed, training={"max_steps": 40, "batch_size": 6}, checkpoint_seconds=0) for seed in (0, 1)]
    found, struck = outcomes_on_slurm(todo, 1, Slurm(), study, print), False
    with pytest.MonkeyPatch.context() as patch:
        sleep = time.sleep

        def strike(seconds):
            nonlocal struck
            if not struck and list((todo[0].path / "trainer").glob("checkpoint-[1-9]*/recorder*")):
                struck = True
                ours = (p for p in psutil.process_iter() if "submitit.core._submit" in _command(p))
                (task,) = [p for p in ours if p.environ().get("SLURM_ARRAY_TASK_ID") == "0" and str(study) in _command(p)]
                task.send_signal(signal.SIGUSR2)
            sleep(seconds)

        patch.setattr(slurm.time, "sleep", strike)
        assert sorted((each.config.seed, error) for each, error in found) == [(0, None), (1, None)]
    log = (todo[0].path / "log.txt").read_text()
    assert struck and "again from checkpoint-" in log and len(read_run(todo[0].path).steps) == 40
    assert "again from" not in (todo[1].path / "log.txt").read_text()


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
