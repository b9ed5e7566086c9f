"""What recording and attributing cost on one model, in rows: the budgets, beside what a user would otherwise use.

Knows what is compared and how; knows nothing about which models are measured or where rows are written.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from attribution.capture import evaluating, scored_logits
from attribution.causes import BATCH_SIZE, attribute
from attribution.causes.gradient import first_order
from attribution.causes.integrated import NODES
from attribution.causes.reference import VOCABULARY, Reference, zeros
from attribution.components import Components
from attribution.metrics import METRICS
from attribution.samples import Batch, Sample, batches, encode
from attribution.store import read_run
from attribution.updates.recorder import ALL_UP_TO, Recorder
from experiments.peers import ablation_by, conductance_by_captum, first_order_by, missing
from experiments.per_sample import WITHOUT, collecting, installed
from experiments.subjects import CLIP, LEARNING_RATE, METRIC, Subject
from experiments.timing import LiveBytes, Row, interleaved, peaks, ratio_row

SPARSE: dict[str, Any] = {"everything": False, "batch_after": False}  # the default of large models
FULL = {"everything": True, "batch_after": True}  # and of small ones
LEFT_OUT = SPARSE | {"steps": "ends"}
LOOPED_UP_TO, LOOPED = 5_000_000, 64  # parameters; of a larger model so many components are timed
BY_PEERS = 16  # components that other libraries ablate, one forward pass each
CONDUCTANCE_TURNS, CONDUCTANCE_UP_TO = 3, 50_000_000  # they are long; parameters
CLOSE = 1e-5  # nats, between the fast ablation and the loop; of the largest, between first-order causes
# Bytes, × those of the parameters: the weights before the step; with a probe set its gradient too, and while shares are refined
# the weights after the step. Slack is for what grows with components and tokens read.
MEMORY = {"no probes": {"held": 1, "at the peak": 1}, "one probe set": {"held": 2, "at the peak": 3}}
MEMORY_STEPS, SLACK, FLAT = (3, 30), 0.25, 0.01
FEWER_STEPS = (3, 10)  # of a model above `CONDUCTANCE_UP_TO`


def measure(subject: Subject, repeats: int) -> list[Row]:
    """Every row that is measured on a model."""
    repeats = min(repeats, subject.repeats or repeats)
    parts = (step_rows, first_order_rows, conductance_rows, ablation_rows, memory_rows)
    return [row for part in parts for row in part(subject, repeats)]


# The recorder


Begin = Callable[[Any, Any], tuple[dict[str, Any], Callable[[], Any]]]


def step_rows(subject: Subject, repeats: int) -> list[Row]:
    """A training step bare and recorded, each on its own copy of the model."""
    small = len(Components(subject.model)) <= ALL_UP_TO
    variants = {"none": SPARSE, "probes": SPARSE | subject.probes()} | ({"full": FULL, "left out": LEFT_OUT} if small else {})
    with tempfile.TemporaryDirectory() as place:
        with ExitStack() as recording:
            turns = {"bare": step_of(subject, subject.trained), "by hand": step_and_pass(subject)}
            for name, settings in variants.items():
                begin = recorded(recording, subject.tokenizer, Path(place) / name, **settings)
                turns[name] = step_of(subject, subject.trained, begin)
            if installed():
                turns["bergson"] = step_of(subject, subject.trained, collected(recording, subject, Path(place) / "bergson"))
            seconds = interleaved(turns, repeats)
        count = len(seconds["bare"])
        single = read_run(Path(place) / "probes").probes["passes"].to_numpy(dtype=float)[-count:] == 1
    ratios = {name: np.divide(seconds[name], seconds["bare"]) for name in turns}
    probes, refined = ratios["probes"][single], f"{(~single).sum()} of {count} steps refined"
    with_them = "" if single.all() else f", with them {median(ratios['probes']):.2f}"
    rows = [
        Row("bare training step", "floor", "1", None, f"{median(seconds['bare']):.3g} s, {subject.tokens(subject.trained)}"),
        ratio_row("step, recorder without probes", ratios["none"], "≤ 1.05", "floor 1"),
        ratio_row("step, one probe set as large as the batch, shares", probes, "≤ 2.1", f"floor 2; {refined}{with_them}"),
        ratio_row("bare step, then forward and backward of the probe set", ratios["by hand"], notes="the floor, by hand"),
        ratio_row(
            "step, bergson's callback",
            ratios.get("bergson", []),
            notes="gradients of each sample, projected to 16 × 16 per matrix; no components" if installed() else WITHOUT,
        ),
    ]
    if small:
        rows.append(ratio_row("step, no probes, all is written, batch run again", ratios["full"], notes="floor 2"))
        rows.append(ratio_row("step that is left out (`steps`), no probes", ratios["left out"], notes="its row alone is kept"))
    return rows


def step_of(subject: Subject, samples: Sequence[Sample], begin: Begin | None = None) -> Callable[[], None]:
    """A training step on a copy of the model.

    Args:
        subject, samples: to train.
        begin: called with model and optimizer before the first step; returns further arguments of the forward pass, and what
            is called after each step.
    """
    batch, model = subject.batch(samples), deepcopy(subject.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    given, after = begin(model, optimizer) if begin else ({}, lambda: None)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels, use_cache=False, **given).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        after()

    return step


def recorded(recording: ExitStack, tokenizer: Any, path: Path, **settings: Any) -> Begin:
    """Record the steps with these settings until the stack closes."""

    def begin(model: Any, optimizer: Any) -> tuple[dict[str, Any], Callable[[], Any]]:
        recorder = Recorder(path, tokenizer=tokenizer, metric=METRIC, milestones="ends", singles="heads", **settings)
        recording.enter_context(recorder.attach(model, optimizer))
        return {}, lambda: None

    return begin


def collected(recording: ExitStack, subject: Subject, path: Path) -> Begin:
    """Have bergson's callback collect what it collects until the stack closes."""

    def begin(model: Any, optimizer: Any) -> tuple[dict[str, Any], Callable[[], Any]]:
        given, after, end = collecting(model, optimizer, len(subject.trained), path)
        recording.callback(end)
        return given, after

    return begin


def step_and_pass(subject: Subject) -> Callable[[], None]:
    """A bare step, and then the gradient of a probe set as large: what a user would write."""
    batch, metric = subject.batch(subject.probed), METRICS[METRIC]

    def begin(model: Any, _optimizer: Any) -> tuple[dict[str, Any], Callable[[], Any]]:
        def after() -> None:
            logits = model(batch.ids, use_cache=False).logits[batch.scored]
            torch.autograd.grad(metric(logits, batch).mean(), list(model.parameters()))

        return {}, after

    return step_of(subject, subject.trained, begin)


# Causes


def first_order_rows(subject: Subject, repeats: int) -> list[Row]:
    """First-order causes, by taps and from weights and gradients, against forward and backward of the same metric."""
    index, metric = Components(deepcopy(subject.model)), METRICS[METRIC]
    found = batches(encode(subject.tokenizer, subject.probed), BATCH_SIZE, subject.model.device)
    values, tokens = zeros(index.parts), subject.tokens(subject.probed)

    def total() -> Tensor:
        return torch.stack([metric(scored_logits(index.parts, batch), batch).sum() for batch in found]).sum()

    turns = {
        "floor": lambda: (index.parts.model.zero_grad(), total().backward()),
        "taps": lambda: [first_order(index, batch, values, metric) for batch in found],
        "gradients": lambda: index.first_order(index.gradients(total())),
    }
    peers = first_order_by(index, subject.tokenizer, metric)
    turns |= {name: lambda peer=peer: peer(found) for name, peer in peers.items()}
    with evaluating(index.parts.model), index.untied():
        seconds, most = interleaved(turns, repeats), peaks(turns)
        ours = torch.cat([first_order(index, batch, values, metric) for batch in found], dim=1)
    ratios = {name: np.divide(seconds[name], seconds["floor"]) for name in turns}
    rows = [
        Row("forward and backward of the metric", "floor", "1", None, f"{median(seconds['floor']):.3g} s", most["floor"]),
        ratio_row("first-order causes of each sample, by taps", ratios["taps"], "≤ 1.15", tokens, most["taps"]),
        ratio_row(
            "first-order causes of all samples together, ⟨W, ∇W⟩", ratios["gradients"], "≤ 1.15", tokens, most["gradients"]
        ),
    ]
    for name, peer in peers.items():
        theirs = peer(found)
        apart = ((theirs - ours[: len(theirs)]).abs().max() / theirs.abs().max()).item()
        assert apart <= CLOSE, f"{name} finds other causes: {apart:.1e} of the largest apart"
        notes = f"heads and neurons; at most {apart:.0e} apart"
        rows.append(ratio_row(f"the same by {name}", ratios[name], notes=notes, peak=most[name]))
    return rows + [Row(f"the same by {name}", "none", "not measured", None, why) for name, why in missing().items()]


def conductance_rows(subject: Subject, repeats: int) -> list[Row]:
    """Conductance of all layers, and captum's of one layer after the other, against forward and backward."""
    if subject.model.num_parameters() > CONDUCTANCE_UP_TO:
        why = f"hundreds of passes; above {CONDUCTANCE_UP_TO / 1e6:.0f} M parameters they are left out"
        return [Row("conductance of all layers together", "none", "not measured", None, why)]
    samples, index, metric = subject.probed[: subject.few], Components(subject.model), METRICS[METRIC]
    batch, found = subject.batch(samples), {}
    start = Reference(VOCABULARY).of_embeddings(index.parts)

    def floor() -> None:
        index.parts.model.zero_grad()
        metric(scored_logits(index.parts, batch), batch).sum().backward()

    def ours() -> None:
        found["ours"] = attribute(subject.model, subject.tokenizer, samples, method="conductance", metric=METRIC)

    def captum() -> None:
        found["captum"] = conductance_by_captum(index, batch, start, metric, NODES)

    seconds = interleaved({"floor": floor, "ours": ours, "captum": captum}, min(repeats, CONDUCTANCE_TURNS))
    index.parts.model.zero_grad()
    change = float(found["ours"].sums["change"].abs().mean())
    theirs = found["captum"].sum(1).cpu()
    mine = found["ours"].per_sample[: len(theirs)].sum(1)
    apart, order = (theirs - mine).abs().max() / mine.abs().max(), spearmanr(theirs, mine).statistic
    passes = f"{found['ours'].passes:.0f} passes, residual {abs(found['ours'].residual) / change:.1e} of the change"
    notes = f"{NODES} first-order steps for each site; {apart:.2f} of the largest apart from ours, rank correlation {order:.2f}"
    ratios = {name: np.divide(seconds[name], seconds["floor"]) for name in ("ours", "captum")}
    return [
        ratio_row("conductance of all layers together", ratios["ours"], notes=f"{subject.tokens(samples)}; {passes}"),
        ratio_row("the same by captum LayerConductance", ratios["captum"], notes=notes),
    ]


def ablation_rows(subject: Subject, repeats: int) -> list[Row]:
    """Exact ablation of heads and neurons against one forward per component: how many times as fast."""
    components = Components(subject.model).table.query("kind != 'row'")
    count, samples = len(components), subject.probed[: subject.few]
    if extrapolated := subject.model.num_parameters() > LOOPED_UP_TO and count > LOOPED:
        components = components.sample(LOOPED, random_state=0).sort_index()
    listed, batch, found = list(components.itertuples(index=False, name=None)), subject.batch(samples), {}

    def fast() -> None:
        found["fast"] = attribute(subject.model, subject.tokenizer, samples, metric=METRIC, components=components).per_sample

    def loop() -> None:
        found["loop"] = one_by_one(subject.model, batch, listed).cpu()

    turns = {"fast": fast, "loop": loop}
    seconds = interleaved(turns, repeats)
    apart = (found["fast"] - found["loop"]).abs().max().item()
    assert apart <= CLOSE < found["loop"].abs().max().item(), f"the fast ablation is {apart:.1e} nats off the loop"
    most = peaks(turns)
    whole = [median(seconds[name]) * count / len(listed) for name in ("fast", "loop")]
    timed = f"{len(listed)} random ones of {count:,} timed, extrapolated" if extrapolated else f"all {count:,}"
    notes = f"{timed}: {whole[0]:.3g} s for {whole[1]:.3g} s, {subject.tokens(samples)}; at most {apart:.0e} nats apart"
    ratios = np.divide(seconds["loop"], seconds["fast"])
    return [
        ratio_row("exact ablation, times as fast as one forward per component", ratios, "≥ 4", notes, most["fast"]),
        Row("one forward per component, by a hook", "floor", "1", None, f"{whole[1]:.3g} s", most["loop"]),
        *ablation_by_peers(subject, repeats),
    ]


def ablation_by_peers(subject: Subject, repeats: int) -> list[Row]:
    """Other libraries against one forward per component, on some of the components: how many times as fast."""
    index, samples = Components(subject.model), subject.probed[: subject.few]
    chosen = index.table.query("kind != 'row'").sample(BY_PEERS, random_state=0).sort_index()
    listed, batch, found = list(chosen.itertuples(index=False, name=None)), subject.batch(samples), {}
    peers = ablation_by(index, subject.tokenizer, METRICS[METRIC])

    def run(name: str, one: Callable[..., Tensor]) -> None:
        found[name] = one(batch, listed).cpu()

    turns = {name: partial(run, name, one) for name, one in peers.items()}
    turns = {"loop": lambda: run("loop", partial(one_by_one, subject.model)), **turns}
    seconds, most, rows = interleaved(turns, repeats), peaks(turns), []
    for name in peers:
        apart = (found[name] - found["loop"]).abs().max().item()
        assert apart <= CLOSE < found["loop"].abs().max().item(), f"{name} finds other effects: {apart:.1e} nats apart"
        notes = f"{BY_PEERS} random components, one by one; at most {apart:.0e} nats apart"
        rows.append(ratio_row(f"the same by {name}", np.divide(seconds["loop"], seconds[name]), notes=notes, peak=most[name]))
    return rows


@torch.no_grad()
def one_by_one(model: Any, batch: Batch, components: Sequence[tuple[str, int, int]]) -> Tensor:
    """The loop anyone would write: a forward pass for each component, its activation set to zero by a hook."""

    def read() -> Tensor:
        return METRICS[METRIC](model(batch.ids, use_cache=False).logits[batch.scored], batch)

    intact, effects = read(), []
    for kind, layer, index in components:
        block = model.model.layers[layer]
        module, width = (block.self_attn.o_proj, block.self_attn.head_dim) if kind == "head" else (block.mlp.down_proj, 1)
        kept = torch.ones(module.in_features, device=batch.ids.device)
        kept[index * width : (index + 1) * width] = 0
        handle = module.register_forward_pre_hook(lambda _module, args, kept=kept: (args[0] * kept,))
        effects.append(intact - read())
        handle.remove()
    return torch.stack(effects)


# Memory


def memory_rows(subject: Subject, _repeats: int) -> list[Row]:
    """Bytes of tensors that recorded steps need beyond bare ones, in multiples of the parameters' bytes."""
    whole, bare, rows = sum(each.nbytes for each in subject.model.parameters()), memory(subject, None), []
    (early, late), tokens = memory_steps(subject), subject.tokens(subject.trained[: subject.fewer])
    notes = f"× parameters, after {early} and {late} steps of {tokens}"
    for what, budgets in MEMORY.items():
        settings = SPARSE | (subject.probes(subject.fewer) if what == "one probe set" else {})
        extra = (memory(subject, settings) - bare) / whole  # [when, held or at the peak]
        for (place, budget), (early, late) in zip(budgets.items(), extra.T, strict=True):
            met = bool(late <= budget + SLACK and abs(late - early) <= FLAT)
            rows.append(Row(f"memory {place}, {what}", f"{budget} + small, flat", f"{early:.2f}, {late:.2f}", met, notes))
    return rows


def memory_steps(subject: Subject) -> tuple[int, int]:
    """After how many steps memory is counted: fewer of a large model."""
    return FEWER_STEPS if subject.model.num_parameters() > CONDUCTANCE_UP_TO else MEMORY_STEPS


def memory(subject: Subject, settings: Mapping[str, Any] | None) -> np.ndarray:
    """(bytes held, most bytes within a step so far) after each of `memory_steps`; of bare steps without settings."""
    samples, found, steps = subject.trained[: subject.fewer], [], memory_steps(subject)
    with tempfile.TemporaryDirectory() as place, LiveBytes() as live, ExitStack() as recording:
        begin = None if settings is None else recorded(recording, subject.tokenizer, Path(place) / "run", **settings)
        step = step_of(subject, samples, begin)
        gc.collect()
        live.peak = live.now
        for number in range(1, steps[-1] + 1):
            step()
            if number in steps:
                gc.collect()
                found.append((live.now, live.peak))
    return np.array(found, dtype=float)
