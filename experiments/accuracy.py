"""How accurate each score of a cause is: `python -m experiments.accuracy [--model planted FOLDER --data TEXT]`.

Scores of components are compared with exact ablation of each component alone, and their sums with exact ablation of random
sets, on the same samples. Figures are Spearman's rank correlations but for `top`; in brackets, 95 % intervals by the bootstrap
over samples, and over random sets where there are any, of the figure that as many other samples would give.

    exact        of score and ablation effect, over the components of a kind
    size         the same of both without sign, which is all that a rival without sign can be asked for
    top          share of the 5 % of components (three at least) with the largest ablation effects, by size, that are among as
                 many with the largest scores
    linear       linear ablation score: over random sets of components of a kind, of the sum of scores and the effect of
                 ablating the set jointly; a set holds so large a share of each layer's components (one at least)
    halves       the figure before it, with the score from one half of the samples and the ablation from the other half, mean
                 over random splits. Of the row `ablation` this is the noise ceiling: how far half of the samples fix the
                 ranking at all. It is not corrected to all samples (Spearman-Brown): with effects of heavy tails that is off by
                 0.06 in simulations of rank correlations. It is below zero where samples are balanced, as are the replies of
                 `planted`: the reply that is right more often in one half is so less often in the other.
    passes       forward passes over the samples for all components of all kinds, a backward pass counting as two
    time         seconds of that, in units of one forward and backward pass over the same samples in the same turn (the first
                 8 samples; median over turns)

A score and the ablation that it is compared with see the same samples, so that `exact` may well exceed the ceiling; what it
tells beyond these samples is in `halves`. The last three rows are rivals that nobody would call an attribution: the size of
the activation (root of summed squares over tokens), the norm of the output weights, and random numbers, of one draw: over 16
heads every twentieth draw correlates beyond 0.5, which no interval over samples knows.

Ablation replaces by zero, rows by the mean over the vocabulary; gradient and integrated have the same references, conductance
has a path of its own, from the mean embedding. Effects are of single components and of integrals as their methods define them:
`integrated` shares out what all components do together and `conductance` what passes through, so that to disagree with single
ablations is no error of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import tyro
from scipy.stats import rankdata
from tqdm import tqdm

from attribution.capture import evaluating, scored_logits, sites, tapped
from attribution.causes import BATCH_SIZE, attribute, batches_with_values
from attribution.causes.ablation import ablate_sets
from attribution.causes.direct import direct_sets
from attribution.causes.gradient import by_unit, per_sample
from attribution.components import KINDS, Components
from attribution.errors import AttributionError, ConfigError, DataError
from attribution.metrics import metric_named
from attribution.models import load
from attribution.samples import Batch, Encoded, Sample, batches, encode, read_samples, samples_from_text
from attribution.updates.provenance import versions
from attribution.worlds import planted
from experiments.timing import interleaved

TOGETHER = "head and neuron"
GROUPS = {**{kind: (kind,) for kind in KINDS}, TOGETHER: ("head", "neuron")}
SHARES = (0.1, 0.5)  # of a layer's components in a random set
TOP, AT_LEAST = 0.05, 3  # largest components: a share of them, and at least so many
SPLITS, DRAWS = 20, 500  # of the samples into halves, and of the bootstrap
CERTAIN = 0.999  # correlation beyond which intervals make no difference
TIMED, TURNS = 8, 3  # samples of what is timed, and how often
WORDS = {"prompt_words": 8, "response_words": 2}  # of samples cut from a text
ABOUT = {
    "planted": "embedded; prompts in which two cues stand and conflict",
    "stories260K": "a Llama of 0.26 M parameters trained on TinyStories by Andrej Karpathy (llama2.c, tinyllamas; MIT licence)",
    "campfire-heldout.md": "campfire stories of github.com/erikhyrkas/snakes (MIT licence)",
}


class Subject(NamedTuple):
    """A model, and samples that it can be read on.

    Attributes:
        name, data: of the model and of where its samples come from, as the table tells them.
        metric: what is read.
    """

    name: str
    data: str
    model: Any
    tokenizer: Any
    samples: Sequence[Sample]
    metric: str

    @property
    def encoded(self) -> list[Encoded]:
        return encode(self.tokenizer, self.samples)


def main(
    model: tuple[str, ...] = ("planted",),
    data: str | None = None,
    out: Path = Path("results/accuracy.md"),
    samples: int = 64,
    sets: int = 200,
) -> None:
    """Measure every method on every model, and write the table: about ten minutes on an idle core for two small models.

    Rows of other models that stand beside `out` already stay. Each model is written when it is done, so that after a kill only
    those that are missing need be named again.

    Args:
        model: embedded models, folders or hub ids.
        data: of models that are not embedded: JSONL of samples, or a text file to cut samples from.
        out: Markdown file to write, with the same as a table in parquet beside it.
        samples: read so many.
        sets: random sets of each kind and share, at least 200 for a table to be shown.
    """
    torch.set_num_threads(1)
    try:
        subjects = [subject(name, data, samples) for name in model]
    except AttributionError as error:
        raise SystemExit(str(error)) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    table = out.with_suffix(".parquet")
    for given in subjects:
        rows = accuracy(given, measured(given, sets))
        if table.exists():
            others = pd.read_parquet(table).query("model != @given.name")
            rows = pd.concat([others, rows], ignore_index=True).sort_values("model", kind="stable", ignore_index=True)
        rows.to_parquet(table, index=False)
        out.write_text(page(rows), encoding="utf-8")
    print(short(pd.read_parquet(table)), out, sep="\n")


def subject(name: str, data: str | None, count: int) -> Subject:
    """A model with samples: of the world `planted` in conflict, or of the user's file.

    Raises:
        ConfigError: no samples are named for a model that needs them.
        DataError: they cannot be read.
        ModelError: as `load`.
    """
    if name.split("/")[0] == "planted":
        found = [Sample(**row) for row in planted.prompts(count, 5, star="conflict")]
        return Subject(name, "", *load(name), found, "logit_difference")
    if data is None:
        raise ConfigError(f"samples for {name!r} are not known; name a JSONL or text file with --data")
    return Subject(Path(name).name, Path(data).name, *load(name), _samples(data, count), "log_odds_per_token")


def _samples(data: str, count: int) -> list[Sample]:
    if data.endswith(".jsonl"):
        return read_samples(data)[:count]
    try:
        text = Path(data).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"cannot read text from {data}: {reason}; name a text file, or JSONL of samples") from None
    return samples_from_text(text, **WORDS, limit=count)


# Scores: of every component on every sample, Float [component, sample], and the passes that they took.

Scores = tuple[np.ndarray, float]


def attributed(**asked: Any) -> Callable[[Subject], Scores]:
    """The scores of a method of `attribute`."""

    def scores(given: Subject) -> Scores:
        found = attribute(given.model, given.tokenizer, given.samples, metric=given.metric, **asked)
        return found.per_sample.double().numpy(), found.passes

    return scores


@torch.no_grad()
def activation_sizes(given: Subject) -> Scores:
    """Root of the sum over tokens of the squared activation; of a row, of its logit less the mean over the vocabulary."""
    index, found = Components(given.model), []
    with evaluating(index.parts.model):
        for batch in batches(given.encoded, BATCH_SIZE):
            with tapped(index.parts, sites(index.parts)) as seen:
                logits = scored_logits(index.parts, batch)
            tokens = {site: value * batch.mask[..., None] for site, value in seen.items()}
            units = by_unit(index.parts, {site: (value, value) for site, value in tokens.items()})
            rows = per_sample((logits - logits.mean(-1, keepdim=True)).square(), batch)
            found.append(torch.cat([units, rows]).sqrt())
    return torch.cat(found, dim=1).double().numpy(), 1.0


def weight_norms(given: Subject) -> Scores:
    """Norm of the output weights, the same on every sample."""
    index = Components(given.model)
    squares = index.reduce(lambda use: use.values, torch.square, output_only=True)[torch.as_tensor(index.output_groups)]
    return np.tile(squares.sqrt().numpy()[:, None], len(given.samples)), 0.0


def random_numbers(given: Subject) -> Scores:
    """The same on every sample."""
    drawn = np.random.default_rng(1).normal(size=(len(Components(given.model)), 1))
    return np.tile(drawn, len(given.samples)), 0.0


ABLATION = "ablation"
METHODS: dict[str, Callable[[Subject], Scores]] = {
    ABLATION: attributed(),
    "ablation, direct": attributed(path="direct"),
    "gradient": attributed(method="gradient"),
    "integrated": attributed(method="integrated"),
    "conductance": attributed(method="conductance"),
    "activation size": activation_sizes,
    "weight norm": weight_norms,
    "random": random_numbers,
}


# What they are compared with


class Measured(NamedTuple):
    """What is read on a model.

    Attributes:
        kinds: of every component.
        scores: by method.
        joint: by group and share, which components of the group each random set holds, Bool [set, component], and the effects
            of ablating the sets, Float [set, sample].
        times: by method, see `relative_times`.
    """

    kinds: pd.Series
    scores: dict[str, Scores]
    joint: dict[tuple[str, float], tuple[np.ndarray, np.ndarray]]
    times: dict[str, float]


def measured(given: Subject, sets: int) -> Measured:
    """Score all components by every method, ablate random sets, and take the time."""
    scores, joint = {}, {}
    with tqdm(total=len(METHODS) + len(GROUPS) * len(SHARES) + 1, desc=given.name, unit="step") as bar:
        for name, method in METHODS.items():
            scores[name] = method(given)
            bar.update()
        for group, share in ((group, share) for group in GROUPS for share in SHARES):
            joint[group, share] = joint_effects(given, GROUPS[group], share, sets)
            bar.update()
        times = relative_times(given)
        bar.update()
    return Measured(Components(given.model).table["kind"], scores, joint, times)


def accuracy(given: Subject, found: Measured) -> pd.DataFrame:
    """One row per method and kind: the columns that the first lines of this file tell, and what was read and with what."""
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    rows = []
    for (name, (score, passes)), group in ((each, group) for each in found.scores.items() for group in GROUPS):
        chosen = found.kinds.isin(GROUPS[group]).to_numpy()
        score, exact = score[chosen], found.scores[ABLATION][0][chosen]
        row = {"model": given.name, "data": given.data, "method": name, "kind": group, **agreement("exact", score, exact)}
        row |= {"size": float(spearman(*(abs(each.mean(1)) for each in (score, exact)))), "top": recall(score, exact)}
        for share in SHARES:
            members, effects = found.joint[group, share]
            row |= agreement(f"linear {share:g}", members @ score, effects, redrawn=True)
        row |= {"passes": passes, "time": found.times[name], "metric": given.metric, "samples": len(given.samples)}
        rows.append(row | {"sets": len(members), "versions": libraries})
    return pd.DataFrame(rows)


def joint_effects(given: Subject, kinds: Sequence[str], share: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ablate random sets jointly, each of so large a share of the components of every layer and kind.

    Returns:
        Which components of these kinds a set holds, Bool [set, component]; the effects, Float [set, sample].
    """
    index = Components(given.model)
    places = np.flatnonzero(index.table["kind"].isin(kinds))
    draw, members = np.random.default_rng(0), np.zeros((count, len(places)), dtype=bool)
    for own in index.table.iloc[places].reset_index(drop=True).groupby(["kind", "layer"]).indices.values():
        for row in members:
            row[draw.choice(own, max(1, round(share * len(own))), replace=False)] = True
    sets = {str(number): places[row] for number, row in enumerate(members)}
    ablated = direct_sets if tuple(kinds) == ("row",) else ablate_sets  # all that a row does is direct, and needs no pass
    read, batched = metric_named(given.metric), batches_with_values(index.parts, given.encoded, "zero", None)
    with evaluating(index.parts.model):
        found = [ablated(index, sets, batch, values, read).effect for batch, values in batched]
    return members, torch.cat(found, dim=1).double().numpy()


def relative_times(given: Subject) -> dict[str, float]:
    """Seconds of each method in units of one forward and backward pass in the same turn, median over turns."""
    few = given._replace(samples=given.samples[:TIMED])
    index, read, encoded = Components(given.model), metric_named(given.metric), batches(few.encoded, BATCH_SIZE)

    def total(batch: Batch) -> torch.Tensor:
        return read(scored_logits(index.parts, batch), batch).sum()

    def unit() -> None:
        for batch in encoded:
            torch.autograd.grad(total(batch), list(index.stored.values()))

    turns = {"": unit, **{name: lambda method=method: method(few) for name, method in METHODS.items()}}
    with evaluating(index.parts.model):
        seconds = interleaved(turns, TURNS)
    return {name: float(np.median(np.divide(seconds[name], seconds[""]))) for name in METHODS}


# Statistics


def agreement(name: str, predicted: np.ndarray, measured: np.ndarray, redrawn: bool = False) -> dict[str, float]:
    """Spearman's correlation of the means over samples, with its interval, and across halves of the samples.

    Args:
        name: of the column; the others are name low, name high and name halves.
        predicted, measured: Float [unit, sample].
        redrawn: whether the units are a random draw too, so that the bootstrap redraws them.
    """
    draw, count = np.random.default_rng(0), predicted.shape[1]
    weights = draw.multinomial(count, np.full(count, 1 / count), size=DRAWS).T / count  # [sample, draw]
    again = predicted @ weights, measured @ weights
    if redrawn:
        units = draw.integers(len(predicted), size=again[0].shape)
        again = tuple(np.take_along_axis(each, units, axis=0) for each in again)
    value = float(spearman(predicted.mean(1), measured.mean(1)))
    low, high = interval(value, spearman(*again))
    first = np.argsort(draw.random((count, SPLITS)), axis=0) < count // 2  # [sample, split]
    one, other = (half / half.sum(0) for half in (first, ~first))
    halves = np.concatenate([spearman(predicted @ one, measured @ other), spearman(predicted @ other, measured @ one)])
    return {name: value, f"{name} low": low, f"{name} high": high, f"{name} halves": float(halves.mean())}


def interval(value: float, drawn: np.ndarray) -> tuple[float, float]:
    """95 % interval of a rank correlation, from the spread of Fisher's z over bootstrap draws; beyond 0.999 all is alike.

    Draws hold the noise of the samples twice over and lie lower than the value: their spread is of use, their place is not.
    """
    middle, z = (np.arctanh(np.clip(each, -CERTAIN, CERTAIN)) for each in (value, drawn))
    low, high = np.tanh([middle - 1.96 * z.std(), middle + 1.96 * z.std()])
    return float(min(low, value)), float(max(high, value))


def spearman(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Rank correlation down the first axis; NaN where either does not vary."""
    ranks = [rankdata(each, axis=0) - (len(each) + 1) / 2 for each in (one, other)]
    with np.errstate(invalid="ignore"):
        return (ranks[0] * ranks[1]).sum(0) / np.sqrt((ranks[0] ** 2).sum(0) * (ranks[1] ** 2).sum(0))


def recall(score: np.ndarray, exact: np.ndarray) -> float:
    """Share of the components with the largest exact effects that are among as many with the largest scores, by size."""
    count = max(AT_LEAST, math.ceil(TOP * len(score)))
    first, wanted = (np.argsort(-abs(each.mean(1)), kind="stable")[:count] for each in (score, exact))
    return float(np.isin(wanted, first).mean())


# The page


def page(rows: pd.DataFrame) -> str:
    """Every figure as Markdown, model by model."""
    parts = [f"# {__doc__}"]
    for name, own in rows.groupby("model"):
        first = own.iloc[0]
        samples = f"{first['samples']} samples" + (f" of {_named(first['data'])}" if first["data"] else "")
        parts.append(f"## {name}\n")
        parts.append(f"{_named(str(name))}. {samples}, {first['metric']}, {first['sets']} random sets of each kind and share.")
        parts.append(f"Measured with one thread on a CPU; {first['versions']}.\n\n{_table(_cells(own))}")
    return "\n".join(parts)


def short(rows: pd.DataFrame) -> str:
    """The table of the README: methods and the best of their rivals; `exact / linear 0.1 / linear 0.5`, by kind."""
    lines = []
    for name, own in rows.groupby("model"):
        for method in [each for each in METHODS if each not in ("weight norm", "random")]:
            found = own[own["method"] == method].set_index("kind")
            line = {"model": name, "method": method} | {kind: _figures(found.loc[kind], "") for kind in GROUPS}
            lines.append(line | {"passes": _whole(found["passes"].iloc[0]), "time": _whole(found["time"].iloc[0])})
        found = own[own["method"] == ABLATION].set_index("kind")
        line = {"model": name, "method": "noise ceiling"} | {kind: _figures(found.loc[kind], " halves") for kind in GROUPS}
        lines.append(line | {"passes": "", "time": ""})
    return _table(pd.DataFrame(lines))


def _figures(row: pd.Series, which: str) -> str:
    return " / ".join(f"{row[name + which]:.2f}" for name in ("exact", *(f"linear {share:g}" for share in SHARES)))


def _cells(rows: pd.DataFrame) -> pd.DataFrame:
    shown = rows[["method", "kind"]].copy()
    for name in ("exact", "size", "top", *(f"linear {share:g}" for share in SHARES)):
        shown[name] = rows[name].map("{:.2f}".format)
        if f"{name} low" in rows:
            ends = zip(shown[name], rows[f"{name} low"], rows[f"{name} high"], strict=True)
            shown[name] = [f"{value} [{low:.2f}, {high:.2f}]" for value, low, high in ends]
            shown[f"{name}, halves"] = rows[f"{name} halves"].map("{:.2f}".format)
    return shown.assign(passes=rows["passes"].map(_whole), time=rows["time"].map("{:,.1f}".format))


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _table(cells: pd.DataFrame) -> str:
    lines = [list(cells.columns), ["---"] * len(cells.columns), *cells.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _named(name: str) -> str:
    return f"`{name}`: {ABOUT[name]}" if name in ABOUT else f"`{name}`"


if __name__ == "__main__":
    tyro.cli(main)
