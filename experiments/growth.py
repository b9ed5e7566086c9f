"""How cost grows with samples, length, layers and neurons: exponents, fitted by least squares to logarithms.

Each quantity is timed at a few sizes of one thing, all sizes turn by turn, with the rest as it is. The seconds of a size are
the least of its turns: whatever else a machine does only adds to them. The standard error is that of the fit.

Knows what is made larger; knows nothing about budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import linregress

from attribution.causes import attribute
from attribution.components import Components
from experiments.costs import SPARSE, recorded, step_of
from experiments.subjects import METRIC, Size, Subject, random_llama
from experiments.timing import seconds_of

BASE = {"samples": 8, "length": 32, "layers": 3, "neurons": 512}
SIZES = {"samples": (4, 8, 16, 32), "length": (16, 32, 64, 128), "layers": (2, 3, 4, 6, 8), "neurons": (256, 512, 1024, 2048)}
TURNS, ABLATED, FEWER = 3, 1 / 16, 4  # turns; share of the neurons that are ablated; on one sample of so many
_LLAMA = {"hidden_size": 128, "num_attention_heads": 4, "vocab_size": 256, "tie_word_embeddings": False, "dtype": "float32"}
# What cost would grow with if nothing but products of matrices took time: those of attention itself, which grow with the square
# of the length, are a small part here. Fixed costs of a call and of a parameter pull below. Ablations are as many as
# components, and run only the layers after their own: their number times the layers after them.
EXPECTED = {
    "recorded step": {"samples": "≤ 1", "length": "1, towards 2", "layers": "1", "neurons": "≤ 1"},
    "first-order causes": {"samples": "1", "length": "1, towards 2", "layers": "1", "neurons": "≤ 1"},
    "exact ablation": {"samples": "1", "length": "1, towards 2", "layers": "2, above 2 for few layers", "neurons": "1 to 2"},
}


class Exponent(NamedTuple):
    """One fit: `cost` grows with `size` to the power of `exponent`, with its standard error, over these sizes."""

    cost: str
    size: str
    over: tuple[int, ...]
    exponent: float
    error: float


def exponents(device: str) -> list[Exponent]:
    """Every quantity against every size."""
    found = []
    for size, values in SIZES.items():
        seconds = _timed(size, values, device)
        found += [Exponent(cost, size, values, *fitted(values, least)) for cost, least in seconds.items()]
    return found


def fitted(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Slope of log seconds over log size, and its standard error."""
    fit: Any = linregress(np.log(sizes), np.log(seconds))
    return float(fit.slope), float(fit.stderr)


def table(found: Sequence[Exponent]) -> str:
    """As Markdown."""
    lines = ["| cost | grows with | over | exponent ± standard error | expected |", "|---|---|---|---|---|"]
    lines += [
        f"| {each.cost} | {each.size} | {', '.join(map(str, each.over))} | {each.exponent:.2f} ± {each.error:.2f} "
        f"| {EXPECTED[each.cost][each.size]} |"
        for each in found
    ]
    return "\n".join(lines) + "\n"


def _timed(size: str, values: Sequence[int], device: str) -> dict[str, list[float]]:
    """Least seconds of each quantity at each size, after one turn that is not counted."""
    with TemporaryDirectory() as place, ExitStack() as recording:
        calls = [_calls(subject(device, **{**BASE, size: value}), recording, Path(place) / str(value)) for value in values]
        seconds: dict[str, list[list[float]]] = {cost: [[] for _ in values] for cost in EXPECTED}
        for turn in range(TURNS + 1):
            for number, each in enumerate(calls):
                for cost, call in each.items():
                    taken = seconds_of(call)
                    if turn:
                        seconds[cost][number].append(taken)
    return {cost: [min(each) for each in found] for cost, found in seconds.items()}


def subject(device: str, samples: int, length: int, layers: int, neurons: int) -> Subject:
    """A small random Llama of such sizes."""
    config = {**_LLAMA, "num_hidden_layers": layers, "intermediate_size": neurons, "max_position_embeddings": length}
    return random_llama(Size(config, samples, 1), device)


def _calls(given: Subject, recording: ExitStack, path: Path) -> dict[str, Callable[[], Any]]:
    model, tokenizer = given.model, given.tokenizer
    units = Components(model).table.query("kind == 'neuron'")
    units = units.iloc[:: round(1 / ABLATED)]  # of every layer alike
    few = given.probed[: max(1, len(given.probed) // FEWER)]
    begin = recorded(recording, given.tokenizer, path, **SPARSE, **given.probes())
    return {
        "recorded step": step_of(given, given.trained, begin),
        "first-order causes": lambda: attribute(model, tokenizer, given.probed, method="gradient", metric=METRIC),
        "exact ablation": lambda: attribute(model, tokenizer, few, metric=METRIC, components=units),
    }
