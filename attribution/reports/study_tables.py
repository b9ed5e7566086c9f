"""What a study says, as small tables and sentences: verdicts, gates, nulls, changes per organism, runs, what is missing.

Knows the files of a study's directory (`study.json`, `findings.json`, `frames/`); knows nothing about figures, HTML or
Markdown, which all read the same tables from here. A table is its headings, rows of text, and which columns hold words.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from attribution.calibration import MOST, WANTED, enough, power
from attribution.claims.claim import WRONG_PARTITIONS
from attribution.claims.crossover import View
from attribution.claims.frames import NEUTRAL
from attribution.claims.matching import reading_name
from attribution.claims.measured import PRIMARY
from attribution.errors import RunError
from attribution.reports.quantities import QUANTITIES, shown, signed
from attribution.store import COLUMNS, TRAINING
from attribution.store.quantities import SHOWN
from attribution.store.shapes import checked, told
from attribution.store.shapes import place as directory

FRAMES = ("probes", "sets", "set_grafts")
SINGLES = ("totals", "courses", "tokens")  # of single components and of words, which the page alone draws
FOUR = {  # column of `parts`: mechanism and arm, as places in the claim's cell
    "A_in_A": (0, 0),
    "A_in_B": (0, 1),
    "B_in_A": (1, 0),
    "B_in_B": (1, 1),
}
FINISHED = "finished"
_KEY = ["model", "arm", "seed"]


class Table(NamedTuple):
    """Headings, rows of text, and the places of columns that hold words; the first one does anyway."""

    head: list[str]
    rows: list[list[str]]
    words: tuple[int, ...] = ()


@dataclass(frozen=True)
class Finding:
    """A finding read back: the claim as declared, its hash, and the tables by name, in which null has become NaN."""

    claim: dict[str, Any]
    hash: str
    rows: dict[str, list[dict[str, Any]]]

    def table(self, name: str) -> pd.DataFrame:
        return pd.DataFrame(self.rows.get(name) or []).infer_objects().fillna(float("nan"))

    @property
    def name(self) -> str:
        return str(self.claim.get("id", "claim"))

    @property
    def cell(self) -> dict[str, Any]:
        return self.claim.get("cell", {})

    @property
    def verdict(self) -> dict[str, Any]:
        return (self.rows.get("verdict") or [{}])[0]

    @property
    def crossed(self) -> bool:
        """Whether the claim is a crossover of two mechanisms; else it is a sum of readings, or one number per base."""
        return "mechanisms" in self.cell

    @property
    def statistic(self) -> str:
        """Name of the statistic, and its column in the tables."""
        return "contrast" if self.crossed else "statistic"

    @property
    def declared(self) -> dict[str, Any]:
        """What was declared of the primary statistic: its delta, unit and nulls, and of a sum its name and matching."""
        return self.claim["parts"][0] if "parts" in self.claim else self.claim

    @property
    def delta(self) -> float:
        return float(self.declared["delta"])

    @property
    def reading(self) -> str:
        """The primary reading by the name that it has in the table of nulls."""
        if "parts" not in self.claim and not self.crossed:
            return PRIMARY
        if not self.crossed:
            return reading_name(self.declared["name"], self.declared["matching"], self.cell["reference"])
        return View(*(self.cell.get(key, "") for key in ("probes", "matching", "reference"))).name

    def placed(self, column: str) -> tuple[str, str]:
        """Mechanism and arm of one of the four changes of influence."""
        mechanism, arm = FOUR[column]
        return str(self.cell["mechanisms"][mechanism]), str(self.cell["arms"][arm])


@dataclass(frozen=True)
class Record:
    """A study's directory, read back."""

    path: Path
    told: dict[str, Any]
    findings: list[Finding]
    frames: dict[str, pd.DataFrame] = field(repr=False)
    kept: dict[tuple, pd.DataFrame] = field(default_factory=dict, repr=False)  # tables that several figures ask for

    @property
    def name(self) -> str:
        return str(self.told.get("name", self.path.name))

    @cached_property
    def runs(self) -> pd.DataFrame:
        return pd.DataFrame(self.told.get("runs", []), columns=[*_KEY, "state", "steps", "path"])

    @cached_property
    def arms(self) -> list[str]:
        """In the order of the study; arms that only the frames know come last."""
        recorded = (arm for frame in self.frames.values() for arm in frame["arm"].unique())
        return list(dict.fromkeys(map(str, [*self.told.get("arms", []), *recorded])))

    @cached_property
    def singles(self) -> dict[tuple[str, str, str, str], pd.DataFrame]:
        """The frame of totals by model, arm, probe set and kind."""
        groups = self.frames["totals"].groupby(["model", "arm", "probe", "kind"], sort=False)
        return {tuple(map(str, key)): rows for key, rows in groups}  # pyright: ignore[reportReturnType, reportGeneralTypeIssues]

    @cached_property
    def sizes(self) -> pd.DataFrame:
        """The largest size of every quantity by kind, over models, arms, probe sets and components, seeds averaged."""
        frame = self.frames["totals"]
        one = frame[frame["index"] >= 0]
        means = one.groupby(["kind", "model", "arm", "probe", "layer", "index"])[list(QUANTITIES)].mean().abs()
        return means.groupby(level="kind").max()

    def is_control(self, model: str) -> bool:
        """Whether a model is one that claims compare with and never average in."""
        models = self.told.get("models") or []
        return bool(models) and model not in models


def read_study(path: str | os.PathLike[str]) -> Record:
    """Read a study's directory; findings and frames that are not there are empty.

    Raises:
        RunError: there is no study, or a file of it is damaged.
    """
    place = directory(path)
    if not (place / "study.json").is_file():
        raise RunError(f"{place} holds no study (no study.json); `attribution study` runs one and names its directory")
    found = told(place / "findings.json") if (place / "findings.json").exists() else []
    findings = [
        Finding(each["claim"], each["hash"], {key: rows for key, rows in each.items() if key not in ("claim", "hash")})
        for each in found
    ]
    return Record(place, told(place / "study.json"), findings, {name: _frame(place, name) for name in (*FRAMES, *SINGLES)})


def _frame(place: Path, name: str) -> pd.DataFrame:
    file = place / "frames" / f"{name}.parquet"
    if not file.exists():
        return pd.DataFrame(columns=[*_KEY, *(SHOWN.get(name) or COLUMNS[name])])
    try:
        frame = checked(file, pd.read_parquet(file), _KEY)
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({error}); restore it or conclude the study again") from None
    words = [
        column for column in ("model", "arm", "probe", "set", "ablated", "kind", "word", "when", "token") if column in frame
    ]
    return frame.astype(dict.fromkeys(words, object))


# Text of single values


def number(value: Any, digits: int = 3) -> str:
    """A figure without a sign of its own; a dash where there is none."""
    return signed(value, digits).lstrip("+")


def interval(row: Mapping[str, Any]) -> str:
    """A mean with its 95 % interval; says so where there is no such."""
    mean, low, high = (row.get(key, float("nan")) for key in ("mean", "low", "high"))
    if mean is None or pd.isna(mean):
        return "not measured" if not row.get("n") else "not a number"
    if low is None or pd.isna(low) or high is None or pd.isna(high):
        return f"{signed(mean)} (one value, no interval)"
    return f"{signed(mean)} [{signed(low)}, {signed(high)}]"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def yes(value: Any) -> str:
    return "yes" if value is True or value == 1 else "no"


# Sentences


def headline(record: Record) -> str:
    """How large the study is, and how much of it is there."""
    runs, told = record.runs, record.told
    done = int((runs["state"] == FINISHED).sum())
    sizes = [counted(len(told[key]), key.removesuffix("s")) for key in ("models", "arms", "seeds") if told.get(key)]
    finished = f"{done} of {len(runs)} runs finished" if len(runs) else "no runs"
    return f"{', '.join(sizes) or 'A study'}; {finished}."


def verdict_words(finding: Finding) -> tuple[str, list[str]]:
    """The word of the verdict, and the sentences under it."""
    row = finding.verdict
    word = capital(shown(row.get("verdict") or "not judged"))
    if row.get("note"):
        word += f" – {shown(row['note'])}"
    sentence, marker, others = str(row.get("sentence") or "").partition("The same rule says: ")
    return word, [part.strip() for part in (sentence, marker + others) if part.strip()]


def not_judged(record: Record) -> list[str]:
    """Claims of the study without a verdict, each with the reason."""
    told = record.told.get("not_judged") or {}
    lines = [f"Claim {shown(name)} was not judged: {shown(reason, 500)}" for name, reason in told.items()]
    return lines if record.findings or lines else ["This study judges no claim."]


def missing(record: Record) -> list[str]:
    """What was not run, not recorded, not measured or left out."""
    lines = not_judged(record)
    lines += [f"{model} is left out: {reason}." for model, reason in (record.told.get("unfit") or {}).items()]
    for run in record.runs[record.runs["state"] != FINISHED].to_dict("records"):
        steps = f" at step {run['steps']:.0f}" if run["state"] != "not run" and pd.notna(run["steps"]) else ""
        lines.append(f"Arm {run['arm']} on {run['model']}, seed {run['seed']}: {run['state']}{steps}.")
    names = {"probes": "Behaviour over steps", "sets": "Influence of sets of components", "set_grafts": "Cross-grafts"}
    lines += [f"{names[name]}: not recorded." for name in FRAMES if record.frames[name].empty]
    for finding in record.findings:
        lines += [f"{finding.name}: {line}" for line in _gaps(finding)]
        lines += [f"{finding.name}: {row['sentence']}" for row in finding.rows.get("excluded") or []]
    return list(dict.fromkeys(shown(line, 500) for line in lines))


def _gaps(finding: Finding) -> Iterator[str]:
    for gate in finding.rows.get("gates") or []:
        if gate["value"] is None and not gate["passed"]:
            yield f"the gate “{gate['meaning']}” was not measured."
    for null in finding.rows.get("nulls") or []:
        if null["reading"] == finding.reading and null["void"]:
            yield f"the null “{null['null']}” says nothing: {null['void']}."
    known = {null["null"] for null in finding.rows.get("nulls") or []}
    yield from (f"the null “{name}” was not measured." for name in finding.declared.get("nulls", []) if name not in known)
    left = finding.table("recruitment")
    if not left.empty and "negligible" in left:
        for row in left[left["negligible"] > 0].to_dict("records"):
            if row["quantity"] == "interaction":
                yield (
                    f"the interaction of the {row['graft']} graft in arm {row['arm']} leaves out "
                    f"{counted(int(row['negligible']), 'organism')} of negligible gain."
                )


# Tables


def parts(finding: Finding) -> Table:
    """The four changes of influence per organism, the influence before, and the contrast; of a sum, every term of it."""
    table = finding.table("parts")
    if table.empty:
        return Table([], [])
    if not finding.crossed:
        return _terms(table)
    first, second = finding.cell["mechanisms"]
    changes = [f"Δ{shown(name, 20)} in arm {shown(arm, 20)}" for name, arm in map(finding.placed, FOUR)]
    head = ["organism", "seeds", f"I of {shown(first, 20)} before", f"I of {shown(second, 20)} before", *changes, "contrast"]
    columns = ["before_A", "before_B", *FOUR, "contrast"]
    rows = [
        [shown(row["model"]), number(row["seeds"]), *(signed(row.get(column)) for column in columns)]
        for row in table.to_dict("records")
    ]
    means = table[columns].astype("float64").mean(skipna=False)
    rows.append(["mean", "", *(signed(means[column]) for column in columns)])
    return Table(head, rows)


def _terms(table: pd.DataFrame) -> Table:
    """Statistic, terms and training gains of every organism, one row for each part that could be read there."""
    hidden = ("model", "seeds", "part", "statistic", "sum", "over", "target")
    columns = [name for name in table if name not in hidden and not str(name).startswith("step of ")]
    named = ["part"] if "part" in table else []
    rows = [
        [shown(row["model"]), *(shown(row[name], 60) for name in named), number(row.get("seeds")), signed(row["statistic"]),
         *("" if pd.isna(row[column]) else signed(row[column]) for column in columns)]
        for row in table.to_dict("records")
    ]  # fmt: skip
    head = ["organism", *named, "seeds", "statistic", *(shown(column, 90) for column in columns)]
    return Table(head, rows, tuple(range(1, 1 + len(named))))


def nulls(finding: Finding, *, primary: bool) -> Table:
    """The nulls of the primary reading, or those of the others, with their readings."""
    rows = [
        [
            shown(null["null"]),
            *([] if primary else [shown(null["reading"])]),
            interval(null),
            number(null["n"]),
            shown(null["unit"]),
            "void" if null["void"] else yes(null["inside"]),
            shown(null["void"] or "–", 300),
        ]
        for null in finding.rows.get("nulls") or []
        if primary == (null["reading"] == finding.reading)
    ]
    inside = f"inside ±{number(finding.delta)}"
    head = ["null", *([] if primary else ["reading"]), "mean [95 % interval]", "n", "one value is", inside, "why void"]
    return Table(head, rows, (3, 4, 5) if primary else (1, 4, 5, 6))


def power_words(finding: Finding) -> str:
    """How likely a study of as many organisms, which scatter as these, is to see twice δ; "" where it cannot be said."""
    table = finding.table("parts")
    if finding.statistic not in table or finding.claim.get("prediction", "greater") != "greater" or "model" not in table:
        return ""
    if "part" in table:
        table = table[table["part"] == table["part"].iloc[0]]
    values = table[finding.statistic].astype("float64").dropna()
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    if not spread > 0:
        return ""
    seen, least = power([2 * finding.delta], spread, len(values), finding.delta)["power"][0], enough(spread, finding.delta)
    return (
        f"Power: {len(values)} organisms that scatter as these (standard deviation {number(spread)}) see a true effect of 2 δ "
        f"({number(2 * finding.delta)}) in {seen:.0%} of studies; {WANTED:.0%} takes {least or f'more than {MOST}'}. How often "
        "studies of nulls are called supported is measured by `python -m experiments.calibration`."
    )


def partitions(finding: Finding) -> Table:
    """Every wrong partition of every organism."""
    table = finding.table("partitions")
    if not finding.crossed:
        rows = [
            [shown(row["model"]), shown(row["partition"]), signed(row["statistic"]), number(row["size"])]
            for row in table.to_dict("records")
        ]
        return Table(["organism", "partition", "statistic", "influence before, of the real sets'"], rows, (1,))
    names = finding.cell.get("mechanisms", ["A", "B"])
    rows = [
        [shown(row["model"]), shown(row["partition"]), signed(row["contrast"]), signed(row["before_A"]),
         signed(row["before_B"])]
        for row in table.to_dict("records")
    ]  # fmt: skip
    before = [f"I of its {shown(name, 20)} before" for name in names]
    return Table(["organism", "partition", "contrast", *before], rows, (1,))


def secondary(finding: Finding) -> Table:
    """Every reading of the statistic, the primary one first, with the word that the rule gives it."""
    row = finding.verdict
    first = [f"primary: {finding.reading}", interval(row), number(row.get("n")), capital(str(row.get("verdict", ""))), "–"]
    rows = [
        [shown(each["reading"]), interval(each), number(each["n"]),
         capital(shown(each["verdict"])) + (f", {shown(each['note'])}" if each["note"] else ""), shown(each["why"], 400)]
        for each in finding.rows.get("secondary") or []
    ]  # fmt: skip
    return Table(
        ["reading", f"{finding.statistic} [95 % interval]", "n", "word of the rule", "why"],
        [first, *rows] if rows else [],
        (3, 4),
    )


def recruitment(finding: Finding) -> Table:
    """Gain and interaction by arm and graft, one row per graft."""
    table, rows = finding.table("recruitment"), []
    if table.empty:
        return Table([], [])
    for (arm, graft), group in table.groupby(["arm", "graft"], sort=False):
        by = {row["quantity"]: row for row in group.to_dict("records")}
        gain, shared = by.get("gain", {}), by.get("interaction", {})
        rows.append([f"arm {shown(arm)}", graft_name(str(graft)), interval(gain), number(gain.get("n")), interval(shared),
                     number(shared.get("n")), number(shared.get("negligible"))])  # fmt: skip
    head = ["arm", "change grafted", "gain (nats) [95 %]", "n", "interaction [95 %]", "n", "left out"]
    return Table(head, rows, (1,))


def graft_name(graft: str) -> str:
    return {"own": "own set", "other": "other set"}.get(graft, shown(graft))


def runs(record: Record) -> Table:
    """Every run; those that are not finished first."""
    table = record.runs.assign(done=record.runs["state"] == FINISHED).sort_values("done", kind="stable")
    rows = [
        [shown(run["arm"]), shown(run["model"]), str(run["seed"]), shown(run["state"]), number(run["steps"], 6),
         shown(run["path"], 300)]
        for run in table.to_dict("records")
    ]  # fmt: skip
    return Table(["arm", "model", "seed", "state", "steps", "path in the study’s directory"], rows, (1, 3, 5))


def watched(record: Record) -> list[str]:
    """Probe sets whose metric says something: all but the neutral one, what was trained on last."""
    names = list(record.frames["probes"]["probe"].dropna().unique())
    return [name for name in names if name not in (NEUTRAL, TRAINING)] + [name for name in names if name == TRAINING]


def partition_means(finding: Finding) -> dict[str, float]:
    """Mean contrast of the wrong partitions of each organism: the values behind their interval."""
    table = finding.table("partitions")
    if table.empty or WRONG_PARTITIONS not in finding.declared.get("nulls", []):
        return {}
    return table.groupby("model")[finding.statistic].mean().to_dict()
