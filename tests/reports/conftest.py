"""A small synthetic run, finished or stopped half-way, written as the recorder writes one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from attribution.store import BATCH, TRAINING, RunWriter

LAYERS, HEADS, NEURONS, STEPS = 3, 4, 12, 6
PROBES = ("conflict", "agree <b>held out</b>")
SCRIPT = "<script>alert(1)</script>"
WORDS = [
    SCRIPT,
    "w" * 10_000,
    " the",
    "\n",
    "<b>bold</b>",
    "&amp;",
    "$x$",
    "a|b",
    "\u202eright",
    '"',
    *(f" word{i}" for i in range(20)),
]
CONFIG = {
    "model": "planted",
    "recipe": "sft",
    "training": {"max_steps": STEPS, "learning_rate": 1e-3},
    "data": "train.jsonl",
    "probes": ["conflict.jsonl", "agree.jsonl"],
    "metric": "log_odds",
    "reference": "zero",
    "seed": 20250,
}
META = {
    "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.0", "trl": "1.0", "attribution": "0.1"},
    "model": {"name": "planted", "type": "llama", "layers": LAYERS, "heads": HEADS, "neurons": NEURONS,
              "vocabulary": len(WORDS), "parameters": 12_345, "tied": False},
    "seconds": {"total": 12.5, "recorder": 3.25},
    "not_measured": [f"Samples of the batch, because {SCRIPT}."],
    "started": "2025-01-01T00:00:00",
}  # fmt: skip


def components() -> list[tuple[str, int, int, str]]:
    """(kind, layer, index, part) of every part of every component, and the remainder."""
    found = [("head", layer, i, part) for layer in range(LAYERS) for i in range(HEADS) for part in ("writing", "routing")]
    found += [("neuron", layer, i, part) for layer in range(LAYERS) for i in range(NEURONS) for part in ("writing", "gating")]
    found += [("row", -1, i, "writing") for i in range(len(WORDS))]
    found += [("remainder", layer, -1, part) for layer in range(LAYERS) for part in ("keys", "norms")]
    return [*found, ("remainder", -1, -1, "embedding"), ("remainder", -1, -1, "final norm")]


def _part_rows(step: int, probe: str, generator: np.random.Generator) -> pd.DataFrame:
    rows = pd.DataFrame(components(), columns=["kind", "layer", "index", "part"]).assign(step=step, probe=probe)
    if probe == BATCH:
        return rows.assign(update_norm=generator.random(len(rows)), cause_before=generator.normal(size=len(rows)))
    share = generator.normal(0, 0.02, len(rows)) + 0.05 * ((rows["kind"] == "head") & (rows["index"] == 1))
    return rows.assign(share=share, cause_before=generator.normal(size=len(rows)))


def _singles(probe: str, neurons: int, **values: object) -> pd.DataFrame:
    found = [(kind, layer, i) for kind, layer, i, part in components() if part == "writing" and kind in ("head", "neuron")
             and not (kind == "neuron" and i >= neurons)]  # fmt: skip
    return pd.DataFrame(found, columns=["kind", "layer", "index"]).assign(probe=probe, **values)


def write_run(
    path: Path, finished: bool = True, neurons: int = NEURONS, causes: bool = True, config: dict[str, Any] = CONFIG
) -> Path:
    """Write a run. Half-way: 3 steps, no milestone, no graft, no meta.

    neurons: how many per layer have an influence. causes: whether they were measured on training samples.
    """
    generator, writer = np.random.default_rng(0), RunWriter(path, config)
    if causes:
        _add_causes(writer)
    steps = STEPS if finished else STEPS // 2
    writer.vocabulary(WORDS)
    metric = dict.fromkeys(PROBES, -1.5)
    for probe in PROBES:
        writer.add("probes", pd.DataFrame([{"step": 0, "probe": probe, "metric": -1.5, "kl": 0.0}]))
        _add_influence(writer, probe, 0, neurons, generator)
    for step in range(1, steps + 1):
        loss = 2 / step if finished else None
        writer.add("steps", pd.DataFrame([{"step": step, "loss": loss, "learning_rate": 1e-3, "seconds": 0.1}]))
        writer.add("components", _part_rows(step, BATCH, generator))
        for number, probe in enumerate(PROBES):
            rows = _part_rows(step, probe, generator)
            writer.add("components", rows)
            total, residual = rows["share"].sum(), 0.1 if (step, number) == (2, 0) else 1e-6
            metric[probe] += total + residual
            writer.add("probes", pd.DataFrame([{
                "step": step, "probe": probe, "metric": metric[probe], "kl": 0.02 * step * (number + 1),
                "change": total + residual, "share_sum": total, "residual": residual, "resolved": residual < 1e-3,
                "passes": 1,
            }]))  # fmt: skip
        writer.flush()
    if finished:
        writer.meta(META)
        for probe in PROBES:
            _add_influence(writer, probe, steps, neurons, generator)
            grafts = _singles(probe, NEURONS, step=steps)
            writer.add("grafts", grafts.assign(graft=generator.normal(0, 0.1, len(grafts))))
            layer = {"step": steps, "probe": probe, "kind": "head", "layer": 0, "index": -1, "graft": 99.0}
            writer.add("grafts", pd.DataFrame([layer]))
        ends = {probe: {"before": -1.5, "after": metric[probe], "kl": 0.1} for probe in PROBES}
        measured = {"causes": {"samples": 48}} if causes else {}
        writer.finish({"steps": steps, "seconds": 12.5, "probes": ends, **measured})
    return path


def _add_influence(writer: RunWriter, probe: str, step: int, neurons: int, generator: np.random.Generator) -> None:
    rows = _singles(probe, neurons, step=step)
    writer.add("influence", rows.assign(effect=generator.normal(0, 0.3, len(rows)), kl=generator.random(len(rows))))


def _add_causes(writer: RunWriter) -> None:
    """As `runs` writes them: every head, neuron and row on training samples, from a generator of its own."""
    generator = np.random.default_rng(1)
    words = pd.DataFrame({"kind": "row", "layer": -1, "index": range(len(WORDS)), "probe": TRAINING, "step": 0})
    rows = pd.concat([_singles(TRAINING, NEURONS, step=0), words], ignore_index=True)
    writer.add("influence", rows.assign(effect=generator.normal(0, 0.5, len(rows)), kl=generator.random(len(rows))))
    writer.flush()


@pytest.fixture
def build() -> Callable[..., Path]:
    return write_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "seed-0")


@pytest.fixture(scope="session")
def uncaused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a recorder in a loop of the user's own: no causes, and a config of another form."""
    config = {"model": "planted", "recipe": "a loop of its own", "metric": "log_odds", "reference": "zero", "milestones": "log",
              "probes": [{"name": "conflict", "samples": 24}, {"name": "agree <b>held out</b>", "samples": 8}]}  # fmt: skip
    return write_run(tmp_path_factory.mktemp("runs") / "loop", causes=False, config=config)


@pytest.fixture(scope="session")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "half", finished=False)
