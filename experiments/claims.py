"""Test claims of the ledger on bases of kindland, or on a model of yours: `python -m experiments.claims CLAIM … [--help]`.

Without a name, all claims that the pool of runs serves. An arm that several claims name is trained once on every base and
seed, whichever script asked for it first; finished runs are kept, so that a study that was stopped goes on. Ends with a table
of verdicts and the path of a page. A claim that cannot be tested on a model says so, with the figure that shows it.

Every claim has a script of its own beside this one, which says what is asked and how: `python -m experiments.larp`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

from attribution.claims import LEDGER
from attribution.errors import AttributionError
from attribution.mechanisms import FILE, write_mechanisms
from attribution.models import load, locate
from attribution.reports import study_report
from attribution.runs.quiet import quiet
from attribution.store import read_json, write_json
from attribution.study import Study, conclude, run_study, write_study
from attribution.worlds.kindland import circuits, gates
from attribution.worlds.pool import JUDGED, slug, write_kindland
from attribution.worlds.studies import BASES


@dataclass(frozen=True)
class Asked:
    """What every script of a claim can be asked.

    Attributes:
        model: bases, or folders of models of your own.
        quick: one seed, and only the first model: shows the figures, and is too little for a verdict.
        runs: directory that holds studies, and the page where no other place is named.
    """

    model: tuple[str, ...] = BASES
    quick: bool = False
    runs: Path = Path("runs")

    @property
    def models(self) -> tuple[str, ...]:
        return self.model[:1] if self.quick else self.model


@dataclass(frozen=True)
class Trained(Asked):
    """What a script that trains can be asked.

    Attributes:
        seeds: training seeds of every arm, averaged within a base.
        slots: runs at once.
    """

    seeds: int = 2
    slots: int = 2

    @property
    def count(self) -> int:
        """Of seeds."""
        return 1 if self.quick else self.seeds


def main(asked: Trained, claims: tyro.conf.Positional[tuple[str, ...]] = ()) -> None:
    """Run what the claims need, judge them, and print their verdicts.

    Args:
        asked: on what, and how often.
        claims: ids; all of the pool if none is named.
    """
    quiet()
    place = tested(claims or JUDGED, asked.models, asked.count, asked.runs, asked.slots)
    print(table(place))
    print(study_report(place))


def tested(claims: Sequence[str], models: Sequence[str], seeds: int, runs: Path, slots: int) -> Path:
    """The directory of a study in which these claims were judged."""
    place = runs / "claims" / (claims[0] if len(claims) == 1 else "several")
    fit, unfit = parted(models)
    if not fit:
        return write_untestable(place, "kindland", claims, unfit)
    study = study_of(claims, fit, runs).only(seeds=seeds)
    failed = run_study(study, runs, slots=slots)
    return conclude(study, runs, failed, into=place, unfit=unfit, known=known(claims, fit, runs))


def study_of(claims: Sequence[str], models: Sequence[str], runs: Path) -> Study:
    """The arms of the pool that claims name, on models whose mechanisms are discovered where they bring none."""
    mechanisms = {name: str(discovered(name, runs)) for name in models if not (Path(locate(name)) / FILE).exists()}
    return Study.model_validate(write_kindland(runs / "kindland" / "data", claims, models, mechanisms=mechanisms))


def write_untestable(place: Path, name: str, claims: Sequence[str], unfit: Mapping[str, str]) -> Path:
    """Write a page that says of claims why they cannot be tested on any of the models; returns its directory."""
    reason = "not testable here: " + " ".join(f"{model}: {why}." for model, why in unfit.items())
    return write_study(place, name, [], not_judged=dict.fromkeys(claims, reason), unfit=unfit, models=list(unfit))


def known(claims: Iterable[str], models: Iterable[str], runs: Path) -> dict[str, pd.DataFrame]:
    """What claims read and no run records: for those that ask for it, whether mechanisms are dissociated in a model.

    It is measured once for a model, which takes minutes.
    """
    if not any(gate.name == "dissociated" for claim in claims for gate in LEDGER[claim].gates):
        return {}
    rows = []
    for name in models:
        file = runs / "kindland" / "separations" / f"{slug(name)}.json"
        if not file.exists():
            print(f"measuring whether mechanisms of {name} are dissociated", flush=True)
            told = circuits.dissociated(*load(name), progress=True)
            write_json(file, {" | ".join(sorted(pair)): int(apart) for pair, apart in told.items()})
        rows += [{"model": name, "pair": pair, "dissociated": apart} for pair, apart in read_json(file).items()]
    return {"separations": pd.DataFrame(rows)}


def parted(models: Iterable[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Models from which something can be concluded, and those from which nothing can, each with the reason."""
    unfit = {name: reason for name in models if (reason := not_testable(name))}
    return tuple(name for name in models if name not in unfit), unfit


def not_testable(name: str) -> str:
    """Why nothing can be concluded from a model, with the figure that shows it; "" where something can.

    The shipped bases have passed what is asked here (`results/worlds.md`).

    Raises:
        ModelError: it cannot be opened, which is no figure of a model.
    """
    if name in BASES:
        return ""
    loaded = load(name)
    try:
        found = gates.acting_gates(*loaded)
    except AttributionError as error:
        return str(error)
    failed = found[found["passed"].eq(False)]
    return "; ".join(f"{row.gate} with probability {row.value:.3f}, needed {row.needed}" for row in failed.itertuples())


def discovered(name: str, runs: Path) -> Path:
    """The file of a model's mechanisms: what it brings, or those that are discovered once, which takes minutes."""
    own = Path(locate(name)) / FILE
    if own.exists():
        return own
    file = runs / "kindland" / "mechanisms" / f"{slug(name)}.json"
    if not file.exists():
        print(f"discovering the mechanisms of {name}", flush=True)
        write_mechanisms(file, circuits.mechanisms(*load(name), progress=True))
    return file


def table(place: Path) -> str:
    """Every claim with its verdict, estimate and reason, as text."""
    lines = []
    for finding in read_json(place / "findings.json"):
        row = finding["verdict"][0]
        lines.append(f"{finding['claim']['id']}: {row['sentence']}")
    lines += [f"{claim}: {reason}" for claim, reason in read_json(place / "study.json")["not_judged"].items()]
    return "\n\n".join(lines)


def script(told: str | None, *claims: str) -> None:
    """The command line of a script of its own: the options of `main`, for these claims. `told`: what its help begins with."""

    def run(asked: Trained) -> None:
        """Run what the claim needs, judge it, and print the verdict.

        Args:
            asked: on what, and how often.
        """
        main(asked, claims)

    told_in_a_sentence(run, told)


def told_in_a_sentence(run: Callable[..., None], told: str | None) -> None:
    """A command line whose errors that a user can mend are one sentence on stderr, with exit code 2."""
    try:
        tyro.cli(run, description=told, config=(tyro.conf.OmitArgPrefixes,))
    except AttributionError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    told_in_a_sentence(main, __doc__)
