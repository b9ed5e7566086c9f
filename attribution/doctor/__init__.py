"""What a model has, what a study of it would cost, and what it will not measure: asked before GPU hours are spent.

    from attribution.doctor import examine
    print(examine("planted").page())

Of a model that is loaded the identities are checked and passes are timed. Of one that is only a config, of any size, nothing
is allocated: see `doctor.passes`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from attribution.components import Components
from attribution.doctor.advice import Choice, choices, fitting
from attribution.doctor.disk import Disk, disk
from attribution.doctor.machine import Machine, machine, timed
from attribution.doctor.memory import Memory, footprint
from attribution.doctor.opening import opened
from attribution.doctor.passes import Shapes
from attribution.doctor.plan import Plan
from attribution.doctor.seconds import refining, seconds
from attribution.doctor.shards import per_gpu, spread
from attribution.doctor.structure import Structure, not_measured, structure
from attribution.errors import ConfigError
from attribution.updates.selection import Selection

GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """What a plan takes: bytes on the device, seconds by part and of each further reading of shares, bytes on disk."""

    memory: Memory
    seconds: dict[str, float]
    refining: float
    disk: Disk

    @property
    def time(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found.

    Attributes:
        name: of the model, as asked for.
        structure: its sizes.
        identities: relative errors, by identity; None: only the config was read.
        not_measured: sentences.
        plan, cost: of the study asked for.
        machine: on which its seconds are.
        instead: what other choices cost, each made alone.
        room: bytes of memory there are; None: not said.
        chosen, fitted: with which choices the plan fits the room, and what it then costs.
        sharded, sharded_fitted: bytes on each of several GPUs, by their number, as asked for and with those choices: estimates.
    """

    name: str
    structure: Structure
    identities: dict[str, float] | None
    not_measured: list[str]
    plan: Plan
    cost: Cost
    machine: Machine
    instead: list[tuple[Choice, Cost]]
    room: float | None
    chosen: list[Choice]
    fitted: Cost
    sharded: dict[int, float]
    sharded_fitted: dict[int, float]

    def page(self) -> str:
        """Plain text of at most 100 columns."""
        from attribution.doctor.page import page

        return page(self)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; bytes and seconds."""
        found = asdict(self)
        for key, cost in (("cost", self.cost), ("fitted", self.fitted)):
            found[key] |= {"peak": cost.memory.peak, "time": cost.time}
        found["instead"] = [
            {**asdict(choice), "peak": cost.memory.peak, "time": cost.time, "disk": cost.disk.total}
            for choice, cost in self.instead
        ]
        return found


def examine(
    name: str,
    plan: Plan | None = None,
    *,
    meta: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    memory: float | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
    allow_pickle: bool = False,
) -> Diagnosis:
    """Examine a model for a study.

    Args:
        name: an embedded model, a folder or a hub id. A folder that holds only config.json is not loaded.
        plan: the study; by default `Plan()`.
        meta: load no weights, whatever is there: nothing is checked or timed, and nothing of the model's size allocated.
        dtype: torch dtype name of the weights.
        device: where the model lives.
        memory: memory of the device, in GiB, that the study must fit.
        tflops: 1e12 operations per second in products of matrices of the machine that will run it; None: timed here.
        bandwidth: of its memory, GB per second; None: timed here, or not counted where `tflops` is given.
        allow_pickle: as `load` takes it.

    Raises:
        ModelError: the model cannot be opened, or does not behave as its row in `architectures` says.
        ConfigError: a number that cannot be, an unknown kind or layer, or no such dtype or device.
    """
    for what, value in (("memory", memory), ("tflops", tflops), ("bandwidth", bandwidth)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{what} is {value}; expected a number above 0")
    plan = plan or Plan()
    given = opened(name, meta=meta, dtype=dtype, device=device, allow_pickle=allow_pickle)
    components = Components(given.model)
    Selection(plan.kinds, plan.layers).mask(components)  # refuses what the model does not have
    found, shapes = structure(components), Shapes(given.model.config, dtype)
    here = machine(dtype, device, tflops, bandwidth)
    if given.loaded and tflops is None:
        here = timed(here, given, plan, shapes)
    wrote: dict[Plan, Disk] = {}

    def cost(of: Plan) -> Cost:
        key = replace(
            of, batch_size=1, accumulation=1, samples=1, probe_samples=1, share_passes=min(of.share_passes, 2), lora=0,
            checkpointing=False,
        )  # fmt: skip
        if key not in wrote:
            step = here.seconds(shapes.training(plan.batch_size, plan.length))
            wrote[key] = disk(components, of, found.small, step)
        parts = seconds(found, of, shapes, here, wrote[key].ablated, device)
        return Cost(footprint(found, of, shapes, device), parts, refining(found, of, shapes, here), wrote[key])

    def over(of: Plan, whole: Memory) -> dict[int, float]:
        return spread(lambda shards: per_gpu(found, of, shapes, device, whole, shards), room)

    own, room = cost(plan), None if memory is None else memory * GIB
    chosen, fitted = fitting(plan, found.small, lambda of: footprint(found, of, shapes, device).peak, room or float("inf"))
    return Diagnosis(
        name=name,
        structure=found,
        identities=given.identities,
        not_measured=not_measured(found, plan),
        plan=plan,
        cost=own,
        machine=here,
        instead=[(choice, cost(replace(plan, **choice.changes))) for choice in choices(plan, found.small)],
        room=room,
        chosen=chosen,
        fitted=(less := cost(fitted)),
        sharded=over(plan, own.memory),
        sharded_fitted=over(fitted, less.memory),
    )
