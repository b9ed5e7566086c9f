"""Small runs: one that works, one whose process is killed while it trains, one whose samples are missing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from attribution.launch import Job
from attribution.runs import RunConfig, directory

DIES = '''"""Kills the process that trains, the first time."""
import os, signal
from pathlib import Path

from attribution.recipes.sft import SFT


class Dies(SFT):
    once: str

    def build(self, setting):
        if not Path(self.once).exists():
            Path(self.once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().build(setting)
'''


@pytest.fixture
def job(data, tmp_path) -> Callable[..., Job]:
    """`job("A")`, a job of two steps below tmp_path / "runs" / "mine"; settings replace those of its config."""
    (tmp_path / "dies.py").write_text(DIES)

    def make(arm: str, **settings) -> Job:
        if arm == "dies":
            settings = {"recipe": f"{tmp_path / 'dies.py'}:Dies", **settings}
        training = {"max_steps": 2, "batch_size": 6, **({"once": str(tmp_path / "once")} if arm == "dies" else {})}
        given = {
            "model": "planted/31", "data": str(tmp_path / "none.jsonl") if arm == "missing" else data["train"],
            "probes": [data["agree"]], "sets": "model", "milestones": "ends", "everything": False, "batch_after": False,
            "singles": "heads", "grafts": "none", "training": training, **settings,
        }  # fmt: skip
        config = RunConfig.model_validate(given)
        return Job(arm, config, directory(config, tmp_path / "runs" / "mine", arm))

    return make


@pytest.fixture
def study(tmp_path) -> Path:
    return tmp_path / "runs" / "mine"
