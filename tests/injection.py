"""Every file operation of a run fails in its turn: the disk is full, it cannot be read or written, or the process ends there.

    python tests/injection.py FOLDER --every 1

A run of three steps is done once to count its operations below its directory, of which Python tells: opening to write, flushing
to disk, renaming, removing, cutting off, making and removing directories. Then, for each of them, a run in which it fails,
and a second start that goes on: its record must equal the undisturbed one. What torch and safetensors write past Python is
faulted by a small file system (`test_faults`) and by kills (`under_fire`).
"""

import argparse
import errno
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
from under_fire import recorded

from attribution.errors import AttributionError
from attribution.runs import RunConfig, run
from attribution.samples import Sample, write_samples
from attribution.store import is_finished
from attribution.worlds import planted as grammar

ACTS = {"full": errno.ENOSPC, "broken": errno.EIO, "crash": None}
_EVENTS = {"os.rename": 0, "os.remove": 0, "os.mkdir": 0, "os.truncate": 0, "os.rmdir": 0, "shutil.rmtree": 0}


class Faults:
    """Counts file operations below a directory, and makes one of them fail, and all after it where the disk is full.

    Attributes:
        count: operations so far.
        seen: what they were.
    """

    def __init__(self, below: Path, at: int = -1, act: str = "crash"):
        self.below, self.at, self.act = f"{below}{os.sep}", at, act
        self.count, self.seen, self.on = 0, [], True
        sys.addaudithook(self._audited)
        fsync = os.fsync

        def flushed(number: int) -> None:
            self._operation("fsync", os.readlink(f"/proc/self/fd/{number}"))
            fsync(number)

        os.fsync = flushed

    def _audited(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open" and _writes(arguments):
            self._operation("open", arguments[0])
        elif event in _EVENTS:
            self._operation(event, arguments[0])

    def _operation(self, what: str, path: object) -> None:
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
        if not self.on or (os.path.isabs(name) and not f"{name}{os.sep}".startswith(self.below)):
            return
        self.count += 1
        self.seen.append(f"{what} {name.removeprefix(self.below)}")
        if self.count - 1 == self.at and self.act == "crash":
            os._exit(9)
        frees = what in ("os.remove", "os.rmdir", "shutil.rmtree", "os.truncate")
        fails = self.count - 1 == self.at or (self.act == "full" and 0 <= self.at < self.count and not frees)
        if fails and not (self.act == "full" and frees):
            code = ACTS[self.act]
            assert code is not None
            raise OSError(code, os.strerror(code), name)


def _writes(arguments: tuple) -> bool:
    path, mode, flags = arguments
    return isinstance(path, str | bytes | os.PathLike) and (
        any(each in mode for each in "wax+") if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR))
    )


def config(folder: Path) -> RunConfig:
    """A run of three steps, with completions, checkpoints and grafts."""
    data = write_samples(folder / "train.jsonl", [Sample(**row) for row in grammar.prompts(4, 1, problems=grammar.TRAINING)])
    probes = write_samples(folder / "agree.jsonl", [Sample(**row) for row in grammar.prompts(2, 2, star="agree")])
    return RunConfig(
        data=str(data), probes=(str(probes),), model="planted/31", sets="model", singles="heads", grafts="sets",
        everything=False, milestones="ends", share_passes=0, checkpoint_seconds=0, recipe="dpo",
        training={"max_steps": 3, "batch_size": 2, "learning_rate": 1e-3},
    )  # fmt: skip


def start(given: RunConfig, path: Path, at: int = -1, act: str = "crash") -> tuple[int, str, list[str]]:
    """One start of the run in a process of its own: its exit code, what it said, and its file operations."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        signal.alarm(120)
        faults, said, code = Faults(path, at, act), "", 0
        try:
            run(given, path, page=False)
        except AttributionError as error:
            said, code = str(error), 2
        except BaseException as error:
            said, code = f"{type(error).__name__}: {error}", 1
        faults.on = False
        with os.fdopen(writer, "w") as file:
            json.dump([said, faults.seen], file)
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as file:
        told = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said, seen = json.loads(told) if told else ("", [])
    return code, said, seen


def injected(folder: Path, every: int, acts: tuple[str, ...] = tuple(ACTS)) -> dict:
    """Fault every so many-th operation in each way; how often the run said so and went on.

    Raises:
        AssertionError: an error that is no sentence of the package, or a record that differs.
    """
    given, begun, found = config(folder), time.monotonic(), Counter()
    code, said, seen = start(given, folder / "whole")
    assert code == 0 and len(seen) > 60, (code, said, len(seen))
    expected = recorded(folder / "whole")
    assert len(expected["steps"]) == 3 and len(expected["samples"])
    for act in acts:
        for at in range(0, len(seen), every):
            path = folder / f"{act}-{at}"
            code, said, _ = start(given, path, at, act)
            told = f"{act} at operation {at}, {seen[at]}: exit {code}, {said!r}"
            if act == "crash":
                assert code == 9, told
            else:
                assert code == 2 or (code == 0 and is_finished(path)), told
                assert code == 0 or ("cannot" in said and os.strerror(ACTS[act] or 0) in said), told
            found[f"{act}, {'finished all the same' if code == 0 else 'broke off'}"] += 1
            code, said, _ = start(given, path)
            assert code == 0 and is_finished(path), f"after {told}: the next start ended with {code}, {said!r}"
            for name, frame in recorded(path).items():
                pd.testing.assert_frame_equal(
                    frame, expected[name], check_exact=True, check_categorical=False, obj=f"{told}, {name}"
                )
            left = [file.name for file in path.rglob("*") if ".tmp-" in file.name or file.name == "trainer"]
            assert not left, f"after {told}: {left} are left"
    return {"operations": len(seen), **found, "seconds": round(time.monotonic() - begun)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(injected(asked.folder.resolve(), asked.every)))


if __name__ == "__main__":
    from under_fire import ready

    ready()
    main()
