"""How accurate each score of a cause is: `python -m experiments.accuracy [--model planted] [--out results/accuracy.md]`.

For every method and kind of component, on held-out samples of the model:
    exact        Spearman's rank correlation over components with exact ablation of each alone
    linear       linear ablation score: Spearman over random sets of components of one kind between the sum of their scores and
                 the effect of ablating the set jointly; sets hold a tenth, or half, of the components of every layer
    ceiling      how well exact ablation on one half of the samples ranks that on the other, corrected to the whole
                 (Spearman-Brown): no score can be asked to agree better than that
    passes       forward passes over the samples for all components, a backward pass counting as two
    time         seconds, in units of one forward and backward pass on the same samples in the same run

Ablation is by zero. What is read is the metric of the embedded study (logit difference) on `planted`, log-odds per token where
samples have no contrasts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import tyro
from scipy.stats import spearmanr

from attribution.causes import Causes, ablate, attribute
from attribution.components import KINDS, Components
from attribution.models import load
from attribution.samples import Sample, read_samples, samples_from_text
from attribution.updates.share import read as gradients_of
from attribution.worlds import planted

METHODS: dict[str, dict[str, Any]] = {
    "ablation": {},
    "ablation, direct": {"path": "direct"},
    "gradient": {"method": "gradient"},
    "integrated": {"method": "integrated"},
    "conductance": {"method": "conductance"},
}
SHARES = (0.1, 0.5)  # of the components of a kind and layer in a random set
HALVES = 20  # ways to split the samples
TURNS = 3  # of everything that is timed


class Subject(NamedTuple):
    """A model, and samples that it can be read on."""

    name: str
    model: Any
    tokenizer: Any
    samples: Sequence[Sample]
    metric: str


def main(
    model: tuple[str, ...] = ("planted",),
    data: str | None = None,
    out: Path = Path("results/accuracy.md"),
    samples: int = 64,
    sets: int = 200,
) -> None:
    """Measure every method on every model and write the table.

    Args:
        model: embedded models, folders or hub ids.
        data: of models that are not embedded: JSONL of samples, or a text file to cut samples from.
        out: Markdown file to write.
        samples: read so many.
        sets: random sets of each kind and share, at least 200 for a table to be shown.
    """
    torch.set_num_threads(1)
    rows = pd.concat([accuracy(subject(name, data, samples), sets) for name in model], ignore_index=True)
    rows.to_parquet(out.with_suffix(".parquet"), index=False)
    out.write_text(page(rows, samples, sets), encoding="utf-8")
    print(out.read_text(encoding="utf-8"))
    print(out)


def subject(name: str, data: str | None, count: int) -> Subject:
    """A model with samples: of the world `planted` in conflict, or of the user's file."""
    model, tokenizer = load(name)
    if name.startswith("planted"):
        found = [Sample(**row) for row in planted.prompts(count, 5, star="conflict")]
        return Subject(name, model, tokenizer, found, "logit_difference")
    if data is None:
        raise SystemExit(f"{name} is not embedded; name its samples with --data")
    if data.endswith(".jsonl"):
        found = read_samples(data)[:count]
    else:
        found = samples_from_text(Path(data).read_text(encoding="utf-8"), prompt_words=12, response_words=3, limit=count)
    return Subject(Path(name).name, model, tokenizer, found, "log_odds_per_token")


def accuracy(given: Subject, sets: int) -> pd.DataFrame:
    """One row per method and kind: model, method, kind, exact, linear .1, linear .5, ceiling, passes, time."""
    unit = seconds(lambda: _forward_and_backward(given))
    exact = _attributed(given)
    tables = {name: (exact if name == "ablation" else _attributed(given, **asked)) for name, asked in METHODS.items()}
    times = {name: seconds(lambda asked=asked: _attributed(given, **asked)) / unit for name, asked in METHODS.items()}
    joint = {(kind, share): joint_effects(given, kind, share, sets) for kind in KINDS for share in SHARES}
    rows = []
    for name, causes in tables.items():
        for kind in KINDS:
            chosen = (exact.table["kind"] == kind).to_numpy()
            score = causes.table.loc[chosen, "effect"].to_numpy()
            row = {"model": given.name, "method": name, "kind": kind}
            row["exact"] = spearman(score, exact.table.loc[chosen, "effect"].to_numpy())
            for share in SHARES:
                members, effects = joint[kind, share]
                row[f"linear {share:g}"] = spearman(members @ score, effects)
            rows.append(row | {"ceiling": ceiling(exact, chosen), "passes": causes.passes, "time": times[name]})
    return pd.DataFrame(rows)


def joint_effects(given: Subject, kind: str, share: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random sets of one kind: Bool [set, component of that kind], and the effect of ablating each, Float [set]."""
    table = Components(given.model).table
    table = table[table["kind"] == kind].reset_index(drop=True)
    draw = np.random.default_rng(0)
    members = np.zeros((count, len(table)), dtype=bool)
    for places in table.groupby("layer").indices.values():
        some = max(1, round(share * len(places)))
        for row in members:
            row[draw.choice(places, some, replace=False)] = True
    sets = {str(number): table[row] for number, row in enumerate(members)}
    found = ablate(given.model, given.tokenizer, given.samples, sets, metric=given.metric)
    return members, found["effect"].to_numpy()


def ceiling(exact: Causes, chosen: np.ndarray) -> float:
    """Spearman between random halves of the samples, mean over draws, as of twice as many samples (Spearman-Brown)."""
    effects = exact.per_sample[torch.as_tensor(chosen.copy())].double().numpy()
    draw, halves = np.random.default_rng(0), []
    for _ in range(HALVES):
        order = draw.permutation(effects.shape[1])
        one, other = np.array_split(order, 2)
        halves.append(spearman(effects[:, one].mean(1), effects[:, other].mean(1)))
    half = float(np.mean(halves))
    return 2 * half / (1 + half)


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """NaN where either does not vary."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(spearmanr(one, other).statistic)


def seconds(run: Callable[[], object]) -> float:
    """Median over turns."""
    taken = []
    for _ in range(TURNS):
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    return median(taken)


def page(rows: pd.DataFrame, samples: int, sets: int) -> str:
    """The table as Markdown."""
    shown = rows.assign(
        **{name: rows[name].map("{:+.2f}".format) for name in rows.columns[3:-2]},
        passes=rows["passes"].map("{:,.0f}".format),
        time=rows["time"].map("{:,.1f}".format),
    )
    lines = ["| " + " | ".join(shown.columns) + " |", "|" + "---|" * len(shown.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in shown.itertuples(index=False)]
    return f"{_HEAD.format(samples=samples, sets=sets)}\n" + "\n".join(lines) + "\n"


def _attributed(given: Subject, **asked: Any) -> Causes:
    return attribute(given.model, given.tokenizer, given.samples, metric=given.metric, **asked)


def _forward_and_backward(given: Subject) -> None:
    from attribution.metrics import metric_named
    from attribution.samples import batches, encode

    encoded = encode(given.tokenizer, given.samples)
    gradients_of(Components(given.model), batches(encoded, 64), metric_named(given.metric))


_HEAD = """# How accurate each score is

Written by `python -m experiments.accuracy`, whose first lines say what the columns are: {samples} samples, {sets} random sets
of each kind and share, ablation by zero. Time is in units of one forward and backward pass; passes and time are of all
kinds together.
"""


if __name__ == "__main__":
    tyro.cli(main)
