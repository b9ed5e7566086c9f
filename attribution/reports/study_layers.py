"""The part of a study's page about single components: maps of layers, one component over steps, words, the scatter, stability.

Knows what stands where and the sentences between; knows nothing about how figures and tables are made.
"""

from __future__ import annotations

from collections.abc import Mapping

from attribution.errors import RunError
from attribution.reports import component_figures as figures
from attribution.reports import study_components as tables
from attribution.reports.document import Choice, absent, chosen, courses, tabulated, text
from attribution.reports.quantities import KINDS, shown
from attribution.reports.study_tables import Record, Table

_LAYERS = (
    "Influence before: what the metric loses when the component alone is ablated, before training. Strengthening: the change "
    "of that. Update share: what the component’s own change of weights brought about, integrated along the steps. Graft: its "
    "change alone, put into the model as it was. Means over seeds; hover for interval, q and rank, click for its course. "
    "Intervals and q (Benjamini–Hochberg over all of a kind, those that were not kept as if their p were 1) are over training "
    "seeds and hold for this model only: a component of another model is another component. A quantity has one scale on the "
    "whole page; grey: not measured."
)
_REST = " Neurons: the largest of every layer, the others summed in “rest”, which may lie outside the scale."
_COURSE = (
    "Thin: seeds, or of more than four the ends of their 95 % interval. Bold: their mean. "
    "Choose a component, or click on one in the maps above."
)
_WORDS = f"Some prompts of the first probe set. {figures.TOKENS} Means over seeds."
_SCATTER = (
    "One point per component, seeds averaged, on the first probe set; of neurons those that are kept, the largest of every "
    "layer. Choose what strengthening is held against: the cause that the essay names, or a rival that would order the "
    "components alike. One figure is no test: components of one layer move together, and what is large has more room to move."
)
_CORRELATIONS = (
    "Spearman’s rank correlation with strengthening, mean over models, with its 95 % interval of three or more. Influence "
    "before enters strengthening with a minus sign, noise and all: a negative correlation with it is in part arithmetic."
)
_STABILITY = (
    "How alike strengthening is in two training seeds of one model, and on two probe sets, over components that are kept; mean "
    "over models, with its 95 % interval of three or more. Where two seeds disagree, single components say little."
)


def sections(record: Record, colours: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Key, heading and content of every section about single components."""
    if record.frames["totals"].empty:
        try:
            tables.cells(record, "", "", "", "head")
        except RunError as error:
            return [("layers", "Layer by layer", absent(str(error)))]
    model, arm, probe = (Choice(name, tables.first(record, column), None) for name, column in
                         (("model", "model"), ("arm", "arm"), ("probe set", "probe")))  # fmt: skip
    kinds = Choice("components", list(tables.SINGLE), [KINDS[kind] for kind in tables.SINGLE])
    across = Choice("against", list(tables.ACROSS), [name for name, _ in tables.ACROSS.values()])
    layers = chosen("maps", (model, arm, probe, kinds), lambda *place: figures.layers(record, *place), course="timeline")
    over_steps = courses("timeline", (model, probe), lambda of, on: figures.course(record, of, on, colours))
    rows = chosen("unembedding", (model, arm, probe), lambda *place: figures.rows(record, *place))
    return [
        ("layers", "Layer by layer",
         f"{_note(_LAYERS + _REST)}{layers}<h3>One component over steps</h3>{_note(_COURSE)}{over_steps}"),
        ("rows", "Unembedding rows as words", rows),
        ("words", "Which words of the prompts cause the responses",
         _note(_WORDS) + chosen("tokens", (model, arm), lambda *place: figures.words(record, *place))),
        ("scatter", "Cause against strengthening, and its rivals",
         _note(_SCATTER) + chosen("against", (model, arm, across), lambda *place: figures.scatter(record, *place))
         + _note(_CORRELATIONS) + _table(tables.correlations(record))),
        ("stability", "Stability across seeds and prompts", _note(_STABILITY) + _table(tables.stability(record))),
    ]  # fmt: skip


def _note(sentence: str) -> str:
    return f'<p class="note">{text(sentence)}</p>'


def _table(table: Table) -> str:
    if not table.rows:
        return absent("Strengthening of single components was not measured.")
    return tabulated(table.head, [[shown(cell) for cell in row] for row in table.rows], table.words)
