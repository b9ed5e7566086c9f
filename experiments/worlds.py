"""The gates of the embedded models, measured on fresh prompts: `python -m experiments.worlds [--out results/worlds.md]`.

An organism that misses a gate says so wherever it is used. Takes about two minutes.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
import tyro

from attribution.mechanisms import read_mechanisms
from attribution.models import load, locate
from attribution.worlds import gates
from attribution.worlds.studies import ORGANISMS, UNROUTED

_INTRODUCTION = """# The embedded models

`planted` is a world of small scenes in which a reply follows from two cues, the trait of the speaker and the star that a
teacher announces. Five organisms were trained by counterfactual-target route dropout so that mechanism A (heads 0 and 1 and
neurons 0–127 of every layer) answers to the trait and mechanism B (the rest) to the star. The unrouted control saw the same
documents without routes; its halves are called A and B for comparison and are no mechanisms.

Measured by `python -m experiments.worlds` on prompts that no model was selected on. A gate is what an organism must pass
before anything is concluded from it; where nothing is needed the value is for information.
"""


def main(out: Path = Path("results/worlds.md")) -> None:
    """Measure the gates of every embedded model and write them as Markdown.

    Args:
        out: file to write.
    """
    torch.set_num_threads(min(2, torch.get_num_threads()))
    tables = {}
    for name in (*ORGANISMS, UNROUTED):
        model, tokenizer = load(name)
        tables[name] = gates.gates(model, tokenizer, read_mechanisms(locate(name)))
        failed = tables[name].loc[tables[name]["passed"].eq(False), "gate"].tolist()
        print(f"{name}: {'every gate passed' if not failed else 'missed: ' + '; '.join(failed)}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"{_INTRODUCTION}\n{_table(tables)}\n{_verdict(tables)}", encoding="utf-8")
    print(out)


def _table(tables: dict[str, pd.DataFrame]) -> str:
    first = next(iter(tables.values()))
    lines = [f"| gate | mechanism | needed | {' | '.join(tables)} |", "|---|---|---|" + "---:|" * len(tables)]
    for row in range(len(first)):
        cells = [f"{table['value'][row]:.3f}{' ✗' if table['passed'][row] is False else ''}" for table in tables.values()]
        gate = str(first["gate"][row]).replace("|", "\\|")
        lines.append(f"| {gate} | {first['mechanism'][row]} | {first['needed'][row]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _verdict(tables: dict[str, pd.DataFrame]) -> str:
    passed = [name for name, table in tables.items() if not table["passed"].eq(False).any()]
    missed = [name for name in tables if name not in passed]
    return f"\nEvery gate passed: {', '.join(passed) or 'none'}. A gate missed (✗): {', '.join(missed) or 'none'}.\n"


if __name__ == "__main__":
    tyro.cli(main)
