"""What recording and attributing cost: `python -m experiments.speed [--model planted random] [--repeats 7]`.

Ratios, not seconds: what is compared runs in one process, turn by turn (A B C A B C ...), so that whatever else the machine
does falls on all alike. A ratio is taken within each turn; shown are its median over the turns and its quartiles, and the
budget is judged by the median. About ten minutes on one idle core with OMP_NUM_THREADS=1.

A step is forward, backward, clipping and AdamW. The recorder ablates heads alone and at both ends alone, outside the steps
timed, does not run the batch again, and writes neurons and rows in part, as it does by default for large models. A step is
refined where two gradients do not give its shares to 1 %; that takes further passes, and the row holds the other steps. Rows
go to disk every fifteen seconds, within a step. First-order causes stand against forward and backward of the same metric on
the same prompts, and beside the same numbers from captum, nnsight and (`pip install "attribution[bench]"`) TransformerLens.
Memory is the bytes of tensors alive, counted one by one, beyond those of the same steps without a recorder; with few tokens no
activations hide the peak. Rows that wait to be written are not in it.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import timeit
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from attribution.capture import evaluating, scored_logits
from attribution.causes import BATCH_SIZE, attribute
from attribution.causes.gradient import first_order
from attribution.causes.integrated import NODES
from attribution.causes.reference import VOCABULARY, Reference, zeros
from attribution.components import Components
from attribution.metrics import METRICS
from attribution.models import load
from attribution.samples import Batch, ProbeSet, Sample, batches, collate, encode
from attribution.store import read_run
from attribution.updates.provenance import versions
from attribution.updates.recorder import ALL_UP_TO, Recorder
from attribution.worlds import planted
from attribution.worlds.build import word_tokenizer
from experiments.peers import conductance_by_captum, first_order_by

RANDOM = "random"
LLAMA = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 1024,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
USED = 64  # words of its vocabulary that occur, so that training on random words improves held-out ones as well
METRIC, LEARNING_RATE, CLIP = "log_odds_per_token", 1e-4, 1.0
SPARSE: dict[str, Any] = {"everything": False, "batch_after": False}  # the default of large models
FULL = {"everything": True, "batch_after": True}  # and of small ones
LEAST_SECONDS = 15.0  # of a comparison: quick ones take more turns than asked for
LOOPED_UP_TO, LOOPED = 5_000_000, 64  # parameters; of a larger model so many components are timed
CONDUCTANCE_TURNS = 3  # they are long
CLOSE = 1e-5  # nats, between the fast ablation and the loop; of the largest, between first-order causes
# Bytes, × those of the parameters: the weights before the step; with a probe set its gradient too, and while shares are refined
# the weights after the step. Slack is for what grows with components and tokens read.
MEMORY = {"no probes": {"held": 1, "at the peak": 1}, "one probe set": {"held": 2, "at the peak": 3}}
MEMORY_STEPS, SLACK, FLAT = (3, 30), 0.25, 0.01
STUDY = Path("results/boost/study.json")


class Subject(NamedTuple):
    """What is measured on: a Llama in eval mode, and samples for it.

    Attributes:
        trained, probed: of the training step and of the probe set, as many of each.
        few, fewer: how many of them are ablated component by component, and make the steps whose memory is counted.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    trained: tuple[Sample, ...]
    probed: tuple[Sample, ...]
    few: int
    fewer: int

    def batch(self, samples: Sequence[Sample]) -> Batch:
        return collate(encode(self.tokenizer, samples), self.model.device)

    def probes(self, count: int | None = None) -> dict[str, Any]:
        return {"probes": [ProbeSet(name="held out", samples=self.probed[:count])]}

    def tokens(self, samples: Sequence[Sample]) -> str:
        return f"{int(self.batch(samples).mask.sum()):,} tokens"


class Row(NamedTuple):
    """A line of the table; `met` is None where there is nothing to meet."""

    what: str
    budget: str
    measured: str
    met: bool | None
    notes: str


def main(
    model: tuple[str, ...] = ("planted", RANDOM), device: str = "cpu", repeats: int = 7, out: Path = Path("results/speed.md")
) -> None:
    """Measure the budgets of the recorder and of causes, and write them as Markdown.

    Args:
        model: names of embedded Llamas, and "random" for an untrained one of 25 M parameters.
        device: where to run them.
        repeats: turns of each comparison, at least.
        out: file to write.
    """
    rows = {}
    for name in model:
        subject = random_llama(device) if name == RANDOM else embedded(name, device)
        rows[f"{name} ({subject.model.num_parameters() / 1e6:.1f} M)"] = measure(subject, repeats)
    rows[""] = [help_row(), study_row(STUDY)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(rows, device, repeats), encoding="utf-8")
    print(table(rows), out, sep="\n")


def embedded(name: str, device: str) -> Subject:
    """An embedded model on prompts of its world."""
    model, tokenizer = load(name, device=device)
    trained = planted.prompts(128, seed=1, star="agree", problems=planted.TRAINING)
    both = (tuple(Sample(**row) for row in rows) for rows in (trained, planted.prompts(128, seed=3, star="agree")))
    return Subject(model, tokenizer, *both, few=16, fewer=128)


def random_llama(device: str) -> Subject:
    """A random Llama on random words: 32 samples of 64 tokens, half of them response."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    words, draw = [f"w{i}" for i in range(model.config.vocab_size - 4)], Random(0).choices
    texts = [[" ".join(draw(words[:USED], k=count)) for count in (31, 32)] for _ in range(64)]
    samples = tuple(Sample(prompt=prompt, response=f" {response}") for prompt, response in texts)
    return Subject(model.to(device), word_tokenizer(words), samples[:32], samples[32:], few=2, fewer=2)


def measure(subject: Subject, repeats: int) -> list[Row]:
    """Every row that is measured on a model."""
    parts = (step_rows, first_order_rows, conductance_rows, ablation_rows, memory_rows)
    return [row for part in parts for row in part(subject, repeats)]


def interleaved(turns: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other, at least `repeats` times, after one turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    taken = 0
    while taken <= repeats or sum(map(sum, seconds.values())) < LEAST_SECONDS:
        for name, run in turns.items():
            begun = time.perf_counter()
            run()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if taken:
                seconds[name].append(time.perf_counter() - begun)
        taken += 1
    return seconds


# The recorder


def step_rows(subject: Subject, repeats: int) -> list[Row]:
    """A training step bare and recorded, each on its own copy of the model."""
    small = len(Components(subject.model)) <= ALL_UP_TO
    variants = {"none": SPARSE, "probes": SPARSE | subject.probes()} | ({"full": FULL} if small else {})
    with tempfile.TemporaryDirectory() as place:
        with ExitStack() as recording:
            turns = {"bare": step_of(subject, subject.trained)}
            for name, settings in variants.items():
                turns[name] = step_of(subject, subject.trained, recording, path=Path(place) / name, **settings)
            seconds = interleaved(turns, repeats)
        count = len(seconds["bare"])
        single = read_run(Path(place) / "probes").probes["passes"].to_numpy(dtype=float)[-count:] == 1
    ratios = {name: np.divide(seconds[name], seconds["bare"]) for name in variants}
    probes, refined = ratios["probes"][single], f"{(~single).sum()} of {count} steps refined"
    with_them = "" if single.all() else f", with them {median(ratios['probes']):.2f}"
    rows = [
        Row("bare training step", "floor", "1", None, f"{median(seconds['bare']):.3g} s, {subject.tokens(subject.trained)}"),
        ratio_row("step, recorder without probes", ratios["none"], "≤ 1.05", "floor 1"),
        ratio_row("step, one probe set as large as the batch, shares", probes, "≤ 2.1", f"floor 2; {refined}{with_them}"),
    ]
    if small:
        rows.append(ratio_row("step, no probes, all is written, batch run again", ratios["full"], notes="floor 2"))
    return rows


def step_of(
    subject: Subject, samples: Sequence[Sample], recording: ExitStack | None = None, **settings: Any
) -> Callable[[], None]:
    """A training step on a copy of the model; with a stack, recorded with these settings until it closes."""
    batch, model = subject.batch(samples), deepcopy(subject.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    if recording is not None:
        recorder = Recorder(tokenizer=subject.tokenizer, metric=METRIC, milestones="ends", singles="heads", **settings)
        recording.enter_context(recorder.attach(model, optimizer))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step


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
        seconds = interleaved(turns, repeats)
        ours = torch.cat([first_order(index, batch, values, metric) for batch in found], dim=1)
    ratios = {name: np.divide(seconds[name], seconds["floor"]) for name in turns}
    rows = [
        ratio_row("first-order causes of each sample, by taps", ratios["taps"], "≤ 1.15", tokens),
        ratio_row("first-order causes of all samples together, ⟨W, ∇W⟩", ratios["gradients"], "≤ 1.15", tokens),
    ]
    for name, peer in peers.items():
        theirs = peer(found)
        apart = ((theirs - ours[: len(theirs)]).abs().max() / theirs.abs().max()).item()
        assert apart <= CLOSE, f"{name} finds other causes: {apart:.1e} of the largest apart"
        rows.append(ratio_row(f"the same by {name}", ratios[name], notes=f"heads and neurons; at most {apart:.0e} apart"))
    return rows


def conductance_rows(subject: Subject, repeats: int) -> list[Row]:
    """Conductance of all layers, and captum's of one layer after the other, against forward and backward."""
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

    seconds = interleaved({"fast": fast, "loop": loop}, repeats)
    apart = (found["fast"] - found["loop"]).abs().max().item()
    assert apart <= CLOSE < found["loop"].abs().max().item(), f"the fast ablation is {apart:.1e} nats off the loop"
    whole = [median(seconds[name]) * count / len(listed) for name in ("fast", "loop")]
    timed = f"{len(listed)} random ones of {count:,} timed, extrapolated" if extrapolated else f"all {count:,}"
    notes = f"{timed}: {whole[0]:.3g} s for {whole[1]:.3g} s, {subject.tokens(samples)}; at most {apart:.0e} nats apart"
    ratios = np.divide(seconds["loop"], seconds["fast"])
    return [ratio_row("exact ablation, times as fast as one forward per component", ratios, "≥ 4", notes)]


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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors born inside the block, from birth to death: `now`, and the most there were, `peak`.

    A storage counts once however many tensors share it. What torch does not own (numpy, pandas, Python) is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(Tensor, self._born, func(*args, **(kwargs or {})))

    def _born(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._alive:
            self._alive[storage] = None
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())
        return tensor

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def memory_rows(subject: Subject, _repeats: int) -> list[Row]:
    """Bytes of tensors that recorded steps need beyond bare ones, in multiples of the parameters' bytes."""
    whole, bare, rows = sum(each.nbytes for each in subject.model.parameters()), memory(subject, None), []
    early, late, tokens = *MEMORY_STEPS, subject.tokens(subject.trained[: subject.fewer])
    notes = f"× parameters, after {early} and {late} steps of {tokens}"
    for what, budgets in MEMORY.items():
        settings = SPARSE | (subject.probes(subject.fewer) if what == "one probe set" else {})
        extra = (memory(subject, settings) - bare) / whole  # [when, held or at the peak]
        for (place, budget), (early, late) in zip(budgets.items(), extra.T, strict=True):
            met = bool(late <= budget + SLACK and abs(late - early) <= FLAT)
            rows.append(Row(f"memory {place}, {what}", f"{budget} + small, flat", f"{early:.2f}, {late:.2f}", met, notes))
    return rows


def memory(subject: Subject, settings: Mapping[str, Any] | None) -> np.ndarray:
    """(bytes held, most bytes within a step so far) after each of `MEMORY_STEPS`; of bare steps without settings."""
    samples, found = subject.trained[: subject.fewer], []
    with tempfile.TemporaryDirectory() as place, LiveBytes() as live, ExitStack() as recording:
        recorded = {} if settings is None else {"recording": recording, "path": Path(place) / "run", **settings}
        step = step_of(subject, samples, **recorded)
        gc.collect()
        live.peak = live.now
        for number in range(1, MEMORY_STEPS[-1] + 1):
            step()
            if number in MEMORY_STEPS:
                gc.collect()
                found.append((live.now, live.peak))
    return np.array(found, dtype=float)


# Without a model, and the page


def help_row() -> Row:
    """Seconds of `attribution --help`, the least of five, and whether it imports torch."""
    command = [sys.executable, "-m", "attribution", "--help"]
    seconds = min(timeit.repeat(lambda: subprocess.run(command, check=True, capture_output=True), number=1, repeat=5))
    code = "import sys; from attribution.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    torchless = subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    notes = "least of 5 processes; torch is " + ("not imported" if torchless else "imported")
    return Row("`attribution --help`, seconds", "< 0.5, no torch", f"{seconds:.2f}", torchless and seconds < 0.5, notes)


def study_row(path: Path) -> Row:
    """Seconds of the default study, as far as its result tells them."""
    what, budget = "default study on two cores, seconds", "≤ 300"
    if not path.exists():
        return Row(what, budget, "not measured", None, f"there is no {path}")
    told = json.loads(path.read_text())
    notes = f"{told['seconds']:.0f} s summed over {len(told['runs'])} runs, of which two go at once; read from {path}"
    return Row(what, budget, f"≥ {told['seconds'] / 2:.0f}", None if told["seconds"] <= 600 else False, notes)


def ratio_row(what: str, ratios: Sequence[float] | np.ndarray, budget: str = "none", notes: str = "") -> Row:
    """A row of ratios: their median and quartiles, against a budget such as "≤ 1.05", "≥ 4" or "none"."""
    if not len(ratios):
        return Row(what, budget, "not measured", None, notes)
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    sign, _, limit = budget.partition(" ")
    met = None if not limit else bool(middle <= float(limit) if sign == "≤" else middle >= float(limit))
    return Row(what, budget, f"{middle:.2f} [{low:.2f}, {high:.2f}]", met, notes)


def table(rows: Mapping[str, Sequence[Row]]) -> str:
    """Rows by model, as Markdown."""
    mark = {True: "met", False: "✗ missed", None: ""}
    lines = ["| model | what | budget | measured | | notes |", "|---|---|---|---|---|---|"]
    for model, found in rows.items():
        lines += [f"| {model} | {r.what} | {r.budget} | {r.measured} | {mark[r.met]} | {r.notes} |" for r in found]
    return "\n".join(lines) + "\n"


def page(rows: Mapping[str, Sequence[Row]], device: str, repeats: int) -> str:
    """What was measured, with what, and the table."""
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    place = f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} of them used by torch"
    about = f"{METRIC}, learning rate {LEARNING_RATE:g}, clipping to {CLIP:g}, at least {repeats} turns after a warm-up"
    return f"# {__doc__}\nMeasured on {place}; {libraries}; {about}.\n\n{table(rows)}"


if __name__ == "__main__":
    tyro.cli(main)
