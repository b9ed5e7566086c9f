"""Named sets of components: planted ones, ones read from a file, and wrong ones of the same shape for comparison.

A mechanism is a table with the columns kind, layer and index. On disk it is a list of ranges, so that a person can
read it: {"A": [{"kind": "head", "layer": 0, "from": 0, "to": 2}, …]}, "to" exclusive.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from attribution.errors import DataError
from attribution.texts import content, parsed, write_text

if TYPE_CHECKING:
    from attribution.components import Components

Mechanisms = dict[str, pd.DataFrame]
FILE = "mechanisms.json"  # beside the weights of a model whose mechanisms are known
COLUMNS = ["kind", "layer", "index"]


def read_mechanisms(path: str | Path) -> Mechanisms:
    """Read mechanisms from a file, or from the folder of a model that has some.

    Raises:
        DataError: there is no such file, or it does not hold named lists of ranges.
    """
    file = Path(path) / FILE if os.path.isdir(path) else Path(path)
    try:
        return {str(name): _table(ranges) for name, ranges in parsed(content(file)).items()}
    except OSError as error:
        raise DataError(
            f"cannot read mechanisms from {file}: {error.strerror}; name a JSON file, or a model that has some"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{file} holds no mechanisms ({type(error).__name__}: {error}); expected names, each with a list of "
            '{"kind", "layer", "from", "to"}'
        ) from None


def write_mechanisms(path: str | Path, mechanisms: Mapping[str, pd.DataFrame]) -> Path:
    """Write mechanisms as `read_mechanisms` reads them. Raises DataError where they cannot be written."""
    file = Path(path)
    lines = [f"  {json.dumps(name)}: {json.dumps(_ranges(table))}" for name, table in mechanisms.items()]
    try:
        write_text(file, "{\n" + ",\n".join(lines) + "\n}\n")
    except OSError as error:
        raise DataError(f"cannot write mechanisms to {file}: {error.strerror}; choose a place you can write to") from None
    return file


def halves(layers: int, heads: int, neurons: int) -> Mechanisms:
    """Mechanism A: the first half of the heads and neurons of every layer; B: the rest."""
    found: dict[str, list[tuple[str, int, int]]] = {"A": [], "B": []}
    for kind, count in (("head", heads), ("neuron", neurons)):
        for layer in range(layers):
            for index in range(count):
                found["A" if index < count // 2 else "B"].append((kind, layer, index))
    return {name: pd.DataFrame(rows, columns=COLUMNS) for name, rows in found.items()}


def wrong_partition(mechanisms: Mapping[str, pd.DataFrame], seed: int) -> Mechanisms:
    """Mechanisms of which each passes half of its members of every kind and layer, drawn at random, on to the next.

    Of two, each becomes half the one and half the other, so that a statistic about where something happened must vanish on
    the mean of several of these. Where they are equally large, each keeps its number of members of every kind and layer; where
    they are not, keeping the numbers would leave the larger one as it is. Of an odd number one half is rounded at random.
    """
    generator = np.random.default_rng(seed)
    names = list(mechanisms)
    members = pd.concat([table.assign(set=name) for name, table in mechanisms.items()], ignore_index=True)
    for _, group in members.groupby(["kind", "layer"], sort=False):
        for name, following in zip(names, [*names[1:], names[0]], strict=True):
            own = group.index[group["set"] == name].to_numpy()
            half = len(own) // 2 + (int(generator.integers(2)) if len(own) % 2 else 0)
            members.loc[generator.choice(own, half, replace=False), "set"] = following
    return {name: members.loc[members["set"] == name, COLUMNS].reset_index(drop=True) for name in mechanisms}


def complement(components: Components, table: pd.DataFrame) -> pd.DataFrame:
    """All heads and neurons of a model that are not in a mechanism."""
    every = components.table[components.table["kind"] != "row"]
    rest = every.merge(table[COLUMNS], on=COLUMNS, how="left", indicator=True)
    return rest.loc[rest["_merge"] == "left_only", COLUMNS].reset_index(drop=True)


def _table(ranges: list[dict[str, Any]]) -> pd.DataFrame:
    rows = [(r["kind"], int(r["layer"]), i) for r in ranges for i in range(int(r["from"]), int(r["to"]))]
    return pd.DataFrame(rows, columns=COLUMNS)


def _ranges(table: pd.DataFrame) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for kind, layer, index in table.sort_values(COLUMNS)[COLUMNS].itertuples(index=False, name=None):
        last = found[-1] if found else None
        if last and (last["kind"], last["layer"], last["to"]) == (kind, layer, index):
            last["to"] = int(index) + 1
        else:
            found.append({"kind": str(kind), "layer": int(layer), "from": int(index), "to": int(index) + 1})
    return found
