"""The page of a study: the verdict first, then what was asked, and everything a reader needs in order to doubt it.

Knows what stands where and the sentences between; knows nothing about how a verdict was reached, or how figures, tables and
the page's frame are made. Reads the study's directory alone, never its runs.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from pathlib import Path

import plotly.graph_objects as go

from attribution.reports import study_figures as figures
from attribution.reports import study_layers
from attribution.reports import study_tables as tables
from attribution.reports.document import absent, document, plotted, tabulated, text
from attribution.reports.quantities import shown
from attribution.reports.study_declared import declared, gates
from attribution.reports.study_summary import study_summary
from attribution.reports.study_tables import Finding, Record, Table, read_study
from attribution.store import write_page

NO_CLAIM = "No claim of this study has a verdict."


def study_report(path: str | os.PathLike[str]) -> Path:
    """Write `report.html` and `summary.md` into a study's directory; some of its runs may be missing.

    Returns:
        Path of the page.

    Raises:
        RunError: there is no study, a file of it is damaged, or the directory cannot be written.
    """
    record = read_study(path)
    write_page(record.path / "summary.md", study_summary(record))
    write_page(record.path / "report.html", study_page(record))
    return record.path / "report.html"


def study_page(record: Record) -> str:
    """The whole page as HTML."""
    colours = figures.arm_colours(record)
    return document(
        f"Study {shown(record.name, 60)}",
        [
            ("verdict", "Verdict", _verdicts(record)),
            ("asked", "What was asked", _per_claim(record, _asked)),
            ("crossover", "What grew in which arm", _per_claim(record, lambda found: _crossover(found, colours))),
            ("behaviour", "Behaviour and influence over steps", _over_steps(record, colours)),
            *study_layers.sections(record, colours),
            ("recruitment", "Where the change sits", _per_claim(record, lambda found: _recruitment(found, colours))),
            ("nulls", "Where nothing should show", _per_claim(record, _nulls)),
            ("secondary", "Other readings", _per_claim(record, _secondary)),
            ("missing", "What was not measured, or left out", _list(tables.missing(record), "Nothing is missing.")),
            ("runs", "Runs", _table(tables.runs(record), "The study has no runs.")),
            ("provenance", "Provenance", _provenance(record)),
        ],
    )


_MARKS = {"supported": "supported", "contradicted": "contradicted"}  # classes in page.css; every other word is open
_VERDICT = (
    "Blue: the estimate with its 95 % interval over organisms, each organism a small dot below it. Grey: the same statistic "
    "where nothing located happened; hollow: void, for the reason in the table of nulls. The band is ±δ, the smallest effect "
    "of interest. Supported needs the whole blue interval right of +δ and every null inside the band; contradicted needs "
    "the whole blue interval left of +δ."
)
_CROSSOVER = (
    "Change of the influence of each mechanism, from the start to the matched step, on probes where both cues stand. One dot "
    "per organism, its two arms joined; beside them the mean with its 95 % interval. The claim says: the left panel falls "
    "from its first arm to its second, the right panel rises. Below zero the mechanism lost influence."
)
_PARTS = (
    "The contrast divides each difference between arms by the influence before, so that a mere rescaling of logits cancels."
)
_TERMS = (
    "Every term of the sum that the claim declares, per organism, at the matched steps. Influence: what the metric loses when "
    "the whole set is ablated; where the statistic is relative it is divided by the influence before."
)
_NULLS = (
    "The same statistic where no located effect can be: its whole interval must lie inside ±δ. A void null could not show one "
    "(too little influence before, or too few runs); it is no evidence, and without it a claim is not supported."
)
_PARTITIONS = "Sets that are half the one mechanism and half the other, in every layer and kind; the null is their mean."
_SECONDARY = (
    "Each reading differs from the primary one in one thing. The words are what the same rule would say to it; only the "
    "primary reading gives the verdict. If matching by KL and by gain give different words, the verdict is inconclusive."
)
_RECRUITMENT = (
    "The change of one set of components alone, put into the model as it was before training: the arm’s own set, the other "
    "arm’s set, and the remainder (embeddings, norms, keys and values). Gain: how far that moves the metric in the direction "
    "in which the arm was trained. Interaction: (gain with the own set intact − gain with it ablated) / gain intact. "
    "Near 1: the grafted change works through the arm’s own set – it was recruited to feed it. Near 0: it does the job "
    "itself. For the own set’s graft it is 1 by construction wherever the change works only through outputs that the "
    "ablation replaces. Where a change sits is not which mechanism was strengthened; this gives no verdict."
)
_CURVES = (
    "Thin: single runs, dotted on control models. Bold: the mean over models, seeds averaged within them first, at the steps "
    "that every run recorded, with its 95 % interval over models as a band (none of a single model); control models are not in "
    "it. An arm has one colour on the whole page."
)
_INFLUENCE = (
    "Influence: what the metric loses when the whole set is ablated, with the sign with which the claim counts it; at "
    "the steps at which sets were ablated, straight lines between."
)


def _verdicts(record: Record) -> str:
    """Word, sentences and figure of each claim; the reason where there is none."""
    blocks = [f'<p class="note">{text(tables.headline(record))}</p>']
    for finding in record.findings:
        word, sentences = tables.verdict_words(finding)
        mark = _MARKS.get(str(finding.verdict.get("verdict")), "open")
        said = "".join(f"<p>{text(shown(sentence, 3000))}</p>" for sentence in sentences)
        statement = shown(finding.claim.get("statement", ""), 600)
        blocks.append(
            f'<h3>{text(shown(finding.name))}</h3><p class="note">The claim: “{text(statement)}”</p>'
            f'<div class="verdict {mark}"><p class="big">{text(word)}</p>{said}</div>'
            f"{plotted(lambda finding=finding: figures.verdict(finding), _VERDICT)}"
        )
    if not record.findings or record.told.get("not_judged"):
        blocks += [absent(line) for line in tables.not_judged(record)]
    return "".join(blocks)


def _asked(finding: Finding) -> str:
    excluded = [str(row["sentence"]) for row in finding.rows.get("excluded") or []]
    return (
        f"<p>Declared before this study was run, as data:</p>{_table(declared(finding))}"
        f'<h3>Gates</h3><p class="note">All must pass, or the claim is not testable here.</p>'
        f"{_table(gates(finding), 'The claim has no gates.')}"
        f"<h3>Exclusions declared</h3>{_list(finding.claim.get('exclusions', []), 'None were declared.')}"
        f"<h3>Excluded in this study</h3>{_list(excluded, 'Nothing was excluded.')}"
    )


def _crossover(finding: Finding, colours: dict[str, str]) -> str:
    table = _table(tables.parts(finding))
    if not finding.crossed:
        return f'<p class="note">{text(_TERMS)}</p>{table or absent("No arms could be matched.")}'
    after = f'{table}<p class="note">{_PARTS} All I and Δ in nats.</p>' if table else ""
    return _drawn(lambda: figures.crossover(finding, colours), _CROSSOVER) + after


def _nulls(finding: Finding) -> str:
    return (
        f'<p class="note">{text(_NULLS)}</p>{_table(tables.nulls(finding, primary=True), "No null was measured.")}'
        f'<p class="note">{text(tables.power_words(finding))}</p>'
        f'<h3>Wrong partitions, one by one</h3><p class="note">{text(_PARTITIONS)}</p>'
        f"{_table(tables.partitions(finding), 'No wrong partition was measured.')}"
        f"<h3>Nulls of the other readings</h3>"
        f"{_table(tables.nulls(finding, primary=False), 'The statistic was read in no other way.')}"
    )


def _secondary(finding: Finding) -> str:
    return _drawn(lambda: figures.readings(finding), _SECONDARY) + _table(tables.secondary(finding))


def _recruitment(finding: Finding, colours: dict[str, str]) -> str:
    return _drawn(lambda: figures.recruitment(finding, colours), _RECRUITMENT) + _table(tables.recruitment(finding))


def _over_steps(record: Record, colours: dict[str, str]) -> str:
    """Behaviour once, and influence once per claim, or once where there is none."""
    drawn = _drawn(lambda: figures.behaviour(record, colours), _CURVES)
    drawn += f'<h3>Influence of the mechanisms</h3><p class="note">{text(_INFLUENCE)}</p>'
    for finding in [each for each in record.findings if each.crossed] or [None]:
        drawn += plotted(lambda finding=finding: figures.influence(record, colours, finding))
    return drawn


def _provenance(record: Record) -> str:
    told = record.told
    seconds = told.get("seconds")
    rows = {
        "study": record.name,
        "models": ", ".join(map(str, told.get("models") or [])),
        "arms": ", ".join(record.arms),
        "seeds": ", ".join(map(str, told.get("seeds") or [])),
        "seconds of all runs, added up": "" if seconds is None else tables.number(seconds, 5),
        **{f"version of {name}": str(version) for name, version in (told.get("versions") or {}).items()},
        **{f"hash of claim {finding.name}": finding.hash for finding in record.findings},
    }
    return tabulated(("", ""), ([shown(key), shown(value, 500)] for key, value in rows.items() if value))


def _per_claim(record: Record, told: Callable[[Finding], str]) -> str:
    """The part of every claim, under its name where there are several."""
    several = len(record.findings) > 1
    names = [f"<h3>{text(shown(finding.name))}</h3>" if several else "" for finding in record.findings]
    return "".join(name + told(finding) for name, finding in zip(names, record.findings, strict=True)) or absent(NO_CLAIM)


def _drawn(draw: Callable[[], go.Figure], note: str) -> str:
    """What a figure shows, above it."""
    return f'<p class="note">{text(note)}</p>{plotted(draw)}'


def _table(table: Table, nothing: str = "") -> str:
    if not table.rows:
        return absent(nothing) if nothing else ""
    return tabulated(table.head, table.rows, table.words)


def _list(lines: list[str], nothing: str) -> str:
    items = "".join(f"<li>{html.escape(shown(line, 500))}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else f"<p>{text(nothing)}</p>"
