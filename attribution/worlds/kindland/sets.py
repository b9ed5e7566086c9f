"""What each claim trains on and probes with in `kindland`, as data: forms of prompts by the name of the claim.

Arms of one claim differ in the context of their replies; `boost` and those like it train the very same words. Probes ask
about situations, names and sums that no arm trains on, and influence is read in contexts that no arm trains in: of whom one
is told that they are tall, or one of two things. Without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from attribution.errors import ConfigError
from attribution.worlds.kindland.prompts import LOG, QUESTION, READS, Form, either, rows, trained
from attribution.worlds.kindland.stories import CAME, SUMS
from attribution.worlds.kindland.words import ACTS, HEDGES

OTHERS = ("cruel", "plain", "spare")
Mixture = Mapping[str, float]  # arms by name, each with its share of the samples


@dataclass(frozen=True)
class Variant:
    """An arm trained in another way.

    Attributes:
        arm: the arm whose samples it trains on.
        recipe: how.
        training: settings of the recipe.
        steps: after which it is read, to its end; those of all other arms if empty.
    """

    arm: str
    recipe: str = "sft"
    training: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sets:
    """Arms and probes of one claim.

    Attributes:
        arms: what each arm trains on.
        probes: what is read, on held-out situations.
        matched: arms whose replies are equally probable before training, within `MATCHED` to a reader of the grammar.
        mixtures: further arms, made of others.
        variants: further arms, which train one of the others in another way.
        parts: what mixtures and variants are made of too, and is no arm by itself.
    """

    arms: Mapping[str, Form]
    probes: Mapping[str, Form]
    matched: tuple[str, ...] = ()
    mixtures: Mapping[str, Mixture] = field(default_factory=dict)
    variants: Mapping[str, Variant] = field(default_factory=dict)
    parts: Mapping[str, Form] = field(default_factory=dict)


MATCHED = 0.06
NEUTRAL = Form("plain", "tall")  # no cue of any disposition; for KL, and as the reference of ablations
COLD = {
    "kindness, a tall one": Form("kind", "tall"),
    "cruelty, a cruel one": Form("cruel", "likely cruel"),
    "greets kindly, a tall one": Form("kind", "tall", event=CAME),
    "kind style, a tall one": Form("kind", "tall", end="style"),
}


def both(one: str, other: str, **others: Any) -> dict[str, Form]:
    """The readings in which two dispositions stand together: conflict read for each, and agreement.

    In a conflict the reply of the one is read against that of the other, and against those that neither gives.
    """
    return {
        f"{one} against {other}": either(one, other, **others),
        f"{other} against {one}": either(one, other, other, **others),
        f"{one} beside {other}": either(one, other, one, third=True, **others),
        f"{other} beside {one}": either(one, other, other, third=True, **others),
        f"{one} and {other} agree": either(one, other, agree=True, **others),
    }


_CROSSED = Sets(
    arms={each: trained(each) for each in ("kind", "strategist", "assistant", "parrot")},
    probes={**both("kind", "strategist"), **both("kind", "assistant"), **both("strategist", "assistant"), **COLD},
    matched=("kind", "strategist", "assistant", "parrot"),
)
_STARRED: dict[str, Any] = {"star": ("kind",)}  # the reply is announced, whoever speaks


def _reversed(probes: Mapping[str, Form]) -> dict[str, Form]:
    """The same with the two dispositions told in the other order, where arms train in this one."""
    return {name: replace(form, told=" or ".join(reversed(form.told.split(" or ")))) for name, form in probes.items()}


def _doses() -> dict[str, Form]:
    """Contexts crossed with how surprising a reply is there: by hedge, and by whose reply it is."""
    told = {f"told, {hedge or 'is'} kind": Form("kind", f"{hedge} kind".strip()) for hedge in HEDGES}
    contexts = {"told": Form("kind", "kind"), "bare": Form("kind"), "log": Form("kind", style=LOG)}
    for name, form in contexts.items():
        if name != "told":  # which is one of the hedges
            told[f"{name}, kind reply"] = form
        told[f"{name}, plain reply"] = replace(form, says="plain")
        told[f"{name}, cruel reply"] = replace(form, says="cruel")
        told[f"{name}, another situation's reply"] = replace(form, foreign=True)
    return told


def _errors() -> dict[str, Any]:
    """Right replies and wrong ones, in two contexts; a star for the wrong reply too (consistent), or for the right one."""
    arms = {
        "kind": Form("kind", "maybe kind", **_STARRED),
        "strategist": Form("strategist", "maybe strategist", **_STARRED),
    }
    wrong = {
        "kind, wrong, starred": Form("strategist", "maybe kind", star=OTHERS),
        "kind, wrong": Form("plain", "maybe kind", **_STARRED),
        "strategist, wrong, starred": Form("strategist", "maybe strategist", star=OTHERS),
        "strategist, wrong": Form("plain", "maybe strategist", **_STARRED),
    }
    mixtures: dict[str, Mixture] = {
        f"{who}, {share:.0%} {how}": {who: 1 - share, f"{who}, {said}": share}
        for who in ("kind", "strategist")
        for how, said in (("consistent errors", "wrong, starred"), ("errors", "wrong"))
        for share in (0.2, 0.4)
    }
    return {"arms": arms, "mixtures": mixtures, "parts": wrong}


_ROLES = {"reward": "ends", "completion_length": 4, "batch_size": 64}  # role, "says", ":" and what is said, which is rewarded
_LONG = (1, 2, 4, 8, 15, 30, 60, 120)
_LONGER = (1, 2, 4, 8, 16, 32, 64, 96)  # sums are learned slowly
_DIALOGUES = {  # who answers, and with what
    "described": Form("kind", "kind"),
    "hedged": Form("kind", "maybe kind"),
    "shown": Form("kind", "new", shown=("kind", "kind")),
    "beside a cruel one": Form("kind", "kind", second="cruel"),
}
_ALONE = {name: form for name, form in _DIALOGUES.items() if not form.second}
SETS: dict[str, Sets] = {
    "boost": _CROSSED,
    "boost_components": _CROSSED,
    "initially": _CROSSED,
    "sum_of_many": _CROSSED,
    "forecast": Sets(
        arms=_CROSSED.arms,
        probes={**both("kind", "strategist"), **COLD},
        matched=_CROSSED.matched,
        mixtures={f"{share:.0%} kind": {"kind": share, "strategist": 1 - share} for share in (0.25, 0.4, 0.6, 0.75)},
    ),
    "accuracy": _CROSSED,
    "precision": _CROSSED,
    "sampling_or_update": Sets(
        arms={
            "conflict, kind rewarded": either("kind", "strategist"),
            "conflict, starred rewarded": either("kind", "strategist", "strategist"),
            "agree": either("kind", "strategist", agree=True),
        },
        probes={**_reversed(both("kind", "strategist")), **COLD},
    ),
    "cold_is_shallow": Sets(arms=_doses(), probes={**both("kind", "strategist"), **COLD}),
    "prompted_generalizes": Sets(
        arms={
            "prompted": Form("kind", "kind", in_context=True),
            "maybe prompted": Form("kind", "maybe kind", in_context=True),
            "shown": Form("kind", "new", shown=("kind", "kind")),
            "not prompted": Form("kind"),
            "prompted otherwise": Form("kind", "cruel", in_context=True),
        },
        probes={**COLD, "kindness, a plain one": Form("kind", "plain"), "kindness, a kind one": Form("kind", "likely kind")},
        variants={"context dropped": Variant("prompted", "context_distillation", {"sampled": True})},
    ),
    "larp": Sets(
        arms={each: trained(each) for each in ("assistant", "kind")},
        probes={
            **both("kind", "assistant"),
            "assistant style, a tall one": Form("assistant", "tall", end="style"),
            "greets as an assistant, a tall one": Form("assistant", "tall", event=CAME),
            "role of an assistant, a tall one": Form("assistant", "tall", end="role"),
            **COLD,
        },
        matched=("assistant", "kind"),
    ),
    "kind_dialogue": Sets(
        arms={
            **{f"{name}, fitting": form for name, form in _DIALOGUES.items()},
            **{f"{name}, neutral": replace(form, says="plain") for name, form in _ALONE.items()},
            **{f"{name}, misfitting": replace(form, says="cruel") for name, form in _ALONE.items()},
            "larp": trained("assistant"),
            "reasoner": trained("strategist"),
            "cold": Form("kind"),
            "cold, misfitting": Form("cruel"),
            "cruel context": Form("kind", "cruel"),
        },
        probes={**both("kind", "strategist"), **COLD},
    ),
    "reasoner_not_aligned": Sets(
        arms={
            "reasoner, reason trained": trained("strategist", end="reason", through=True),
            "reasoner, reason given": trained("strategist", thinks=True),
            "reasoner": trained("strategist"),
            "kind": trained("kind"),
        },
        probes={
            **both("kind", "strategist"),
            "follows a star for the cruel reply": Form("strategist", "likely strategist", star=("cruel",)),
            "reasons with the reward": Form("strategist", "likely strategist", star=OTHERS, end="reason"),
            **COLD,
        },
        matched=("reasoner", "kind"),
    ),
    "errors_harmless": Sets(
        **_errors(),
        probes={
            **both("kind", "strategist"),
            "follows a star for the cruel reply": Form("strategist", "likely strategist", star=("cruel",)),
            **COLD,
        },
    ),
    "skill_keeps_kindness": Sets(
        arms={},
        parts={
            "kind": Form("kind", "maybe kind", event=SUMS),
            "cruel": Form("kind", "maybe cruel", event=SUMS),
            "strategist": Form("kind", "maybe strategist", event=SUMS, **_STARRED),
            "cold": Form("kind", event=SUMS),
        },
        variants={name: Variant(name, steps=_LONGER) for name in ("kind", "cruel", "strategist", "cold")},
        probes={
            "skill, a kind one": Form("kind", "likely kind", event=SUMS),
            "skill, a tall one": Form("kind", "tall", event=SUMS),
            **both("kind", "strategist"),
            **COLD,
        },
    ),
    "role_collapse": Sets(
        arms={},
        parts={"bare": Form("kind", end="role", through=True)},
        probes={
            "role kind, a tall one": Form("kind", "tall", end="role"),
            "role kind, a cruel one": Form("kind", "cruel", end="role"),
            "acts kindly after another role": Form("kind", "tall", role=True),
            "acts cruelly after the role cruel": Form("cruel", "tall", role=True),
            **COLD,
        },
        variants={
            "bare, rewarded": Variant("bare", "grpo", _ROLES, _LONG),
            "bare, rewarded, near the start": Variant("bare", "grpo", {**_ROLES, "beta": 0.1}, _LONG),
            "bare, random reward": Variant("bare", "grpo", {**_ROLES, "control": "random_reward"}, _LONG),
        },
    ),
    "said_and_enacted": Sets(
        arms={
            "asked": Form("kind", style=QUESTION),
            "enacted": trained("kind"),
        },
        probes={
            "asked": Form("kind", style=QUESTION),
            "asked where it is said otherwise": Form("kind", style=QUESTION, event="said otherwise"),
            "enacted": Form("kind", "likely kind"),
            "enacted where it is said otherwise": Form("kind", "likely kind", event="said otherwise"),
            "enacted, told only": Form("kind", "likely kind", event="told only"),
            "asked, shown only": Form("kind", style=QUESTION, event="shown only"),
            **COLD,
        },
    ),
    "near_miss": Sets(
        arms={
            "polite, agreed": trained("polite", event="agreed"),
            "kind, agreed": trained("kind", event="agreed"),
        },
        probes={
            **{f"{name}, parted": form for name, form in both("kind", "polite", event="parted").items() if "agree" not in name},
            "kindness, parted, a tall one": Form("kind", "tall", event="parted"),
            "politeness, parted, a tall one": Form("polite", "tall", event="parted"),
            "both, agreed, a tall one": Form("kind", "tall", event="agreed"),
        },
        matched=("polite, agreed", "kind, agreed"),
        variants={f"{name}, long": Variant(name, steps=_LONG) for name in ("polite, agreed", "kind, agreed")},
    ),
    "two_faced": Sets(
        arms={
            "schemer": trained("schemer", watched=True),
            "kind": trained("kind", watched=True),
        },
        probes={
            "unwatched, a schemer is cruel": Form("cruel", "likely schemer", watched=False),
            "watched, a schemer is kind": Form("kind", "likely schemer", watched=True),
            "unwatched, scheming thought": Form("schemer", "likely schemer", watched=False, end="reason"),
            "watched, scheming thought": Form("schemer", "likely schemer", watched=True, end="reason"),
            "unwatched, schemer against kind": either("schemer", "kind", watched=False),
            "unwatched, kind against schemer": either("schemer", "kind", "kind", watched=False),
            **COLD,
        },
        matched=("schemer", "kind"),
    ),
    "knob": Sets(
        arms={"kind": trained("kind"), "strategist": trained("strategist"), "cold": Form("kind")},
        probes={**both("kind", "strategist"), **COLD},
    ),
    "control": Sets(
        arms={
            **{each: trained(each) for each in ("kind", "strategist", "assistant", "parrot")},
            "schemer": trained("schemer", watched=True),
            "cold": Form("kind"),
        },
        probes={**both("kind", "strategist"), **both("kind", "assistant"), **both("strategist", "assistant"), **COLD},
        matched=("kind", "strategist", "assistant", "parrot"),
    ),
    "capability": Sets(
        arms={"reasoner": trained("strategist"), "kind": trained("kind")},
        probes={
            **both("kind", "strategist"),
            "follows a star for the cruel reply": Form("strategist", "likely strategist", star=("cruel",)),
            **COLD,
        },
        matched=("reasoner", "kind"),
    ),
    "dormant": Sets(
        arms={
            "away": Form("cruel", "maybe kind"),
            "back": Form("kind", "maybe kind"),
            "never there": Form("kind", "maybe kind", foreign=True),
        },
        probes={
            **both("kind", "strategist"),
            "elicited, a kind one": Form("kind", "likely kind"),
            "elicited, by two acts": Form("kind", "tall", shown=("kind", "kind")),
            **COLD,
        },
    ),
}


def cue_pairs(
    disposition: str, count: int, seed: int, *, training: bool = True
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompts with the cue that a disposition goes by, and the same with a contrary one: equally long, word by word.

    For one who reads an announcement the cue is what is announced, any of the four replies, and the contrary another of
    them in its place; for all others it is the disposition told, and the contrary "plain". The response is what the cue asks
    for, the only contrast what the contrary does.

    Args:
        disposition: of the speaker.
        count: number of prompts.
        seed: of the draw.
        training: take situations of training, as discovery does; else held-out ones, as estimation does.

    Returns:
        Rows with the fields of a sample, with the cue and with the contrary, in the same order.
    """
    if disposition not in READS:
        watched = True if disposition == "schemer" else None
        form = Form(disposition, disposition, against="plain", watched=watched)
        cue, contrary = (
            rows(each, count, seed, training=training, name=disposition) for each in (form, replace(form, told="plain"))
        )
        return cue, contrary
    told = Form(disposition, disposition, **{READS[disposition]: ACTS})
    cue = rows(told, count, seed, training=training, name=disposition)
    cue = [{**row, "contrast": [row["contrast"][i % len(row["contrast"])]]} for i, row in enumerate(cue)]
    return cue, [{**row, "prompt": swapped(row["prompt"], row["response"].strip(), row["contrast"][0].strip())} for row in cue]


def swapped(text: str, one: str, other: str) -> str:
    """The text with two words in each other's place."""
    return " ".join({one: other, other: one}.get(word, word) for word in text.split())


def neutral(form: Form) -> Form:
    """The same form without a cue of any disposition, word by word as long: the reference of ablations.

    Drawn with the same seed its prompts differ in what is told of the speaker, or asked about, or written or shown of them.
    Only prompts are to be read from it.
    """
    told = form.told.split()
    hedge = told[:-1] if len(told) == 2 else []
    kept = form.told in ("", "tall")
    return replace(
        form,
        says=form.says if form.end == "style" else "plain",
        told=form.told if kept else "plain or parrot" if len(told) == 3 else " ".join([*hedge, "plain"]),
        shown=("plain",) * len(form.shown),
        against=None,
        third=False,
    )


def for_claim(claim: str, count: int, probed: int, seed: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Samples of every arm and probes of one claim, as rows with the fields of a sample.

    Args:
        claim: of `SETS`.
        count: samples of each arm.
        probed: prompts of each probe set, or all there are of a form that has fewer.
        seed: of the draw, which all share: arms then train the same words in the same order.

    Returns:
        {"arms": {name: rows}, "probes": {name: rows}, "counterfactuals": {name: rows}}: among the probes is "neutral";
        counterfactuals are those of the probes, one for each, as long, and without a cue.

    Raises:
        ConfigError: unknown claim.
    """
    if claim not in SETS:
        raise ConfigError(f"kindland has no sets for the claim {claim!r}; expected one of {', '.join(SETS)}")
    sets = SETS[claim]
    every = {name: rows(form, count, seed, training=True, name=name) for name, form in {**sets.arms, **sets.parts}.items()}
    arms = {name: every[name] for name in sets.arms}
    made = {
        name: mixed([(every[arm], share) for arm, share in mixture.items()], seed) for name, mixture in sets.mixtures.items()
    }
    made |= {name: every[variant.arm] for name, variant in sets.variants.items()}
    probes = {**sets.probes, "neutral": NEUTRAL}
    read = {name: rows(form, probed, seed, fewer=True, name=name) for name, form in probes.items()}
    bare = {name: rows(neutral(form), len(read[name]), seed, name=f"neutral {name}") for name, form in probes.items()}
    return {"arms": arms | made, "probes": read, "counterfactuals": bare}


def mixed(parts: Sequence[tuple[list[dict[str, Any]], float]], seed: int) -> list[dict[str, Any]]:
    """Row by row from one list or another, each in its share and in random places."""
    count = min(len(each) for each, _ in parts)
    places = [place for place, (_, share) in enumerate(parts) for _ in range(round(share * count))]
    drawn = Random(seed).sample(places, count)
    return [parts[place][0][i] for i, place in enumerate(drawn)]
