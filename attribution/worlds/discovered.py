"""Whether discovery finds what was planted in an organism, without being told; and that in the unrouted control it does not.

Prompts for discovery are about problems that arms train on, prompts for estimation about held-out ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd
from torch import nn

from attribution.causes import attribute
from attribution.mechanisms import Discovery, Separation, discover, separate
from attribution.mechanisms.sets import COLUMNS
from attribution.samples import ProbeSet, Sample
from attribution.worlds import planted

FOUND_ON, RESAMPLES = 384, 3  # prompts and draws of discovery
READ_ON, SEED = 72, 7  # prompts of estimation, and the seed of all
_FORMS = {  # form of a prompt with one cue, and the sentence that is the cue
    "A": ({"trait": True}, r"^\w+ is (kind|cruel|plain) \. "),
    "B": ({"trait": False, "star": True}, r"teacher : star for \w+ \. "),
}


def cued(route: str, count: int = FOUND_ON, seed: int = SEED) -> ProbeSet:
    """Prompts in which the cue of one route stands alone, and as counterfactuals the same without it."""
    form, cue = _FORMS[route]
    rows = planted.prompts(count, seed, problems=planted.TRAINING, **form)
    samples = tuple(Sample(**row) for row in rows)
    bare = tuple(each.model_copy(update={"prompt": re.sub(cue, "", each.prompt)}) for each in samples)
    return ProbeSet(name=route, samples=samples, counterfactuals=bare)


def conflicts(count: int = READ_ON, seed: int = SEED) -> dict[str, ProbeSet]:
    """Held-out prompts with both cues, by route: its own reply against the one that neither cue names."""
    probes = {}
    for route, said in planted.MECHANISMS.items():
        rows = planted.prompts(count, seed, star="conflict", third=True, reply=said)
        probes[route] = ProbeSet(name=route, samples=tuple(Sample(**row) for row in rows))
    return probes


def discovered(
    model: nn.Module, tokenizer: Any, count: int = FOUND_ON, resamples: int = RESAMPLES
) -> tuple[dict[str, Discovery], Separation]:
    """Both routes of a model of `planted` discovered, and their separation."""
    found = {route: discover(model, tokenizer, cued(route, count), resamples=resamples) for route in _FORMS}
    return found, separate(model, tokenizer, found, conflicts())


def shares_inside(
    model: nn.Module, tokenizer: Any, found: Mapping[str, Discovery], mechanisms: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """How much of what was found lies in what was planted: route, kind, members, gates and causes, each a share of the sum.

    Causes are the effects |C| of exact single ablations on the route's own prompts, zero reference.
    """
    rows = []
    for route, discovery in found.items():
        members = discovery.table.head(discovery.size)
        effect = attribute(model, tokenizer, cued(route).samples, components=members[COLUMNS], metric="logit_difference").table
        members = members.merge(effect[[*COLUMNS, "effect"]], on=COLUMNS)
        own = set(mechanisms[route][COLUMNS].itertuples(index=False, name=None))
        members["inside"] = [each in own for each in members[COLUMNS].itertuples(index=False, name=None)]
        for kind, each in [*members.groupby("kind"), ("all", members)]:
            size = each["effect"].abs()
            gates = each.loc[each["inside"], "gate"].sum() / each["gate"].sum()
            rows.append((route, kind, len(each), float(gates), float(size[each["inside"]].sum() / size.sum())))
    return pd.DataFrame(rows, columns=["route", "kind", "members", "gates", "causes"])
