"""How large pages are, and how long they take to make and to open: `python -m experiments.pages [--out results/pages.md]`.

Of two records made of random numbers, in the shapes that the budgets name: a study of five arms and ten seeds on five bases of
the size of kindland's, and a run of a model with a billion parameters. Opening is timed in headless Chromium, where Playwright
and `chromium` are there: until the page has loaded, and until every figure is drawn.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

from attribution.reports import report, study_report
from attribution.store import TRAINING, RunWriter, read_run, write_atomic, write_json
from attribution.store.quantities import components, drawn, timelines

STEPS, PROBES, TRACKED = 20, ("agree", "conflict"), 128
SMALL = {"layers": 4, "heads": 8, "neurons": 512, "rows": 254}  # a base of kindland
LARGE = {"layers": 16, "heads": 32, "neurons": 8192, "rows": 128_256}  # of the shapes of a Llama with 1.2 B parameters
MODELS, ARMS, SEEDS = 5, 5, 10
_HEAD = """# Pages

Records of random numbers in these shapes, printed by `python -m experiments.pages`. Budgets: 15 MB and 3 s for the study,
25 MB for the run. Seconds are of this machine.

| record | page | made in | opens in | all figures drawn after |
|---|---|---|---|---|
"""


def main(out: Path = Path("results/pages.md")) -> None:
    """Make both pages, measure them, and write a table.

    Args:
        out: file to write.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, make, page in (
            (f"study of {ARMS} arms, {SEEDS} seeds and {MODELS} bases", study, study_report),
            ("run of a model with 1.2 billion parameters", large, report),
        ):
            place = make(Path(folder) / name.split()[0])
            begun = time.perf_counter()
            file = page(place)
            made = time.perf_counter() - begun
            loaded, all_drawn = opened(file)
            rows.append(f"| {name} | {file.stat().st_size / 1e6:.1f} MB | {made:.0f} s | {loaded} | {all_drawn} |")
    write_atomic(out, (_HEAD + "\n".join(rows) + "\n").encode())
    print(out.read_text(encoding="utf-8"))


def large(place: Path) -> Path:
    """A run of a large model: all neurons and rows at both ends, a choice of them at every step."""
    return record(place, **LARGE, seed=0)


def study(place: Path) -> Path:
    """A study whose runs are one record, each with noise of its own."""
    run = read_run(record(place / "run", **SMALL, seed=0))
    one, course = components(run), timelines(run)
    models, arms = [f"base {number}" for number in range(MODELS)], [f"arm {number}" for number in range(ARMS)]
    generator, tables, courses, runs = np.random.default_rng(1), [], [], []
    for model, arm, seed in product(models, arms, range(SEEDS)):
        who = {"model": model, "arm": arm, "seed": seed}
        tables.append(noisy(one, generator).assign(**who))
        courses.append(noisy(course, generator).assign(**who))
        runs.append({**who, "state": "finished", "steps": STEPS, "seconds": 1.0, "path": f"{arm}/seed-{seed}"})
    chosen, over_steps = drawn(tables, courses)
    (place / "frames").mkdir(parents=True)
    chosen.to_parquet(place / "frames" / "totals.parquet")
    over_steps.to_parquet(place / "frames" / "courses.parquet")
    told = {"name": "random", "arms": arms, "models": models, "seeds": [*range(SEEDS)], "runs": runs}
    write_json(place / "study.json", {**told, "not_judged": {"boost": "random numbers"}})
    return place


def noisy(frame: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    """The numbers of a frame, each times one plus a tenth of a standard normal number."""
    numbers = frame.select_dtypes("floating")
    return frame.assign(**{name: numbers[name] * (1 + 0.1 * generator.standard_normal(len(frame))) for name in numbers})


def record(place: Path, *, layers: int, heads: int, neurons: int, rows: int, seed: int) -> Path:
    """A finished run of random numbers."""
    shutil.rmtree(place, ignore_errors=True)
    generator = np.random.default_rng(seed)
    every = pd.concat([_kind("head", layers, heads), _kind("neuron", layers, neurons), _kind("row", 1, rows, -1)])
    some = pd.concat([_kind("head", layers, heads), _kind("neuron", layers, -(-TRACKED // layers))])
    single = every[every["kind"] != "row"].drop(columns="part")
    writer = RunWriter(place, {"model": "random", "recipe": "sft", "metric": "log_odds", "reference": "zero",
                               "probes": [f"{name}.jsonl" for name in PROBES]})  # fmt: skip
    writer.vocabulary([f"word{number}" for number in range(rows)])
    for probe in PROBES:
        for step in range(1, STEPS + 1):
            read = every if step in (1, STEPS) else some
            writer.add("components", read.assign(step=step, probe=probe, share=1e-4 * generator.standard_normal(len(read))))
            writer.add("probes", {"step": step, "probe": probe, "metric": step / 10, "kl": step / 1000, "change": 0.1})
            writer.flush()
        for step in (0, STEPS):
            writer.add("influence", single.assign(step=step, probe=probe, effect=generator.standard_normal(len(single))))
    writer.add("influence", single.assign(step=0, probe=TRAINING, effect=generator.standard_normal(len(single))))
    for step in range(1, STEPS + 1):
        writer.add("steps", {"step": step, "loss": 1 / step})
    writer.finish({"steps": STEPS, "seconds": 1.0})
    return place


def _kind(kind: str, layers: int, count: int, first: int = 0) -> pd.DataFrame:
    layer, index = np.divmod(np.arange(layers * count), count)
    return pd.DataFrame({"kind": kind, "layer": layer + first, "index": index, "part": "writing"})


def opened(file: Path) -> tuple[str, str]:
    """Seconds until the page has loaded, and until all is drawn."""
    executable = shutil.which("chromium")
    if not executable:
        return "no chromium here", ""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        begun = time.perf_counter()
        page.goto(file.resolve().as_uri())
        loaded = time.perf_counter() - begun
        page.locator("html[data-drawn=all]").wait_for(state="attached")
        whole = time.perf_counter() - begun
        browser.close()
    return f"{loaded:.1f} s", f"{whole:.1f} s"


if __name__ == "__main__":
    tyro.cli(main)
