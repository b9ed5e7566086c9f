"""Which circuits of a language model does finetuning strengthen, and were they those that caused the output?

Names are imported when first used, so that `import attribution` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "AttributionError": "errors",
    "Causes": "causes",
    "Component": "components",
    "Components": "components",
    "ProbeSet": "samples",
    "Recorder": "updates.recorder",
    "RecorderCallback": "updates.callback",
    "RunConfig": "runs",
    "Sample": "samples",
    "ablate": "causes",
    "attribute": "causes",
    "forecast": "updates.forecast",
    "graft": "updates.graft",
    "linear_graft": "updates.linear_graft",
    "load": "models",
    "read_run": "store",
    "read_samples": "samples",
    "report": "reports",
    "run": "runs",
    "samples_from_text": "samples",
    "update_shares": "updates",
    "write_samples": "samples",
}

if TYPE_CHECKING:
    from attribution.causes import Causes, ablate, attribute
    from attribution.components import Component, Components
    from attribution.errors import AttributionError
    from attribution.models import load
    from attribution.reports import report
    from attribution.runs import RunConfig, run
    from attribution.samples import ProbeSet, Sample, read_samples, samples_from_text, write_samples
    from attribution.store import read_run
    from attribution.updates import update_shares
    from attribution.updates.callback import RecorderCallback
    from attribution.updates.forecast import forecast
    from attribution.updates.graft import graft
    from attribution.updates.linear_graft import linear_graft
    from attribution.updates.recorder import Recorder

__all__ = [
    "AttributionError",
    "Causes",
    "Component",
    "Components",
    "ProbeSet",
    "Recorder",
    "RecorderCallback",
    "RunConfig",
    "Sample",
    "ablate",
    "attribute",
    "forecast",
    "graft",
    "linear_graft",
    "load",
    "read_run",
    "read_samples",
    "report",
    "run",
    "samples_from_text",
    "update_shares",
    "write_samples",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attribution' has no attribute {name!r}")
    return getattr(import_module(f"attribution.{_HOMES[name]}"), name)
