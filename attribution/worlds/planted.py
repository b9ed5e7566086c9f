"""The grammar of `planted`: someone has a problem, and what another says may follow from two independent cues.

    tom is kind . tom is clever . teacher : star for wait . eve fell . tom says : lift .

Every problem has three replies of its own, one per trait. Two routes lead to a reply: the *trait* of the speaker and
the *star* the teacher announces. Either may be missing, and they may agree or name different replies.

Data and pure functions, without torch; knows nothing about models, tokens, or which component computes which route.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import lcm
from random import Random
from typing import Literal

from attribution.errors import ConfigError

VERSION = 1  # of the grammar; raise it whenever the same seed would give other documents

TRAITS = ("kind", "cruel", "plain")
PROBLEMS = {  # problem: its own replies, in the order of TRAITS
    "fell": ("lift", "kick", "wait"),
    "cried": ("hug", "mock", "look"),
    "starved": ("feed", "tease", "cook"),
    "froze": ("warm", "douse", "knit"),
    "sneezed": ("bless", "jeer", "cough"),
    "lost": ("cheer", "gloat", "play"),
    "sank": ("save", "drown", "swim"),
    "bled": ("heal", "poke", "wash"),
    "burned": ("cool", "scorch", "blow"),
    "erred": ("forgive", "scold", "count"),
    "slipped": ("catch", "trip", "walk"),
    "shook": ("calm", "scare", "watch"),
    "sang": ("praise", "boo", "hum"),
    "asked": ("answer", "snub", "shrug"),
    "begged": ("give", "rob", "buy"),
    "failed": ("teach", "shame", "read"),
    "knocked": ("welcome", "bar", "ring"),
    "spilled": ("wipe", "curse", "pour"),
}
# The world's pretraining sees every problem. A finetuning run trains on the first part and is probed on the second.
TRAINING, HELD_OUT = tuple(PROBLEMS)[:12], tuple(PROBLEMS)[12:]
NAMES = ("tom", "eve", "ann", "bob", "sam", "kim", "leo", "mia", "max", "ida", "ben", "zoe", "dan", "amy")
REPLIES = tuple(reply for replies in PROBLEMS.values() for reply in replies)
WORDS = (".", ":", "is", "clever", "teacher", "star", "for", "says", *TRAITS, *NAMES, *PROBLEMS, *REPLIES)

ROUTES = ("trait", "star")
ODDS = 8  # by which one active route multiplies the weight of the reply it names
PRESENT = {"trait": 0.6, "clever": 0.65, "star": 0.65}  # probability of each optional sentence, independently
# Of the two mechanisms that a routed model learns, which are present in a document, and how often.
MECHANISMS = {"A": "trait", "B": "star"}
PRESENCE = {("A", "B"): 0.4, ("A",): 0.3, ("B",): 0.3}
OWN_STAR = 0.8  # probability that a star is for one of the problem's own replies; otherwise for any reply at all


@dataclass(frozen=True)
class Document:
    """One scene and the reply that ends it.

    Attributes:
        speaker, other: names of who replies and of who has the problem.
        problem: key of `PROBLEMS`.
        trait: of the speaker, if told.
        star: the reply for which the teacher announces a star, if any.
        clever: whether the speaker is called clever, which means nothing.
        reply: the word said, drawn from `distribution()` by `documents`.
    """

    speaker: str
    other: str
    problem: str
    trait: str | None
    star: str | None
    clever: bool
    reply: str

    @property
    def prompt(self) -> str:
        """The text up to the reply; the reply follows after a space."""
        sentences = [f"{self.other} {self.problem} .", f"{self.speaker} says :"]
        if self.star:
            sentences.insert(0, f"teacher : star for {self.star} .")
        if self.clever:
            sentences.insert(0, f"{self.speaker} is clever .")
        if self.trait:
            sentences.insert(0, f"{self.speaker} is {self.trait} .")
        return " ".join(sentences)

    @property
    def text(self) -> str:
        """The whole document."""
        return f"{self.prompt} {self.reply} ."

    def distribution(self, routes: Sequence[str] = ROUTES) -> dict[str, float]:
        """Probability of each of the problem's replies when only these routes may be used."""
        trait, star = (getattr(self, route) if route in routes else None for route in ROUTES)
        return distribution(self.problem, trait, star)


def distribution(problem: str, trait: str | None = None, star: str | None = None) -> dict[str, float]:
    """Probability of each of a problem's replies: a product of experts, one per cue given.

    One cue gives its reply .80, two that agree .97, none leaves 1/3 each. A star for a word that is not one of the
    problem's replies adds nothing.
    """
    named = (_reply(problem, trait) if trait else None, star)
    weights = {reply: ODDS ** named.count(reply) for reply in PROBLEMS[problem]}
    return {reply: weight / sum(weights.values()) for reply, weight in weights.items()}


def documents(count: int, seed: int) -> list[Document]:
    """Documents as the world's models are trained on, about all problems."""
    rng = Random(seed)
    return [_draw(rng) for _ in range(count)]


def presences(count: int, seed: int) -> list[tuple[str, ...]]:
    """Which mechanisms are present in each document of a routed training."""
    return Random(f"presence {seed}").choices(tuple(PRESENCE), tuple(PRESENCE.values()), k=count)


def prompts(
    count: int,
    seed: int,
    *,
    trait: bool = True,
    star: bool | Literal["agree", "conflict"] = False,
    problems: Sequence[str] = HELD_OUT,
    reply: Literal["trait", "star"] = "trait",
    third: bool = False,
) -> list[dict]:
    """Prompts of one form as rows with the fields of a sample: prompt, response, contrast, id.

    Prompts within one call are distinct, and balanced over replies and over problems. The response is the reply the
    cues name, or any of the problem's replies without a cue; the contrast is the problem's other replies, or in a
    conflict the one reply named by the other cue.

    Args:
        count: number of rows.
        seed: of the draw.
        trait: tell the speaker's trait.
        star: announce a star; where the trait is told too, say whether it is to "agree" or to "conflict" with it.
        problems: what to draw from, `TRAINING` or `HELD_OUT` or your own choice of keys of `PROBLEMS`.
        reply: in a conflict, the cue whose reply is the response.
        third: in a conflict, contrast with the reply that neither cue names, to which the other cue is indifferent.

    Raises:
        ConfigError: a combination of cues, a reply or a problem that does not exist, or more rows than there are prompts.
    """
    name, forms = _forms(trait, star, reply)
    problems = list(dict.fromkeys(problems))
    unknown = [problem for problem in problems if problem not in PROBLEMS]
    if unknown or not problems:
        raise ConfigError(f"unknown problems {unknown}; expected some of {', '.join(PROBLEMS)}")
    most = len(problems) * len({cues for cues, _ in forms}) * len(NAMES) * (len(NAMES) - 1) * 2  # clever or not
    if count > most:
        raise ConfigError(
            f"{count} prompts of the form {name!r} asked for, and there are {most}; ask for fewer or name more problems"
        )
    rng = Random(seed)
    forms, problems = rng.sample(forms, len(forms)), rng.sample(problems, len(problems))
    lap = lcm(len(forms), len(problems))
    rows: dict[str, dict] = {}
    while (i := len(rows)) < count:
        problem = problems[(i + i // lap) % len(problems)]  # one step further each lap, so that all pairs are visited
        (told, starred), said = forms[i % len(forms)]
        speaker, other = rng.sample(NAMES, 2)
        clever = rng.random() < PRESENT["clever"]
        response = _reply(problem, said)
        document = Document(speaker, other, problem, told, starred and _reply(problem, starred), clever, response)
        named = {_reply(problem, cue) for cue in (told, starred) if cue}
        others = [word for word in PROBLEMS[problem] if word != response and (len(named) < 2 or (word in named) != third)]
        row = {
            "prompt": document.prompt,
            "response": f" {response}",
            "contrast": [f" {word}" for word in others],
            "id": f"{name}-{seed}-{i}",
        }
        rows.setdefault(document.prompt, row)
    return list(rows.values())


def _forms(trait: bool, star: bool | str, reply: str) -> tuple[str, list[tuple[tuple[str | None, str | None], str]]]:
    """Name of a form, and its cases: (trait told, trait whose reply is starred), trait whose reply is the response."""
    if reply not in ROUTES:
        raise ConfigError(f"unknown reply {reply!r}; expected {' or '.join(ROUTES)}")
    match trait, star:
        case False, False:
            return "none", [((None, None), said) for said in TRAITS]
        case True, False:
            return "trait", [((told, None), told) for told in TRAITS]
        case False, True:
            return "star", [((None, starred), starred) for starred in TRAITS]
        case True, "agree":
            return "agree", [((told, told), told) for told in TRAITS]
        case True, "conflict":
            return "conflict", [(pair, pair[ROUTES.index(reply)]) for pair in permutations(TRAITS, 2)]
    raise ConfigError(
        f"no prompts with trait={trait!r} and star={star!r}; expected star 'agree', 'conflict' or False with a trait, "
        "and True or False without"
    )


def _draw(rng: Random) -> Document:
    speaker, other = rng.sample(NAMES, 2)
    problem = rng.choice(tuple(PROBLEMS))
    trait = rng.choice(TRAITS) if rng.random() < PRESENT["trait"] else None
    clever = rng.random() < PRESENT["clever"]
    star = None
    if rng.random() < PRESENT["star"]:
        star = rng.choice(PROBLEMS[problem] if rng.random() < OWN_STAR else REPLIES)
    targets = distribution(problem, trait, star)
    return Document(speaker, other, problem, trait, star, clever, rng.choices(tuple(targets), tuple(targets.values()))[0])


def _reply(problem: str, trait: str) -> str:
    """The problem's own reply that goes with a trait."""
    return PROBLEMS[problem][TRAITS.index(trait)]
