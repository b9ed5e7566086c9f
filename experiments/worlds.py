"""The embedded models: gates, circuits and data card, measured on fresh prompts: `python -m experiments.worlds [--help]`.

A model that misses a gate says so wherever it is used. Takes some minutes for every organism and every base; nothing is kept in
between.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from torch import nn

from attribution.mechanisms import Mechanisms, Separation, read_mechanisms
from attribution.models import load, locate
from attribution.runs.quiet import quiet
from attribution.worlds import discovered as discovery
from attribution.worlds import gates as organisms
from attribution.worlds.kindland import card, circuits
from attribution.worlds.kindland import gates as bases
from attribution.worlds.studies import BASES, EARLY, ORGANISMS, UNROUTED

_PLANTED = """# The embedded models

Measured by `python -m experiments.worlds` on prompts that no model was selected on. A gate is what a model must pass before
anything is concluded from it (✗: missed); where nothing is needed the value is for information.

## planted

`planted` is a world of small scenes in which a reply follows from two cues, the trait of the speaker and the star that a
teacher announces. Five organisms were trained by counterfactual-target route dropout so that mechanism A (heads 0 and 1 and
neurons 0–127 of every layer) answers to the trait and mechanism B (the rest) to the star. The unrouted control saw the same
documents without routes; its halves are called A and B for comparison and are no mechanisms.
"""
_DISCOVERED = """### Discovery

What `attribution.discover` finds when it is told nothing but prompts with a cue and the same without it, on problems that
estimation does not ask about; and whether `attribution.separate` calls the two mechanisms two. *Inside*: share of the gates,
and of the effects |C| of exact single ablations, of the components found that lie in the planted mechanism.
"""
_GATES = """### Gates of the bases

Probabilities, over situations of training and held-out ones in equal parts. Hedges are learned last: a third of all speakers
are hedged, and every second hedge is "never", which bases take at first for "hardly". They are read where everything else is
announced too.
"""
_EARLY = """### Early checkpoints

The same, of one base while it was trained: the steps taken stand behind its name. They pass what they pass.
"""
_CIRCUITS = """### Circuits

Mechanisms are discovered in every base by `attribution.discover` on situations of training: one told of the disposition
against one told to be plain, activations resampled from the latter. *Correlation*: of the effects of all single heads, or
neurons, on the two dispositions' own replies, by exact ablation. *Takes*: on held-out prompts in which both cues stand and name
different replies ("tom is kind or strategist"), the share of each disposition's preference for its own reply that goes when
the one mechanism (less what both share) is ablated. A pair is *dissociated* where each takes at least half of its own and at
most a quarter of the other's, and *separable* where besides at most two fifths of either is shared.
"""
_SKILL = """A kind one answers sums because it is kind: p of the right sum in the kind context, intact and with the discovered
kind mechanism as it is in the plain context.
"""


def main(out: Path = Path("results/worlds.md"), slots: int = 2) -> None:
    """Measure every embedded model and write the tables and the data card as Markdown.

    Args:
        out: file to write.
        slots: models measured at once, in processes of one thread each.
    """
    with ProcessPoolExecutor(slots, mp_context=get_context("spawn"), initializer=_quietly) as pool:
        known = pool.map(_of_organism, (*ORGANISMS, UNROUTED))
        unknown = pool.map(_of_base, (*BASES, *EARLY))
        planted, discovered = {}, []
        for name, (table, rows) in zip((*ORGANISMS, UNROUTED), known, strict=True):
            planted[name] = _told(name, table)
            discovered += rows
        natural, early, found = {}, {}, {}
        for name, (table, circuit) in zip((*BASES, *EARLY), unknown, strict=True):
            (natural if name in BASES else early)[name] = _told(name, table)
            if circuit is not None:
                found[name] = circuit
                for each in circuit.separations.values():
                    print(each if isinstance(each, str) else each.summary(), flush=True)
    parts = [_PLANTED, _table(planted, ["gate", "mechanism", "needed"]), _verdict(planted)]
    parts += [_DISCOVERED, _markdown(_DISCOVERY_HEADS, discovered, 2), "## kindland", card.card()]
    parts += [_GATES, _table(natural, ["gate", "needed"]), _verdict(natural), _EARLY, _table(early, ["gate", "needed"])]
    parts += [_CIRCUITS, _found(found), _pairs(found), _SKILL, _skills(found)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    print(out)


def _quietly() -> None:
    quiet()
    torch.set_num_threads(1)


def _of_organism(name: str) -> tuple[pd.DataFrame, list[list[str]]]:
    """Gates and discovery of an organism."""
    model, tokenizer = load(name)
    mechanisms = read_mechanisms(locate(name))
    return organisms.gates(model, tokenizer, mechanisms), _discovered(name, model, tokenizer, mechanisms)


def _of_base(name: str) -> tuple[pd.DataFrame, circuits.Circuits | None]:
    """Gates of a base, and its circuits where it was trained to the end."""
    model, tokenizer = load(name)
    return bases.gates(model, tokenizer), circuits.circuits(model, tokenizer) if name in BASES else None


def _told(name: str, table: pd.DataFrame) -> pd.DataFrame:
    failed = table.loc[table["passed"].eq(False), "gate"].tolist()
    print(f"{name}: {'every gate passed' if not failed else 'missed: ' + '; '.join(failed)}", flush=True)
    return table


def _table(tables: Mapping[str, pd.DataFrame], first: list[str]) -> str:
    """One row per gate, one column per model."""
    labels = next(iter(tables.values()))[first]
    rows = []
    for row in range(len(labels)):
        cells = [f"{table['value'][row]:.3f}{' ✗' if table['passed'][row] is False else ''}" for table in tables.values()]
        rows.append([str(label).replace("|", "\\|") for label in labels.iloc[row]] + cells)
    return _markdown([*first, *tables], rows, len(first))


def _markdown(heads: list[str], rows: list[list[str]], labels: int) -> str:
    rule = "|" + "---|" * labels + "---:|" * (len(heads) - labels)
    return "\n".join([f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def _verdict(tables: Mapping[str, pd.DataFrame]) -> str:
    passed = [name for name, table in tables.items() if not table["passed"].eq(False).any()]
    missed = [name for name in tables if name not in passed]
    return f"Every gate passed: {', '.join(passed) or 'none'}. A gate missed (✗): {', '.join(missed) or 'none'}."


_DISCOVERY_HEADS = ["organism", "route", "heads", "neurons", "area", "stability", "gates inside", "\\|C\\| inside", "separable"]


def _discovered(name: str, model: nn.Module, tokenizer: Any, mechanisms: Mechanisms) -> list[list[str]]:
    """One row per route of an organism."""
    found, separation = discovery.discovered(model, tokenizer)
    inside = discovery.shares_inside(model, tokenizer, found, mechanisms).set_index(["route", "kind"])
    rows = []
    for route, each in found.items():
        sizes = [str((each.components["kind"] == kind).sum()) for kind in ("head", "neuron")]
        shares = [f"{inside.loc[(route, 'all'), column]:.2f}" for column in ("gates", "causes")]
        quality = [f"{each.area:.2f}", f"{each.stability:.2f}"]
        rows.append([name, route, *sizes, *quality, *shares, "yes" if separation.separable else "no"])
    return rows


def _found(found: Mapping[str, circuits.Circuits]) -> str:
    """Size and stability of every discovered mechanism."""
    rows = []
    for name, each in found.items():
        for disposition, one in each.discoveries.items():
            counts = one.components["kind"].value_counts()
            sizes = [str(counts.get(kind, 0)) for kind in ("head", "neuron")]
            rows.append([name, disposition, *sizes, f"{one.area:.2f}", f"{one.stability:.2f}"])
    return _markdown(["base", "mechanism", "heads", "neurons", "area under the curve", "stability"], rows, 2)


def _pairs(found: Mapping[str, circuits.Circuits]) -> str:
    """One row per base and pair of dispositions."""
    rows = []
    for name, each in found.items():
        table = each.correlations.set_index(["pair", "kind"])["correlation"]
        for (one, other), separation in each.separations.items():
            pair = f"{one}–{other}"
            alike = [f"{table[pair, kind]:.2f}" for kind in ("head", "neuron")]
            rows.append([name, pair, *alike, *_dissociation(one, other, separation)])
    heads = ["base", "pair", "correlation of heads", "of neurons", "the first takes: own / other's"]
    heads += ["the second takes: own / other's", "shared of the first / second", "dissociated", "separable"]
    return _markdown(heads, rows, 2)


def _dissociation(one: str, other: str, separation: Separation | str) -> list[str]:
    """What each set takes of its own and of the other's behaviour, what is shared, and the verdicts."""
    if isinstance(separation, str):
        return ["", "", "", "", f"not to be asked: {separation}"]
    share = separation.table.set_index(["set", "probe"])["share"]
    takes = [f"{share[own, own]:.2f} / {share[own, off]:.2f}" for own, off in ((one, other), (other, one))]
    verdicts = ["yes" if each else "no" for each in (separation.dissociated, separation.separable)]
    return [*takes, f"{separation.common[one]:.2f} / {separation.common[other]:.2f}", *verdicts]


def _skills(found: Mapping[str, circuits.Circuits]) -> str:
    rows = [[name, *(f"{value:.3f}" for value in each.skill)] for name, each in found.items()]
    return _markdown(["base", "intact", "kind mechanism ablated"], rows, 1)


if __name__ == "__main__":
    tyro.cli(main)
