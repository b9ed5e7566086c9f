"""The frames a study hands to its claims: which columns they have, and the check that they have them.

    sets     one row per run, step, probe set and set of components (jointly ablated)
    probes   one row per run, step and probe set
    grafts   one row per run, probe set, set of components whose change is grafted, and set ablated meanwhile; optional
    failed   one row per run that failed; optional
    separations  one row per model and pair of mechanisms; optional

`sets` may have a column `reference`, what ablated activations are replaced by; without it all rows are the claim's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from attribution.errors import RunError
from attribution.store import TRAINING

NEUTRAL = "neutral"  # the probe set on which KL is matched
_RUN = {
    "model": "name of the organism or base",
    "arm": "training condition",
    "seed": "of data order and dropout",
}
COLUMNS: dict[str, dict[str, str]] = {
    "sets": {
        **_RUN,
        "step": "optimizer steps done; 0 is the start",
        "probe": "name of the probe set",
        "set": "name of the set of components; wrong partitions: 'wrong-<k> <name>'",
        "effect": "metric(intact) - metric(set ablated), mean over the probe set, nats",
        "effect_even": "the same over the even-numbered samples",
        "effect_odd": "and over the odd-numbered ones",
        "kl": "KL(ablated || intact) per response token, nats",
    },
    "probes": {
        **_RUN,
        "step": "optimizer steps done; 0 is the start",
        "probe": f"name of the probe set; {NEUTRAL!r}: for matching by KL, {TRAINING!r}: what the arm is trained on",
        "metric": "mean over the probe set, nats",
        "kl": "KL(model now || model at the start) per response token, nats",
        "probability": "mean over the probe set of the probability of the whole response; optional",
    },
    "grafts": {
        **_RUN,
        "probe": "name of the probe set",
        "set": "whose change is put into the model before training: a mechanism or 'remainder'",
        "ablated": "mechanism ablated while reading, or ''",
        "graft": "change of the metric by the graft in that condition, nats",
    },
    "failed": {**_RUN, "reason": "why the run failed"},
    "separations": {
        "model": _RUN["model"],
        "pair": "names of two sets, sorted, with ' | ' between them",
        "dissociated": "1 where each takes its own behaviour and leaves the other's, see `mechanisms.separate`; else 0",
    },
}
_VALUES = {"effect", "effect_even", "effect_odd", "kl", "metric", "probability", "graft", "reason", "dissociated"}
_OPTIONAL = ("probability",)  # not a number where it was not recorded
Frames = Mapping[str, pd.DataFrame]


def checked(frames: Frames, reference: str, needed: tuple[str, ...] = ("sets", "probes")) -> dict[str, pd.DataFrame]:
    """The frames with plain strings as keys and a column `reference`; those that are not needed may be empty.

    Args:
        frames: by the names above.
        reference: what rows of `sets` stand for where no column says so.
        needed: names of those without which there is nothing to test.

    Raises:
        RunError: a needed frame is missing or empty, a column is missing, or a row stands there twice.
    """
    unknown = set(frames) - {*COLUMNS, "singles", "group_grafts", "forecasts"}  # which other tests read
    if unknown:
        raise RunError(f"unknown frame {min(unknown)!r}; expected {', '.join(COLUMNS)}")
    found = {}
    for name, columns in COLUMNS.items():
        frame = frames.get(name)
        if frame is None or frame.empty:
            if name in needed:
                raise RunError(f"there are no rows of {name!r} to test a claim on; run the study's arms first")
            found[name] = pd.DataFrame(columns=[*columns, *(["reference"] if name == "sets" else [])])
            continue
        missing = [column for column in columns if column not in (*frame.columns, *_OPTIONAL)]
        if missing:
            raise RunError(f"frame {name!r} lacks the column {missing[0]!r}; expected {', '.join(columns)}")
        keys = [column for column in columns if column not in _VALUES]
        plain = frame.assign(**{name: np.nan for name in _OPTIONAL if name in columns and name not in frame})
        if name == "sets":
            plain["reference"] = plain["reference"].astype(str) if "reference" in plain else reference
            keys.append("reference")
        for column in keys:
            if column not in ("seed", "step"):
                plain[column] = plain[column].astype(str)
        if plain[keys].isna().to_numpy().any():
            raise RunError(f"frame {name!r} has a row without a key; expected values in {', '.join(keys)}")
        twice = plain.duplicated(keys)
        if name != "failed" and twice.any():
            row = ", ".join(f"{key} {plain.loc[twice, key].iloc[0]}" for key in keys)
            raise RunError(f"frame {name!r} holds one row twice ({row}); hand in every run once")
        found[name] = plain.reset_index(drop=True)
    return found


def needed(frames: Frames, name: str, otherwise: str) -> pd.DataFrame:
    """A frame of which the rule above says nothing, with plain strings as keys.

    Args:
        frames: of a study.
        name: of the frame.
        otherwise: what to do where it is not there.

    Raises:
        RunError: it is missing or empty.
    """
    frame = frames.get(name)
    if frame is None or frame.empty:
        raise RunError(f"there are no rows of {name!r} to test a claim on; {otherwise}")
    words = {column: str for column in ("model", "arm", "probe", "set", "group", "kind") if column in frame}
    return frame.astype(words)


def trajectories(frame: pd.DataFrame, by: list[str], values: list[str]) -> dict[tuple, pd.DataFrame]:
    """Values over steps, one frame per combination of the columns `by`; steps ascend."""
    ordered = frame.sort_values("step", kind="stable")  # ties in the order of the frame, on every machine
    numbers = ordered.set_index("step")[values].astype("float64")
    places = ordered.groupby(by, sort=False, observed=True).indices
    return {key if isinstance(key, tuple) else (key,): numbers.iloc[rows] for key, rows in places.items()}
