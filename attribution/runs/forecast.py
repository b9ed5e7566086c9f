"""The forecast of a run: what the first step of its training would strengthen. Nothing is trained, and no run is written.

Everything that the run would read is read and checked as for the run; torch is imported when it is asked for. Knows configs
and stages; knows nothing about how a forecast is shown.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from attribution.errors import RunError
from attribution.runs import stages
from attribution.runs.config import RunConfig, digests
from attribution.store import Run, write_atomic, write_json

if TYPE_CHECKING:
    import pandas as pd

    from attribution.updates.forecast import Forecast

STEPS = (1, 5, 20)  # of a recorded run, those at which a forecast is compared with it where they are there; and its last
FILE = "forecast.json"


def forecast_of(config: RunConfig, *, top: int = 8, compared: bool = True, progress: bool = False) -> Forecast:
    """What the first step of a run's own training, on its first batch, would do to its probe sets, sets and top components.

    Args:
        config: of the run. Its settings of recording are checked, and have no effect but for kinds, layers and heads, of
            which the top components are taken.
        top: as `updates.forecast.forecast`.
        compared: foretell compared sets too.
        progress: show bars.

    Raises:
        AttributionError: whatever the run would refuse, or `first_step`.
    """
    from attribution.components import Components
    from attribution.updates.forecast import first_step, from_step
    from attribution.updates.seam import plain
    from attribution.updates.selection import Selection

    digests(config)  # of a replay: refuses inputs that have changed
    given = stages.read(config, progress)
    with TemporaryDirectory() as folder:
        setting = stages.setting(given, Path(folder), [])
        step = first_step(lambda: config.training.build(setting).train(), given.model)
    components = Components(plain(given.model))
    among = components.table[Selection(config.kinds, config.layers, config.heads).mask(components)]
    others = given.compared if compared else {}
    sets = {**given.sets, **others}
    if config.sets_on is not None:
        wanted = {name for names in config.sets_on.values() for name in names} | set(others)
        sets = {name: members for name, members in sets.items() if name in wanted}
    return from_step(
        components, step, given.tokenizer, given.probes, sets=sets, top=top, among=among,
        metric=config.metric, reference=config.reference, progress=progress,
    )  # fmt: skip


def against(found: Forecast, run: Run) -> pd.DataFrame:
    """How a forecast turned out in a recorded run, after steps 1, 5 and 20 as far as recorded, and the last: `compare`.

    Raises:
        RunError: as `updates.forecast.compare`, and where the run has no recorded step.
    """
    from attribution.updates.compare import compare, recorded_steps

    recorded = recorded_steps(run)
    if not recorded:
        raise RunError(f"{run.path} has no recorded step yet to compare a forecast with; wait for one, or name another run")
    return compare(found, run, sorted({*recorded[-1:], *(step for step in STEPS if step in recorded)}))


def write(found: Forecast, config: RunConfig, folder: str | Path, compared: pd.DataFrame | None = None) -> Path:
    """Write forecast.json and the frames beside it, as forecast-sets.parquet and so on; the path of the former.

    Raises:
        RunError: the folder cannot be written.
    """
    frames = {"sets": found.sets, "components": found.components, "against": compared}
    for name, frame in frames.items():
        if frame is not None:
            write_atomic(Path(folder) / f"forecast-{name}.parquet", frame.to_parquet(index=False, compression="zstd"))
    told: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "metric": found.metric,
        "reference": found.reference,
        "planned_norm": found.planned_norm,
        "probes": found.probes.to_dict("records"),
    }
    write_json(Path(folder) / FILE, told)
    return Path(folder) / FILE
