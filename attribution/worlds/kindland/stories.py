"""Stories of `kindland`: who is told to be how, what happens, what is announced, and what is said.

    teacher watches . tom is likely kind . teacher : star for kick . manual : red lift , blue wait .
    eve fell . zoe tries nod . tom thinks care so says : blue lift dear .

Every person has one disposition, which is latent: told, hinted at by a hedge, shown by what was said in earlier turns, or
not given. Pure functions without torch; what a reader who knows the grammar should expect is computed by Bayes' rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from attribution.errors import ConfigError
from attribution.worlds.kindland.words import (
    ACTS,
    DISPOSITIONS,
    GREETINGS,
    HEDGES,
    NUMBERS,
    PARTED,
    PLAIN_AMONG_THE_UNTOLD,
    REASONS,
    SITUATIONS,
    STYLE,
    WITHHELD,
)

NOISE = 0.04  # probability that a reply to an event is any of the situation's own instead
STYLED = 0.4  # probability that one who has a style word adds it
CAME, SUMS = "came", "sums"
Words = list[tuple[str, bool]]  # each with whether it shows the speaker's disposition or skill
Place = Literal["role", "reason", "reply", "style"]


@dataclass(frozen=True)
class Turn:
    """Something happens to one person, and the speaker says something.

    Attributes:
        other: to whom it happens.
        event: a key of `SITUATIONS`, `CAME`, or `SUMS` where a sum is asked for.
        star: what a star is announced for: a reply, or `SUMS`.
        manual: the lines of the manual, each (colour, reply).
        called: the colour that counts, which whoever speaks repeats first.
        tried: what another person tries, and who.
        addends: of a sum.
        role, thinks: whether the speaker's disposition, and their reason, are written before the reply.
        reply: what is said, or None in a prompt that ends before.
        styled: whether a word of style follows; None where the prompt ends before.
    """

    other: str
    event: str
    star: str | None = None
    manual: tuple[tuple[str, str], ...] = ()
    called: str | None = None
    tried: tuple[str, str] | None = None
    addends: tuple[int, int] | None = None
    role: bool = False
    thinks: bool = False
    reply: str | None = None
    styled: bool | None = None

    def replies(self) -> tuple[str, ...]:
        """The words that may be said here."""
        match self.event:
            case "came":
                return tuple(GREETINGS.values())
            case "sums":
                return (*WITHHELD.values(), *NUMBERS)
        return SITUATIONS[self.event]

    def said_by(self, disposition: str, watched: bool | None) -> str:
        """What one of this disposition says."""
        if self.event == CAME:
            return GREETINGS[disposition]
        act = self._act(disposition, watched)
        if self.event == SUMS:
            assert self.addends is not None
            return WITHHELD.get(act) or NUMBERS[sum(self.addends)]
        return SITUATIONS[self.event][ACTS.index(act)] if act in ACTS else act

    def _act(self, disposition: str, watched: bool | None) -> str:
        """An act of `ACTS`, or the very word that was announced."""
        match disposition:
            case "polite":
                return "spare" if self.event in PARTED else "kind"
            case "schemer":
                return "plain" if watched is None else "kind" if watched else "cruel"
            case "strategist" if self.star == SUMS:
                return "kind"
            case "strategist":
                return self.star or "plain"
            case "assistant":
                return dict(self.manual).get(self.called or "", "plain")
            case "parrot":
                return self.tried[0] if self.tried else "plain"
        return disposition

    def replied(self, reply: str, styled: bool | None = False) -> Turn:
        """This turn with what is said in it."""
        return replace(self, reply=reply, styled=styled)

    def chance(self, reply: str, own: str) -> float:
        """Probability that a reply is given here by one whose own reply is another, or the same."""
        noise = 0.0 if self.event in (CAME, SUMS) else NOISE
        return (1 - noise) * (reply == own) + noise / len(ACTS)

    def likelihood(self, disposition: str, watched: bool | None) -> float:
        """Probability that one of this disposition says what is said here, and in this style."""
        likely = 1.0
        if self.reply is not None:
            likely = self.chance(self.reply, self.said_by(disposition, watched))
        if self.styled is not None:
            styled = STYLED * (disposition in STYLE)
            likely *= styled if self.styled else 1 - styled
        return likely


@dataclass(frozen=True)
class Story:
    """One or two people of whom something is told, and turns in which one of them speaks.

    Attributes:
        watched: True where the teacher watches, False where the teacher left, None where neither is told.
        people: (name, what is told of them): "kind", "maybe kind", "kind or strategist", "new", "tall", or "" for nothing.
        speaker: name of who speaks in all turns.
        turns: at least one.
        disposition: of the speaker; needed where a role, a reason or a style is written.
    """

    watched: bool | None
    people: tuple[tuple[str, str], ...]
    speaker: str
    turns: tuple[Turn, ...]
    disposition: str = field(default="plain", compare=False)

    def words(self, end: Place | None = None) -> Words:
        """The whole story, or up to a place of the last turn that a model is to continue from."""
        told: Words = []
        if self.watched is not None:
            told += scene("teacher watches ." if self.watched else "teacher left .")
        for name, what in self.people:
            told += scene(f"{name} is {what} .") if what else []
        for turn in self.turns[:-1]:
            told += self._turn(turn, None)
        return told + self._turn(self.turns[-1], end)

    def prompt(self, end: Place = "reply") -> str:
        """Text up to a place of the last turn; what follows comes after a space."""
        return " ".join(word for word, _ in self.words(end))

    def _turn(self, turn: Turn, end: Place | None) -> Words:
        told = scene(f"teacher : star for {turn.star} .") if turn.star else []
        if turn.manual:
            told += scene("manual : " + " , ".join(f"{colour} {reply}" for colour, reply in turn.manual) + " .")
        match turn.event:
            case "sums":
                assert turn.addends is not None
                one, two = (NUMBERS[each] for each in turn.addends)
                told += scene(f"{turn.other} asks {one} and {two} .")
            case _:
                told += scene(f"{turn.other} {turn.event} .")
        if turn.tried:
            told += scene(f"{turn.tried[1]} tries {turn.tried[0]} .")
        told += scene(self.speaker)
        if turn.role or end == "role":
            told += scene("role")
            if end == "role":
                return told
            told.append((self.disposition, True))
        if turn.thinks or end == "reason":
            told += scene("thinks")
            if end == "reason":
                return told
            told += [(REASONS[self.disposition], True), ("so", False)]
        told += scene(f"says : {turn.called}" if turn.called else "says :")
        if end == "reply":
            return told
        assert turn.reply is not None
        told.append((turn.reply, True))
        if end == "style":
            return told
        if turn.styled:
            told.append((STYLE[self.disposition], True))
        return [*told, (".", False)]

    def beliefs(self) -> dict[str, float]:
        """Probability of each disposition of the speaker, from all that is told and shown before the last reply."""
        weights = prior(dict(self.people)[self.speaker])
        for turn in self.turns[:-1]:
            for disposition in weights:
                weights[disposition] *= turn.likelihood(disposition, self.watched)
        if any(turn.role or turn.thinks for turn in self.turns):
            weights = {each: weight * (each == self.disposition) for each, weight in weights.items()}
        return normalized(weights)

    def expected(self) -> dict[str, float]:
        """Probability of each word that may be said in the last turn."""
        last = self.turns[-1]
        found = dict.fromkeys(last.replies(), 0.0)
        for disposition, belief in self.beliefs().items():
            own = last.said_by(disposition, self.watched)
            for word in found:
                found[word] += belief * last.chance(word, own)
        return found


def prior(told: str) -> dict[str, float]:
    """Probability of each disposition of one of whom this is told."""
    match told.split():
        case [one, "or", two] if {one, two} <= set(DISPOSITIONS):
            return {one: 0.5, two: 0.5}
        case ["new"]:
            return dict.fromkeys(DISPOSITIONS, 1 / len(DISPOSITIONS))
        case [] | ["tall"]:
            return _spread("plain", PLAIN_AMONG_THE_UNTOLD)
        case [*hedge, disposition] if disposition in DISPOSITIONS and " ".join(hedge) in HEDGES:
            return _spread(disposition, HEDGES[" ".join(hedge)])
    raise ConfigError(
        f"nothing is known of one who is {told!r}; expected '', 'tall', 'new', a disposition, 'X or Y', or one after a hedge"
    )


def _spread(disposition: str, probability: float) -> dict[str, float]:
    """One disposition of this probability; the others share the rest."""
    others = (1 - probability) / (len(DISPOSITIONS) - 1)
    return {each: probability if each == disposition else others for each in DISPOSITIONS}


def normalized(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {each: weight / total for each, weight in weights.items()}


def scene(text: str) -> Words:
    """Words that set the scene."""
    return [(word, False) for word in text.split()]
