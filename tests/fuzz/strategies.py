"""What users, editors, other programs and attackers put where a value, a name, a line or a file is expected."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

LONG, DEEP = 300, 100_000
TEXTS = st.sampled_from([
    "", " ", "a", "é", "\x00", "a\x00b", "a\nb", "\r", "\x1b[31m", "\u202e", "\u2028", "\ud800", "\udcff", "\ufeff", "x" * LONG,
    "<script>alert(1)</script>", "</script>", "%s", "{x}", "{0}", "$HOME", "NaN", "1e999", "null", "true", "-1", "0x10",
]) | st.text(max_size=12)  # fmt: skip
NAMES = st.sampled_from([
    "..", ".", "...", "../up", "a/b", "/", "//", "/abs", "~", "~nobody/x", "a\\b", "C:\\x", "-", "--help", "con", ".hidden",
    "a b", " a", "a ", "a:b", "x.py:Y", "*", "?", "a'b", 'a"b', "é" * 130, "x" * 255, "x" * 256, "a\tb", "..\x00",
]) | TEXTS  # fmt: skip
NUMBERS = st.sampled_from([
    0, -0.0, 1, -1, 2, 0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), 2**31, 2**32, 2**63, -(2**63), 2**64,
    10**30, 10**400, True, False, "HUGE",
]) | st.integers() | st.floats()  # fmt: skip
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS | NAMES
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
SYNTAX = st.sampled_from([  # no JSON, or JSON of an unusual kind
    "", " ", "{", "}", "[", "]", '"', "{}", "[]", '""', "0", "null", "true", "NaN", "Infinity", "1e999", "-1e999",
    "1" * 5_000, "{'a': 1}", "{a: 1}", '{"a": 1,}', '{"a": 1} {"b": 2}', "[" * DEEP, '{"a":' * DEEP, "[" * 500 + "]" * 500,
    "\x00" * 9, "\ufeff{}", '"\\ud800"', '"\\u0000"', "x" * 200_000,
])  # fmt: skip
ENCODED = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7"])
KINDS = (
    "file",
    "missing",
    "folder",
    "pipe",
    "endless",
    "nothing",
    "loop",
    "dangling",
    "link",
    "long",
    "nul",
    "below",
)
PLACES = st.sampled_from(KINDS)


def dumped(value: Any) -> str:
    """As JSON, with numbers that no float holds written as they come."""
    return json.dumps(value).replace("Infinity", "1e999").replace('"HUGE"', "1" * 5_000)


def changed(
    base: dict[str, Any], keys: list[str], values: st.SearchStrategy[Any] = VALUES
) -> st.SearchStrategy[dict[str, Any]]:
    """The base with one or two keys of these, or an unknown one, set to anything, or left out."""
    some = st.dictionaries(st.sampled_from(keys) | TEXTS, values, min_size=1, max_size=2)
    if not base:
        return some
    without = st.sampled_from(sorted(base)).map(lambda gone: {key: value for key, value in base.items() if key != gone})
    return some.map(lambda changes: {**base, **changes}) | without


def texts(good: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    """Bytes of a file that was meant to hold this text."""
    whole = st.builds(lambda text, code: text.encode(code, "replace"), good | SYNTAX, ENCODED)
    cut = st.builds(lambda data, at: data[: at % (len(data) + 1)], whole, st.integers(0, 10**6))
    return whole | cut | st.binary(max_size=40) | good.map(lambda text: text.encode("utf-8", "surrogatepass"))


def lines(good: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """A file of such lines, with others among them."""
    ends = st.sampled_from(["\n", "\r\n", "\n\n", "\r", "\u2028", ""])
    return st.builds(lambda some, end: end.join(some) + end, st.lists(good | SYNTAX, min_size=1, max_size=3), ends)


def placed(folder: Path, kind: str, data: bytes = b"", name: str = "given") -> str:
    """A path in the folder at which there is a file with these bytes, or something else that has a path."""
    path = folder / name
    made = {
        "file": lambda: path.write_bytes(data),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "endless": lambda: path.symlink_to("/dev/zero"),
        "nothing": lambda: path.symlink_to("/dev/null"),
        "loop": lambda: path.symlink_to(path.name),
        "dangling": lambda: path.symlink_to("nowhere"),
        "link": lambda: (folder / "there").write_bytes(data) and path.symlink_to("there"),
    }
    if kind in made:
        made[kind]()
    return str({"long": folder / ("x" * LONG), "nul": f"{path}\x00", "below": path / "further"}.get(kind, path))
