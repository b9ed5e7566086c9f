"""What the files of a run or study must look like to be read: a directory may come from anywhere, and is data.

Knows the fields that readers count on; others may stand beside them, of any value. Imports no torch.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NotRequired

import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # that of Python 3.11 is not enough for pydantic

from attribution.errors import RunError
from attribution.store.files import read_json

_TEXT = {"probe", "kind", "part", "set", "group", "ablated", "reference", "when", "token", "model", "arm", "word"}  # columns
_Numbers = dict[str, dict[str, Any]]
_OPEN = with_config(ConfigDict(extra="allow", strict=True, arbitrary_types_allowed=True))


@_OPEN
class _Config(TypedDict, total=False):
    model: str
    recipe: str
    seed: int
    metric: str
    reference: str
    inputs: dict[str, str]  # hashes of files
    probes: list[str | dict[str, Any]]


@_OPEN
class _Meta(TypedDict, total=False):
    format: int
    versions: dict[str, Any]
    model: dict[str, Any]
    seconds: dict[str, float | None]
    not_measured: list[str]


@_OPEN
class _Status(TypedDict, total=False):
    state: str
    step: int
    steps: int


@_OPEN
class _Result(TypedDict, total=False):
    steps: int
    seconds: float | None
    probes: dict[str, dict[str, float | None]]
    causes: dict[str, Any]
    linear_graft: dict[str, dict[str, float | None]]


@_OPEN
class _Listed(TypedDict):
    arm: str
    model: str
    seed: int
    path: str
    state: NotRequired[str]
    steps: NotRequired[int]
    seconds: NotRequired[float | None]


@_OPEN
class _Study(TypedDict, total=False):
    name: str
    arms: list[str]
    models: list[str | None]
    seeds: list[int]
    runs: list[_Listed]
    seconds: float | None
    versions: dict[str, Any]
    not_judged: dict[str, str] | None
    unfit: dict[str, str] | None


@_OPEN
class _Claim(TypedDict):
    id: str


@_OPEN
class _Finding(TypedDict):
    claim: _Claim
    hash: str
    verdict: Annotated[list[dict[str, Any]], Field(min_length=1)]


class _Line(TypedDict, total=False):
    step: int
    sample: int
    prompt: str
    completion: str
    tokens: int
    reward: float | None
    advantage: float
    ratio: float | None


_SHAPES: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(shape)
    for name, shape in {
        "config.json": _Config, "meta.json": _Meta, "status.json": _Status, "result.json": _Result, "study.json": _Study,
        "findings.json": list[_Finding], "vocabulary.json": list[str], "samples.jsonl": list[_Line],
    }.items()
}  # fmt: skip


def told(path: Path) -> Any:
    """Read a JSON file of a run or study. Raises RunError: it is missing, damaged, or of another shape than the file has."""
    return shaped(path, read_json(path))


def shaped(path: Path, value: Any) -> Any:
    """The value as it was read. Raises RunError: not of the shape of the file of this name."""
    try:
        _SHAPES[path.name].validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise RunError(f"{path} is damaged ({where}: {first['msg']}); restore it or run again in another directory") from None
    return value


def checked(file: Path, frame: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """The frame as it was read. Raises RunError: a column is not there, or holds text for numbers or numbers for text."""
    for column in columns:
        if column not in frame:
            raise RunError(f"{file} has no column {column!r}; restore it, or run again in another directory")
        kind = frame[column].dtype
        number = is_numeric_dtype(kind) or is_bool_dtype(kind)
        if frame[column].notna().any() and number == (column in _TEXT):
            wanted = "text" if number else "numbers"
            raise RunError(f"{file} holds {kind} in column {column!r}, expected {wanted}; restore it, or run again elsewhere")
    return frame


def place(path: str | os.PathLike[str]) -> Path:
    """A directory's path, whether or not it is there. Raises RunError: none can have it, or it cannot be looked at."""
    try:
        os.stat(path)
    except ValueError:  # NUL, or half of a surrogate pair
        raise RunError(f"{str(path)!r} cannot be the name of a directory; choose another") from None
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise RunError(f"{path} cannot be used: {error.strerror}; name another directory") from None
    return Path(path)
