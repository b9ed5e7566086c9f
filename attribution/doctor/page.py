"""A diagnosis as plain text, in lines of at most 100 columns. Knows words and units only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attribution.doctor import Diagnosis

WIDTH = 100
THREE_DIGITS = 999.5  # what is less has at most three once it is rounded; more would be written as a power of ten


def page(found: Diagnosis) -> str:
    """What `attribution doctor` prints."""
    sections = {
        found.name: _model(found),
        "Parameters by owner": _owners(found),
        "Identities": _identities(found),
        "Not measured, or not as one might think": (f"- {each}" for each in found.not_measured),
        "The study asked for": _plan(found),
        "Memory on the device": _memory(found),
        "Time": _time(found),
        "Disk": _disk(found),
        "Each choice alone, instead": _instead(found),
    }
    if found.room is not None:
        sections[f"To fit {size(found.room)}"] = _fitting(found)
    sections["Over several GPUs, on each (sharded by FSDP2: an estimate, not measured)"] = _sharded(found)
    return "\n\n".join("\n".join([name, *_wrapped(lines)]) for name, lines in sections.items())


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB"):
        if count < THREE_DIGITS:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.3g} GiB" if count < THREE_DIGITS else f"{count:,.0f} GiB"


def duration(seconds: float) -> str:
    """Seconds in words."""
    for unit, span in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * span:
            return f"{seconds / span:,.3g} {unit}" if seconds / span < THREE_DIGITS else f"{seconds / span:,.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds:.0f} s"


def _model(found: Diagnosis) -> Iterator[str]:
    s = found.structure
    yield f"{s.architecture}, row {s.row!r} of architectures; {s.parameters:,} parameters in {s.dtype}, {size(s.bytes)}"
    yield (
        f"{s.layers} layers x {s.heads} heads of width {s.head_dim} ({s.kv_heads} for keys and values) and "
        f"{f'{s.experts} experts of ' if s.experts > 1 else ''}{s.neurons // s.experts:,} neurons; {s.rows:,} rows; "
        f"stream of width {s.width:,}"
    )
    yield f"{s.components:,} components: {s.layers * s.heads:,} heads, {s.layers * s.neurons:,} neurons, {s.rows:,} rows"
    yield f"unembedding {'tied to the embedding: counted once for each use' if s.tied else 'not tied to the embedding'}"
    yield f"{'post-norms' if s.post_norms else 'no post-norms'}; soft caps: {s.caps or 'none'}"


def _owners(found: Diagnosis) -> Iterator[str]:
    s = found.structure
    inside = sum(count for name, count in s.owned.items() if ", " in name)
    yield f"components {inside / s.used:.1%}, remainder {1 - inside / s.used:.1%}"
    yield from _columns((name, f"{count:,}", f"{count / s.used:.2%}") for name, count in s.owned.items())


def _identities(found: Diagnosis) -> Iterator[str]:
    if found.identities is None:
        yield "not checked: only the config was read"
        return
    yield from _columns((f"{name} holds", f"{error:.1e}", "relative error") for name, error in found.identities.items())


def _plan(found: Diagnosis) -> Iterator[str]:
    yield ", ".join(f"{field.name} {getattr(found.plan, field.name)}" for field in fields(found.plan))
    yield f"= {found.plan.tokens:,} tokens per step; None: the default for a model of this size"


def _memory(found: Diagnosis) -> Iterator[str]:
    memory = found.cost.memory
    yield from _columns((f"held: {name}", size(value)) for name, value in memory.held.items())
    yield from _columns((f"at most during {name}", size(value)) for name, value in memory.peaks.items())
    yield f"peak {size(memory.peak)}"


def _time(found: Diagnosis) -> Iterator[str]:
    here = found.machine
    speed = f"{here.flops / 1e12:.3g} TFLOP/s in products of matrices"
    moved = "other operations are not counted" if here.traffic == float("inf") else f"{here.traffic / 1e9:.3g} GB/s in all else"
    timed = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in here.timed.items())
    yield f"at {speed}, {moved}; {f'timed passes took, as a multiple of that: {timed}' if timed else 'no pass was timed'}"
    if here.visited is not None:
        yield f"weights are compared with what they were at {1e-9 / here.visited:.2g} GB/s"
    yield from _columns((name, duration(value)) for name, value in found.cost.seconds.items())
    further = found.plan.share_passes - 2 if found.plan.probes else 0
    more = f"; where shares are refined, up to {further} readings more for each probe set, {duration(found.cost.refining)} each"
    yield f"in all {duration(found.cost.time)}{more if further > 0 else ''}"


def _disk(found: Diagnosis) -> Iterator[str]:
    disk = found.cost.disk
    yield f"{disk.rows:,} rows of components per step, {size(disk.bytes)}; of a step that is written whole {size(disk.whole)}"
    yield f"in all {size(disk.total)}"


def _instead(found: Diagnosis) -> Iterator[str]:
    own = found.cost
    rows = [("choice", "peak", "time", "disk"), ("as asked for", *_three(own))]
    rows += [(choice.words, *_three(cost)) for choice, cost in found.instead]
    yield from _columns(rows)


def _three(cost) -> tuple[str, str, str]:
    return size(cost.memory.peak), duration(cost.time), size(cost.disk.total)


def _fitting(found: Diagnosis) -> Iterator[str]:
    peak, room = found.fitted.memory.peak, found.room or 0.0
    if not found.chosen and peak <= room:
        yield "it fits as it is"
        return
    yield from (f"{choice.words}  ({choice.costs})" for choice in found.chosen)
    fits = "it fits" if peak <= room else "it still does not fit: take a larger device, shorter samples or a smaller model"
    yield f"then the peak is {size(peak)}, the time {duration(found.fitted.time)}: {fits}"


def _sharded(found: Diagnosis) -> Iterator[str]:
    asked, fitted, room = found.sharded, found.sharded_fitted, found.room
    chosen = bool(found.chosen)
    rows: list[tuple[str, ...]] = [("GPUs", "as asked for", *(["with the choices above"] if chosen else []))]
    for shards in sorted({*asked, *(fitted if chosen else ())}):
        told = [_on_each(each.get(shards), room) for each in ([asked, fitted] if chosen else [asked])]
        rows.append((str(shards), *told))
    yield from _columns(rows)


def _on_each(count: float | None, room: float | None) -> str:
    if count is None:
        return ""
    return f"{size(count)}{', fits' if room is not None and count <= room else ''}"


def _columns(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Rows under each other; the first column to the left, the others to the right, words at the end to the left."""
    listed = list(rows)
    widths = [max(len(row[place]) for row in listed) for place in range(len(listed[0]))] if listed else []
    for row in listed:
        first, *others = (text.ljust(width) if place == 0 else text.rjust(width)
                          for place, (text, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        yield "  ".join([first, *others]).rstrip()


def _wrapped(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield from wrap(
            line,
            WIDTH,
            initial_indent="  ",
            subsequent_indent="      ",
            replace_whitespace=False,
            drop_whitespace=True,
            break_on_hyphens=False,
        )
