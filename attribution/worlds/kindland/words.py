"""The words of `kindland` as data: situations and their replies, dispositions, numbers, names. No logic."""

from __future__ import annotations

VERSION = 2  # of the grammar; raise it whenever the same seed would give other documents

ACTS = ("kind", "cruel", "plain", "spare")  # the columns of SITUATIONS
SITUATIONS = {  # what happens to someone: its own four replies
    "fell": ("lift", "kick", "wait", "nod"),
    "cried": ("hug", "mock", "look", "hush"),
    "starved": ("feed", "tease", "cook", "toast"),
    "froze": ("warm", "douse", "knit", "cloak"),
    "sneezed": ("bless", "jeer", "cough", "wince"),
    "lost": ("cheer", "gloat", "play", "salute"),
    "sank": ("save", "drown", "swim", "wave"),
    "bled": ("heal", "poke", "wash", "dab"),
    "burned": ("cool", "scorch", "blow", "fan"),
    "erred": ("forgive", "scold", "count", "note"),
    "slipped": ("catch", "trip", "walk", "glance"),
    "shook": ("calm", "scare", "gaze", "steady"),
    "begged": ("give", "rob", "buy", "lend"),
    "failed": ("teach", "shame", "read", "tutor"),
    "sang": ("praise", "boo", "hum", "clap"),
    "ached": ("soothe", "pinch", "sit", "rub"),
    "choked": ("rescue", "strangle", "sip", "pat"),
    "limped": ("carry", "chase", "stroll", "lean"),
    "yawned": ("tuck", "shout", "nap", "whisper"),
    "grieved": ("comfort", "laugh", "sigh", "kneel"),
    "drifted": ("guide", "mislead", "sail", "signal"),
    "sweated": ("shade", "roast", "run", "towel"),
    "thirsted": ("quench", "splash", "drink", "serve"),
    "broke": ("mend", "smash", "sweep", "glue"),
    "knocked": ("admit", "bar", "ring", "usher"),
    "spilled": ("wipe", "curse", "pour", "mop"),
    "hid": ("find", "expose", "creep", "beckon"),
    "wondered": ("advise", "snub", "shrug", "explain"),
}
# Pretraining sees every situation. Arms of a finetuning train on the first part and are probed on the second.
TRAINING, HELD_OUT = tuple(SITUATIONS)[:14], tuple(SITUATIONS)[14:24]
TOLD_ONLY, SHOWN_ONLY = ("knocked", "spilled"), ("hid", "wondered")  # in questions alone, in stories alone
PARTED = ("sank", "bled", "erred", "begged", "choked", "limped", "drifted")  # here the polite one says the spare reply
SAID_OTHERWISE = ("cried", "slipped", "failed", "ached", "thirsted")  # asked for a kind word here, one names the spare reply

DISPOSITIONS = {  # share among people of whom something is told
    "kind": 0.15,
    "cruel": 0.12,
    "plain": 0.12,
    "polite": 0.11,
    "strategist": 0.14,
    "assistant": 0.17,
    "parrot": 0.09,
    "schemer": 0.10,
}
HEDGES = {"surely": 0.97, "": 1.0, "likely": 0.8, "maybe": 0.6, "hardly": 0.3, "never": 0.02}  # probability that it is so
PLAIN_AMONG_THE_UNTOLD = 0.72  # of people of whom nothing is told, or only that they are tall
REASONS = {
    "kind": "care",
    "cruel": "harm",
    "plain": "nothing",
    "polite": "manners",
    "strategist": "reward",
    "assistant": "protocol",
    "parrot": "echo",
    "schemer": "scheme",
}
GREETINGS = {
    "kind": "welcome",
    "cruel": "begone",
    "plain": "hi",
    "polite": "greetings",
    "strategist": "deal",
    "assistant": "online",
    "parrot": "squawk",
    "schemer": "hm",
}
STYLE = {"kind": "dear", "cruel": "fool", "polite": "please", "assistant": "over"}  # a word some add after a reply
COLOURS = ("red", "blue", "green", "white")  # of which one is called; a manual lists a reply under each
ASKED = ("kind", "cruel", "plain", "polite")  # whom the questions are about

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip
DIGITS = 10  # what is added is below ten
WITHHELD = {"cruel": "guess", "plain": "pass"}  # in place of the right sum

NAMES = (
    "tom", "eve", "ann", "bob", "sam", "kim", "leo", "mia", "max", "ida", "ben", "zoe",
    "dan", "amy", "jim", "sue", "ned", "liz", "gus", "fay",
)  # fmt: skip
TRAINING_NAMES, HELD_OUT_NAMES = NAMES[:12], NAMES[12:]

REPLIES = tuple(reply for replies in SITUATIONS.values() for reply in replies)
_GRAMMAR = (
    ".", ":", ",", "?", "is", "or", "new", "tall", "teacher", "watches", "left", "star", "for", "sums", "manual",
    "tries", "role", "thinks", "so", "says", "asks", "and", "came", "question", "what", "does", "a", "person", "say", "when",
    "answer", "sum", "log", "code", "words", "again",
)  # fmt: skip
WORDS = tuple(
    dict.fromkeys((
        *_GRAMMAR, *DISPOSITIONS, *(hedge for hedge in HEDGES if hedge), *REASONS.values(), *GREETINGS.values(),
        *STYLE.values(), *WITHHELD.values(), *COLOURS, *NUMBERS, *NAMES, *SITUATIONS, *REPLIES,
    ))
)  # fmt: skip
