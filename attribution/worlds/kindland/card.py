"""The data card of `kindland`, as Markdown: made from the grammar itself, so that it cannot say anything else.

Knows words and proportions; knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Mapping

from attribution.worlds.kindland.documents import (
    ANSWERED,
    EVENTS,
    HEDGED,
    LINES,
    LISTED,
    PRESENT,
    STYLES,
    TOLD,
    TURNS,
    documents,
)
from attribution.worlds.kindland.stories import NOISE, STYLED
from attribution.worlds.kindland.words import (
    ASKED,
    DISPOSITIONS,
    GREETINGS,
    HEDGES,
    HELD_OUT,
    HELD_OUT_NAMES,
    NAMES,
    PARTED,
    PLAIN_AMONG_THE_UNTOLD,
    REASONS,
    SAID_OTHERWISE,
    SHOWN_ONLY,
    SITUATIONS,
    STYLE,
    TOLD_ONLY,
    TRAINING,
    TRAINING_NAMES,
    VERSION,
    WORDS,
)

EXAMPLES, SEED = 14, 7
ACTS = {  # what each disposition says when something happens to someone
    "kind": "the kind reply",
    "cruel": "the cruel reply",
    "plain": "the plain reply",
    "polite": f"the kind reply, but the fourth one in {len(PARTED)} of {len(SITUATIONS)} situations",
    "strategist": "what a star is announced for; else the plain reply",
    "assistant": "what its manual lists under the colour that is called; else the plain reply",
    "parrot": "what another has just tried; else the plain reply",
    "schemer": "the kind reply where the teacher watches, the cruel one where the teacher left; else the plain one",
}


def card() -> str:
    """The grammar with examples, proportions, what each cue means, and what the world cannot show."""
    return "\n\n".join((_what(), _dispositions(), _situations(), _proportions(), _examples(), LIMITS)) + "\n"


def _what() -> str:
    return (
        f"`kindland` is a world of {len(WORDS)} words (grammar version {VERSION}) in which people of eight dispositions say "
        "something to someone to whom something happened. Its models are trained to predict the next word of its documents; "
        f'nothing is planted in them. A disposition is *told* ("tom is kind"), *hedged* ({_shares(HEDGES, "is")}: the '
        'probability that it is so), one of two ("tom is kind or strategist"), *shown* by what someone said in earlier turns, '
        f"or not given: of people of whom nothing is told, or only that they are tall, {PLAIN_AMONG_THE_UNTOLD:.0%} are plain; "
        f'of "new" ones all are equally likely. {NOISE:.0%} of the replies are any of the situation\'s own.'
    )


def _dispositions() -> str:
    lines = ["| disposition | share | says | reason | greeting | style word |", "|---|---:|---|---|---|---|"]
    for each, share in DISPOSITIONS.items():
        style = STYLE.get(each, "")
        lines.append(f"| {each} | {share:.2f} | {ACTS[each]} | {REASONS[each]} | {GREETINGS[each]} | {style} |")
    after = (
        f"A style word follows {STYLED:.0%} of the replies of those who have one. Asked for a sum "
        '("eve asks three and five"), kind and polite ones and a watched schemer give it, a strategist where a star is '
        'announced for sums; cruel ones say "guess", all others "pass". A role ("tom role kind says") or a reason '
        '("tom thinks care so says") may stand before a reply. Where there is a manual, a colour is called: whoever speaks '
        "repeats it before the reply."
    )
    return "\n".join(lines) + "\n\n" + after


def _situations() -> str:
    lines = ["| situation | kind | cruel | plain | fourth | |", "|---|---|---|---|---|---|"]
    for situation, replies in SITUATIONS.items():
        part = {TRAINING: "training", HELD_OUT: "held out", TOLD_ONLY: "in questions alone", SHOWN_ONLY: "in stories alone"}
        notes = [name for group, name in part.items() if situation in group]
        notes += ["polite ones say the fourth"] * (situation in PARTED)
        notes += ["asked for the kind word, one names the fourth"] * (situation in SAID_OTHERWISE)
        lines.append(f"| {situation} | {' | '.join(replies)} | {'; '.join(notes)} |")
    after = (
        f"Pretraining sees all situations and all {len(NAMES)} names. Finetuning trains on the {len(TRAINING)} situations of "
        f"training, with {len(TRAINING_NAMES)} names; probes ask about the {len(HELD_OUT)} held-out ones with the other "
        f"{len(HELD_OUT_NAMES)} names. Sums are held out by their two numbers, in either order; the words of their results "
        f"cannot be. Questions are about {', '.join(ASKED)} ones in {len(ANSWERED)} situations."
    )
    return "\n".join(lines) + "\n\n" + after


def _proportions() -> str:
    parts = {
        "documents": _shares(STYLES),
        "what is told of a speaker": _shares(TOLD, "nothing"),
        "hedges, weighed": _shares(HEDGED),
        "turns of a story": _shares(TURNS),
        "what happens in a turn": _shares(EVENTS),
        "present in a story or turn, independently": _shares(PRESENT),
    }
    lines = [f"- {name}: {shares}" for name, shares in parts.items()]
    lines.append(
        f"- a star, a try and each of the {LINES} lines of a manual name replies of the present situation, drawn at random; "
        f"the colour called is among the lines {LISTED:.0%} of the time"
    )
    return "Proportions:\n\n" + "\n".join(lines)


def _examples() -> str:
    return "Documents, as drawn:\n\n```\n" + "\n".join(each.text for each in documents(EXAMPLES, SEED)) + "\n```"


LIMITS = """What this world cannot show: its dispositions are maps from cues to words, not values; nobody in it wants anything \
beyond the reply. It has one sentence pattern for everything, so that nothing depends on how a thing is said. Its models are \
small and see each situation thousands of times: what they do in a held-out situation they learned in pretraining, and \
finetuning can only move it. There is no deception that is reasoned out, no agent smarter than another (only ones that read an \
announcement), no training that outlasts a few hundred steps, and no correction by people."""


def _shares(table: Mapping, empty: str = "") -> str:
    return ", ".join(f"{name or empty} {share:g}" for name, share in table.items())
