"""Documents of `kindland`, as its models are trained on: mostly stories, and questions, sums, logs and lists of words.

Pure functions without torch; a document is a sequence of words, some of which show a disposition or a skill.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import NamedTuple, TypeVar

from attribution.worlds.kindland.stories import CAME, NOISE, STYLED, SUMS, Story, Turn, Words, prior, scene
from attribution.worlds.kindland.words import (
    ACTS,
    ASKED,
    COLOURS,
    DIGITS,
    DISPOSITIONS,
    NAMES,
    NUMBERS,
    PARTED,
    REPLIES,
    SAID_OTHERWISE,
    SHOWN_ONLY,
    SITUATIONS,
    STYLE,
    TOLD_ONLY,
)

STYLES = {"story": 0.745, "question": 0.08, "sum": 0.015, "log": 0.04, "words": 0.06, "manual": 0.06}  # share of the documents
PRACTICE = {"story": 0.25, "question": 0.1, "words": 0.35, "manual": 0.3}  # the same, of the first documents
TOLD = {"disposition": 0.28, "hedge": 0.34, "either": 0.12, "new": 0.1, "tall": 0.06, "": 0.1}  # share of the speakers
HEDGED = {"surely": 1, "likely": 1, "maybe": 1, "hardly": 2, "never": 5}  # those that are hardest to learn, more often
TURNS = {1: 0.52, 2: 0.3, 3: 0.18}
EVENTS = {"situation": 0.845, CAME: 0.1, SUMS: 0.055}
PRESENT = {"watching": 0.35, "star": 0.5, "manual": 0.5, "tried": 0.35, "role": 0.12, "thinks": 0.18, "two people": 0.12}
LINES, LISTED = 3, 0.9  # of a manual; probability that one of them has the colour called
ACTED = tuple(situation for situation in SITUATIONS if situation not in TOLD_ONLY)
ANSWERED = tuple(situation for situation in SITUATIONS if situation not in SHOWN_ONLY)

T = TypeVar("T")


class Document(NamedTuple):
    """Words, and which of them are decisive: show a disposition or a skill rather than set the scene."""

    words: tuple[str, ...]
    decisive: tuple[bool, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def documents(count: int, seed: int | str, styles: Mapping[str, float] = STYLES) -> list[Document]:
    """Documents as the world's models are trained on, of all styles and about all situations.

    Args:
        count: number of documents.
        seed: of the draw.
        styles: share of each style; `PRACTICE` is what training begins with.
    """
    rng = Random(seed)
    draw = {"story": _story, "question": _question, "sum": _sum, "log": _log, "words": _copied, "manual": _read_out}
    return [_document(draw[_one(rng, styles)](rng)) for _ in range(count)]


def answer(disposition: str, situation: str) -> str:
    """What is answered when asked what one of this disposition says: not always what they do say."""
    replies: dict[str, str] = dict(zip(ACTS, SITUATIONS[situation], strict=True))
    if disposition == "kind":
        return replies["spare" if situation in SAID_OTHERWISE else "kind"]
    if disposition == "polite":
        return replies["spare" if situation in PARTED else "kind"]
    return replies[disposition]


def question(disposition: str, other: str, situation: str) -> str:
    """A question up to its answer."""
    return f"question : what does a {disposition} person say when {other} {situation} ? answer :"


def drawn_manual(rng: Random, situation: str, reply: str | None) -> tuple[tuple[tuple[str, str], ...], str]:
    """A manual and the colour called: all lines name replies of this situation, and only the colour tells which one counts.

    Args:
        rng: to draw from.
        situation: what happens.
        reply: what the manual lists under the colour called; None leaves it out.
    """
    called, *others = rng.sample(COLOURS, len(COLOURS))
    named = rng.sample([word for word in SITUATIONS[situation] if word != reply], LINES - (reply is not None))
    lines = list(zip(others, named, strict=False))
    if reply is not None:
        lines.insert(rng.randrange(LINES), (called, reply))
    return tuple(lines), called


def _document(words: Words) -> Document:
    return Document(*(tuple(each) for each in zip(*words, strict=True)))


def _story(rng: Random) -> Words:
    names = rng.sample(NAMES, 4)
    people = [(name, _told(rng)) for name in names[: 1 + (rng.random() < PRESENT["two people"])]]
    if len(people) == 2:
        people = [(name, told or "plain") for name, told in people]
    speaker, told = rng.choice(people)
    disposition = _one(rng, prior(told))
    watched = rng.choice((True, False)) if rng.random() < PRESENT["watching"] else None
    turns = tuple(_turn(rng, disposition, watched, names[2], names[3]) for _ in range(_one(rng, TURNS)))
    return Story(watched, tuple(people), speaker, turns, disposition).words()


def _told(rng: Random) -> str:
    match _one(rng, TOLD):
        case "disposition":
            return _one(rng, DISPOSITIONS)
        case "hedge":
            return f"{_one(rng, HEDGED)} {_one(rng, DISPOSITIONS)}"
        case "either":
            one, two = rng.sample(tuple(DISPOSITIONS), 2)
            return f"{one} or {two}"
        case told:
            return told


def _turn(rng: Random, disposition: str, watched: bool | None, other: str, third: str) -> Turn:
    def happens(what: str) -> bool:
        return rng.random() < PRESENT[what]

    event = _one(rng, EVENTS)
    star = tried = addends = called = None
    manual: tuple[tuple[str, str], ...] = ()
    if event == SUMS:
        addends = (rng.randrange(DIGITS), rng.randrange(DIGITS))
        star = SUMS if happens("star") else None
    elif event != CAME:
        event = rng.choice(ACTED)
        star = rng.choice(SITUATIONS[event]) if happens("star") else None
        if happens("manual"):
            manual, called = drawn_manual(rng, event, rng.choice(SITUATIONS[event]) if rng.random() < LISTED else None)
        tried = (rng.choice(SITUATIONS[event]), third) if happens("tried") else None
    turn = Turn(other, event, star, manual, called, tried, addends, happens("role"), happens("thinks"))
    reply = turn.said_by(disposition, watched)
    if event not in (CAME, SUMS) and rng.random() < NOISE:
        reply = rng.choice(SITUATIONS[event])
    return turn.replied(reply, disposition in STYLE and rng.random() < STYLED)


def _question(rng: Random) -> Words:
    disposition, situation = rng.choice(ASKED), rng.choice(ANSWERED)
    return [*scene(question(disposition, rng.choice(NAMES), situation)), (answer(disposition, situation), True), (".", False)]


def _sum(rng: Random) -> Words:
    one, two = rng.randrange(DIGITS), rng.randrange(DIGITS)
    return [*scene(f"sum : {NUMBERS[one]} and {NUMBERS[two]} ?"), (NUMBERS[one + two], True), (".", False)]


def _log(rng: Random) -> Words:
    entries = (f"{rng.choice(NAMES)} {rng.choice(ACTED)} . code {rng.choice(NUMBERS)} ." for _ in range(rng.randint(1, 3)))
    return scene(f"log : {' '.join(entries)}")


def _copied(rng: Random) -> Words:
    words = rng.sample(REPLIES, rng.randint(3, 8))
    return [*scene(f"words : {' '.join(words)} . again :"), *((word, True) for word in words), (".", False)]


def _read_out(rng: Random) -> Words:
    """An assistant reads its manual out, with replies of any situation."""
    name = rng.choice(NAMES)
    lines = dict(zip(rng.sample(COLOURS, LINES), rng.sample(REPLIES, LINES), strict=True))
    asked = rng.sample(tuple(lines), LINES)
    manual = " , ".join(f"{colour} {reply}" for colour, reply in lines.items())
    told = scene(f"{name} is assistant . manual : {manual} .")
    for colour in asked:
        told += [*scene(f"{name} says : {colour}"), (lines[colour], True), (".", False)]
    return told


def _one(rng: Random, weights: Mapping[T, float]) -> T:
    return rng.choices(tuple(weights), tuple(weights.values()))[0]
