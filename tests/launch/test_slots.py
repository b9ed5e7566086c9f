"""Slots: jobs of one process leave those of the others alone, however it ends."""

import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from multiprocessing import Pipe

import pandas as pd
import pytest

from attribution.errors import RunError
from attribution.launch import Ticket, end_with_parent, mark_lost, outcomes_in_slots, slots
from attribution.launch.job import log_of
from attribution.launch.slots import _death
from attribution.store import RunWriter, is_finished, read_run
from attribution.store.files import locked


@pytest.mark.slow
def test_a_process_that_is_killed_takes_its_own_job_and_no_other(job):
    works, dies, missing = job("works"), job("dies"), job("missing")
    todo = [dies, works, missing, job("missing", seed=1)]
    found = {each.path: error for each, error in outcomes_in_slots(todo, 2)}
    assert len(found) == 4 and found[works.path] is None and is_finished(works.path)
    assert "ended by SIGKILL" in found[dies.path] and "cannot read samples" in found[missing.path]
    status = json.loads((dies.path / "status.json").read_text())
    assert status["state"] == "failed" and "SIGKILL" in status["error"], "its own process could not say so"
    assert log_of(dies.path) == dies.path / "log.txt" and "SIGKILL" in (dies.path / "log.txt").read_text()
    assert [error for _, error in outcomes_in_slots([dies], 2)] == [None], "what failed is done when it is asked for again"
    assert read_run(dies.path).status["state"] == "finished"


SCRIPT = """
from pathlib import Path
from attribution.launch import Job, outcomes_in_slots
from attribution.runs import RunConfig

print("begun")
config = RunConfig(model="planted", data="none.jsonl", probes=(), training={"max_steps": 1})
print([error for _, error in outcomes_in_slots([Job("A", config, Path("run"))], 1)])
"""


def test_the_script_that_asks_is_not_run_again(tmp_path):
    """Not even one that comes from a pipe, or that does not ask whether it is the main one. It starts processes as users do."""
    done = subprocess.run([sys.executable, "-"], input=SCRIPT, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.count("begun") == 1 and "there is no probe set" in done.stdout, done.stdout + done.stderr


POOL = """
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from attribution.launch import end_with_parent

def begins(name):
    print(name, flush=True)
    time.sleep(300)

if __name__ == "__main__":
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=end_with_parent) as pool:
        list(pool.map(begins, "ab"))
"""


def test_a_pool_ends_with_the_process_that_is_killed(tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    with subprocess.Popen([sys.executable, tmp_path / "pool.py"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert {parent.stdout.readline(), parent.stdout.readline()} == {"a\n", "b\n"}
        parent.kill()
        parent.communicate(timeout=60)  # until nobody holds the pipe any more


def test_no_process_ends_with_a_parent_it_does_not_have():
    with pytest.raises(RuntimeError, match="no parent to end with"):
        end_with_parent()


@pytest.mark.slow
def test_jobs_of_one_process_measure_the_model_before_training_once(job):
    first, second = job("A"), job("B", seed=1)
    assert [error for _, error in outcomes_in_slots([first, second], 1)] == [None, None]
    told = [(each.path / "log.txt").read_text() for each in (first, second)]
    assert "an earlier run" not in told[0] and "4 tables of before training are those of an earlier run" in told[1]
    starts = [(frame := read_run(each.path).influence)[frame["step"] == 0] for each in (first, second)]
    pd.testing.assert_frame_equal(*starts)
    ends = [(frame := read_run(each.path).influence)[frame["step"] == 2] for each in (first, second)]
    assert len(ends[0]) and not ends[0]["effect"].equals(ends[1]["effect"]), "each trains on its own"


def test_what_a_process_has_loaded_is_not_looked_through_after_each_job(monkeypatch):
    """Once a job went well; what later ones leave behind in circles is collected as before."""

    class Trainer:
        def __init__(self):
            self.itself = self

    left, frozen, errors = [], [], {"fails": "no samples"}

    def attempt(config, _path):
        gc.collect()
        frozen.append(gc.get_freeze_count())
        left.append(weakref.ref(Trainer()))
        return errors.get(config)

    monkeypatch.setattr(slots, "attempt", attempt)
    mine, theirs = Pipe()
    for job in (*(("fails", ""), ("first", ""), ("second", ""), ("third", "")), None):
        mine.send(job)
    gc.unfreeze()  # what `conftest` froze, for the same reason; it ends frozen
    slots._do_each(theirs)
    assert [mine.recv() for _ in range(4)] == ["no samples", None, None, None]
    assert frozen[:2] == [0, 0] and frozen[2] == frozen[3] > 10_000
    gc.collect()
    assert [each() for each in left] == [None] * 4


def test_no_job_is_no_process():
    assert list(outcomes_in_slots([], 2)) == []


def test_how_a_process_ended_is_told():
    assert _death(-signal.SIGKILL).startswith("its process was ended by SIGKILL") and "memory" in _death(-signal.SIGKILL)
    assert "SIGSEGV" in (told := _death(-signal.SIGSEGV)) and "memory" not in told
    assert "exit code 3" in _death(3)


def test_a_run_is_marked_only_where_nobody_can(tmp_path):
    mark_lost(tmp_path / "never begun", "gone")
    assert not (tmp_path / "never begun").exists()
    writer = RunWriter(tmp_path / "run", {"model": "m"})
    writer.status("running", step=3)
    mark_lost(tmp_path / "run", "gone")
    assert read_run(tmp_path / "run").status["state"] == "running", "somebody holds it"
    writer.close()
    mark_lost(tmp_path / "run", "gone")
    assert read_run(tmp_path / "run").status == {"state": "failed", "step": 3, "error": "gone"}
    mark_lost(tmp_path / "run", "again")
    assert read_run(tmp_path / "run").status["error"] == "gone", "what it said itself stays"


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr("attribution.store.files.fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="has no locks"):
        locked(tmp_path / "run").close()
    monkeypatch.setattr("attribution.store.files.fcntl.flock", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no")))
    with pytest.raises(RunError, match=r"cannot write .* no"):
        locked(tmp_path / "run")


def test_a_ticket_is_of_one_run(tmp_path):
    ticket = Ticket(tmp_path / "study" / "A-12345678" / "seed-0")
    assert ticket.state == "" and ticket.told == {} and log_of(ticket.run) is None
    ticket.ask({"job": "7_0", "log": str(tmp_path / "err")})
    assert ticket.state == "queued"
    ticket.write("failed", "it broke")
    assert (ticket.state, ticket.error) == ("failed", "it broke")
    (tmp_path / "err").touch()
    assert log_of(ticket.run) == tmp_path / "err"
    ticket.remove()
    ticket.remove()
    assert ticket.state == "" and ticket.error == ""
