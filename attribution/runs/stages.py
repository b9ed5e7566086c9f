"""The stages of a run: what is read and checked before it, causes, training under the recorder, grafts.

Each takes the run's material and gives back what is to be written; torch is imported when they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribution.errors import ConfigError, ModelError
from attribution.recipes import Setting
from attribution.runs.checkpoints import CHECKPOINTS
from attribution.runs.config import RunConfig
from attribution.runs.stopping import Stopping
from attribution.store import TRAINING, RunWriter, read_run

if TYPE_CHECKING:
    import pandas as pd

    from attribution.mechanisms import Mechanisms
    from attribution.samples import Encoded, ProbeSet, Sample
    from attribution.updates.recorder import Recorder

CAUSE_SAMPLES = 64  # training samples on which causes are measured by exact ablation, spread over the file
GRAFTED_NEURONS, GRAFTED_ROWS = 16, 24  # of a layer, and in all, by |update share| on each probe set
WORDS, WORD_NODES = 4, 16  # prompts whose words are read, and nodes of the integral
KEPT = "model"  # where the trained model lies, if it is kept
CHECKPOINTS_KEPT = 2  # the newest, and one to fall back on
CAUSES = {"all": "every component", "heads": "every head", "end": "every head"}  # whose cause is measured, by `singles`


@dataclass
class Material:
    """All that a run works on, read and checked.

    Attributes:
        config: what to do.
        model, tokenizer: the model, which training changes.
        samples: to train on, as the recipe makes them of those given.
        encoded: the same as tokens.
        probes, watched: sets of samples; the first one watched are training samples.
        sets, compared: named sets of components.
        progress: show bars.
    """

    config: RunConfig
    model: Any
    tokenizer: Any
    samples: list[Sample]
    encoded: list[Encoded]
    probes: list[ProbeSet]
    watched: list[ProbeSet]
    sets: Mechanisms
    compared: Mechanisms
    progress: bool = False

    @property
    def cause_metric(self) -> str:
        """Of causes on training samples: log-odds where the run's metric needs contrasts they lack."""
        metric = self.config.metric
        missing = metric == "logit_difference" and not all(sample.contrast for sample in self.watched[0].samples)
        return "log_odds" if missing else metric


def read(config: RunConfig, progress: bool) -> Material:
    """Read everything that the config names, and fail now on what would be refused once the run has begun."""
    from attribution.mechanisms import read_mechanisms
    from attribution.models import load
    from attribution.samples import ProbeSet, encode, read_samples

    if not config.probes:
        raise ConfigError("there is no probe set; name at least one JSONL file of held-out samples with --probes")
    if config.counterfactuals and len(config.counterfactuals) != len(config.probes):
        raise ConfigError(
            f"{len(config.counterfactuals)} files of counterfactuals for {len(config.probes)} probe sets; give one for each"
        )
    samples = read_samples(config.data)
    others = config.counterfactuals or [None] * len(config.probes)
    probes = [ProbeSet.read(p, counterfactuals=c) for p, c in zip(config.probes, others, strict=True)]
    sets = read_mechanisms(_mechanisms(config)) if config.sets else {}
    compared = read_mechanisms(config.compared) if config.compared else {}
    if twice := set(sets) & set(compared):
        raise ConfigError(f"two sets are called {min(twice)!r}; rename one")
    model, tokenizer = load(config.model, device=config.device, allow_pickle=config.allow_pickle)
    context = getattr(model.config, "max_position_embeddings", None)
    encode(tokenizer, samples, context=context)  # what is wrong with them is said of them as they were given
    samples = config.training.prepare(samples, model, tokenizer, config.seed)
    encoded = encode(tokenizer, samples, context=context)
    watched = [ProbeSet(name=TRAINING, samples=tuple(_spread(samples))), *map(ProbeSet.read, config.watched)]
    material = Material(config, model, tokenizer, samples, encoded, probes, watched, sets, compared, progress)
    _check(material)
    return material


def _check(given: Material) -> None:
    from attribution.components import Components
    from attribution.updates.linear_graft import check_request
    from attribution.updates.probes import ProbeReader, Watch
    from attribution.updates.recorder import ALL_UP_TO
    from attribution.updates.selection import Selection

    config = given.config
    config.training.check(setting(given, Path(), []))
    _recorder(given, "")
    components = Components(given.model)
    for probe in given.probes:
        ProbeReader(probe, components, given.tokenizer, config.metric, config.reference, beside=config.beside)
    for each in given.watched:
        Watch(each, components, given.tokenizer)
    for members in (*given.sets.values(), *given.compared.values()):
        components.positions(members)
    selection = Selection(config.kinds, config.layers, config.heads)
    whole = selection.mask(components).all() and (
        len(components) <= ALL_UP_TO if config.everything is None else config.everything
    )
    if config.grafts == "all" and not config.share_passes:
        raise ConfigError(
            "grafts of single neurons and rows are chosen by update shares, which share_passes 0 leaves out; set grafts to "
            "heads or sets, or share_passes to at least 2"
        )
    if config.linear_grafts:
        check_request(config.linear_grafts)
        if not (whole and config.share_passes):
            raise ConfigError(
                f"linear_grafts needs the update shares of all {len(components):,} components, of which this run would record "
                "a choice or none; set everything to true, share_passes to at least 2, and select all kinds, layers and heads, "
                "or set linear_grafts to 0"
            )


def causes(given: Material) -> pd.DataFrame:
    """Which components cause the responses that will be trained, before training: exact ablation on training samples.

    By zero, since training samples have no counterfactuals. Of a large model, all heads, and the choice of neurons and rows
    that `updates.rows` describes.

    Returns:
        `Causes.table`.
    """
    import numpy as np
    import torch

    from attribution.causes import attribute
    from attribution.components import Components
    from attribution.updates.recorder import ALL_UP_TO
    from attribution.updates.rows import Rows
    from attribution.updates.selection import Selection
    from attribution.updates.starts import Start

    config, some, metric = given.config, given.watched[0].samples, given.cause_metric
    index = Components(given.model)
    selection = Selection(config.kinds, config.layers, config.heads)

    def table() -> pd.DataFrame:
        rows = Rows(index, config.singles == "all" and len(index) <= ALL_UP_TO, (), selection)
        if config.singles == "all" and len(index) > ALL_UP_TO:
            score = attribute(given.model, given.tokenizer, some, method="gradient", metric=metric).table["effect"]
            rows.choose(torch.as_tensor(score.to_numpy(copy=True)))
        chosen = index.table.iloc[np.sort(rows.exact)]
        return attribute(given.model, given.tokenizer, some, metric=metric, components=chosen, progress=given.progress).table

    return Start(index).once(table, "causes", config.singles, repr(selection), metric, _tokens(given, some))


def _tokens(given: Material, samples: Sequence[Sample]) -> tuple[Encoded, ...]:
    from attribution.samples import encode

    return tuple(encode(given.tokenizer, samples, context=getattr(given.model.config, "max_position_embeddings", None)))


def train(
    given: Material, writer: RunWriter, checkpoint: Path | None, stopping: Stopping | None = None
) -> tuple[dict[str, Any], Any]:
    """Train and record; between two steps it stops if it is to.

    Returns:
        What the record ends with, and the trained model, plain where it was trained with adapters.
    """
    from attribution.updates.seam import plain

    config, stopping = given.config, stopping or Stopping()
    callback = _recorder(given, writer, checkpoint, stopping)
    folder = writer.path / CHECKPOINTS
    trainer = config.training.build(setting(given, folder, [callback], callback.recorder))
    try:
        with stopping.after_the_step():
            trainer.train(**({"resume_from_checkpoint": str(checkpoint)} if checkpoint else {}))
    except BaseException as error:
        callback.failed(error)
        raise
    finally:
        with suppress(OSError):
            folder.rmdir()  # where the trainer kept nothing
    given.model.eval()
    return callback.recorder.result(), plain(given.model)


def setting(given: Material, folder: Path, callbacks: list[Any], recorder: Recorder | None = None) -> Setting:
    """What the recipe trains on."""
    from attribution.samples import encode

    neutral = [sample for probe in given.probes[:1] for sample in probe.counterfactuals]
    return Setting(
        model=given.model, tokenizer=given.tokenizer, samples=given.samples, encoded=given.encoded, seed=given.config.seed,
        directory=folder, callbacks=callbacks, recorder=recorder, sets=given.sets,
        neutral=encode(given.tokenizer, neutral) if neutral else [], progress=given.progress,
    )  # fmt: skip


def read_words(given: Material, writer: RunWriter, when: str, model: Any) -> None:
    """Write how much each token of some prompts brings about the response, by integrated gradients; the log says why not."""
    from attribution.causes.tokens import token_causes
    from attribution.components import Components
    from attribution.updates.starts import Start

    probe, metric = given.probes[0], given.config.metric
    some = probe.samples[:WORDS]

    def table() -> pd.DataFrame:
        return token_causes(model, given.tokenizer, some, metric=metric, steps=WORD_NODES, exact=False).table

    try:
        before = when == "before"
        found = Start(Components(model)).once(table, "words", metric, some, _tokens(given, some)) if before else table()
    except (ModelError, ConfigError) as error:
        writer.log(f"words of prompts were not read {when} training: {error}")
        return
    writer.add("tokens", found.drop(columns="model").assign(when=when, probe=probe.name))


def _recorder(given: Material, where: Any, checkpoint: Path | None = None, stopping: Stopping | None = None) -> Any:
    from attribution.updates.callback import RecorderCallback

    config = given.config
    keep = CHECKPOINTS_KEPT if config.checkpoint_seconds is not None else None
    return RecorderCallback(
        where, probes=given.probes, tokenizer=given.tokenizer, metric=config.metric, reference=config.reference,
        milestones=config.milestones, everything=config.everything, batch_after=config.batch_after,
        share_passes=config.share_passes, sets=given.sets, sets_on=config.sets_on, compared=given.compared,
        compared_every=config.compared_every,
        beside=config.beside, primary_only=config.primary_only, watched=given.watched, singles=config.singles,
        kinds=config.kinds, layers=config.layers, heads=config.heads, steps=config.steps, resume=checkpoint,
        completions=config.completions, checkpoint_seconds=config.checkpoint_seconds, boundary=config.training.boundary,
        keep=keep, stopping=stopping or Stopping(),
    )  # fmt: skip


def graft(given: Material, writer: RunWriter, tuned: Any) -> dict[str, Any]:
    """Write the grafts that the config asks for, of named sets, single components and random sets; what the result tells."""
    from attribution.models import load
    from attribution.updates.graft import graft_sets

    config = given.config
    base = load(config.model, device=config.device, allow_pickle=config.allow_pickle).model
    on = {"tokenizer": given.tokenizer, "probes": given.probes, "metric": config.metric}
    if config.keep:
        for kept in (tuned, given.tokenizer):
            kept.save_pretrained(writer.path / KEPT)
    if config.grafts == "depth":
        writer.add("group_grafts", _by_depth(given, base, tuned))
    if given.sets and config.grafts not in ("none", "depth"):
        writer.add("set_grafts", graft_sets(base, tuned, given.sets, **on))
    if config.grafts in ("all", "heads"):
        writer.add("grafts", _grafts(given, writer, base, tuned, on))
    if not config.linear_grafts:
        return {}
    return {"linear_graft": _linear_grafts(given, writer, base, tuned, on)}


def _grafts(given: Material, writer: RunWriter, base: Any, tuned: Any, on: dict[str, Any]) -> pd.DataFrame:
    """Graft and prune-back of every head, and of the neurons and rows with the largest update shares."""
    import pandas as pd

    from attribution.components import Components
    from attribution.updates.graft import graft

    writer.flush()
    parts = read_run(writer.path).components
    single = parts[parts["share"].notna() & (parts["index"] >= 0)]
    size = single.groupby(["probe", "kind", "layer", "index"], observed=True)["share"].sum().abs()
    ranked = size.sort_values(ascending=False).reset_index()
    neurons = ranked[ranked["kind"] == "neuron"].groupby(["probe", "layer"], observed=True).head(GRAFTED_NEURONS)
    rows = ranked[ranked["kind"] == "row"].groupby("probe", observed=True).head(GRAFTED_ROWS)
    table = Components(base).table
    heads = table[table["kind"] == "head"]
    chosen = heads if given.config.grafts == "heads" else pd.concat([heads, neurons, rows])
    chosen = chosen[["kind", "layer", "index"]].drop_duplicates()
    singles = {f"{kind} {layer} {index}": [(kind, layer, index)] for kind, layer, index in chosen.itertuples(index=False)}
    found = graft(base, tuned, singles, **on, progress=given.progress)
    named = found["set"].str.split(" ", expand=True)
    found = found.assign(kind=named[0], layer=named[1].astype(int), index=named[2].astype(int))
    return found.assign(step=int(parts["step"].max()))[["step", "probe", "kind", "layer", "index", "graft", "prune"]]


def _by_depth(given: Material, base: Any, tuned: Any) -> pd.DataFrame:
    """Graft and prune-back of what is near the output, on training samples and probe sets, in log-odds."""
    import pandas as pd

    from attribution.components import Components
    from attribution.metrics import log_odds
    from attribution.updates.graft import graft, level, readable

    table = Components(base).table
    last = table["layer"].eq(table["layer"].max()) & table["kind"].ne("row")
    groups = {"rows": table["kind"].eq("row"), "last layer": last, "both": table["kind"].eq("row") | last}
    probes = [given.watched[0], *given.probes]
    found = graft(
        base, tuned, {name: table.loc[mask, ["kind", "layer", "index"]] for name, mask in groups.items()},
        tokenizer=given.tokenizer, probes=probes,
    )  # fmt: skip
    ends = []
    for model in (base, tuned):
        components = Components(model)
        read = readable(components, given.tokenizer, probes)
        ends.append({name: level(components, batches, log_odds) for name, batches in read.items()})
    total = pd.Series(ends[1]) - pd.Series(ends[0])
    return found.rename(columns={"set": "group"}).drop(columns="groups").assign(total=found["probe"].map(total))


def _linear_grafts(given: Material, writer: RunWriter, base: Any, tuned: Any, on: dict[str, Any]) -> dict[Any, Any]:
    """Write the grafts of random sets beside the sums of their shares; how well they agree, by probe set."""
    from attribution.updates import update_shares
    from attribution.updates.linear_graft import linear_graft

    writer.flush()
    shares = update_shares(writer.path)
    found = linear_graft(base, tuned, shares, **on, sets=given.config.linear_grafts, progress=given.progress)
    writer.add("linear_grafts", found.table)
    told = found.scores.set_index("probe").astype(object)
    return told.where(told.notna(), None).to_dict("index")


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    """At most CAUSE_SAMPLES of the training samples, spread evenly over the file."""
    count = min(CAUSE_SAMPLES, len(samples))
    return [samples[i * len(samples) // count] for i in range(count)]


def _mechanisms(config: RunConfig) -> str:
    """Where the named sets are: a file, a folder, or the model itself where `sets` is "model"."""
    if config.sets != "model":
        return str(config.sets)
    from attribution.models import locate

    return str(locate(config.model))
