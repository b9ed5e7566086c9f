"""A run is killed at random moments, again and again, and goes on: the record and the weights end as those of one that ran.

A kill counts only if the process had begun a step and had not finished; the killed process writes its checkpoints at
every step, so what is lost is at most one step and the part in memory. Studies are killed in `test_faults`.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from attribution.runs import RunConfig
from attribution.samples import Sample, write_samples
from attribution.store import COLUMNS, is_finished, read_run
from attribution.worlds import planted as grammar

CLOCKS = ["seconds", "recorder_seconds"]


def config(folder: Path) -> RunConfig:
    def write(name: str, count: int, seed: int, **form) -> str:
        return str(write_samples(folder / name, [Sample(**row) for row in grammar.prompts(count, seed, **form)]))

    return RunConfig(
        model="planted/31", data=write("train.jsonl", 48, 1, problems=grammar.TRAINING),
        probes=(write("agree.jsonl", 12, 2, star="agree"),), sets="model", singles="heads", grafts="sets", everything=False,
        training={"max_steps": 14, "batch_size": 4, "disable_dropout": False, "learning_rate": 1e-3}, checkpoint_seconds=0,
    )  # fmt: skip


def begin(given: RunConfig, path: Path) -> subprocess.Popen:
    file = path.parent / f"{path.name}.json"
    file.write_text(given.model_dump_json())
    code = (
        "import sys, torch; torch.set_num_threads(1); from attribution.runs import RunConfig, run; "
        "run(RunConfig.read(sys.argv[1]), sys.argv[2], page=False)"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(file), str(path)], stderr=subprocess.PIPE, text=True)


def recorded(path: Path) -> dict[str, pd.DataFrame]:
    run = read_run(path)
    found = {name: getattr(run, "parts" if name == "components" else name) for name in COLUMNS}
    return {name: frame.drop(columns=CLOCKS, errors="ignore") for name, frame in found.items()}


def trained_steps(path: Path) -> int:
    """How far the training on disk is, by its newest checkpoint; before the first, 0 once the training has begun."""
    steps = [int(folder.name.split("-")[1]) for folder in (path / "trainer").glob("checkpoint-*")]
    begun = (path / "log.txt").exists() and "training with" in (path / "log.txt").read_text()
    return max(steps) if steps else 0 if begun else -1


def kill_and_go_on(tmp_path: Path, kills: int, seed: int) -> None:
    given, generator = config(tmp_path), random.Random(seed)
    whole = begin(given, tmp_path / "whole")
    assert whole.wait() == 0, whole.communicate()[1]
    expected = recorded(tmp_path / "whole")
    assert len(expected["steps"]) == 14 and not (tmp_path / "whole" / "trainer").exists()

    counted, round_ = 0, 0
    while counted < kills:
        path, round_ = tmp_path / f"killed-{round_}", round_ + 1
        while not is_finished(path):
            process = begin(given, path)
            if counted < kills:
                before = trained_steps(path)
                while process.poll() is None and trained_steps(path) < max(before, 0):
                    time.sleep(0.01)
                time.sleep(generator.uniform(0.0, 3.5 if before < 0 else 6.0))
                if process.poll() is None:
                    at = trained_steps(path)
                    process.send_signal(signal.SIGKILL)
                    counted += at >= 0 and not is_finished(path)
            process.wait()
            if process.returncode not in (0, -signal.SIGKILL):
                pytest.fail(f"after {counted} kills: {process.communicate()[1][-2000:]}")
            if (path / "status.json").exists() and process.returncode:
                readable = recorded(path)  # at any moment
                assert readable["steps"]["step"].is_unique
        found = recorded(path)
        for name, frame in expected.items():
            pd.testing.assert_frame_equal(found[name], frame, check_exact=True, check_categorical=False, obj=name)
        results = [json.loads((each / "result.json").read_text()) for each in (tmp_path / "whole", path)]
        assert results[0]["probes"] == results[1]["probes"] and results[0]["steps"] == results[1]["steps"] == 14
    print(f"{counted} kills over {round_} runs, nothing lost")


@pytest.mark.long
def test_many_kills(tmp_path):
    kill_and_go_on(tmp_path, 36, seed=1)
