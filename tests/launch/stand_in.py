"""A cluster of one machine: `python stand_in.py sbatch|srun|squeue|sacct|scontrol …` does what Slurm is asked.

State lies below $STAND_IN: a folder per job, with the script, a file per task that holds its state, and when it ran. A task
whose id stands in the file `lost` is ended before it begins, as on a node that fails.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

STATE = Path(os.environ["STAND_IN"])
COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scontrol")
WAITING = ("PENDING", "RUNNING")


def install(folder: Path) -> None:
    """Commands of Slurm's names in a folder, for the PATH."""
    folder.mkdir()
    for name in COMMANDS:
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__)} {name} "$@"\n')
        (folder / name).chmod(0o755)


def options(script: Path) -> dict[str, str]:
    lines = (line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if line.startswith("#SBATCH --"))
    return {key: "".join(shlex.split(value)) for key, _, value in (line.partition("=") for line in lines)}


def sbatch(script: str) -> None:
    if (STATE / "full").exists():
        sys.exit("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified")
    number = 7 + len(list(STATE.glob("*/script")))
    place = STATE / str(number)
    place.mkdir()
    (place / "script").write_text(Path(script).read_text())
    tasks, _, _ = options(place / "script").get("array", "").partition("%")
    last = int(tasks.partition("-")[2]) if tasks else -1
    for name in [f"{number}_{k}" for k in range(last + 1)] or [str(number)]:
        (place / f"{name}.state").write_text("PENDING")
    subprocess.Popen(
        [sys.executable, __file__, "serve", str(number)], start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=(place / "serve.log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(f"Submitted batch job {number}")


def serve(number: str) -> None:
    """Run the tasks of a job in order, so many at once."""
    place = STATE / number
    _, _, limit = options(place / "script").get("array", "").partition("%")
    names = sorted((file.stem for file in place.glob("*.state")), key=lambda name: int(name.rpartition("_")[2]))
    running: dict[str, subprocess.Popen] = {}
    while names or running:
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                told(place, name, "ended")
                if (place / f"{name}.requeue").exists():
                    (place / f"{name}.requeue").unlink()
                    (place / f"{name}.state").write_text("PENDING")
                    names.append(name)
                else:
                    (place / f"{name}.state").write_text("FAILED" if process.returncode else "COMPLETED")
        while names and len(running) < int(limit or 1):
            name = names.pop(0)
            if (STATE / "lost").exists() and name in (STATE / "lost").read_text().split():
                (place / f"{name}.state").write_text("OUT_OF_MEMORY")
                continue
            (place / f"{name}.state").write_text("RUNNING")
            told(place, name, "begun")
            running[name] = task(place, name)
        time.sleep(0.05)


def task(place: Path, name: str) -> subprocess.Popen:
    array, _, index = name.partition("_")
    own = {"SLURM_JOB_ID": str(1000 + int(index)) if index else name, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1",
           "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "node1"}  # fmt: skip
    own |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": index} if index else {}
    return subprocess.Popen(["bash", str(place / "script")], env={**os.environ, **own}, start_new_session=True)


def told(place: Path, name: str, what: str) -> None:
    with (place / "times").open("a") as file:
        file.write(json.dumps([name, what]) + "\n")


def srun(*given: str) -> None:
    files, rest = {}, list(given)
    while rest and rest[0].startswith("--"):
        flag = rest.pop(0)
        if flag in ("--output", "--error"):
            files[flag] = rest.pop(0)
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID", ""), os.environ.get("SLURM_ARRAY_TASK_ID", "")
    words = {"%j": os.environ["SLURM_JOB_ID"], "%A": array, "%a": index, "%t": "0"}
    for number, flag in ((1, "--output"), (2, "--error")):
        for word, value in words.items():
            files[flag] = files[flag].replace(word, value)
        os.dup2(os.open(files[flag], os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.execvp(rest[0], rest)


def states(jobs: str) -> dict[str, str]:
    return {file.stem: file.read_text() for job in jobs.split(",") for file in (STATE / job).glob("*.state")}


def squeue(*given: str) -> None:
    if (STATE / "deaf").exists():
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    (jobs,) = (each.partition("=")[2] for each in given if each.startswith("--jobs="))
    assert "--array" in given and "--format=%i" in given and "--noheader" in given
    there = [name for name, state in states(jobs).items() if state in WAITING]
    if not there:
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    print("\n".join(there))


def sacct(*given: str) -> None:
    found = [job for place, job in enumerate(given) if given[place - 1] == "-j"]
    print("JobID|State|NodeList")
    for name, state in states(",".join(found)).items():
        print(f"{name}|{state}|node1")


def scontrol(verb: str, name: str) -> None:
    assert verb == "requeue"
    (STATE / name.partition("_")[0] / f"{name}.requeue").touch()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
