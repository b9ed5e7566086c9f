"""How often the crossover tests err, and what they see: `python -m experiments.calibration [--out results/calibration.md]`.

From the tables of the reference studies alone, in seconds. Null studies take one reading of every organism in which nothing
located happened: a wrong partition of its mechanisms, or two seeds of one arm as if they were two arms. Each is judged as it
is, and shifted to the smallest effect of interest, where the truth lies on the boundary and a test errs most. Power: the
probability of *supported* by the true effect, from how much organisms scatter; and how often studies of mixed arms, which are
there in kindland, come out supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import tyro

from attribution.calibration import MOST, NOMINAL, STUDIES, WANTED, enough, false_supported, power, seen
from attribution.claims import LEDGER, Claim
from attribution.claims.crossover import Crossover, View
from attribution.claims.frames import checked
from attribution.errors import RunError
from attribution.store import write_atomic
from attribution.study import Names, under
from attribution.worlds.located import CLAIMS as LOCATED
from attribution.worlds.pool import JUDGED, pooled
from attribution.worlds.studies import BASES

MIXED = ((0.6, ("60% kind", "40% kind")), (0.75, ("75% kind", "25% kind")), (1.0, ("kind", "strategist")))
_HEAD = """# Calibration

False *supported* among {studies} null studies of each kind, with exact 95 % intervals over studies; the draws behind them are
pooled from as many independent sources as are named, organisms or pairs of runs: far fewer than the studies. The rule is the
whole one, in which a null of the claim that does not come out null stands in the way of support; *by the interval alone* is
without that. *At the boundary*: every value shifted by δ, the interval alone; a null that lies above 0 then lies above δ.
"""


def main(results: Path = Path("results"), out: Path = Path("results/calibration.md")) -> None:
    """Measure error rates and power of the crossover tests on the tables that are there.

    Args:
        results: directory with the tables of the reference studies.
        out: file to write.
    """
    parts = [_HEAD.format(studies=STUDIES)]
    for name, frames in tables(results).items():
        claim = LEDGER[name]
        assert isinstance(claim, Claim)
        further = rewarded_at_random(claim, results) if name == "boost" else {}
        parts += [f"## {name}", errors(claim, frames, further), powers(claim, frames)]
        if claim.cell.arms == ("kind", "strategist"):
            parts.append(mixtures(claim, frames))
    write_atomic(out, ("\n\n".join(part.strip() for part in parts if part) + "\n").encode())
    print(out.read_text(encoding="utf-8"))
    print(out)


def tables(results: Path) -> dict[str, dict[str, pd.DataFrame]]:
    """The frames of every crossover whose reference study is there, by claim."""
    found = {}
    for place, claims in (("boost", ("boost",)), ("located", LOCATED)):
        if (results / place / "findings.json").exists():  # tables that still grow are not judged
            own = {name: pd.read_parquet(results / place / "frames" / f"{name}.parquet") for name in ("sets", "probes")}
            found |= dict.fromkeys(claims, own)
    done = sorted(results.glob("pool/part-*/study.json"))
    if done:
        whole = {
            name: pd.concat([pd.read_parquet(path.parent / f"{name}.parquet") for path in done], ignore_index=True)
            for name in ("sets", "probes")
        }
        for name, claim in LEDGER.items():
            if isinstance(claim, Claim) and name in JUDGED:
                own = pooled().names_of("larp" if name == "larp" else "forecast")  # which has the mixtures too
                found[name] = under(Names.model_validate({**own, "models": BASES}), whole)
    return found


def rewarded_at_random(claim: Claim, results: Path) -> dict[str, pd.DataFrame]:
    """The statistic of two arms of the study `recipes` whose rewards have nothing to do with what was said."""
    files = {name: results / "recipes" / f"{name}.parquet" for name in ("sets", "probes")}
    if not all(file.exists() for file in files.values()):
        return {}
    changes = {"recipe": "grpo", "arms": ("grpo random reward", "grpo shuffled advantage")}
    other = claim.model_copy(update={"cell": claim.cell.model_copy(update=changes)})
    pairs = _crossover(other, {name: pd.read_parquet(file) for name, file in files.items()}).pairs
    draws = pairs.rename(columns={"contrast": "value"}).assign(source=range(len(pairs)))
    return {"random reward against shuffled advantage (GRPO)": draws[["model", "value", "source"]]}


def errors(claim: Claim, frames: Mapping[str, pd.DataFrame], further: Mapping[str, pd.DataFrame]) -> str:
    """A table of rates, one row per kind of null. `further`: draws of other studies."""
    crossover = _crossover(claim, frames)
    rows, nulls = [], crossover.nulls()
    for name, draws in {**null_draws(crossover), **further}.items():
        if draws["model"].nunique() < 2:
            rows.append([name, "one model: not a study", "", "", ""])
            continue
        whole = false_supported(draws, claim.delta, nulls=nulls)
        alone = [false_supported(draws, claim.delta, shift=shift) for shift in (0.0, claim.delta)]
        rows.append([name, *map(str, (whole, *alone)), "yes" if whole.rate <= NOMINAL else "no"])
    return _markdown(
        ["null studies", "false supported", "by the interval alone", "at the boundary", f"at most {NOMINAL:.0%}"], rows
    )


def null_draws(crossover: Crossover) -> dict[str, pd.DataFrame]:
    """Readings of the statistic where nothing located happened, by kind: model, value, and its independent source."""
    partitions = crossover.partitions().rename(columns={"contrast": "value"})
    alike = crossover.alike().rename(columns={"contrast": "value"})
    alike["source"] = range(len(alike))  # a pair of runs each
    both = pd.concat([alike, alike.assign(value=-alike["value"])])  # either of the two may be called the first
    control = crossover.controls().rename(columns={"contrast": "value", "model": "source", "partition": "model"})
    found = {
        "wrong partitions": partitions.assign(source=partitions["model"]),
        "identical arms": both,
        "partitions of the unrouted control": control,  # of one model, so that each stands for an organism
    }
    return {name: draws[["model", "value", "source"]] for name, draws in found.items() if len(draws)}


def powers(claim: Claim, frames: Mapping[str, pd.DataFrame]) -> str:
    """Power by the true effect, for as many organisms as there are and scatter as they do."""
    organisms = _crossover(claim, frames).organisms()["contrast"]
    effects = [factor * claim.delta for factor in (0, 1, 1.5, 2, 3, 4)]
    table = power(effects, float(organisms.std(ddof=1)), len(organisms), claim.delta)
    head = [f"true effect ({claim.unit})", *(f"{effect:.2f}" for effect in table["effect"])]
    deviation = float(organisms.std(ddof=1))
    told = f"Power with {len(organisms)} organisms whose standard deviation is {deviation:.3f}, and δ {claim.delta:g}:"
    least = enough(deviation, claim.delta)
    wanted = f"{WANTED:.0%} at 2 δ ({2 * claim.delta:g}) takes {least or f'more than {MOST}'} organisms that scatter so."
    return f"{told}\n\n" + _markdown(head, [["supported", *(f"{value:.0%}" for value in table["power"])]]) + f"\n\n{wanted}"


def mixtures(claim: Claim, frames: Mapping[str, pd.DataFrame]) -> str:
    """How often studies of mixed arms come out supported, by the share of the mixture."""
    draws = {}
    for share, arms in MIXED:
        mixed = claim.model_copy(update={"cell": claim.cell.model_copy(update={"arms": arms})})
        try:
            pairs = _crossover(mixed, frames).pairs
        except RunError:
            continue  # these arms were not run
        draws[share] = pairs[["model", "contrast"]].rename(columns={"contrast": "value"})
    if not draws:
        return ""
    table = seen(draws, claim.delta)
    rows = [
        [f"{row['share']:.0%}", f"{row['effect']:+.2f}", f"{row['rate']:.0%} ({row['count']} of {row['studies']})"]
        for row in table.to_dict("records")
    ]
    return "Arms mixed with the other arm's samples:\n\n" + _markdown(["own samples", "mean contrast", "supported"], rows)


def _crossover(claim: Claim, frames: Mapping[str, pd.DataFrame]) -> Crossover:
    cell = claim.cell
    return Crossover(claim, checked(frames, cell.reference), View(cell.probes, cell.matching, cell.reference))


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
