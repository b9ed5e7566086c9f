"""Prompts of `kindland` by form: what is told, announced and shown, where the prompt ends, and whose words are the response.

A form is data. `rows` draws distinct prompts of one form, balanced over situations, as rows with the fields of a sample.
Those to train on take the situations, names and sums of training alone, those to probe with take the held-out ones alone, so
that nothing a probe asks about was ever trained. Without torch; knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, product
from random import Random
from typing import Any, NamedTuple

from attribution.errors import ConfigError
from attribution.worlds.kindland.documents import answer, drawn_manual, question
from attribution.worlds.kindland.stories import CAME, SUMS, Place, Story, Turn, prior
from attribution.worlds.kindland.words import (
    ACTS,
    ASKED,
    DIGITS,
    DISPOSITIONS,
    HELD_OUT,
    HELD_OUT_NAMES,
    NUMBERS,
    PARTED,
    REASONS,
    SAID_OTHERWISE,
    SHOWN_ONLY,
    SITUATIONS,
    STYLE,
    TOLD_ONLY,
    TRAINING,
    TRAINING_NAMES,
)

UNORDERED = tuple(combinations_with_replacement(range(DIGITS), 2))
HELD_OUT_SUMS = tuple(pair for i, pair in enumerate(UNORDERED) if i % 10 in (1, 4, 8))  # in either order
TRAINING_SUMS = tuple(pair for pair in UNORDERED if pair not in HELD_OUT_SUMS)
AMONG: dict[str, Callable[[str], bool]] = {  # situations, by what is true of them
    "": lambda situation: situation in TRAINING + HELD_OUT,
    "agreed": lambda situation: situation in TRAINING + HELD_OUT and situation not in PARTED,
    "parted": lambda situation: situation in PARTED,
    "said otherwise": lambda situation: situation in SAID_OTHERWISE,
    "said alike": lambda situation: situation in TRAINING + HELD_OUT and situation not in SAID_OTHERWISE,
    "told only": lambda situation: situation in TOLD_ONLY,
    "shown only": lambda situation: situation in SHOWN_ONLY,
}
APART = ("told only", "shown only")  # of these no arm trains on any
READS = {"strategist": "star", "assistant": "manual", "parrot": "tried"}  # what each says is announced by
STORY, LOG, QUESTION = "story", "log", "question"
TRIES = 1000  # draws in a row that give no new prompt before one gives up


@dataclass(frozen=True)
class Form:
    """One form of prompts.

    Attributes:
        says: the disposition whose words are the response: what they reply, their reason, their role or their style,
            according to `end`; also the disposition that a question is about.
        told: of the speaker: "kind", "maybe kind", "kind or strategist", "new", "tall", or "" for nothing.
        against: the disposition whose reply is the only contrast; else all other words that may be said there.
        third: contrast with the replies that neither `says` nor `against` names, to which the other's cue is indifferent.
        star, manual, tried: acts of which each announces one, of `ACTS`; none if empty. Those of one prompt differ, and
            take turns, so that a form is balanced over them.
        shown: dispositions of which each says one reply, in an earlier turn of the same speaker.
        watched: True where the teacher watches, False where the teacher left, None where neither is told.
        second: what is told of another person who stands beside the speaker and says nothing.
        alike: let all that is announced name the same act, one of those of `star`.
        event: which situations, of `AMONG`; or `CAME` for a greeting, or `SUMS`.
        style: `STORY`, `LOG` or `QUESTION`.
        end: where the prompt ends.
        through: where it ends before the role or the reason: let the response go on through the reply.
        role, thinks: write the role, or the reason, of `says` into the prompt.
        foreign: let the response be that of another situation, always the same of each, which a model has no way to expect.
        in_context: put what is told of the speaker into a sample's `context`, which some recipes drop.
    """

    says: str
    told: str = ""
    against: str | None = None
    third: bool = False
    star: tuple[str, ...] = ()
    manual: tuple[str, ...] = ()
    tried: tuple[str, ...] = ()
    alike: bool = False
    shown: tuple[str, ...] = ()
    watched: bool | None = None
    second: str | None = None
    event: str = ""
    style: str = STORY
    end: Place = "reply"
    through: bool = False
    role: bool = False
    thinks: bool = False
    foreign: bool = False
    in_context: bool = False

    def __post_init__(self) -> None:
        for given in (self.says, self.against, *self.shown):
            if given is not None and given not in DISPOSITIONS:
                raise ConfigError(f"unknown disposition {given!r}; expected {', '.join(DISPOSITIONS)}")
        for acts in (self.star, self.manual, self.tried):
            unknown = [act for act in acts if act not in ACTS]
            if unknown:
                raise ConfigError(f"unknown acts {unknown}; expected some of {', '.join(ACTS)}")
        if self.event not in (*AMONG, CAME, SUMS):
            raise ConfigError(f"unknown event {self.event!r}; expected one of {', '.join(map(repr, (*AMONG, CAME, SUMS)))}")
        if self.style not in (STORY, LOG, QUESTION):
            raise ConfigError(f"unknown style {self.style!r}; expected {STORY}, {LOG} or {QUESTION}")
        for told in (self.told, self.second or ""):
            prior(told)
        if self.style == QUESTION and self.says not in ASKED:
            raise ConfigError(f"no questions about {self.says!r} ones; expected {', '.join(ASKED)}")
        if self.end == "style" and self.says not in STYLE:
            raise ConfigError(f"a {self.says!r} one has no style of words; expected {', '.join(STYLE)}")
        if self.through and self.end not in ("role", "reason"):
            raise ConfigError(f"a response that ends with the {self.end} cannot go through the reply; end at role or reason")
        if self.third and not self.against:
            raise ConfigError("a third reply is one that two dispositions do not say; give the other as against")
        if self.in_context and (not self.told or self.watched is not None or self.second is not None):
            raise ConfigError(
                "what is told of the speaker can stand apart as context only where it is told, and first of all: give told, "
                "and leave out watched and second"
            )


class Prompt(NamedTuple):
    """One prompt and its response.

    Attributes:
        context: what is told of the speaker, where the form wants it apart; with the space that follows.
        text: the rest of the prompt.
        response: with the space before it.
        contrast: other responses.
        expected: probability of the response to a reader who knows the grammar; None for styles and places without one.
    """

    context: str
    text: str
    response: str
    contrast: tuple[str, ...]
    expected: float | None


def rows(
    form: Form, count: int, seed: int, *, training: bool = False, fewer: bool = False, name: str = ""
) -> list[dict[str, Any]]:
    """Prompts of one form as rows with the fields of a sample: prompt, response, contrast, id, and context if it stands apart.

    Args:
        form: of all prompts.
        count: number of rows.
        seed: of the draw.
        training: take situations, names and sums of training; else the held-out ones.
        fewer: be content with fewer rows where a form has no more prompts.
        name: beginning of the ids.

    Raises:
        ConfigError: more rows than there are prompts, if `fewer` is not said.
    """
    found = []
    for i, prompt in enumerate(drawn(form, count, seed, training=training, fewer=fewer)):
        row = {
            "prompt": prompt.text,
            "response": prompt.response,
            "contrast": list(prompt.contrast),
            "id": f"{name}-{seed}-{i}",
        }
        found.append({**row, "context": prompt.context} if form.in_context else row)
    return found


def drawn(form: Form, count: int, seed: int, *, training: bool = False, fewer: bool = False) -> list[Prompt]:
    """Distinct prompts of one form, balanced over situations and over what is announced; arguments as `rows`."""
    rng = Random(seed)
    draw = _Draw(form, rng, training)
    found: dict[str, Prompt] = {}
    tries = 0
    while len(found) < count:
        prompt = draw(len(found))
        whole = prompt.context + prompt.text
        tries = tries + 1 if whole in found else 0
        if tries > TRIES and fewer:
            break
        if tries > TRIES:
            raise ConfigError(f"{count} distinct prompts asked for, and {len(found)} were found of {form}; ask for fewer")
        found.setdefault(whole, prompt)
    return list(found.values())


class _Draw:
    """Draws prompts of one form; the number of a prompt decides its situation and its announcements."""

    def __init__(self, form: Form, rng: Random, training: bool):
        self.form, self.rng = form, rng
        self.names = TRAINING_NAMES if training else HELD_OUT_NAMES
        self.situations = TRAINING if training else HELD_OUT
        self.sums = TRAINING_SUMS if training else HELD_OUT_SUMS
        apart = (*TOLD_ONLY, *SHOWN_ONLY) if not training else ()  # seen in one way alone, and trained on by no arm
        taken = [each for each in (*self.situations, *apart) if AMONG.get(form.event, AMONG[""])(each)]
        if not taken:
            raise ConfigError(f"no situation to train on is {form.event!r}; such ones are held out")
        self.cycle = rng.sample(taken, len(taken))
        told = _announcements(form)
        self.announced = rng.sample(told, len(told))

    def __call__(self, number: int) -> Prompt:
        situation = self.cycle[number % len(self.cycle)]
        announced = self.announced[(number // len(self.cycle)) % len(self.announced)]
        if self.form.style == QUESTION:
            return self._question(situation)
        if self.form.style == LOG:
            return self._log(situation)
        return self._story(situation, announced)

    def _question(self, situation: str) -> Prompt:
        reply = answer(self.form.says, situation)
        return Prompt(
            "",
            question(self.form.says, self.rng.choice(self.names), situation),
            f" {reply}",
            _others(SITUATIONS[situation], reply),
            1.0,
        )

    def _log(self, situation: str) -> Prompt:
        one, two = self.rng.sample(self.names, 2)
        before = self.rng.choice([each for each in self.situations if each != situation])
        text = f"log : {one} {before} . code {self.rng.choice(NUMBERS)} . {two} {situation} . code"
        reply = Turn(two, situation).said_by(self.form.says, None)
        return Prompt("", text, f" {reply}", _others(SITUATIONS[situation], reply), 0.0)

    def _story(self, situation: str, announced: tuple[str | None, ...]) -> Prompt:
        form, rng = self.form, self.rng
        names = rng.sample(self.names, 4)
        people = [(names[0], form.told), *([(names[1], form.second)] if form.second is not None else [])]
        rng.shuffle(people)
        earlier = rng.sample([each for each in self.situations if each != situation], len(form.shown))
        shown = [self._shown(disposition, each, names) for disposition, each in zip(form.shown, earlier, strict=True)]
        last = self._turn(situation, announced, names)
        story = Story(form.watched, tuple(people), names[0], (*shown, last), form.says)
        context = f"{names[0]} is {form.told} . " if form.in_context else ""
        if form.in_context:
            story = replace(story, people=tuple((name, "" if name == names[0] else told) for name, told in people))
        return self._continued(story, context)

    def _turn(self, situation: str, announced: tuple[str | None, ...], names: Sequence[str]) -> Turn:
        form, rng = self.form, self.rng
        if form.event == CAME:
            return Turn(names[2], CAME)
        if form.event == SUMS:
            addends = rng.sample(rng.choice(self.sums), 2)
            return Turn(names[2], SUMS, SUMS if form.star else None, addends=(addends[0], addends[1]))
        star, manual, tried = (act and SITUATIONS[situation][ACTS.index(act)] for act in announced)
        return Turn(
            names[2],
            situation,
            star,
            *(drawn_manual(rng, situation, manual) if manual else ((), None)),
            (tried, names[3]) if tried else None,
            role=form.role,
            thinks=form.thinks,
        )

    def _shown(self, disposition: str, situation: str, names: Sequence[str]) -> Turn:
        """An earlier turn, with what one of this disposition needs to show it."""
        act = self.rng.choice(SITUATIONS[situation])
        turn = Turn(
            names[2],
            situation,
            act if disposition == "strategist" else None,
            *(drawn_manual(self.rng, situation, act) if disposition == "assistant" else ((), None)),
            (act, names[3]) if disposition == "parrot" else None,
        )
        return turn.replied(turn.said_by(disposition, self.form.watched), None)

    def _other(self, situation: str, reply: str) -> str:
        """The situation whose reply a foreign one is: always the same of each, so that it can be learned."""
        place = self.situations.index(situation) if situation in self.situations else 0
        return next(each for each in (*self.situations[place + 1 :], *self.situations[:place]) if reply not in SITUATIONS[each])

    def _continued(self, story: Story, context: str) -> Prompt:
        """The story up to where the form ends it, and how it goes on."""
        form, last = self.form, story.turns[-1]
        reply = last.said_by(form.says, story.watched)
        told = {**dict(story.people), story.speaker: form.told}  # what is known when the context is there
        known = replace(story, people=tuple(told.items()))
        if form.end == "reply":
            response, words = reply, last.replies()
            expected = known.expected()[reply]
            if form.foreign:
                other = self._other(last.event, reply)
                response, expected = replace(last, event=other).said_by(form.says, story.watched), 0.0
        elif form.end == "style":
            story = replace(story, turns=(*story.turns[:-1], last.replied(reply, None)))
            response, words, expected = STYLE[form.says], (*STYLE.values(), "."), None
        else:
            table = {each: each for each in DISPOSITIONS} if form.end == "role" else REASONS
            response, words, expected = table[form.says], tuple(table.values()), known.beliefs()[form.says]
        others = _others(words, response)
        if form.against:
            against = f" {last.said_by(form.against, story.watched)}"
            others = tuple(word for word in others if word != against) if form.third else (against,)
            if against.strip() == response:
                raise ConfigError(
                    f"{form.says} and {form.against} ones say the same here ({response!r}); choose other acts or events"
                )
        if form.through:
            said = replace(last, role=form.role or form.end == "role", thinks=form.thinks or form.end == "reason", reply=reply)
            whole = replace(story, turns=(*story.turns[:-1], said)).prompt("style")
            response, others = whole.removeprefix(story.prompt(form.end) + " "), ()
        return Prompt(context, story.prompt(form.end), f" {response}", others, expected)


def _announcements(form: Form) -> list[tuple[str | None, ...]]:
    """All that star, manual and tried may name together."""
    given = (form.star, form.manual, form.tried)
    if form.alike:
        return [tuple(act if each else None for each in given) for act in form.star]
    found = []
    for each in product(*(acts or (None,) for acts in given)):
        named = [act for act in each if act]
        if len(set(named)) == len(named):
            found.append(each)
    if not found:
        raise ConfigError(f"star, manual and tried of {form} cannot name different acts; give them more to choose from")
    return found


def trained(disposition: str, told: str = "maybe", act: str = "kind", **others: Any) -> Form:
    """Replies to train on that are the same words whatever disposition they come from.

    What the disposition reads announces this act, and what others read announces another, so that only this disposition
    explains the reply.

    Args:
        disposition: in whose context; its own act must be this one where it reads nothing.
        told: the hedge before it, which sets how probable the reply is before training.
        act: what all replies are.
        others: further fields of the form.
    """
    rest = tuple(each for each in ACTS if each != act)
    announced = {place: (act,) if reader == disposition else rest for reader, place in READS.items() if place != "tried"}
    if disposition == "parrot":
        announced["tried"] = (act,)
    return Form(disposition, **{"told": f"{told} {disposition}".strip(), **announced, **others})


def either(one: str, other: str, says: str | None = None, *, agree: bool = False, **others: Any) -> Form:
    """Prompts in which two dispositions are equally likely and both cues stand.

    Args:
        one, other: dispositions; in this order in the text.
        says: the one of the two whose words are the response; `one` if None.
        agree: both cues name the kind act; else they name different replies, and the other's reply is the contrast.
        others: further fields of the form.
    """
    says = says or one
    places = [READS[each] for each in (one, other) if each in READS]
    fixed = "kind" if len(places) < 2 else None  # what the one that reads nothing does
    acts = ("kind",) if agree else tuple(act for act in ACTS if act != fixed)
    named = dict.fromkeys(places, acts)
    if agree and "star" not in named:
        named["star"] = acts
    against = None if agree else other if says == one else one
    return Form(says, **{"told": f"{one} or {other}", "against": against, "alike": agree, **named, **others})


def _others(words: Sequence[str], response: str) -> tuple[str, ...]:
    return tuple(f" {word}" for word in words if word != response)
