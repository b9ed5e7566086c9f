"""A study is killed at random moments, again and again, and goes on: every record ends as that of one that was let be.

    python tests/under_fire.py FOLDER --kills 100

Each attempt is a process group of its own, forked from this process, which has imported everything already (else nine kills
in ten would hit an import). A kill is SIGKILL to the whole group, to the study's own process alone, whose workers must end
with it, or to one worker, which the others must survive. A kill counts if a run was under way, or the study was being
concluded. What every attempt did is in `trace`: one line when a step begins, and one at every change of stage.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd

from attribution.launch import slots
from attribution.recipes import recipe_named
from attribution.runs import RunConfig
from attribution.samples import Sample, write_samples
from attribution.store import COLUMNS, RunWriter, find_runs, is_finished, read_run
from attribution.study import Study, conclude, jobs, run_study
from attribution.updates.recorder import Recorder
from attribution.worlds import planted as grammar

CLOCKS = ["seconds", "recorder_seconds"]
STEPS = 6
SAMPLING = {"generations": 2, "batch_size": 4, "completion_length": 2, "disable_dropout": False}
ARMS = {
    "sft": ("sft", {"batch_size": 4, "disable_dropout": False}),
    "grpo": ("grpo", {**SAMPLING, "accumulation": 2, "iterations": 2}),  # goes on at every second step
    "dpo": ("dpo", {"batch_size": 4}),
}
KINDS = {"group": 0.6, "study": 0.2, "worker": 0.2}  # whom a kill hits, and how often


def study(folder: Path, chosen: Sequence[str] = tuple(ARMS)) -> Study:
    """Some of three arms, one of which samples, on one organism; a checkpoint after every step."""

    def write(name: str, count: int, seed: int, **form) -> str:
        return str(write_samples(folder / name, [Sample(**row) for row in grammar.prompts(count, seed, **form)]))

    data = write("train.jsonl", 12, 1, problems=grammar.TRAINING)
    probes = (write("agree.jsonl", 6, 2, star="agree"),)
    arms = {
        name: RunConfig(
            data=data, probes=probes, sets="model", singles="heads", grafts="sets", everything=False, milestones="ends",
            share_passes=2, checkpoint_seconds=0, recipe=recipe,
            training=recipe_named(recipe)(max_steps=STEPS, learning_rate=1e-3, **settings),
        )
        for name, (recipe, settings) in ARMS.items() if name in chosen
    }  # fmt: skip
    return Study(name="fire", arms=arms, models=("planted/31",), claims=("boost",))


def traced(trace: Path) -> None:
    """Every process of an attempt says what it begins."""
    begins, log = Recorder._step_begins, RunWriter.log

    def say(*words: object) -> None:
        with open(trace, "a") as file:
            file.write(" ".join(map(str, (os.getpid(), *words))) + "\n")

    def step_begins(self, args, kwargs):
        if self._depth == 0 or self._watch.seen:
            say("step", self._record.writer.path, self.steps + 1)
        begins(self, args, kwargs)

    def logged(self, line):
        log(self, line)
        say("stage", self.path, line.split(",")[0].split(" ")[0])

    Recorder._step_begins, RunWriter.log = step_begins, logged


def attempt(given: Study, root: Path, trace: Path) -> int:
    """Begin the study, or go on, in a process group of its own; its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        with suppress(PermissionError, ProcessLookupError):  # the child did it first, or has ended
            os.setpgid(child, child)
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        slots.START = "fork"
        traced(trace)
        failed = run_study(given, root, slots=2, tell=lambda line: None)
        with open(trace, "a") as file:
            file.write(f"{os.getpid()} concluding {root / given.name} -\n")
        conclude(given, root, failed)
        status = 3 if failed else 0
        for job, why in failed.items():
            print(f"{job.arm}: {why}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def last(trace: Path, offset: int) -> tuple[int, list[str]]:
    """How many lines an attempt has written, and the last one's words."""
    lines = trace.read_text()[offset:].splitlines() if trace.exists() else []
    return len(lines), lines[-1].split(" ") if lines else []


def alive(group: int) -> list[int]:
    """Processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(words[2]) == group and words[0] != "Z":
                found.append(int(entry.name))
    return found


def kill(kind: str, child: int, generator: random.Random) -> str:
    """Kill whom the kind says, and wait until nobody of the attempt is left, or, where a worker was hit, go on."""
    others = [each for each in alive(child) if each != child]
    if kind == "worker" and others:
        os.kill(generator.choice(others), signal.SIGKILL)
        return "worker"
    if kind == "study":
        os.kill(child, signal.SIGKILL)
        until = time.monotonic() + 30
        while alive(child) and time.monotonic() < until:
            time.sleep(0.02)
        left = alive(child)
        assert not left, f"workers {left} outlived their study"
    else:
        os.killpg(child, signal.SIGKILL)
        kind = "group"
    os.waitpid(child, 0)
    return kind


def recorded(path: Path) -> dict[str, pd.DataFrame]:
    run = read_run(path)
    found = {name: getattr(run, "parts" if name == "components" else name) for name in (*COLUMNS, "samples")}
    return {name: frame.drop(columns=CLOCKS, errors="ignore") for name, frame in found.items()}


def same(given: Study, one: Path, other: Path) -> None:
    """Every run's record, bit for bit, and all that the study concludes."""
    for here, there in zip(jobs(given, one), jobs(given, other), strict=True):
        expected, found = recorded(here.path), recorded(there.path)
        assert len(expected["steps"]) == STEPS and len(expected["components"]) and len(expected["influence"])
        for name, frame in expected.items():
            told = f"{here.arm}: {name}"
            pd.testing.assert_frame_equal(found[name], frame, check_exact=True, check_categorical=False, obj=told)
        results = [json.loads((path / "result.json").read_text()) for path in (here.path, there.path)]
        assert results[0]["probes"] == results[1]["probes"] and results[0]["steps"] == STEPS
        assert len(expected["samples"]) or here.arm == "sft"
        left = {file.name for file in there.path.rglob("*") if ".tmp-" in file.name or file.name.startswith("checkpoint-")}
        assert not left, f"{there.path} still holds {left}"
    concluded = [root / given.name for root in (one, other)]
    findings = [json.loads((place / "findings.json").read_text()) for place in concluded]
    assert findings[0] == findings[1]
    for file in sorted((concluded[0] / "frames").glob("*.parquet")):
        frames = [pd.read_parquet(place / "frames" / file.name).drop(columns=CLOCKS, errors="ignore") for place in concluded]
        if file.name not in ("failed.parquet",):
            pd.testing.assert_frame_equal(*frames, check_exact=True, obj=file.name)


def steps_lost(trace: Path) -> int:
    """The most steps of a run that any attempt had to do again, beyond the one that was under way."""
    most, reached, process = 0, {}, {}
    for line in trace.read_text().splitlines():
        words = line.split(" ")
        if len(words) == 4 and words[1] == "step":
            pid, _, run, step = words
            boundary = 2 if "grpo" in run else 1
            before = reached.get(run, 1)
            if process.get(run) not in (None, pid):
                kept = (before - 1) // boundary * boundary  # steps behind which a checkpoint was whole when the last one began
                most = max(most, kept + 1 - int(step))
            reached[run], process[run] = int(step), pid
    return most


def readable(root: Path) -> None:
    """Whatever lies there can be read, at any moment."""
    for path in find_runs(root):
        steps = recorded(path)["steps"]["step"]
        assert steps.is_unique


def under_fire(folder: Path, kills: int, seed: int = 0, arms: Sequence[str] = tuple(ARMS), in_turn: bool = False) -> dict:
    """Kill studies until so many kills have counted; what was hit, by place and kind.

    Args:
        folder: to work in.
        kills: how many.
        seed: of the moments.
        arms: of the study.
        in_turn: whom a kill hits goes round, and is not drawn.

    Raises:
        AssertionError: a record differs, a step more than the one under way was lost, or a worker outlived its study.
    """
    generator, given, begun = random.Random(seed), study(folder, arms), time.monotonic()
    child = attempt(given, folder / "whole", folder / "whole.trace")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    whole = time.monotonic() - begun
    hit, by, round_ = Counter(), Counter(), 0
    while sum(by.values()) < kills:
        root, round_ = folder / f"killed-{round_}", round_ + 1
        trace, done = folder / f"{root.name}.trace", False
        while not done:
            offset = trace.stat().st_size if trace.exists() else 0
            child, spared = attempt(given, root, trace), sum(by.values()) >= kills
            if all(is_finished(job.path) for job in jobs(given, root)):
                spared = spared or generator.random() < 0.5  # what is left takes no time, and would be hit again and again
            # by what it has done, not by the clock: on a busy machine every kill would hit its first seconds
            lines = 1 if spared else generator.randint(1, 8 * len(given.arms))
            while not spared and last(trace, offset)[0] < lines and not _ended(child):
                if last(trace, offset)[1][1:2] == ["concluding"]:
                    break
                time.sleep(0.005)
            until = time.monotonic() + generator.uniform(0.0, whole / 10 / len(given.arms))
            drawn = generator.choices(list(KINDS), list(KINDS.values()))[0]
            kind = list(KINDS)[sum(by.values()) % 3] if in_turn else drawn
            while not spared and time.monotonic() < until and not _ended(child):
                time.sleep(0.005)
            if not spared and not _ended(child):
                _, at = last(trace, offset)
                place = {"stage": at[3], "step": f"a step of {Path(at[2]).parent.name.partition('-')[0]}"}
                where = place.get(at[1], "concluding")
                kind = kill(kind, child, generator)
                hit[where] += 1
                by[kind] += 1
                if kind != "worker":
                    readable(root)
                    print(f"{sum(by.values())} kills, {round(time.monotonic() - begun)} s", file=sys.stderr, flush=True)
                    continue
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            assert code == 0 or (code == 3 and kind == "worker"), f"an attempt after {sum(by.values())} kills ended with {code}"
            assert not alive(child)
            done = code == 0
        assert all(is_finished(job.path) for job in jobs(given, root))
        same(given, folder / "whole", root)
        assert steps_lost(trace) <= 0, f"{steps_lost(trace)} steps more than the one under way were lost"
    return {
        "kills": sum(by.values()), "studies": round_, "runs": round_ * len(given.arms), "whom": dict(by),
        "where": dict(hit.most_common()), "seconds": round(time.monotonic() - begun),
    }  # fmt: skip


def _ended(child: int) -> bool:
    return not any(each == child for each in alive(child))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(under_fire(asked.folder.resolve(), asked.kills, asked.seed)))


def ready() -> None:
    """Import all that a run does, so that processes forked from this one begin at once."""
    import torch
    import trl.trainer.dpo_trainer
    import trl.trainer.grpo_trainer
    import trl.trainer.sft_trainer  # noqa: F401

    from attribution.updates import callback, graft, linear_graft  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    ready()
    main()
