"""The run directory: what is written, when it counts as finished, and how it is read back as tidy frames.

Knows files, JSON and parquet; knows nothing about models or torch, so that reading a run never imports them.

    runs/<study>/<arm>-<hash8>/seed-<s>/
      config.json               what was asked; another config in the same directory is an error
      meta.json                 versions, model shape, cost; vocabulary.json: the words of the unembedding rows
      status.json               running | failed | interrupted | finished, and how far; log.txt: when what was done
      start.safetensors         what the model said at the start, for resuming
      steps.parquet/            one row per optimizer step
      samples.jsonl             completions that were trained on, with reward and advantage; fields in `SAMPLES`
      probes.parquet/           step x probe set
      components.parquet/       step x probe set x component part
      influence.parquet/        milestone x probe set x component: exact ablation
      sets.parquet/             step x probe set x named set of components: joint ablation
      tokens.parquet/           before and after x sample x token of the prompt
      grafts.parquet/           probe set x component
      set_grafts.parquet/       probe set x named set x set ablated meanwhile
      forecasts.parquet/        probe set x named set: what the first step was expected to strengthen
      group_grafts.parquet/     probe set x group of components, by depth
      linear_grafts.parquet/    probe set x random set of components
      model/                    the trained model, if it was asked for
      result.json               written last: the completion marker; with the length and CRC-32 of every file of rows

Every file appears under a temporary name and is renamed, so a reader never meets half of one; samples.jsonl grows by
whole lines. A file that was cut off or changed is an error that names it, see `checksums`. The columns of each frame, with
units, are in `COLUMNS`.
"""

from __future__ import annotations

from attribution.store.columns import (
    BASE_MEAN,
    BATCH,
    BESIDE,
    COLUMNS,
    FORMAT,
    NORMS_KEPT,
    OWN_MEAN,
    SAMPLES,
    TRAINING,
)
from attribution.store.files import read_json, write_atomic, write_json, write_page
from attribution.store.reader import Run, find_runs, read_run
from attribution.store.studies import STUDY_COLUMNS, RecordedStudy, read_study
from attribution.store.writer import Columns, RunWriter, Unwritten, claim, config_hash, hold, is_finished

__all__ = [
    "BASE_MEAN",
    "BATCH",
    "BESIDE",
    "COLUMNS",
    "FORMAT",
    "NORMS_KEPT",
    "OWN_MEAN",
    "SAMPLES",
    "STUDY_COLUMNS",
    "TRAINING",
    "Columns",
    "RecordedStudy",
    "Run",
    "RunWriter",
    "Unwritten",
    "claim",
    "config_hash",
    "find_runs",
    "hold",
    "is_finished",
    "read_json",
    "read_run",
    "read_study",
    "write_atomic",
    "write_json",
    "write_page",
]
