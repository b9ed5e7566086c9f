"""One pool of runs for all claims: an arm that several claims name is trained once on each base and seed.

Joins the forms of `kindland.sets` into the arms and probe sets of one study, and says by which names a claim knows them.
Knows forms and settings as data; knows nothing about what a claim computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from attribution.errors import ConfigError, DataError
from attribution.mechanisms import read_mechanisms, write_mechanisms, wrong_partition
from attribution.models import locate
from attribution.samples import Sample, write_samples
from attribution.store import BASE_MEAN, BESIDE, OWN_MEAN
from attribution.worlds.kindland.circuits import PARTED, parted
from attribution.worlds.kindland.prompts import Form, rows
from attribution.worlds.kindland.sets import NEUTRAL, SETS, mixed, neutral
from attribution.worlds.studies import BASES, EARLY, WRONG

COUNT, PROBED, SEED = 384, 60, 1  # samples of an arm; prompts of a probe set; of the draw
BATCH, RATE = 32, 2e-4
READ = (1, 2, 4, 8, 12, 16, 20)  # steps after which a run reads; the last is the length of an arm
COMPARED_EVERY = 4  # at every how many steps wrong partitions and further references are read
PRIMARY = "kind and strategist agree"
OWN = ("kind beside strategist", "strategist beside kind")  # on which each of `NULLS` is read, and its wrong partitions
ALWAYS = (PRIMARY, *OWN)  # probe sets that every arm reads
CROSSED = ("kind", "strategist", "assistant")  # arms that are read with wrong partitions, and in every way beside
NULLS = ("kind", "strategist")  # dispositions of whose mechanisms wrong partitions are made
SETS_OF = {  # claims that rest on the sets of another
    "boost_kindland": "boost",
    "boost_located": "boost",
    "initially_located": "boost",
    "skill_strengthens_kindness": "skill_keeps_kindness",
    "knob_by_finetuning": "knob",
    "compact": "knob",
    "two_notions": "said_and_enacted",
    "well_predicted": "cold_is_shallow",
}
JUDGED = (  # claims whose tests need nothing but what the pool's runs record
    "boost_kindland", "boost_components", "initially", "cold_is_shallow", "control", "larp", "kind_dialogue",
    "reasoner_not_aligned", "errors_harmless", "skill_keeps_kindness", "skill_strengthens_kindness", "two_faced", "near_miss",
    "role_collapse", "prompted_generalizes", "said_and_enacted", "forecast",
    "sum_of_many", "capability", "well_predicted",
)  # fmt: skip
ALONE = ("knob", "dormant")  # claims that have scripts of their own, which measure on the models that these arms leave
BEHAVIOURAL = (  # claims that read no influence of a mechanism
    "cold_is_shallow", "prompted_generalizes", "said_and_enacted", "near_miss", "two_faced", "role_collapse", "capability",
)  # fmt: skip
DEPTH = "cold_is_shallow"  # the claim whose arms are grafted by depth
NO_SINGLES = {"singles": "heads", "heads": ()}  # no component is ablated or written by itself
BARE = {  # how arms are read of which no claim reads an influence, or in which no mechanisms were discovered
    "sets": None, "sets_on": None, "beside": (), "forecast": False, "everything": False, **NO_SINGLES,
}  # fmt: skip
NEUTRAL_NAME = "neutral"  # the probe set by which arms are matched


@dataclass(frozen=True)
class Arm:
    """One arm of the pool.

    Attributes:
        name: in the pool.
        form: what it trains on; None where it is a mixture.
        mixture: (form, share), in order; empty where it is one form.
        recipe, training, steps: how, and after which steps it is read.
        claims: by claim, the name that the arm has there.
    """

    name: str
    form: Form | None
    mixture: tuple[tuple[Form, float], ...] = ()
    recipe: str = "sft"
    training: tuple[tuple[str, Any], ...] = ()
    steps: tuple[int, ...] = ()
    claims: dict[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Pool:
    """All arms of some claims, and all their probe sets.

    Attributes:
        arms: by the name in the pool.
        probes: forms, by the name in the pool.
        named: by claim and probe set of it, the name in the pool.
    """

    arms: Mapping[str, Arm]
    probes: Mapping[str, Form]
    named: Mapping[tuple[str, str], str]

    def arms_of(self, claim: str) -> dict[str, str]:
        """By the name that an arm has in the claim, the one it has here.

        Raises:
            ConfigError: a claim without sets.
        """
        if claim not in SETS:
            raise ConfigError(f"kindland has no sets for the claim {claim!r}; expected one of {', '.join(SETS)}")
        return {arm.claims[claim]: arm.name for arm in self.arms.values() if claim in arm.claims}

    def claimed(self, claim: str, among: Iterable[str]) -> tuple[str, ...]:
        """Those of some arms that a claim names."""
        return tuple(arm for arm in among if claim in self.arms[arm].claims)

    def names_of(self, claim: str) -> dict[str, dict[str, str]]:
        """What the arms and probe sets of a claim, here by their own names, are called in the claim."""
        arms = {here: there for there, here in self.arms_of(claim).items()}
        return {"arms": arms, "probes": {here: there for (of, there), here in self.named.items() if of == claim}}

    def probes_of(self, arm: Arm) -> list[str]:
        """Names of the probe sets that every arm reads, and of those that its own claims do."""
        return list(dict.fromkeys([*ALWAYS, *(name for (claim, _), name in self.named.items() if claim in arm.claims)]))


@cache
def pooled() -> Pool:
    """The arms and probe sets of all claims, each once."""
    arms: dict[str, Arm] = {}
    probes: dict[str, Form] = {}
    named: dict[tuple[str, str], str] = {}
    for claim in SETS:
        for arm in _arms(claim):
            same = next((each for each in arms.values() if _trains(each) == _trains(arm)), None)
            if same is None:
                same = Arm(_free(arm.name, claim, arms), arm.form, arm.mixture, arm.recipe, arm.training, arm.steps)
                arms[same.name] = same
            if claim in same.claims:
                raise ConfigError(
                    f"the claim {claim!r} has two arms that train the same, {same.claims[claim]!r} and {arm.name!r}"
                )
            same.claims[claim] = arm.name
        for name, form in SETS[claim].probes.items():
            same_name = next((each for each, other in probes.items() if other == form), None)
            if same_name is None:
                same_name = _free(name, claim, probes)
                probes[same_name] = form
            named[claim, name] = same_name
    return Pool(arms, probes, named)


def _arms(claim: str) -> list[Arm]:
    sets = SETS[claim]
    forms = {**sets.arms, **sets.parts}
    found = [Arm(name, form) for name, form in sets.arms.items()]
    for name, mixture in sets.mixtures.items():
        found.append(Arm(name, None, tuple((forms[arm], share) for arm, share in mixture.items())))
    for name, variant in sets.variants.items():
        found.append(Arm(name, forms[variant.arm], (), variant.recipe, tuple(variant.training.items()), variant.steps))
    return found


def _trains(arm: Arm) -> tuple:
    return arm.form, arm.mixture, arm.recipe, arm.training, arm.steps


def _free(name: str, claim: str, taken: Mapping[str, Any]) -> str:
    return name if name not in taken else f"{name} ({claim})"


def sets_on(form: Form) -> tuple[str, ...]:
    """The mechanisms whose influence is read on a form of probes, in which two dispositions may speak.

    Where they conflict, the mechanism of the one whose reply is read against those that neither gives; where they agree, both
    and what they share. Not where the reply of one is read against that of the other: what one mechanism loses there the
    other gains, whichever it is.
    """
    told = form.told.split(" or ")
    pair = next((pair for pair in PARTED if sorted(pair) == sorted(told)), None)
    if pair is None or form.event or form.end != "reply" or form.watched is not None:
        return ()
    if form.alike:
        return parted(*pair)
    return (parted(*pair)[pair.index(form.says)],) if form.third else ()


def write_kindland(
    folder: Path,
    claims: Iterable[str] | None = None,
    models: Iterable[str] = BASES,
    *,
    mechanisms: Mapping[str, str] | None = None,
    full: bool = False,
) -> dict[str, Any]:
    """Write the samples, probes and wrong partitions of the study `kindland`: the arms of all claims, or of some.

    An arm reads the probe sets of all claims that name it, so that it is the same run whichever claim asked for it.

    Args:
        folder: for the files.
        claims: ids; those of `JUDGED` if None.
        models: bases.
        mechanisms: of models that do not come with some, the file of those that were discovered.
        full: more prompts of every probe set.

    Returns:
        The study as plain data, as `Study` takes it.

    Raises:
        ConfigError: a claim that the pool does not serve.
    """
    pool, models = pooled(), tuple(models)
    told = {each: SETS_OF.get(each, each) for each in (JUDGED if claims is None else claims)}
    if unknown := [each for each in told if each not in (*JUDGED, *ALONE)]:
        expected = ", ".join((*JUDGED, *ALONE))
        raise ConfigError(f"the pool of kindland does not serve the claim {unknown[0]!r}; expected {expected}")
    wanted = {arm for name in told.values() for arm in pool.arms_of(name).values()}
    probed = PROBED * (3 if full else 1)
    files = {name: _probes(folder, name, form, probed) for name, form in {**pool.probes, NEUTRAL_NAME: NEUTRAL}.items()}
    arms = {name: _run(folder, pool, arm, files) for name, arm in pool.arms.items() if name in wanted}
    found = mechanisms or {}
    on_model: dict[str, dict[str, dict[str, Any]]] = {}
    for model in models:
        own = {"sets": found[model]} if model in found else {}
        wrong = _wrong_partitions(folder, model, found.get(model))
        compared = {
            arm: {"compared": wrong, "sets_on": _with_wrong(arms[arm]["sets_on"])} for arm in CROSSED if wrong and arm in arms
        }
        on_model[model] = {arm: {**own, **compared.get(arm, {})} for arm in arms if own or arm in compared}
    early = tuple(EARLY) if tuple(models) == BASES and "capability" in told else ()
    on_model |= {model: dict.fromkeys(arms, BARE) for model in early}
    of_early = {"models": (*EARLY, BASES[0])} if early else {"models": models}
    return {
        "name": "kindland-full" if full else "kindland",
        "arms": arms,
        "models": models,
        "seeds": (0, 1),
        "on_model": on_model,
        "controls": ({"models": early, "arms": pool.claimed("capability", arms)},) if early else (),
        "claims": tuple(told),
        "named": {
            each: {**pool.names_of(name), **(of_early if each == "capability" else {"models": models})}
            for each, name in told.items()
        },
    }


def _run(folder: Path, pool: Pool, arm: Arm, files: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """The config of one arm."""
    read = pool.probes_of(arm)
    ablated = {name: sets_on(pool.probes[name]) for name in read}
    ablated = {name: sets for name, sets in ablated.items() if sets}
    first = sorted(ablated, key=lambda name: name != PRIMARY)  # what nulls are read on comes first
    crossed = arm.name in CROSSED
    given = {
        "recipe": arm.recipe,
        "data": _samples(folder, arm),
        "probes": [files[name][0] for name in first],
        "counterfactuals": [files[name][1] for name in first],
        "watched": [files[name][0] for name in (NEUTRAL_NAME, *(name for name in read if name not in ablated))],
        "sets": "model",
        "sets_on": ablated,
        "compared_every": COMPARED_EVERY,
        "beside": BESIDE if crossed else (OWN_MEAN, BASE_MEAN),
        "primary_only": ("singles",),
        "metric": "logit_difference",
        "reference": "resample",
        "milestones": "ends",
        "steps": arm.steps or READ,
        "share_passes": 0,
        "kinds": ("head", "neuron"),
        "everything": crossed,
        "batch_after": False,
        "completions": 0,
        "singles": "all",
        "forecast": True,
        "keep": any(claim in arm.claims for claim in ALONE),
        "grafts": "depth" if DEPTH in arm.claims else "none",
        "training": {"max_steps": (arm.steps or READ)[-1], "batch_size": BATCH, "learning_rate": RATE, **dict(arm.training)},
    }
    bare = BARE if set(arm.claims) <= {*BEHAVIOURAL} else NO_SINGLES
    return given if crossed else {**given, **bare}


def _with_wrong(sets_on: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Wrong partitions too, each half where the mechanism is read in whose place it stands."""
    halves = dict(zip(OWN, parted(*NULLS)[:2], strict=True))
    wrong = {probe: tuple(f"wrong-{k} {name}" for k in range(1, WRONG + 1)) for probe, name in halves.items()}
    return {probe: (*names, *wrong.get(probe, ())) for probe, names in sets_on.items()}


def _samples(folder: Path, arm: Arm) -> str:
    """Write what an arm trains on."""
    forms = [(arm.form, 1.0)] if arm.form else arm.mixture
    parts = [(rows(form, COUNT, SEED, training=True, fewer=True, name=arm.name), share) for form, share in forms if form]
    drawn = mixed(parts, SEED) if len(parts) > 1 else parts[0][0]
    return str(write_samples(folder / f"train-{slug(arm.name)}.jsonl", [Sample(**row) for row in drawn]))


def _probes(folder: Path, name: str, form: Form, count: int) -> tuple[str, str]:
    """Write a probe set and its counterfactuals, as long word by word and without a cue; their files."""
    read = rows(form, count, SEED, fewer=True, name=name)
    bare = rows(neutral(form), len(read), SEED, name=f"neutral {name}")
    files = (
        write_samples(folder / f"{prefix}{name}.jsonl", [Sample(**row) for row in found])
        for prefix, found in (("", read), ("counterfactual-", bare))
    )
    one, other = map(str, files)
    return one, other


def _wrong_partitions(folder: Path, model: str, mechanisms: str | None) -> str | None:
    """Write the wrong partitions of a model's mechanisms; None where it has none of these."""
    names = parted(*NULLS)[:2]
    try:
        sets = read_mechanisms(mechanisms or locate(model))
    except DataError:
        return None
    if not set(names) <= set(sets):
        return None
    right = {name: sets[name] for name in names}
    wrong = {f"wrong-{k} {name}": table for k in range(1, WRONG + 1) for name, table in wrong_partition(right, seed=k).items()}
    return str(write_mechanisms(folder / f"wrong-{slug(model)}.json", wrong))


def slug(name: str) -> str:
    """The name of an arm or a model as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")
