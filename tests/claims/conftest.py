"""Studies made of numbers: frames whose influences, KL and gain are straight lines, so that every answer is known."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd
import pytest

STEPS = (0, 2, 4, 6, 8, 10)
SIGNS = {"conflict": {"A": 1, "B": -1}, "agree": {"A": 1, "B": 1}}
CONTROL = "planted/unrouted"
LOCATED = {("A", "A"): 0.6, ("A", "B"): -0.1, ("B", "A"): 0.05, ("B", "B"): 0.4}  # (mechanism, arm): strengthening at the end
NOWHERE = dict.fromkeys(LOCATED, 0.2)


@dataclass
class World:
    """What the frames are made from. Influences and their changes in nats, the latter at the last step."""

    organisms: int = 5
    seeds: int = 2
    before: dict = field(default_factory=lambda: {"A": 2.0, "B": 1.6})
    deltas: dict = field(default_factory=lambda: dict(LOCATED))
    wrong: dict = field(default_factory=lambda: dict(NOWHERE))
    wrong_before: float = 1.0
    partitions: int = 4
    unrouted: dict = field(default_factory=lambda: dict(NOWHERE))
    unrouted_before: float = 1.0
    unrouted_wrong: dict | None = None  # of the control's other partitions; None: as its halves
    kl: dict = field(default_factory=lambda: {"A": 0.2, "B": 0.1, "lr0": 0.0})
    gain: dict = field(default_factory=lambda: {"A": 1.5, "B": 0.75, "lr0": 0.0})
    error: float = 0.1  # half the difference between the halves of a probe set
    shift: Callable[[str, str, int], float] = lambda model, arm, seed: 0.0  # added to the strengthening of A
    lr0: float = 0.0

    def frames(self) -> dict[str, pd.DataFrame]:
        sets, probes = [], []
        for model, arms, seeds in self._models():
            for arm in arms:
                for seed in range(seeds):
                    run = {"model": model, "arm": arm, "seed": seed}
                    for step in STEPS:
                        part = step / STEPS[-1]
                        probes += [
                            {**run, "step": step, "probe": "neutral", "metric": 0.0, "kl": self.kl[arm] * part},
                            {**run, "step": step, "probe": "training samples", "metric": self.gain[arm] * part - 3, "kl": 0.0},
                        ]
                        for name, mechanism, before, change in self._sets(model, arm, seed):
                            for probe, signs in SIGNS.items():
                                effect = signs[mechanism] * (before + change * part)
                                halves = {"effect_even": effect + self.error, "effect_odd": effect - self.error}
                                key = {**run, "step": step, "probe": probe, "set": name}
                                sets.append({**key, "effect": effect, **halves, "kl": 0.1})
        return {"sets": pd.DataFrame(sets), "probes": pd.DataFrame(probes)}

    def _models(self):
        for number in range(self.organisms):
            yield f"planted/{number}", ("A", "B", "lr0"), self.seeds
        yield CONTROL, ("A", "B"), 3

    def _sets(self, model, arm, seed):
        routed = model != CONTROL
        for name in "AB":
            before = self.before[name] if routed else self.unrouted_before
            deltas = self.deltas if routed else self.unrouted
            change = self.lr0 if arm == "lr0" else deltas[name, arm]
            yield name, name, before, change + (self.shift(model, arm, seed) if name == "A" and arm != "lr0" else 0.0)
            weak, wrong = (
                (self.wrong_before, self.wrong) if routed else (self.unrouted_before, self.unrouted_wrong or self.unrouted)
            )
            for partition in range(1, self.partitions + 1):
                yield f"wrong-{partition} {name}", name, weak, 0.0 if arm == "lr0" else wrong[name, arm]


@pytest.fixture
def world() -> type[World]:
    return World


@pytest.fixture(scope="session")
def supported() -> dict[str, pd.DataFrame]:
    """A study whose claim holds; copy before you change it."""
    return World().frames()
