"""What a run takes against what the doctor said it would: `python -m experiments.memory [--model "25 M" "125 M"]`.

A real run, from its config to its grafts, with probe sets, update shares and their refining, exact ablation, grafts and the
words of prompts. It is made twice, each time in a process of its own: once as it is, for seconds and for the resident memory
of the process (on a GPU, `--device cuda`: what torch's allocator gave out there); once while every tensor is counted from
birth to death, for bytes. Both are told by part of the run and stand beside what `attribution doctor` says of the same plan
from shapes alone. Bytes do not depend on what else the machine does; seconds do, and so does the speed of the machine, which
the doctor measures just before. Minutes on one core with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from random import Random
from statistics import quantiles
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import tyro
from transformers import LlamaConfig, LlamaForCausalLM

from attribution.components import Components
from attribution.doctor import Plan
from attribution.doctor.disk import disk
from attribution.doctor.machine import machine, timed
from attribution.doctor.memory import footprint
from attribution.doctor.opening import opened
from attribution.doctor.passes import Shapes
from attribution.doctor.seconds import FRESH, refining, seconds
from attribution.doctor.structure import structure
from attribution.runs import RunConfig, run, stages
from attribution.samples import Sample, write_samples
from attribution.store import read_run
from attribution.updates import probes
from attribution.updates.batch import BatchWatch
from attribution.updates.provenance import versions
from attribution.updates.recorder import Recorder
from attribution.worlds.build import word_tokenizer
from experiments.subjects import LLAMA
from experiments.timing import LiveBytes, synchronize

STEPS = 6
PARTS = {  # of a run, and what the doctor calls its seconds
    "causes on training samples": ("causes on training samples",),
    "words of prompts": ("words of prompts",),
    "forward and backward": ("training", "gradients of effective weights"),  # of adapters, within a pass
    "step of the optimizer": (),  # in "training"
    "recorder around a step": ("recorder around steps",),
    "training batch run again": ("training batches run again",),
    "reading of a probe set": ("readings of probe sets",),
    "refining of its shares": (),
    "exact ablation": ("exact ablation of heads", "exact ablation of neurons and rows, at both ends"),
    "grafts": ("grafts",),
}
CLOSE = 0.2  # how far a prediction of bytes, or of all of a run's seconds, may be off
MIB = 2**20
REST = "all else"  # reading, opening, writing


@dataclass(frozen=True)
class Subject:
    """What is run.

    Attributes:
        sizes: of a random Llama.
        plan: of the run.
        grafts: as `RunConfig` takes them.
    """

    sizes: dict[str, Any]
    plan: Plan
    grafts: str = "all"


SMALL = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 250,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip  # as large as an organism of the world "planted"
LARGE = {**LLAMA, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 6,
         "vocab_size": 26_000}  # fmt: skip
BILLION = {**LLAMA, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4, "vocab_size": 32_000}  # fmt: skip
_PLAN = Plan(max_steps=STEPS, batch_size=8, length=16, response=4, probes=2, probe_samples=8, share_passes=3, samples=8)
_QUICK = replace(_PLAN, milestones="ends", singles="heads", layers=(1,))
SUBJECTS = {
    "0.7 M": Subject(SMALL, replace(_PLAN, batch_size=16, probe_samples=80, samples=64, layers=(1,))),
    "25 M": Subject(LLAMA, _QUICK, "depth"),
    "25 M, LoRA": Subject(LLAMA, replace(_QUICK, lora=8), "depth"),
    "25 M, tied, checkpointing": Subject(
        {**LLAMA, "tie_word_embeddings": True, "vocab_size": 8_000},
        replace(_QUICK, probes=1, checkpointing=True, accumulation=2, batch_size=4), "depth",
    ),
    "125 M": Subject(LARGE, _QUICK, "depth"),
    "1.1 B": Subject(BILLION, replace(_QUICK, length=32, response=8), "depth"),
}  # fmt: skip
FOR_A_GPU = ("1.1 B",)  # 25 GB


def main(
    model: tuple[str, ...] = tuple(name for name in SUBJECTS if name not in FOR_A_GPU),
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Measure what runs take, and write it as Markdown beside what the doctor says.

    Args:
        model: names of sizes.
        device: where the models live, cpu or cuda.
        out: file to write; `results/memory.md` if left out, and of another device `results/memory-cuda.md`.
    """
    found, out = {}, out or Path("results") / ("memory.md" if device == "cpu" else f"memory-{device}.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in model:
        found[name] = both(name, device)
        out.write_text(page(found, device), encoding="utf-8")
    print(out.read_text(encoding="utf-8"), out, sep="\n")


def both(name: str, device: str = "cpu") -> dict[str, Any]:
    """What the doctor says of a subject and what its run takes, counted and timed, each in a new process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        found = [pool.submit(measured, SUBJECTS[name], counted, device).result() for counted in (False, True)]
    return {"plain": found[0], "counted": found[1]}


# One run


class Parts:
    """Most bytes and all seconds of every part of a run, those of parts within it left out.

    Args:
        peak: most bytes since it was called last.
    """

    def __init__(self, peak: Callable[[], float]):
        self.bytes: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._peak, self._last, self._open = peak, time.perf_counter(), [REST]

    def mark(self) -> None:
        """Count what there was since the last mark to the innermost part that is open."""
        synchronize()
        now, name = time.perf_counter(), self._open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self.bytes[name] = max(self.bytes.get(name, 0.0), self._peak())
        self._last = time.perf_counter()

    def begin(self, name: str) -> None:
        self.mark()
        self._open.append(name)

    def end(self, name: str) -> None:
        self.mark()
        assert self._open.pop() == name

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)

    def of(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call as a part."""

        @wraps(call)
        def within(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return within

    def step_begins(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The recorder's look before a step; what follows is the optimizer's own."""
        looked = self.of("recorder around a step", call)

        @wraps(call)
        def within(*args: Any) -> None:
            looked(*args)
            self.begin("step of the optimizer")

        return within

    def step_ends(self, call: Callable[..., Any]) -> Callable[..., Any]:
        looked = self.of("recorder around a step", call)

        @wraps(call)
        def within(*args: Any) -> None:
            self.end("step of the optimizer")
            looked(*args)

        return within


def watched(parts: Parts) -> ExitStack:
    """While it is open, parts of a run are told apart."""
    from transformers import Trainer

    stack = ExitStack()
    for where, attribute, change in (
        (stages, "causes", lambda call: parts.of("causes on training samples", call)),
        (stages, "read_words", lambda call: parts.of("words of prompts", call)),
        (stages, "graft", lambda call: parts.of("grafts", call)),
        (Trainer, "training_step", lambda call: parts.of("forward and backward", call)),
        (Recorder, "_step_begins", parts.step_begins),
        (Recorder, "_step_ends", parts.step_ends),
        (BatchWatch, "again", lambda call: parts.of("training batch run again", call)),
        (probes, "read", lambda call: parts.of("reading of a probe set", call)),
        (probes, "shares", lambda call: parts.of("refining of its shares", call)),
        (probes.ProbeReader, "influence", lambda call: parts.of("exact ablation", call)),
    ):
        stack.enter_context(patch.object(where, attribute, change(getattr(where, attribute))))
    return stack


@dataclass
class Resident:
    """Memory of this process beyond what it is now."""

    base: float = field(default_factory=lambda: _status("VmRSS"))

    def peak(self) -> float:
        """Most since the last call."""
        found = _status("VmHWM") - self.base
        Path("/proc/self/clear_refs").write_text("5")
        return found


@dataclass
class Allocated:
    """Memory of the GPU that torch's allocator has given out, beyond what it is now."""

    base: float = field(default_factory=torch.cuda.memory_allocated)

    def peak(self) -> float:
        """Most since the last call."""
        found = torch.cuda.max_memory_allocated() - self.base
        torch.cuda.reset_peak_memory_stats()
        return found


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measured(subject: Subject, counted: bool, device: str = "cpu") -> dict[str, Any]:
    """One run of a subject: bytes and seconds by part; where they are of the process, what was predicted, too."""
    predicted = {}
    with TemporaryDirectory() as place:
        folder = Path(place) / "own"
        config = written(subject, folder, device)
        if not counted:
            tiny = {**SMALL, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
            once = replace(subject, sizes=tiny, plan=replace(subject.plan, probe_samples=2, samples=8, batch_size=4))
            _go(written(once, Path(place) / "tiny", device), Path(place) / "tiny", Parts(lambda: 0.0))  # opens all libraries
            predicted = doctored(subject, str(folder / "model"), device)
            gc.collect()
            resident = Resident() if device == "cpu" else Allocated()
            resident.peak()
            parts = Parts(resident.peak)
            _go(config, folder, parts)
        else:
            with LiveBytes() as live:
                parts = Parts(lambda: _since(live))
                _go(config, folder, parts)
        passes = [int(count) for count in read_run(folder / "run").probes["passes"].dropna()]
    return {"predicted": predicted, "bytes": parts.bytes, "seconds": parts.seconds, "passes": passes}


def _since(live: LiveBytes) -> float:
    found, live.peak = live.peak, live.now
    return found


def _go(config: RunConfig, folder: Path, parts: Parts) -> None:
    with watched(parts):
        run(config, folder / "run", page=False)
        parts.mark()


def written(subject: Subject, folder: Path, device: str = "cpu") -> RunConfig:
    """A random Llama and random words as files, and the config of a run on them."""
    plan, model = subject.plan, folder / "model"
    words, draw = [f"w{i}" for i in range(subject.sizes["vocab_size"] - 4)], Random(0).choices
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**subject.sizes)).save_pretrained(model)
    word_tokenizer(words).save_pretrained(model)
    count = {"train": plan.samples, **{f"probe {number}": plan.probe_samples for number in range(plan.probes)}}
    files = {}
    for name, samples in count.items():
        texts = [" ".join(draw(words[:64], k=plan.length - 1)).split(" ") for _ in range(samples)]  # and the beginning token
        cut = plan.length - 1 - plan.response
        rows = [Sample(prompt=" ".join(text[:cut]), response=" " + " ".join(text[cut:])) for text in texts]
        files[name] = str(write_samples(folder / f"{name}.jsonl", rows))
    return RunConfig.model_validate({
        "model": str(model), "data": files.pop("train"), "probes": tuple(files.values()), "grafts": subject.grafts,
        "singles": plan.singles, "milestones": plan.milestones, "share_passes": plan.share_passes,
        "everything": plan.everything, "layers": plan.layers, "batch_after": plan.batch_after, "checkpoint_seconds": None,
        "metric": "log_odds", "device": device, "training": {
            "max_steps": plan.max_steps, "batch_size": plan.batch_size, "accumulation": plan.accumulation,
            "learning_rate": 1e-3, "lora": {"rank": plan.lora},
            "trainer": {"gradient_checkpointing": True} if plan.checkpointing else {},
        },
    })  # fmt: skip


def doctored(subject: Subject, model: str, device: str = "cpu") -> dict[str, Any]:
    """What the doctor says: bytes and seconds by part, from shapes, on this machine."""
    plan, given = subject.plan, opened(model, device=device)
    components, shapes = Components(given.model), Shapes(given.model.config, "float32")
    found = structure(components)
    here = timed(machine("float32", device, None, None), given, plan, shapes)
    ablated = disk(components, plan, found.small, 1.0).ablated
    return {
        "peaks": footprint(found, plan, shapes, device).peaks,
        "seconds": seconds(found, plan, shapes, here, ablated, device),
        "refining": refining(found, plan, shapes, here),
    }


# The page


def page(found: Mapping[str, Mapping[str, Any]], device: str = "cpu") -> str:
    """What was measured, with what, and the tables."""
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    place = device if device == "cpu" else torch.cuda.get_device_name()
    about = f"{torch.get_num_threads()} of {os.cpu_count()} cores; {libraries}"
    parts = [f"# {__doc__}\nMeasured on {place}, {about}.\n", "## Bytes\n", _bytes(found), "## Seconds\n", _seconds(found)]
    return "\n".join(parts)


def _bytes(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "Most bytes in each part of a run, everything held included. Counted: of all tensors alive. Resident: of the process,",
        "or given out on the GPU, beyond what there was before the run; what the allocator rounds up is in it.\n",
        "| model | part | predicted MiB | counted MiB | predicted / counted | resident MiB | predicted / resident |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, both in found.items():
        predicted, counted, resident = both["plain"]["predicted"]["peaks"], both["counted"]["bytes"], both["plain"]["bytes"]
        rows = {part: (predicted[part], counted[part], resident[part]) for part in predicted if part in counted}
        rows["**peak**"] = (max(predicted.values()), max(counted.values()), max(resident.values()))
        for part, (told, alive, process) in rows.items():
            ratio = told / alive
            close = "" if abs(ratio - 1) <= CLOSE else " ✗"
            of_process = f"{process / MIB:,.1f} | {told / process:.2f}" if process > 0 else "none | –"  # it had as much before
            lines.append(f"| {name} | {part} | {told / MIB:,.1f} | {alive / MIB:,.1f} | {ratio:.2f}{close} | {of_process} |")
    return "\n".join(lines) + "\n"


def _seconds(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "Of one run each, not of an idle machine: what else ran on it is in them, and in the speed the doctor measured first.",
        "Where shares were refined, a prediction counts the readings that it took. Memory used for the first time takes",
        "seconds of whichever part uses it; they are foretold of all parts together.\n",
        "| model | part | predicted s | measured s | predicted / measured |",
        "|---|---|---|---|---|",
    ]
    ratios, runs = [], []
    for name, both in found.items():
        rows = _timed(name, both["plain"])
        fresh = both["plain"]["predicted"]["seconds"][FRESH]
        told, took = (sum(each) for each in zip(*rows.values(), strict=True))
        ratios += [predicted / measured for predicted, measured in rows.values()]
        runs.append((fresh + told) / took)
        lines += [f"| {name} | {part} | {a:.2f} | {b:.2f} | {a / b:.2f} |" for part, (a, b) in rows.items()]
        close = "" if abs(runs[-1] - 1) <= CLOSE else " ✗"
        part = f"**all of these**, with {fresh:.2f} for {FRESH}"
        lines.append(f"| {name} | {part} | {fresh + told:.2f} | {took:.2f} | {runs[-1]:.2f}{close} |")
    low, middle, high = quantiles(ratios, n=4)
    lines.append(
        f"\nOver all parts the ratio is {middle:.2f} [{low:.2f}, {high:.2f}] (median and quartiles), over whole runs from"
    )
    lines.append(f"{min(runs):.2f} to {max(runs):.2f}.")
    return "\n".join(lines) + "\n"


def _timed(name: str, plain: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Predicted and measured seconds by part of one run."""
    told, took = plain["predicted"]["seconds"], dict(plain["seconds"])
    took["forward and backward"] += took.pop("step of the optimizer")
    further = sum(count - 1 for count in plain["passes"]) * plain["predicted"]["refining"]
    rows = {}
    for part, names in PARTS.items():
        known = part in took and (names or part == "refining of its shares")
        if not known or (part == "grafts" and SUBJECTS[name].grafts != "all"):  # the doctor foretells all
            continue
        seconds = sum(told.get(each, 0.0) for each in names) if names else further
        if seconds and took[part]:
            rows[part] = seconds, took[part]
    return rows


if __name__ == "__main__":
    tyro.cli(main)
