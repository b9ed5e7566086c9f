"""What recording and attributing cost: `python -m experiments.speed [--model planted random] [--repeats 7] [--resume]`.

Ratios, not seconds: what is compared runs in one process, turn by turn (A B C, B C A, ..., each in an order that is drawn), so
that whatever else the machine does, and what one leaves in the caches for the next, falls on all alike. A ratio is taken
within each turn; shown are its median over the turns and its quartiles, and the budget is judged by the median. About an hour
on one idle core with OMP_NUM_THREADS=1, and five minutes of two for the default study, whose seconds are those of the clock;
what is finished is kept beside the page, `--resume` goes on from there, and `--model` measures some models anew and keeps the
others.

A step is forward, backward, clipping and AdamW. The recorder ablates heads alone and at both ends alone, outside the steps
timed, does not run the batch again, and writes neurons and rows in part, as it does by default for large models. A step is
refined where two gradients do not give its shares to 1 %; that takes further passes, and the row holds the other steps. Rows
go to disk every fifteen seconds, within a step. First-order causes stand against forward and backward of the same metric on
the same prompts, and beside the same numbers from captum, nnsight and (`pip install "attribution[bench]"`) TransformerLens;
exact ablation against one forward pass for each component, by hand and by each of these; a recorded step beside bergson's
callback, where it is installed. Of models above 5 M parameters 64 random components are ablated, and the whole is extrapolated.
Exact ablation runs the layers above a component alone, many components in a pass: where one forward pass keeps the machine busy
by itself, as on a CPU those of 25 M parameters and more do, it saves the layers below, 2 L / (L - 1) times for L layers, the
last layer's positions that are not scored, and what larger products gain.
On a GPU (`--device cuda`) a step of so few tokens takes the time in which one core of the host starts its kernels, and not that
in which they run: there a ratio says how many more of them the recorder starts.
Memory is the bytes of tensors alive, counted one by one, beyond those of the same steps without a recorder; with few tokens no
activations hide the peak. Rows that wait to be written are not in it. The column `peak` holds the tensors that one call makes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import timeit
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro

from attribution.store import read_json, write_json
from attribution.updates.provenance import versions
from experiments.costs import measure
from experiments.growth import Exponent, exponents
from experiments.growth import table as table_of_exponents
from experiments.subjects import CLIP, LEARNING_RATE, METRIC, RANDOM, subject_named
from experiments.timing import Row, table

MODELS = ("planted", "kindland", *RANDOM)
GROWTH = "growth"  # its part of what is kept
STUDY = "default study"
_STUDY = "default study on two cores, seconds", "≤ 300"


def main(
    model: tuple[str, ...] = MODELS,
    device: str = "cpu",
    repeats: int = 7,
    growth: bool = True,
    study: bool = True,
    resume: bool = False,
    out: Path = Path("results/speed.md"),
) -> None:
    """Measure the budgets of the recorder and of causes, and write them as Markdown.

    Args:
        model: names of embedded Llamas, and "random" and "random-large" for untrained ones of 25 M and 125 M parameters.
        device: where to run them; "cuda" waits for the GPU before and after each call.
        repeats: turns of each comparison, at least; of the largest model, three at most.
        growth: measure how cost grows, too.
        study: run the default study, too, five minutes on two cores; on a CPU alone.
        resume: keep what is beside the page already, and measure the rest.
        out: file to write; a JSON file of the same name keeps what is finished.
    """
    kept = out.with_suffix(".json")
    parts: dict[str, Any] = read_json(kept) if kept.exists() else {}
    for name in (*model, *([GROWTH] if growth else []), *([STUDY] if study and device == "cpu" else [])):
        part = name if name == STUDY else f"{name} on {device}"
        if resume and part in parts:
            continue
        found: dict[str, Any] = {"about": about(device, repeats)}
        if name == STUDY:
            found = {"about": machine(), "study": list(study_row())}
        elif name == GROWTH:
            found["exponents"] = [list(each) for each in exponents(device)]
        else:
            subject = subject_named(name, device)
            found["model"] = f"{name} ({subject.model.num_parameters() / 1e6:.1f} M)" + (
                "" if device == "cpu" else f", {device}"
            )
            found["rows"] = [list(row) for row in measure(subject, repeats)]
        parts[part] = found
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, parts)
    text = page(parts)
    out.write_text(text, encoding="utf-8")
    print(text[text.index("| model") :], out, sep="\n")


def about(device: str, repeats: int) -> str:
    """What something is measured with."""
    place = f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} of them used by torch"
    if device == "cuda":
        place = f"{torch.cuda.get_device_name()}, {place}"
    turns = f"{repeats} turns in drawn order after a warm-up"
    return f"{machine(place)}; {METRIC}, learning rate {LEARNING_RATE:g}, clipping to {CLIP:g}, {turns}"


def machine(place: str = f"cpu, {os.cpu_count()} cores") -> str:
    """Where something is measured, and the versions of libraries."""
    return f"{place}; {', '.join(f'{name} {version}' for name, version in versions().items())}"


def page(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """What was measured, with what, and the tables."""
    rows: dict[str, Sequence[Row]] = {f["model"]: [Row(*row) for row in f["rows"]] for f in parts.values() if "rows" in f}
    study = parts.get(STUDY, {}).get("study", (*_STUDY, "not measured", None, ""))
    rows[""] = [help_row(), Row(*study)]
    where: dict[str, list[str]] = {}
    for part, found in parts.items():
        where.setdefault(found["about"], []).append(part)
    measured = "\n".join(f"- {', '.join(names)}: {told}." for told, names in where.items())
    if not any(part.endswith("cuda") for part in parts):
        measured += "\n- On a GPU (`--device cuda`): not run."
    grown = [Exponent(*each) for found in parts.values() for each in found.get("exponents", ())]
    grows = f"\n## How cost grows\n\n{GROWN}\n\n{table_of_exponents(grown)}" if grown else ""
    return f"# {__doc__}\nMeasured:\n\n{measured}\n\n{table(rows)}{grows}"


GROWN = (
    "Least seconds at a few sizes of one thing, the rest as it is; exponents by least squares of logarithms, with the standard "
    "error of the fit. Expected is what products of matrices alone would give; fixed costs of a call pull below. A recorded "
    "step reads a probe set too; a share of all neurons is ablated, the same of each layer."
)


def help_row() -> Row:
    """Seconds of `attribution --help`, the least of five, and whether it imports torch."""
    command = [sys.executable, "-m", "attribution", "--help"]
    seconds = min(timeit.repeat(lambda: subprocess.run(command, check=True, capture_output=True), number=1, repeat=5))
    code = "import sys; from attribution.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    torchless = subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    notes = "least of 5 processes; torch is " + ("not imported" if torchless else "imported")
    return Row("`attribution --help`, seconds", "< 0.5, no torch", f"{seconds:.2f}", torchless and seconds < 0.5, notes)


def study_row(*options: str) -> Row:
    """Seconds of the default study by the clock, from the command to the path of its page; options make it smaller."""
    with TemporaryDirectory() as place:
        begun = time.perf_counter()
        command = [sys.executable, "-m", "attribution", "study", "--out", place, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # it says on the other stream how far it is
        seconds = time.perf_counter() - begun
        runs = len(read_json(Path(place) / "planted" / "study.json")["runs"])
    notes = f"by the clock, from the command to the path of its page; {runs} run{'s' if runs > 1 else ''}, two at once"
    return Row(*_STUDY, f"{seconds:.0f}", seconds <= 300, notes)


if __name__ == "__main__":
    tyro.cli(main)
