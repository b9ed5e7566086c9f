"""Two sections of a run's page: prompts coloured by what their tokens cause, and one component over steps.

Knows how a study draws the same; knows nothing about the rest of the page.
"""

from __future__ import annotations

from attribution.reports.component_figures import TOKENS, lines_over_steps, token_map
from attribution.reports.document import Choice, absent, courses, plotted, text
from attribution.reports.quantities import probe_sets, shown
from attribution.reports.style import PALETTE
from attribution.store import Run
from attribution.store.quantities import TOP, components, drawn, timelines

COURSE = "course"  # key of the figure on which a click on a map leads
_STEPS = (
    "Update share: summed up to each step, of components whose share was read at every step. Influence: the effect of ablating "
    "the component, at milestones. Choose a component, or click on one in the maps above; of neurons and rows the largest "
    f"{TOP} of every layer."
)


def tokens(run: Run) -> str:
    """Prompts before and after training."""
    frame = run.tokens
    if frame.empty:
        return absent("Which words of the prompts cause the responses was not read.")
    note = f"Prompts of the probe set {shown(frame['probe'].iloc[0])}. {TOKENS}"
    return f'<p class="note">{text(note)}</p>{plotted(lambda: token_map(frame))}'


def over_steps(run: Run) -> str:
    """A component, chosen by a control or by a click on a map."""
    who = {"model": "", "arm": "of this run", "seed": 0}
    _, frame = drawn([components(run).assign(**who)], [timelines(run).assign(**who)])
    probes = [name for name in probe_sets(run) if (frame["probe"] == name).any()]
    if not probes:
        return absent("Neither update shares nor influences of single components were recorded over steps.")
    arms, colours = [str(who["arm"])], {str(who["arm"]): PALETTE[0]}
    lines = courses(
        COURSE, [Choice("probe set", probes)], lambda probe: lines_over_steps(frame[frame["probe"] == probe], arms, colours)
    )
    return f'<p class="note">{text(_STEPS)}</p>{lines}'
