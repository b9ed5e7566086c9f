"""A small synthetic run, finished or stopped half-way, written as the recorder writes one."""

import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from attribution.claims import BOOST, Claim, evaluate
from attribution.reports import report, study_report
from attribution.store import BATCH, TRAINING, RunWriter, read_run, write_json
from attribution.store.quantities import components as components_of
from attribution.store.quantities import drawn, timelines

LAYERS, HEADS, NEURONS, STEPS = 3, 4, 12, 6
PROBES = ("conflict", "agree <b>held out</b>")
SCRIPT = "<script>alert(1)</script>"
WORDS = [
    SCRIPT,
    "w" * 10_000,
    " the",
    "\n",
    "<b>bold</b>",
    "&amp;",
    "$x$",
    "a|b",
    "\u202eright",
    '"',
    *(f" word{i}" for i in range(20)),
]
CONFIG = {
    "model": "planted",
    "recipe": "sft",
    "training": {"max_steps": STEPS, "learning_rate": 1e-3},
    "data": "train.jsonl",
    "probes": ["conflict.jsonl", "agree.jsonl"],
    "metric": "log_odds",
    "reference": "zero",
    "seed": 20250,
}
META = {
    "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.0", "trl": "1.0", "attribution": "0.1"},
    "model": {"name": "planted", "type": "llama", "layers": LAYERS, "heads": HEADS, "neurons": NEURONS,
              "vocabulary": len(WORDS), "parameters": 12_345, "tied": False},
    "seconds": {"total": 12.5, "recorder": 3.25},
    "not_measured": [f"Samples of the batch, because {SCRIPT}."],
    "started": "2025-01-01T00:00:00",
}  # fmt: skip


def components() -> list[tuple[str, int, int, str]]:
    """(kind, layer, index, part) of every part of every component, and the remainder."""
    found = [("head", layer, i, part) for layer in range(LAYERS) for i in range(HEADS) for part in ("writing", "routing")]
    found += [("neuron", layer, i, part) for layer in range(LAYERS) for i in range(NEURONS) for part in ("writing", "gating")]
    found += [("row", -1, i, "writing") for i in range(len(WORDS))]
    found += [("remainder", layer, -1, part) for layer in range(LAYERS) for part in ("keys", "norms")]
    return [*found, ("remainder", -1, -1, "embedding"), ("remainder", -1, -1, "final norm")]


def _part_rows(step: int, probe: str, generator: np.random.Generator) -> pd.DataFrame:
    rows = pd.DataFrame(components(), columns=["kind", "layer", "index", "part"]).assign(step=step, probe=probe)
    if probe == BATCH:
        return rows.assign(update_norm=generator.random(len(rows)), cause_before=generator.normal(size=len(rows)))
    share = generator.normal(0, 0.02, len(rows)) + 0.05 * ((rows["kind"] == "head") & (rows["index"] == 1))
    return rows.assign(share=share, cause_before=generator.normal(size=len(rows)))


SILENT = 4  # the step of reinforcement learning on which every advantage is zero
PAIRS = {**CONFIG, "recipe": "dpo", "metric": "logit_difference"}
SAMPLED = {**CONFIG, "recipe": "grpo"}


def lines(step: int, pairs: bool) -> list[dict[str, Any]]:
    """Of one step, three prompts with four completions each; of preference pairs, two responses. All hold markup."""
    found = []
    for sample in range(3):
        for number, push in enumerate([0.1, -0.1] if pairs else [1.0, -1.0, 0.5, -0.5]):
            found.append({
                "step": step, "sample": sample, "prompt": f"{'p' * 400} {SCRIPT} question {sample}:",
                "completion": f"{SCRIPT} answer {number} &amp; <b>bold</b> \n{'c' * 10_000}", "tokens": 4,
                "reward": push * step if pairs else float(push > -0.5 * sample),
                "advantage": 0.0 if step == SILENT and not pairs else push, "ratio": None if pairs else 1.25,
            })  # fmt: skip
    return found


def _completed(rows: pd.DataFrame, step: int, pairs: bool) -> pd.DataFrame:
    """Rows of the batch with causes of completions, which stand on output weights."""
    high, low = np.random.default_rng(10 + step).normal(size=(2, len(rows)))
    if step == SILENT and not pairs:
        return rows.assign(cause_rewarded=np.where(rows["part"] == "writing", 0.0, np.nan))
    there = np.where(rows["part"] == "writing", 1.0, np.nan)
    return rows.assign(cause_rewarded=there * (high - low) / 4, cause_high=there * high, cause_low=there * low)


def _singles(probe: str, neurons: int, **values: object) -> pd.DataFrame:
    found = [(kind, layer, i) for kind, layer, i, part in components() if part == "writing" and kind in ("head", "neuron")
             and not (kind == "neuron" and i >= neurons)]  # fmt: skip
    return pd.DataFrame(found, columns=["kind", "layer", "index"]).assign(probe=probe, **values)


def write_run(
    path: Path,
    finished: bool = True,
    neurons: int = NEURONS,
    causes: bool = True,
    config: dict[str, Any] = CONFIG,
    read: bool = True,
    draw: int = 0,
) -> Path:
    """Write a run. Half-way: 3 steps, no milestone, no graft, no meta.

    neurons: how many per layer have an influence. causes: whether they were measured on training samples.
    read: whether those of completions were read, where the config's recipe samples or prefers any. draw: of the numbers.
    """
    generator, writer = np.random.default_rng(draw), RunWriter(path, config)
    if causes:
        _add_causes(writer)
    steps = STEPS if finished else STEPS // 2
    writer.vocabulary(WORDS)
    metric = dict.fromkeys(PROBES, -1.5)
    for probe in PROBES:
        writer.add("probes", pd.DataFrame([{"step": 0, "probe": probe, "metric": -1.5, "kl": 0.0}]))
        _add_influence(writer, probe, 0, neurons, generator)
    for step in range(1, steps + 1):
        loss = 2 / step if finished else None
        writer.add("steps", pd.DataFrame([{"step": step, "loss": loss, "learning_rate": 1e-3, "seconds": 0.1}]))
        batch, pairs = _part_rows(step, BATCH, generator), config["recipe"] == "dpo"
        if pairs or config["recipe"] == "grpo":
            writer.samples(lines(step, pairs))
            batch = _completed(batch, step, pairs) if read else batch
        writer.add("components", batch)
        for number, probe in enumerate(PROBES):
            rows = _part_rows(step, probe, generator)
            writer.add("components", rows)
            total, residual = rows["share"].sum(), 0.1 if (step, number) == (2, 0) else 1e-6
            metric[probe] += total + residual
            writer.add("probes", pd.DataFrame([{
                "step": step, "probe": probe, "metric": metric[probe], "kl": 0.02 * step * (number + 1),
                "change": total + residual, "share_sum": total, "residual": residual, "resolved": residual < 1e-3,
                "passes": 1,
            }]))  # fmt: skip
        writer.flush()
    if finished:
        _add_tokens(writer)
        writer.meta(META)
        for probe in PROBES:
            _add_influence(writer, probe, steps, neurons, generator)
            grafts = _singles(probe, NEURONS, step=steps)
            writer.add("grafts", grafts.assign(graft=generator.normal(0, 0.1, len(grafts))))
            layer = {"step": steps, "probe": probe, "kind": "head", "layer": 0, "index": -1, "graft": 99.0}
            writer.add("grafts", pd.DataFrame([layer]))
        ends = {probe: {"before": -1.5, "after": metric[probe], "kl": 0.1} for probe in PROBES}
        measured = {"causes": {"samples": 48}} if causes else {}
        writer.finish({"steps": steps, "seconds": 12.5, "probes": ends, **measured})
    return path


def _add_influence(writer: RunWriter, probe: str, step: int, neurons: int, generator: np.random.Generator) -> None:
    rows = _singles(probe, neurons, step=step)
    writer.add("influence", rows.assign(effect=generator.normal(0, 0.3, len(rows)), kl=generator.random(len(rows))))


def _add_causes(writer: RunWriter) -> None:
    """As `runs` writes them: every head, neuron and row on training samples, from a generator of its own."""
    generator = np.random.default_rng(1)
    words = pd.DataFrame({"kind": "row", "layer": -1, "index": range(len(WORDS)), "probe": TRAINING, "step": 0})
    rows = pd.concat([_singles(TRAINING, NEURONS, step=0), words], ignore_index=True)
    writer.add("influence", rows.assign(effect=generator.normal(0, 0.5, len(rows)), kl=generator.random(len(rows))))
    writer.flush()


TOKENS = ("tom", SCRIPT, "w" * 10_000, "<b>is</b>", " ")


def _add_tokens(writer: RunWriter) -> None:
    """Two prompts before and after: effects that tell which is which."""
    rows = [{"when": when, "probe": PROBES[0], "sample": sample, "position": place, "token": token,
             "effect": (1 if when == "before" else 2) * (place + 1) - 4 * sample}
            for when in ("before", "after") for sample in (0, 1) for place, token in enumerate(TOKENS)]  # fmt: skip
    writer.add("tokens", pd.DataFrame(rows))


@pytest.fixture
def build() -> Callable[..., Path]:
    return write_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "seed-0")


@pytest.fixture(scope="session")
def uncaused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a recorder in a loop of the user's own: no causes, and a config of another form."""
    config = {"model": "planted", "recipe": "a loop of its own", "metric": "log_odds", "reference": "zero", "milestones": "log",
              "probes": [{"name": "conflict", "samples": 24}, {"name": "agree <b>held out</b>", "samples": 8}]}  # fmt: skip
    return write_run(tmp_path_factory.mktemp("runs") / "loop", causes=False, config=config)


@pytest.fixture(scope="session")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of reinforcement learning, whose completions hold markup."""
    return write_run(tmp_path_factory.mktemp("runs") / "sampled", config=SAMPLED)


@pytest.fixture(scope="session")
def preferred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of preference training."""
    return write_run(tmp_path_factory.mktemp("runs") / "preferred", config=PAIRS)


@pytest.fixture(scope="session")
def unread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a run of reinforcement learning that did not read the causes of its completions."""
    return write_run(tmp_path_factory.mktemp("runs") / "unread", finished=False, config=SAMPLED, read=False)


@pytest.fixture(scope="session")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "half", finished=False)


# A study made of numbers: influences, KL and gain are straight lines over steps, so that every change is known.

LOCATED = {("A", "A"): 0.6, ("A", "B"): -0.1, ("B", "A"): 0.05, ("B", "B"): 0.4}  # (mechanism, arm): strengthening at the end
NOWHERE = dict.fromkeys(LOCATED, 0.2)
CONTROL, MODELS = "planted/unrouted", ("planted/0", "planted/1", "planted/2", f"planted/{SCRIPT}", "planted/<b>4</b>")
SPEED = {"A": 0.2, "B": 0.1, "lr0": 0.0, "<b>both</b>": 0.15}  # KL at the end, by arm
SIGNS = {"conflict": {"A": 1, "B": -1}, "agree": {"A": 1, "B": 1}}


def study_frames(models: int = 5, located: dict[tuple[str, str], float] = LOCATED) -> dict[str, pd.DataFrame]:
    """Frames of a study with the arms of the claim `boost` and one more, its control, and cross-grafts."""
    rows: dict[str, list[dict[str, Any]]] = {"sets": [], "probes": [], "set_grafts": []}
    for number, model in enumerate([*MODELS[:models], CONTROL]):
        shift = 0.0 if model == CONTROL else 0.01 * number
        changes = {arm: {name: (NOWHERE if model == CONTROL else located).get((name, arm), 0.1) + shift for name in "AB"}
                   for arm in SPEED}  # fmt: skip
        changes["lr0"] = dict.fromkeys("AB", 0.0)
        for arm in ("A", "B") if model == CONTROL else SPEED:
            for seed in (0, 1):
                _add_study_run(rows, {"model": model, "arm": arm, "seed": seed}, changes[arm])
    return {name: pd.DataFrame(found) for name, found in rows.items()}


def _add_study_run(rows: dict[str, list[dict[str, Any]]], run: dict[str, Any], changes: dict[str, float]) -> None:
    arm, before = run["arm"], {"A": 2.0, "B": 1.6}
    for step in (0, 2, 4, 6):
        part, key = step / 6, {**run, "step": step}
        rows["probes"] += [
            {**key, "probe": "neutral", "metric": 0.0, "kl": SPEED[arm] * part},
            {**key, "probe": "training samples", "metric": 8 * SPEED[arm] * part - 3, "kl": 0.0},
            {**key, "probe": "conflict", "metric": SPEED[arm] * part * (1 if arm == "A" else -1), "kl": 0.0},
        ]
        for name in "AB":
            sets = {name: (before[name], changes[name])}
            sets |= {f"wrong-{k} {name}": (1.0, 0.2 if arm != "lr0" else 0.0) for k in range(1, 5)}
            for probe, signs in SIGNS.items():
                for label, (start, change) in sets.items():
                    effect = signs[name] * (start + change * part)
                    rows["sets"].append({**key, "probe": probe, "set": label, "effect": effect, "effect_even": effect + 0.1,
                                         "effect_odd": effect - 0.1, "kl": 0.1})  # fmt: skip
    if arm in ("A", "B"):
        sign = BOOST.cell.signs[BOOST.cell.probes]["AB".index(arm)]
        for name, gain, left in (("A", 0.4, 0.1), ("B", 0.3, 0.2), ("remainder", 0.2, 0.2)):
            for ablated, value in (("", gain), (arm, left)):
                rows["set_grafts"].append(
                    {**run, "probe": BOOST.cell.probes, "set": name, "ablated": ablated, "graft": sign * value}
                )


def write_study(
    path: Path,
    frames: dict[str, pd.DataFrame] | None = None,
    claims: tuple[Claim, ...] = (BOOST,),
    leave_out: tuple[str, ...] = (),
    **told: Any,
) -> Path:
    """Write a study's directory as `attribution study` does; frames in `leave_out` are judged but not written."""
    frames = study_frames() if frames is None else frames
    (path / "frames").mkdir(parents=True)
    for name, frame in frames.items():
        if name not in leave_out:
            frame.to_parquet(path / "frames" / f"{name}.parquet")
    reason = f"no memory {SCRIPT}"
    failed = pd.DataFrame([{"model": MODELS[0], "arm": "<b>both</b>", "seed": 7, "reason": reason}])
    given = {"sets": frames["sets"], "probes": frames["probes"], "grafts": frames["set_grafts"], "failed": failed}
    write_json(path / "findings.json", [evaluate(claim, given).to_dict() for claim in claims])
    keys = frames["probes"][["arm", "model", "seed"]].drop_duplicates().to_dict("records")
    runs = [{**key, "path": f"{key['arm']}/seed-{key['seed']}", "state": "finished", "steps": 6} for key in keys]
    runs.append({"arm": "<b>both</b>", "model": MODELS[0], "seed": 7, "path": SCRIPT, "state": "failed", "steps": 3})
    whole = {"name": f"planted {SCRIPT}", "arms": list(SPEED), "models": list(MODELS), "seeds": [0, 1], "seconds": 123.4,
             "versions": {"torch": "2.13.0", "python": "<i>3</i>"}, "runs": runs}  # fmt: skip
    write_json(path / "study.json", {**whole, **told})
    return path


@pytest.fixture
def build_study() -> Callable[..., Path]:
    return write_study


@pytest.fixture(scope="session")
def made_frames() -> Callable[..., dict[str, pd.DataFrame]]:
    return study_frames


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose claim is supported, with one failed run."""
    return write_study(tmp_path_factory.mktemp("studies") / "planted")


@pytest.fixture(scope="session")
def whole_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with its single components: three models and the control, two arms, three seeds."""
    place = tmp_path_factory.mktemp("studies") / "components"
    write_study(place)
    tables: dict[str, list[pd.DataFrame]] = {"totals": [], "courses": [], "tokens": []}
    for number, (model, arm, seed) in enumerate(product((*MODELS[2:5], CONTROL), ("A", "<b>both</b>"), range(3))):
        if (model, arm) == (MODELS[4], "<b>both</b>"):
            continue  # this model has no such arm
        run = read_run(write_run(tmp_path_factory.mktemp("runs") / "run", draw=number))
        for name, frame in (("totals", components_of(run)), ("courses", timelines(run)), ("tokens", run.tokens)):
            words = {column: object for column in ("when", "probe", "token") if column in frame}
            tables[name].append(frame.astype(words).assign(model=model, arm=arm, seed=seed))
    chosen, courses = drawn(tables["totals"], tables["courses"])
    frames = {"totals": chosen, "courses": courses, "tokens": pd.concat(tables["tokens"], ignore_index=True)}
    for name, frame in frames.items():
        frame.to_parquet(place / "frames" / f"{name}.parquet")
    return place


def sync_api():
    return pytest.importorskip("playwright.sync_api")


@pytest.fixture
def expect() -> Callable:
    return sync_api().expect


@pytest.fixture(scope="session")
def browser():
    executable = shutil.which("chromium")
    if not executable:
        complain = pytest.fail if os.environ.get("CI") else pytest.skip
        complain("no chromium on this machine: install it with `apt-get install chromium`")
    with sync_api().sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        opened = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def written() -> dict[Path, str]:
    """Addresses of pages by the directory that they are of: each is written once."""
    return {}


@pytest.fixture
def visit(browser, written):
    """Open the page of a run or a study; on leaving, it must have logged nothing and asked the network for nothing."""
    logged, asked, pages = [], [], []

    def go(path, width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        page.on("console", lambda message: logged.append(message.text))
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        if path not in written and path.suffix == ".html":
            written[path] = path.as_uri()
        elif path not in written:
            written[path] = (study_report if (path / "study.json").exists() else report)(path).as_uri()
        page.goto(written[path])
        page.locator("html[data-drawn=all]").wait_for(state="attached")
        return page

    yield go
    for page in pages:
        page.close()
    assert logged == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
