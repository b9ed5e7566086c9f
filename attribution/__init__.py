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
    "Steering": "causes.steering",
    "ablate": "causes",
    "attribute": "causes",
    "discover": "mechanisms",
    "examine": "doctor",
    "forecast": "updates.forecast",
    "graft": "updates.graft",
    "in_chat": "chat",
    "linear_graft": "updates.linear_graft",
    "load": "models",
    "patch": "causes.patching",
    "read_run": "store",
    "read_samples": "samples",
    "read_study": "store",
    "report": "reports",
    "run": "runs",
    "samples_from_text": "samples",
    "self_repair": "causes",
    "separate": "mechanisms",
    "steering": "causes.steering",
    "token_causes": "causes.tokens",
    "update_shares": "updates",
    "write_samples": "samples",
}

if TYPE_CHECKING:
    from attribution.causes import Causes, ablate, attribute, self_repair
    from attribution.causes.patching import patch
    from attribution.causes.steering import Steering, steering
    from attribution.causes.tokens import token_causes
    from attribution.chat import in_chat
    from attribution.components import Component, Components
    from attribution.doctor import examine
    from attribution.errors import AttributionError
    from attribution.mechanisms import discover, separate
    from attribution.models import load
    from attribution.reports import report
    from attribution.runs import RunConfig, run
    from attribution.samples import ProbeSet, Sample, read_samples, samples_from_text, write_samples
    from attribution.store import read_run, read_study
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
    "Steering",
    "ablate",
    "attribute",
    "discover",
    "examine",
    "forecast",
    "graft",
    "in_chat",
    "linear_graft",
    "load",
    "patch",
    "read_run",
    "read_samples",
    "read_study",
    "report",
    "run",
    "samples_from_text",
    "self_repair",
    "separate",
    "steering",
    "token_causes",
    "update_shares",
    "write_samples",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attribution' has no attribute {name!r}")
    return getattr(import_module(f"attribution.{_HOMES[name]}"), name)
