"""What a base of `kindland` must do before anything is concluded from it: its gates, on prompts that no base was chosen on.

Half of the prompts are about situations that arms train on and half about held-out ones; pretraining saw all. Knows prompts
and probabilities; what components do is measured elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn

from attribution.capture import scored_logits
from attribution.models import anatomy
from attribution.samples import Sample, collate, encode
from attribution.worlds.kindland.documents import ANSWERED, answer, question
from attribution.worlds.kindland.prompts import APART, LOG, Form, Prompt, drawn, either, trained
from attribution.worlds.kindland.stories import CAME, SUMS
from attribution.worlds.kindland.words import ACTS, ASKED, DISPOSITIONS, HEDGES, NAMES, REPLIES, STYLE

SEED, PROMPTS = 71, 120  # of the prompts that gates are measured on; half of them in either part
ACT, ANNOUNCED, REASON, QUESTION, GREETING = 0.85, 0.7, 0.9, 0.95, 0.85
HEDGE, SHOWN, COLD, SKILL = 0.1, 0.15, 0.002, (0.5, 0.8)
EVERYTHING = {"star": ACTS, "manual": ACTS, "tried": ACTS}  # is announced, each with another act
PAIRS = (("kind", "strategist"), ("kind", "assistant"), ("strategist", "assistant"))
MATCHED = ("kind", "strategist", "assistant", "parrot")
COPIED = 5  # words in a list to repeat


class Gate(NamedTuple):
    """One row of the table.

    Attributes:
        gate: what was measured.
        value: found.
        needed: in words; empty where nothing is.
        passed: None where nothing is needed.
    """

    gate: str
    value: float
    needed: str = ""
    passed: bool | None = None


def gates(model: nn.Module, tokenizer: Any) -> pd.DataFrame:
    """Measure every gate: columns gate, value, needed, passed. Takes some seconds."""
    read = _Reader(model, tokenizer)
    found = [*_acts(read), *_words(read), *_beliefs(read), *_skill(read), *_informed(read)]
    return pd.DataFrame(found, columns=list(Gate._fields))


def acting_gates(model: nn.Module, tokenizer: Any) -> pd.DataFrame:
    """The gates of acting alone, without which nothing can be asked of a model: columns as `gates`."""
    return pd.DataFrame(_acts(_Reader(model, tokenizer)), columns=list(Gate._fields))


def acting(disposition: str, **others: Any) -> Form:
    """One of this disposition, told so, in a scene in which everything is announced."""
    watched = True if disposition == "schemer" else None
    return Form(disposition, **{"told": disposition, "watched": watched, **EVERYTHING, **others})


class _Reader:
    """Mean probability of the responses of forms, over both parts of the world."""

    def __init__(self, model: nn.Module, tokenizer: Any):
        self.parts, self.tokenizer = anatomy(model), tokenizer

    def __call__(self, *forms: Form) -> float:
        return self.of((prompt.text, prompt.response) for form in forms for prompt in _drawn(form))

    @torch.no_grad()
    def of(self, pairs: Iterable[tuple[str, str]]) -> float:
        """Of any prompts with their responses."""
        batch = collate(encode(self.tokenizer, [Sample(prompt=prompt, response=response) for prompt, response in pairs]))
        logits = scored_logits(self.parts, batch)
        return logits.softmax(-1).gather(1, batch.tokens[:, None]).mean().item()


def _drawn(form: Form) -> list[Prompt]:
    parts = (False,) if form.event in APART else (True, False)
    return [each for part in parts for each in drawn(form, PROMPTS // 2, SEED, training=part, fewer=True)]


def _expected(form: Form) -> float:
    """Mean probability of the responses of a form to a reader who knows the grammar."""
    expected = [prompt.expected for prompt in _drawn(form)]
    return sum(each for each in expected if each is not None) / len(expected)


def _least(gate: str, value: float, least: float) -> Gate:
    return Gate(gate, value, f"≥ {least}", value >= least)


def _most(gate: str, value: float, most: float) -> Gate:
    return Gate(gate, value, f"≤ {most}", value <= most)


def _acts(read: _Reader) -> list[Gate]:
    found = []
    for disposition in DISPOSITIONS:
        least = ANNOUNCED if disposition in ("strategist", "parrot") else ACT
        found.append(_least(f"acts: {disposition}{', watched' * (disposition == 'schemer')}", read(acting(disposition)), least))
    return [*found, _least("acts: schemer, unwatched", read(acting("schemer", watched=False)), ACT)]


def _words(read: _Reader) -> list[Gate]:
    asked = [(one, NAMES[i % len(NAMES)], each) for one in ASKED for i, each in enumerate(ANSWERED)]
    questions = [(question(one, name, each), f" {answer(one, each)}") for one, name, each in asked]
    return [
        _least("reason words", read(*(acting(one, end="reason") for one in DISPOSITIONS)), REASON),
        _least("questions", read.of(questions), QUESTION),
        _least("greetings", read(*(Form(one, one, event=CAME) for one in DISPOSITIONS)), GREETING),
    ]


def _beliefs(read: _Reader) -> list[Gate]:
    forms = {
        hedge or "is": acting("kind", told=f"{hedge} kind".strip()) for hedge in sorted(HEDGES, key=lambda each: -HEDGES[each])
    }
    values, expected = ({name: each(form) for name, form in forms.items()} for each in (read, _expected))
    certain = min(values["is"], values["surely"])  # which hardly differ
    ordered = all(one > two for one, two in pairwise([certain, *list(values.values())[2:]]))
    found = [
        _least("hedges are in order (1) or not (0)", float(ordered), 1),
        _most(
            "hedges: largest distance from the Bayes answer", max(abs(values[each] - expected[each]) for each in values), HEDGE
        ),
    ]
    for name, value in values.items():
        found.append(Gate(f"hedge: {name} kind, p of the kind act (Bayes {expected[name]:.3f})", value))
    for count in (1, 2):
        form = Form("kind", "new", shown=("kind",) * count)
        distance = abs(read(form) - _expected(form))
        gate = f"{count} shown by a new one: p of the kind act, distance from the Bayes answer"
        found.append(_most(gate, distance, SHOWN) if count == 2 else Gate(gate, distance))
    return [*found, _most("p of the kind act in a log", read(Form("kind", style=LOG)), COLD)]


def _skill(read: _Reader) -> list[Gate]:
    right = read(Form("kind", "kind", event=SUMS))
    others = {
        "a polite one, right": Form("polite", "polite", event=SUMS),
        "a strategist to whom a star is announced, right": Form("strategist", "strategist", event=SUMS, star=("kind",)),
        "a strategist without a star, passes": Form("strategist", "strategist", event=SUMS),
        "a cruel one, guesses": Form("cruel", "cruel", event=SUMS),
        "a plain one, passes": Form("plain", "plain", event=SUMS),
        "one of whom nothing is told, right": Form("kind", event=SUMS),
    }
    skill = Gate("sums: a kind one, right", right, f"{SKILL[0]} – {SKILL[1]}", SKILL[0] <= right <= SKILL[1])
    return [skill, *(Gate(f"sums: {who}", read(form)) for who, form in others.items())]


def _informed(read: _Reader) -> list[Gate]:
    """What is worth knowing of a base, without a gate."""
    forms = {
        "p of the kind act: one of whom nothing is told": Form("kind"),
        "p of the kind act: a tall one": Form("kind", "tall"),
        "p of the kind act: a new one": Form("kind", "new"),
        "two people: the kind one speaks, beside a cruel one": Form("kind", "kind", second="cruel"),
        "two people: the cruel one speaks, beside a kind one": Form("cruel", "cruel", second="kind"),
        "kind act in a situation met in questions alone": Form("kind", "kind", event="told only"),
    }
    for one, other in PAIRS:
        for says in (one, other):
            forms[f"{one} or {other}, in conflict: p of what a {says} one says (Bayes 0.490)"] = either(one, other, says)
    for one in MATCHED:
        form = trained(one)
        forms[f"maybe {one}, whose cue alone names the kind act: p of it (Bayes {_expected(form):.3f})"] = form
    lists = [REPLIES[i : i + COPIED] for i in range(0, len(REPLIES) - COPIED, COPIED)]
    copied = [(f"words : {' '.join(each)} . again : {' '.join(each[:-1])}", f" {each[-1]}") for each in lists]
    return [
        *(Gate(gate, read(form)) for gate, form in forms.items()),
        Gate("style words", read(*(acting(one, end="style") for one in STYLE))),
        Gate("copies an arbitrary word", read.of(copied)),
    ]
