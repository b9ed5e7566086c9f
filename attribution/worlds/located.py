"""The study `located`: the crossover of `kindland` on more bases, read where a wrong partition can come out null.

Of two mechanisms that are each read on their own reply, a wrong partition is half the one and half the other, and grows half
as much in either arm: no null where the effect is real. Where both name the same reply a wrong partition gains from neither
arm more than from the other, so there it can. Runs are the two arms of the pool, and mixtures of them, with nothing recorded
but sets; seeds of one base give nearly the same, so that bases are many and seeds few.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from attribution.store import BASE_MEAN, OWN_MEAN
from attribution.worlds.kindland.circuits import parted
from attribution.worlds.pool import ALWAYS, NO_SINGLES, NULLS, PRIMARY, write_kindland
from attribution.worlds.studies import WRONG

MORE_BASES = tuple(f"kindland/{seed}" for seed in range(56, 74))  # built on demand, none of them shipped
MIXED = ("60% kind", "40% kind", "75% kind", "25% kind")  # arms of the other's samples too, for the curve of power
CLAIMS = ("boost_located", "initially_located")


def write_located(folder: Path, models: Iterable[str], mechanisms: Mapping[str, str]) -> dict[str, Any]:
    """Write the samples, probes and wrong partitions of the study.

    Args:
        folder: for the files.
        models: bases, by folder.
        mechanisms: of models that do not come with some, the file of those that were discovered.

    Returns:
        The study as plain data, as `Study` takes it.
    """
    given = write_kindland(folder, ("forecast",), models, mechanisms=mechanisms)
    wrong = tuple(f"wrong-{k} {name}" for name in parted(*NULLS)[:2] for k in range(1, WRONG + 1))
    lean = {"everything": False, "forecast": False, "beside": (OWN_MEAN, BASE_MEAN), **NO_SINGLES}
    arms = {
        name: _read_on(ALWAYS if name in NULLS else (PRIMARY,), {**given["arms"][name], **lean}) for name in (*NULLS, *MIXED)
    }
    on_model: dict[str, dict[str, dict[str, Any]]] = {}
    for model in given["models"]:
        on_model[model] = {arm: dict(given["on_model"][model].get(arm, {})) for arm in arms}
        for arm in NULLS:
            told, own = arms[arm]["sets_on"], on_model[model][arm]["sets_on"]
            on = {probe: own[probe] for probe in told}
            on_model[model][arm]["sets_on"] = {**on, PRIMARY: (*told[PRIMARY], *wrong)}
    names = given["named"]["forecast"]
    return {
        "name": "located",
        "arms": arms,
        "models": given["models"],
        "seeds": (0, 1),
        "on_model": on_model,
        "claims": CLAIMS,
        "named": {claim: {**names, "models": given["models"]} for claim in CLAIMS},
    }


def _read_on(probes: Collection[str], arm: dict[str, Any]) -> dict[str, Any]:
    """An arm that reads influence on some of its probe sets, and of the others the neutral one alone."""
    places = [place for place, name in enumerate(arm["sets_on"]) if name in probes]
    return {
        **arm,
        **{files: [arm[files][place] for place in places] for files in ("probes", "counterfactuals")},
        "sets_on": {name: sets for name, sets in arm["sets_on"].items() if name in probes},
        "watched": arm["watched"][:1],
    }
