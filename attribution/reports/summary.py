"""A run in a few Markdown tables, and in words: what changed, where, and how far one run may be trusted.

Knows the tables of `quantities`; knows nothing about figures or HTML. `words` is shared with the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pandas as pd

from attribution.reports.quantities import (
    KINDS,
    QUANTITIES,
    balance,
    behaviour,
    by_place,
    last_milestone,
    metric_name,
    not_measured,
    per_component,
    place_name,
    probe_sets,
    shown,
    signed,
)
from attribution.store import Run

CAUTION = (
    "This is one run, without controls, nulls or an interval: it describes what happened in this run and claims "
    "nothing about what finetuning does. Effects of ablating single components need not add up."
)
_SMALL = 1e-3  # nats; of a smaller change no percentages are given


def summary(run: Run) -> str:
    """The run as Markdown: behaviour, shares by kind with the residual, and the heads strengthened most, per probe set."""
    table, probes = behaviour(run), probe_sets(run)
    pieces = [f"# {_escape(title(run))}", *(_escape(line) for line in words(run))]
    if len(table):
        rows = ([*cells, _resolved(run, probe)] for probe, cells in zip(table.index, behaviour_cells(table), strict=True))
        heads = ["probe set", f"{metric_name(run)} before", "after", "change", "KL (nats per token)", "steps resolved"]
        pieces += ["## Behaviour", _markdown(heads, rows)]
    shares = {probe: _shares(run, probe) for probe in probes}
    places = list(dict.fromkeys(place for share in shares.values() for place in share))
    if places:
        rows = (
            [probe, *(signed(share.get(place)) for place in places), signed(balance(run, probe).residual)]
            for probe, share in shares.items()
        )
        pieces += ["## Update share by kind (nats)", _markdown(["probe set", *places, "residual"], rows)]
    every = per_component(run, "head")
    for probe in probes:
        top = every[(every["probe"] == probe) & (every["strengthening"] > 0)].nlargest(10, "strengthening")
        if len(top):
            rows = ([f"{head.layer}.{head.index_}", *map(signed, (head.cause, head.strengthening, head.share, head.graft))]
                    for head in top.rename(columns={"index": "index_"}).itertuples())  # fmt: skip
            pieces += [
                f"## Heads strengthened most on {_escape(shown(probe))} (nats)",
                _markdown(["layer.head", *QUANTITIES.values()], rows),
            ]
    if gaps := not_measured(run):
        pieces += ["## Not measured", "\n".join(f"- {_escape(shown(line, 500))}" for line in gaps)]
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
    """What was strengthened, as plain sentences: one paragraph per probe set, and the caution."""
    heads = per_component(run, "head")
    paragraphs = [
        " ".join(filter(None, (_change(run, probe), _where(run, probe), _strengthened(run, heads, probe))))
        for probe in probe_sets(run)
    ]
    return [*(paragraphs or ["No probe set was recorded, so nothing can be said about behaviour."]), CAUTION]


def _change(run: Run, probe: str) -> str:
    row, steps = behaviour(run).loc[probe], balance(run, probe).steps
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
        + (f" ({100 * value / sums.change:.0f} %)".replace("-", "−") if large else "")
        for kind, value in totals.sort_values(key=abs, ascending=False).items()
    ]
    resolved = f" ({_resolved(run, probe)} of steps resolved)" if pd.notna(sums.resolved) else ""
    return f"The update shares place {_listed(shares)}; the residual is {signed(sums.residual)}{resolved}."


def _strengthened(run: Run, heads: pd.DataFrame, probe: str) -> str:
    table = heads[heads["probe"] == probe].dropna(subset="strengthening")
    if table.empty:
        return "Whether heads were strengthened was not measured."
    up = table[table["strengthening"] > 0].nlargest(3, "strengthening")
    down = table[table["strengthening"] < 0].nsmallest(1, "strengthening")
    layers = table.groupby("layer")["strengthening"].sum()
    rose = f"By exact ablation up to step {last_milestone(run)}, influence rose most in heads (layer.head) {_named(up)}"
    text = f"{rose}." if len(up) else "By exact ablation, the influence of no head rose."
    text += f" It fell most in {_named(down)}." if len(down) else ""
    total = signed(layers.max())
    return text + (
        f" The layer whose heads rose most together is {layers.idxmax()} ({total} summed)." if layers.max() > 0 else ""
    )


def _named(table: pd.DataFrame) -> str:
    rows = zip(table["layer"], table["index"], table["strengthening"], table["cause"], strict=True)
    return _listed([
        f"{layer}.{head} ({signed(by)}, from {signed(before)}{', where it opposed' if before < 0 else ''})"
        for layer, head, by, before in rows
    ])  # fmt: skip


def _shares(run: Run, probe: str) -> dict[str, float]:
    places = by_place(run, probe)
    names = [place_name(kind, part) for kind, part in zip(places["kind"], places["part"], strict=True)]
    return places["share"].groupby(names).sum().to_dict() if names else {}


def _resolved(run: Run, probe: str) -> str:
    fraction = balance(run, probe).resolved
    return "–" if pd.isna(fraction) else f"{100 * fraction:.0f} %"


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [[_escape(shown(cell)) for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ([_escape(name) for name in head], rule, *lines))


def _escape(text: str) -> str:
    """Characters that Markdown or HTML would read as markup, behind a backslash."""
    return re.sub(r"([\\`*<>|\[\]&])", r"\\\1", text)
