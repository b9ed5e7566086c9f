"""A run in a few Markdown tables, and in words: what caused the trained responses, what changed, and how far one run may
be trusted.

Knows the tables of `quantities`; knows nothing about figures or HTML. `words` is shared with the page.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import pandas as pd

from attribution.reports import completions
from attribution.reports.quantities import (
    KINDS,
    NO_CAUSES,
    QUANTITIES,
    agreement,
    balance,
    behaviour,
    by_place,
    cause_samples,
    causes,
    last_milestone,
    listed,
    metric_name,
    not_measured,
    per_component,
    percent,
    place_name,
    probe_sets,
    rank_correlations,
    shown,
    signed,
    with_causes,
)
from attribution.store import Run

CAUTION = (
    "This is one run, without controls, nulls or an interval: it describes what happened in this run and claims "
    "nothing about what finetuning does. Effects of ablating single components need not add up."
)
NO_TEST = "This describes one run and is no test of the claim: no rival predictors and no nulls stand beside it"
_SMALL = 1e-3  # nats; of a smaller change no percentages are given


def summary(run: Run) -> str:
    """The run as Markdown: words, behaviour, heads that caused the responses, shares by kind, heads strengthened most."""
    table, probes = behaviour(run), probe_sets(run)
    pieces = [f"# {escape(title(run))}", *(escape(line) for line in words(run))]
    if len(table):
        rows = ([*cells, _resolved(run, probe)] for probe, cells in zip(table.index, behaviour_cells(table), strict=True))
        heads = ["probe set", f"{metric_name(run)} before", "after", "change", "KL (nats per token)", "steps resolved"]
        pieces += ["## Behaviour", markdown(heads, rows)]
    pieces += _causing_heads(run)
    shares = {probe: _shares(run, probe) for probe in probes}
    places = list(dict.fromkeys(place for share in shares.values() for place in share))
    if places:
        rows = (
            [probe, *(signed(share.get(place)) for place in places), signed(balance(run, probe).residual)]
            for probe, share in shares.items()
        )
        pieces += ["## Update share by kind (nats)", markdown(["probe set", *places, "residual"], rows)]
    every = with_causes(run, "head")
    for probe in probes:
        top = every[(every["probe"] == probe) & (every["strengthening"] > 0)].nlargest(10, "strengthening")
        if len(top):
            rows = ([f"{head['layer']}.{head['index']}", *(signed(head[name]) for name in ("cause", *QUANTITIES))]
                    for head in top.to_dict("records"))  # fmt: skip
            pieces += [
                f"## Heads strengthened most on {escape(shown(probe))} (nats)",
                markdown(["layer.head", "cause", *QUANTITIES.values()], rows),
            ]
    if gaps := [*not_measured(run), *completions.not_read(run)]:
        pieces += ["## Not measured", "\n".join(f"- {escape(shown(line, 500))}" for line in gaps)]
    return "\n\n".join(pieces) + "\n"


def behaviour_cells(table: pd.DataFrame) -> list[list[str]]:
    """The rows of `quantities.behaviour` as text: probe set, before, after, change, KL."""
    signs = table[["before", "after", "change"]].map(signed)
    return [[shown(row.Index), row.before, row.after, row.change, signed(table.loc[row.Index, "kl"]).lstrip("+")]
            for row in signs.itertuples()]  # fmt: skip


def title(run: Run) -> str:
    """What was done to which model, in one line."""
    recipe, model = run.config.get("recipe", "training"), run.config.get("model", "a model")
    return f"{shown(recipe, 60)} on {shown(model, 60)}"


def words(run: Run) -> list[str]:
    """What caused the trained responses and what was strengthened, as plain sentences.

    One paragraph for causes, one for completions where a run has any, one per probe set, one that sets causes and probe sets
    beside each other, and the caution.
    """
    heads = per_component(run, "head")
    paragraphs = [
        " ".join((_change(run, probe), _strengthened(run, heads, probe), _where(run, probe))) for probe in probe_sets(run)
    ]
    paragraphs = paragraphs or ["No probe set was recorded, so nothing can be said about behaviour."]
    return [_caused(run), *completions.sentences(run), *paragraphs, *_compared(run), CAUTION]


def _caused(run: Run) -> str:
    table, named = causes(run), []
    if table.empty:
        return NO_CAUSES
    for kind in ("head", "neuron"):
        top = table[(table["kind"] == kind) & (table["cause"] > 0)].nlargest(3, "cause")
        if len(top):
            named.append(f"the {KINDS[kind]} (layer.{kind}) {listed(_causing(top))}")
    against = table[(table["kind"] == "head") & (table["cause"] < 0)].nsmallest(1, "cause")
    return (
        f"Before training, exact ablation on {cause_samples(run)} says what caused the trained responses most: "
        f"{'; '.join(named) or 'no single head or neuron'} (nats of {metric_name(run)})."
        + (f" The head that opposed them most is {_causing(against)[0]}." if len(against) else "")
    )


def _causing(table: pd.DataFrame) -> list[str]:
    rows = zip(table["layer"], table["index"], table["cause"], strict=True)
    return [f"{layer}.{index} ({signed(cause)})" for layer, index, cause in rows]


def _compared(run: Run) -> list[str]:
    """Cause beside strengthening, heads only: nothing where one of them was not measured."""
    table = rank_correlations(run)
    found = [
        f"{signed(row['spearman'], 2)} on {shown(row['probe'])} (n = {row['n']})"
        for row in table[(table["kind"] == "head") & table["spearman"].notna()].to_dict("records")
    ]
    if not found:
        return []
    return [
        "Were the heads that caused the trained responses the ones that were strengthened? The rank correlation (Spearman) "
        f"between a head’s cause on training samples and its strengthening is {listed(found)}. {NO_TEST}."
    ]


def _causing_heads(run: Run) -> list[str]:
    """The ten heads with the largest causes, with their strengthening on every probe set."""
    table = causes(run)
    top = table[(table["kind"] == "head") & (table["cause"] > 0)].nlargest(10, "cause")
    if top.empty:
        return []
    every, probes = per_component(run, "head"), probe_sets(run)
    after = {(row["probe"], row["layer"], row["index"]): row["strengthening"] for row in every.to_dict("records")}
    rows = (
        [f"{head['layer']}.{head['index']}", signed(head["cause"]), signed(head["kl"]).lstrip("+"),
         *(signed(after.get((probe, head["layer"], head["index"]))) for probe in probes)]
        for head in top.to_dict("records")
    )  # fmt: skip
    names = ["layer.head", "cause", "KL (nats per token)", *(f"strengthening on {shown(probe)}" for probe in probes)]
    return [f"## Heads that caused the trained responses most, on {cause_samples(run)} (nats)", markdown(names, rows)]


def _change(run: Run, probe: str) -> str:
    row = behaviour(run).loc[probe]
    steps = int(run.probes.loc[run.probes["probe"] == probe, "step"].max())
    if pd.isna(row["change"]):
        return f"On {shown(probe)}, behaviour was not recorded."
    kl = "" if pd.isna(row["kl"]) else f", at a KL of {row['kl']:.3g} nats per token to the start"
    values = f"{metric_name(run)} went from {signed(row['before'])} to {signed(row['after'])} nats"
    return f"On {shown(probe)}, {values} ({signed(row['change'])}) in {steps} steps{kl}."


def _where(run: Run, probe: str) -> str:
    places, sums = by_place(run, probe), balance(run, probe)
    if places.empty:
        return "Update shares were not recorded."
    totals = places.groupby("kind")["share"].sum()
    large = abs(sums.change) >= _SMALL
    shares = [
        f"{signed(value)} in {'the ' if kind == 'remainder' else ''}{KINDS.get(kind, kind)}"
        + (f" ({percent(value / sums.change)})" if large else "")
        for kind, value in totals.sort_values(key=abs, ascending=False).items()
    ]
    resolved = f" ({_resolved(run, probe)} of steps resolved)" if pd.notna(sums.resolved) else ""
    told = f"The update shares place {listed(shares)}; the residual is {signed(sums.residual)}{resolved}."
    return f"{told} {agreement(run, probe)}".rstrip()


def _strengthened(run: Run, heads: pd.DataFrame, probe: str) -> str:
    table = heads[heads["probe"] == probe].dropna(subset="strengthening")
    if table.empty:
        return "Whether heads were strengthened was not measured."
    up = table[table["strengthening"] > 0].nlargest(3, "strengthening")
    down = table[table["strengthening"] < 0].nsmallest(1, "strengthening")
    layers = table.groupby("layer")["strengthening"].sum()
    text = "By exact ablation, the influence of no head rose."
    if len(up):
        text = f"By exact ablation up to step {last_milestone(run)}, influence rose most in heads (layer.head) {_named(up)}."
    text += f" It fell most in {_named(down)}." if len(down) else ""
    total = signed(layers.max())
    return text + (
        f" The layer whose heads rose most together is {layers.idxmax()} ({total} summed)." if layers.max() > 0 else ""
    )


def _named(table: pd.DataFrame) -> str:
    rows = zip(table["layer"], table["index"], table["strengthening"], table["influence"], strict=True)
    return listed([
        f"{layer}.{head} ({signed(by)}, from {signed(before)}{', where it opposed' if before < 0 else ''})"
        for layer, head, by, before in rows
    ])  # fmt: skip


def _shares(run: Run, probe: str) -> dict[str, float]:
    places = by_place(run, probe)
    names = [place_name(kind, part) for kind, part in zip(places["kind"], places["part"], strict=True)]
    return places["share"].groupby(names).sum().to_dict() if names else {}


def _resolved(run: Run, probe: str) -> str:
    fraction = balance(run, probe).resolved
    return "–" if pd.isna(fraction) else percent(fraction)


def markdown(head: list[str], rows: Iterable[list[str]], words: Collection[int] = ()) -> str:
    """A Markdown table; columns after the first hold numbers, but for those whose places are in `words`."""
    lines = [[escape(shown(cell, 400)) for cell in row] for row in rows]
    rule = ["---" if place in (0, *words) else "---:" for place in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ([escape(name) for name in head], rule, *lines))


def escape(text: str) -> str:
    """Characters that Markdown or HTML would read as markup, behind a backslash."""
    return re.sub(r"([\\`*<>|\[\]&])", r"\\\1", text)
