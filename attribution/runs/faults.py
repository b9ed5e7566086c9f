"""What broke a run from outside, in one sentence that says what to do: the disk, and memory. Knows errors; knows no run."""

from __future__ import annotations

import errno
from pathlib import Path

from attribution.errors import AttributionError, RunError

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
_SAID = ("no space left on device", "disk quota exceeded", "input/output error", "read-only file system", "permission denied")
# What torch and safetensors say instead, in a checkpoint whose end does not fit
_WRITERS = ("PytorchStreamWriter failed", "unexpected pos", "iostream error", "Error while serializing", "Parent directory")


def explained(error: BaseException, path: Path, doing: str) -> BaseException:
    """An error of the package in place of what the system, torch or safetensors raised; any other error as it is.

    Args:
        error: that ended the run.
        path: the run's directory.
        doing: in words.
    """
    from attribution.updates.memory import out_of_memory

    if isinstance(error, AttributionError) or not isinstance(error, Exception):
        return error
    said = " ".join(str(error).split())
    if out_of_memory(error):
        return RunError(
            f"out of memory while {doing} ({said[:120] or type(error).__name__}); where more memory is free the same command "
            "goes on from the newest checkpoint; else lower training.batch_size (with accumulation), the probe samples or what "
            "is read, which makes it another run: `attribution doctor` says what each would save"
        )
    if _of_the_disk(error, path, said):
        return RunError(
            f"cannot write below {path} while {doing} ({said[:160]}); free some space there, or make it writable, and start "
            "again: the run goes on from its newest checkpoint"
        )
    return error


def _of_the_disk(error: Exception, path: Path, said: str) -> bool:
    if isinstance(error, OSError) and error.errno in _DISK:
        where = error.filename
        return where is None or str(where).startswith(str(path))
    return any(each in said for each in _WRITERS) or any(each in said.lower() for each in _SAID)
