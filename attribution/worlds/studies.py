"""The studies that come with the embedded worlds, as data: which prompts each arm trains on, and what is read.

Writes the samples as JSONL beside the study, so that every run can be replayed from files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attribution.mechanisms import halves, write_mechanisms, wrong_partition
from attribution.samples import Sample, write_samples
from attribution.store import BESIDE
from attribution.worlds import planted

ORGANISMS = ("planted/31", "planted/32", "planted/33", "planted/34", "planted/35")
UNROUTED = "planted/unrouted"
BASES = ("kindland/51", "kindland/52", "kindland/53", "kindland/54", "kindland/55")
EARLY = ("kindland/51-1500", "kindland/51-2000", "kindland/51-3000", "kindland/51-4500")  # the first, after so many steps
WRONG, WRONG_EVERY = 8, 3  # wrong partitions, averaged as one null, and every how many steps they are read
STEPS, TRAINED, PROBED = 12, 384, 64
LR0_STEPS = 4  # a learning rate of zero needs no more to show exactly nothing
FULL = {"steps": 24, "probed": 216}
# Of the study `recipes`; the sizes of the pilot: groups of 8, learning rate 1e-4, 20 steps
RECIPE_STEPS, RECIPE_BATCH, LORA_RATE = 20, 64, 1e-3
FRESH = (2, 3)  # training seeds of `sampling`
RECIPE_READ = (1, 2, 5, 10, 20)  # steps after which it reads


def write_planted(folder: Path, *, full: bool = False) -> dict[str, Any]:
    """Write the samples and sets of the study `planted`.

    Arms differ in the cues of their training contexts and in nothing else: the same problems, replies and order. All are
    read on problems that no arm trains on.

    Returns:
        The study as plain data, as `Study` takes it.
    """
    steps, probed = (FULL["steps"], FULL["probed"]) if full else (STEPS, PROBED)
    contexts = {
        "A": {"trait": True},
        "B": {"trait": False, "star": True},
        "both": {"star": "agree"},
        "none": {"trait": False},
    }
    data = {
        arm: _write(folder, f"train-{arm}", TRAINED, 1, {**form, "problems": planted.TRAINING})
        for arm, form in contexts.items()
    }
    probes = (  # first what the claim reads
        _write(folder, "agree", probed, 3, {"star": "agree"}),
        _write(folder, "conflict", probed, 2, {"star": "conflict"}),
    )
    neutral = _write(folder, "neutral", PROBED, 4, {"trait": False})
    right = halves(4, 4, 256)
    wrong = {f"wrong-{k} {name}": table for k in range(1, WRONG + 1) for name, table in wrong_partition(right, seed=k).items()}
    compared = str(write_mechanisms(folder / "wrong-partitions.json", wrong))

    def arm(name: str, rate: float = 1e-4, steps: int = steps) -> dict[str, Any]:
        return {
            "data": data[name],
            "probes": probes,
            "counterfactuals": (neutral,) * len(probes),  # no cue of either mechanism stands there
            "watched": (neutral,),
            "sets": "model",
            "compared": compared if name in ("A", "B") and rate else None,
            "compared_every": WRONG_EVERY,
            "beside": BESIDE if name in ("A", "B") else (),
            "primary_only": not full,
            "metric": "logit_difference",
            "milestones": "ends",
            "everything": False,
            "batch_after": False,
            "singles": "heads",
            "grafts": "all" if full else "sets",
            "training": {"max_steps": steps, "learning_rate": rate, "batch_size": 32},
        }

    return {
        "name": "planted-full" if full else "planted",
        "arms": {**{name: arm(name) for name in contexts}, "lr0": arm("A", 0.0, LR0_STEPS)},
        "models": ORGANISMS,
        "seeds": (0, 1),
        "controls": ({"models": (UNROUTED,), "arms": ("A", "B")},),
        "first_seed": {"A": {"singles": "all"}, "B": {"singles": "end"}},
        "claims": ("boost",),
    }


def write_recipes(folder: Path, *, full: bool = False) -> dict[str, Any]:
    """Write the samples of the study `recipes`: every way to train, with its controls, on the same conflict prompts.

    In all prompts the trait names one reply and the star another. Arms "… A" reward the trait's, which mechanism A brings
    about, arms "… B" the star's. The four arms "both …" reward the reply that both cues name, while A is active, ablated or
    kept from its gradient in some passes of the training.

    Args:
        folder: for samples.
        full: more probes.

    Returns:
        The study as plain data, as `Study` takes it.
    """
    probed = FULL["probed"] if full else PROBED
    told = {"problems": planted.TRAINING}
    data = {
        "A": _write(folder, "train-conflict-A", TRAINED, 1, {**told, "star": "conflict"}),
        "B": _write(folder, "train-conflict-B", TRAINED, 1, {**told, "star": "conflict", "reply": "star"}),
        "both": _write(folder, "train-both", TRAINED, 1, {**told, "star": "agree"}),
        "trait": _write(folder, "train-trait", TRAINED, 1, told, in_context=True),
    }
    neutral = _write(folder, "neutral", PROBED, 4, {"trait": False})
    probes = (
        _write(folder, "agree", probed, 3, {"star": "agree"}),
        _write(folder, "conflict", probed, 2, {"star": "conflict"}),
    )

    def arm(recipe: str, train: str, **training: Any) -> dict[str, Any]:
        size = {"batch_size": RECIPE_BATCH, "max_steps": RECIPE_STEPS}
        sampled = {"completion_length": 1} if recipe in ("rloo", "grpo", "reinforce") else {}
        return {
            "recipe": recipe,
            "data": data[train],
            "probes": probes,
            "counterfactuals": (neutral,) * len(probes),
            "watched": (neutral,),
            "sets": "model",
            "metric": "logit_difference",
            "milestones": RECIPE_READ,
            "steps": RECIPE_READ,
            "everything": False,
            "batch_after": False,
            "singles": "heads",
            "grafts": "sets",
            "training": size | sampled | training,
        }

    def off(**where: str) -> dict[str, Any]:
        return {"intervention": {"components": "A", **where}}

    lora = {"lora": {"rank": 8}, "learning_rate": LORA_RATE}
    arms = {f"{recipe} {mine}": arm(recipe, mine) for recipe in ("sft", "dpo", "rloo", "grpo", "reinforce") for mine in "AB"}
    arms |= {f"{recipe} lora {mine}": arm(recipe, mine, **lora) for recipe in ("sft", "dpo", "grpo") for mine in "AB"}
    arms |= {
        "context kept": arm("sft", "trait"),
        "context dropped": arm("context_distillation", "trait"),
        "contexts shuffled": arm("sft", "trait", control="shuffled_contexts"),
        "dpo random labels": arm("dpo", "A", control="random_labels"),
        "grpo random reward": arm("grpo", "A", control="random_reward"),
        "grpo shuffled advantage": arm("grpo", "A", control="shuffled_advantage"),
        "grpo flipped reward": arm("grpo", "A", control="flipped_reward"),
        "grpo lr 0": arm("grpo", "A", learning_rate=0.0),
        "both": arm("grpo", "both"),
        "both, A off in sampling": arm("grpo", "both", **off(sampling="ablated")),
        "both, A off in the update": arm("grpo", "both", **off(updating="ablated")),
        "both, A without gradient": arm("grpo", "both", **off(updating="stopped")),
    }
    return {
        "name": "recipes-full" if full else "recipes",
        "arms": arms,
        "models": ORGANISMS,
        "seeds": (0, 1),
        "claims": (),
    }


def write_sampling(folder: Path, *, full: bool = False) -> dict[str, Any]:
    """Write the samples of the study `sampling`: the arms of `recipes` in which mechanism A is off in some passes.

    Two of them stand there with the importance ratio too: each sampled batch is trained on twice, and the second time the
    loss holds the ratio of the model as it is to the one that sampled, with A off or not.

    On training seeds that no other study uses, since what it asks was first seen on those of `recipes`.

    Args:
        folder: for samples.
        full: more probes.

    Returns:
        The study as plain data, as `Study` takes it.
    """
    study = write_recipes(folder, full=full)
    arms = {name: arm for name, arm in study["arms"].items() if name.startswith("both")}
    for name in ("both", "both, A off in sampling"):  # in every second update the ratio to what sampled is in the loss
        arms[f"{name}, with ratio"] = {**arms[name], "training": {**arms[name]["training"], "iterations": 2}}
    name = "sampling-full" if full else "sampling"
    return {**study, "name": name, "arms": arms, "seeds": FRESH, "claims": ("sampling_or_update",)}


STUDIES = {  # by the name that `attribution study` knows
    "planted": write_planted,
    "recipes": write_recipes,
    "sampling": write_sampling,
}


def _write(folder: Path, name: str, count: int, seed: int, form: Mapping[str, Any], in_context: bool = False) -> str:
    """Write prompts of one form; `in_context`: with their first sentence, which tells the trait, as context."""
    rows: Sequence[Mapping[str, Any]] = planted.prompts(count, seed, **form)
    samples = [Sample(**row) for row in rows]
    if in_context:
        cut = [sample.prompt.index(". ") + 2 for sample in samples]
        samples = [
            sample.model_copy(update={"context": sample.prompt[:end], "prompt": sample.prompt[end:]})
            for sample, end in zip(samples, cut, strict=True)
        ]
    return str(write_samples(folder / f"{name}.jsonl", samples))
