"""The run directory: whole files or none, no run overwritten, and what was recorded read back as it was meant."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from attribution import store
from attribution.errors import RunError
from attribution.store import BATCH, COLUMNS, FORMAT, SAMPLES, Columns, RunWriter, config_hash, find_runs, is_finished, read_run

CONFIG = {"model": "planted", "training": {"max_steps": 2, "learning_rate": 1e-3}, "seed": 1}
STEPS = pd.DataFrame({"step": [1, 2], "loss": [2.5, None], "seconds": [0.25, 0.5]})


def tree(path):
    """Every file below a path with its content."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def parts(**columns):
    """Rows of `components` at step 1 for the batch."""
    length = max(len(value) for value in columns.values() if isinstance(value, list))
    return pd.DataFrame({"step": [1] * length, "probe": [BATCH] * length, **columns})


HEAD = {"kind": ["head", "head"], "layer": [0, 0], "index": [3, 3], "part": ["writing", "routing"]}


# Round trip


def test_what_is_written_is_read_back(tmp_path):
    writer = RunWriter(tmp_path / "run", CONFIG)
    writer.meta({"versions": {"torch": "2"}})
    writer.vocabulary(["a", "\u2028", "é"])
    writer.add("steps", STEPS)
    writer.add("probes", pd.DataFrame({"step": [0], "probe": ["p"], "metric": [-1.5]}))
    writer.flush()
    writer.add("steps", STEPS.assign(step=[3, 4]))
    run = read_run(tmp_path / "run")
    assert run.result is None and run.status == {"state": "running", "step": 0}
    writer.finish({"steps": 4, "seconds": np.float32(1.5), "path": tmp_path})
    run = read_run(str(tmp_path / "run"))
    assert run.config == CONFIG and run.meta == {"format": FORMAT, "versions": {"torch": "2"}}
    assert run.vocabulary == ["a", "\u2028", "é"]
    assert run.result is not None and is_finished(run.path)
    sums = run.result.pop("checksums")
    assert run.result == {"steps": 4, "seconds": 1.5, "path": str(tmp_path)}
    files = ["probes.parquet/part-00000.parquet", *(f"steps.parquet/part-0000{i}.parquet" for i in range(2))]
    assert sorted(sums) == files and all(sums[name][0] == (run.path / name).stat().st_size for name in files)
    assert run.status == {"state": "finished", "steps": 4}
    assert run.steps["step"].tolist() == [1, 2, 3, 4] and run.steps["seconds"].tolist() == [0.25, 0.5] * 2
    assert run.steps["loss"].isna().tolist() == [False, True] * 2 and run.steps["loss"][0] == 2.5
    assert list(run.steps.columns) == list(COLUMNS["steps"])
    assert run.probes[["step", "probe", "metric"]].values.tolist() == [[0, "p", -1.5]] and run.probes["passes"].isna().all()


def test_frames_that_were_not_written_are_empty(tmp_path):
    RunWriter(tmp_path / "run", CONFIG)
    run = read_run(tmp_path / "run")
    for name, frame in (("steps", run.steps), ("probes", run.probes), ("influence", run.influence), ("grafts", run.grafts)):
        assert frame.empty and list(frame.columns) == list(COLUMNS[name])
    assert run.components.empty and {"kind", "layer", "index", "share"} <= set(run.components.columns)
    assert run.vocabulary == [] and run.result is None
    with pytest.raises(RunError, match=r"meta\.json is missing"):
        run.meta  # noqa: B018


def test_columns_are_narrow(tmp_path):
    writer = RunWriter(tmp_path / "run", CONFIG)
    writer.add("components", parts(**HEAD, share=[0.1, 0.2]))
    writer.flush()
    kinds = read_run(tmp_path / "run").parts.dtypes
    assert (kinds["layer"], kinds["index"], kinds["step"], kinds["share"]) == ("int16", "int32", "int32", "float32")
    assert all(isinstance(kinds[c], pd.CategoricalDtype) for c in ("probe", "kind", "part"))


def test_a_column_that_is_not_documented_is_refused(tmp_path):
    writer = RunWriter(tmp_path / "run", CONFIG)
    with pytest.raises(ValueError, match=r"\['speed'\] are not documented in COLUMNS\['steps'\]"):
        writer.add("steps", STEPS.assign(speed=1))
    writer.flush()
    assert not (tmp_path / "run" / "steps.parquet").exists()


def test_every_column_is_explained_and_every_frame_can_be_read():
    assert all(text.strip() for columns in COLUMNS.values() for text in columns.values())
    assert {name if name != "components" else "parts" for name in COLUMNS} <= set(dir(store.Run))


# Components put together


def test_parts_of_a_component_are_put_together(tmp_path):
    writer = RunWriter(tmp_path / "run", CONFIG)
    numbers = {
        "weight_norm": [3.0, 4.0], "grad_norm": [5.0, 12.0], "update_norm": [8.0, 15.0], "grad_dot_update": [-1.0, -2.0],
        "cause_before": [0.5, None], "cause_after": [0.25, None], "changed": [1.0, 0.5],
    }  # fmt: skip
    writer.add("components", parts(**HEAD, **numbers))
    writer.add("components", parts(**HEAD, share=[0.25, -1.0]).assign(probe="p"))
    writer.add(
        "components",
        parts(kind=["neuron", "row"], layer=[1, -1], index=[3, 3], part=["gating", "writing"], weight_norm=[2.0, 7.0]),
    )
    rest = {"kind": ["remainder"] * 2, "layer": [0, 0], "index": [-1, -1], "part": ["keys", "norms"]}
    writer.add("components", parts(**rest, weight_norm=[1.0, 9.0]))
    writer.flush()
    whole = read_run(tmp_path / "run").components
    assert len(whole) == 6
    batch, probe = (whole[(whole["kind"] == "head") & (whole["probe"] == name)].iloc[0] for name in (BATCH, "p"))
    assert (batch["layer"], batch["index"], batch["step"]) == (0, 3, 1)
    assert [batch[c] for c in ("weight_norm", "grad_norm", "update_norm", "grad_dot_update")] == [5, 13, 17, -3]
    assert (batch["cause_before"], batch["cause_after"], batch["changed"]) == (0.5, 0.25, 0.75)
    assert np.isnan(batch["share"])  # not measured stays not measured
    assert probe["share"] == -0.75 and np.isnan(probe["weight_norm"]) and np.isnan(probe["cause_before"])
    rest = whole[whole["kind"] == "remainder"]
    assert rest[["name", "weight_norm"]].values.tolist() == [["keys", 1], ["norms", 9]]
    assert whole.loc[whole["kind"] == "neuron", "weight_norm"].tolist() == [2]
    assert whole.loc[whole["kind"] == "row", "weight_norm"].tolist() == [7]


# Whole files or none


def test_no_temporary_file_stays(tmp_path):
    writer = RunWriter(tmp_path / "run", CONFIG)
    for _ in range(3):
        writer.add("steps", STEPS)
        writer.flush()
        writer.flush()  # nothing new, no part
    writer.finish({})
    assert sorted(tree(tmp_path / "run")) == [
        "config.json", "result.json", "status.json", *(f"steps.parquet/part-0000{i}.parquet" for i in range(3))
    ]  # fmt: skip


def test_a_file_appears_only_whole(tmp_path, monkeypatch):
    """When the rename fails, the name holds what it held, and the run says what to do."""
    writer = RunWriter(tmp_path / "run", CONFIG)
    before = tree(tmp_path / "run")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    writer.add("steps", STEPS)
    for write in (writer.flush, lambda: writer.finish({}), lambda: writer.meta({}), lambda: writer.status("failed")):
        with pytest.raises(RunError, match=r"cannot write .*: No space left on device; free some space there"):
            write()
    assert tree(tmp_path / "run") == before
    assert not is_finished(tmp_path / "run")


def test_rows_survive_a_failed_flush(tmp_path, monkeypatch):
    writer = RunWriter(tmp_path / "run", CONFIG)
    writer.add("steps", STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(RunError, match="Input/output error"):
            writer.flush()
    writer.flush()
    assert len(read_run(tmp_path / "run").steps) == 2


def test_the_completion_marker_is_written_last(tmp_path, monkeypatch):
    written = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, path: (written.append(path.name), replace(source, path)))
    writer = RunWriter(tmp_path / "run", CONFIG)
    writer.add("steps", STEPS)
    writer.finish({})
    assert written[0] == "config.json" and "part-00000.parquet" in written
    assert written.index("result.json") == len(written) - 1


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file; name a directory"):
        RunWriter(tmp_path / "file", CONFIG)
    with pytest.raises(RunError, match=r"cannot write .*file/run: .*; choose a directory you can write to"):
        RunWriter(tmp_path / "file" / "run", CONFIG)


# No run is overwritten


@pytest.mark.parametrize("finished", [False, True])
def test_another_config_in_the_directory_is_refused_and_nothing_changes(tmp_path, finished):
    writer = RunWriter(tmp_path / "run", CONFIG)
    if finished:
        writer.finish({})
    before = tree(tmp_path)
    with pytest.raises(RunError, match=r"another config \(different: more, seed, training\); name another directory"):
        RunWriter(tmp_path / "run", {"model": "planted", "training": {"max_steps": 3}, "more": 1})
    assert tree(tmp_path) == before


def test_a_finished_run_is_refused_and_nothing_changes(tmp_path):
    RunWriter(tmp_path / "run", CONFIG).finish({})
    before = tree(tmp_path)
    with pytest.raises(RunError, match="holds a finished run with this config; read it, or name another"):
        RunWriter(tmp_path / "run", CONFIG)
    assert tree(tmp_path) == before


def test_an_unfinished_run_is_moved_aside(tmp_path):
    for loss in (1.0, 2.0, 3.0):
        writer = RunWriter(tmp_path / "run", {**CONFIG, "path": tmp_path, "pair": (1, 2)})
        writer.add("steps", STEPS.assign(loss=loss))
        writer.flush()
        writer.close()
    names = ["run", "run.interrupted-1", "run.interrupted-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [read_run(tmp_path / name).steps["loss"][0] for name in names] == [3, 1, 2]


def test_an_unfinished_run_that_cannot_be_moved_is_named(tmp_path, monkeypatch):
    RunWriter(tmp_path / "run", CONFIG)
    before = tree(tmp_path)

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "rename", denied)
    with pytest.raises(RunError, match=r"cannot move the unfinished run .* aside: Permission denied"):
        RunWriter(tmp_path / "run", CONFIG)
    assert tree(tmp_path) == before


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="is not empty and holds no run; name a new directory"):
        RunWriter(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json cannot be read .*; restore it or run again"):
        RunWriter(tmp_path, CONFIG)


def test_a_writer_killed_before_its_first_rename_leaves_the_directory_free(tmp_path):
    (tmp_path / ".config.json.tmp-123").write_text("{")
    RunWriter(tmp_path, CONFIG).finish({})
    assert read_run(tmp_path).config == CONFIG


# Reading


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(RunError, match=r"holds no run \(no config.json\)"):
        read_run(tmp_path)
    writer = RunWriter(tmp_path / "run", CONFIG)
    writer.add("steps", STEPS)
    writer.flush()
    (tmp_path / "run" / "steps.parquet" / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"steps\.parquet/part-00000\.parquet is damaged or cannot be read .*; restore it"):
        read_run(tmp_path / "run").steps  # noqa: B018


def test_a_newer_format_is_refused(tmp_path):
    writer = RunWriter(tmp_path / "run", CONFIG)
    writer.meta({})
    assert read_run(tmp_path / "run").meta["format"] == FORMAT
    store.write_json(tmp_path / "run" / "meta.json", {"format": FORMAT + 1})
    with pytest.raises(RunError, match=f"format {FORMAT + 1}, this version reads {FORMAT}; upgrade"):
        read_run(tmp_path / "run")


def test_reading_a_run_imports_no_torch(tmp_path):
    writer = RunWriter(tmp_path / "run", CONFIG)
    writer.add("components", parts(**HEAD, share=[0.1, 0.2]))
    writer.finish({})
    code = (
        f"import sys; from attribution.store import read_run; print(len(read_run({str(tmp_path / 'run')!r}).components), "
        "sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1 []\n"


def test_runs_are_found_below_a_directory(tmp_path):
    for name in ("b/arm/seed-1", "a/arm/seed-2", "a/arm/seed-1"):
        RunWriter(tmp_path / name, CONFIG)
    (tmp_path / "a" / "model").mkdir()
    (tmp_path / "a" / "model" / "config.json").write_text("{}")  # a checkpoint has one too
    assert find_runs(tmp_path) == [tmp_path / name for name in ("a/arm/seed-1", "a/arm/seed-2", "b/arm/seed-1")]
    assert find_runs(str(tmp_path / "b" / "arm" / "seed-1")) == [tmp_path / "b/arm/seed-1"]
    assert find_runs(tmp_path / "none") == []


def test_the_hash_of_a_config_knows_values_and_not_their_order():
    turned = {"seed": 1, "training": {"learning_rate": 1e-3, "max_steps": 2}, "model": "planted"}
    assert list(turned) != list(CONFIG)
    assert config_hash(CONFIG) == config_hash(turned) == config_hash(json.loads(json.dumps(CONFIG)))
    assert len(config_hash(CONFIG)) == 8 and int(config_hash(CONFIG), 16) >= 0
    assert config_hash(CONFIG) != config_hash({**CONFIG, "seed": 2})
    assert config_hash(CONFIG) != config_hash({**CONFIG, "training": {"max_steps": 2}})


def test_a_frame_is_the_same_however_it_was_split_into_parts(tmp_path):
    rows = pd.DataFrame(
        {"step": [1, 1, 2], "probe": ["b", "a", "c"], "kind": "head", "layer": 0, "index": [0, 1, 2], "share": 0.5}
    )
    frames = []
    for split in ([0, 3], [0, 1, 3], [0, 2, 3]):
        writer = RunWriter(tmp_path / str(len(frames)), {"model": "m"})
        for start, stop in pairwise(split):
            writer.add("components", rows.iloc[start:stop])
            writer.flush()
        frames.append(read_run(writer.path).parts)
    assert frames[0].equals(frames[1]) and frames[0].equals(frames[2])
    assert frames[0]["probe"].tolist() == ["b", "a", "c"]


def test_frames_single_rows_and_columns_are_written_in_their_order(tmp_path):
    writer = RunWriter(tmp_path, CONFIG)
    many = {"step": 2, "probe": np.array(["b", "a"]), "metric": np.array([1.0, 2.0])}
    for rows in ({"step": 1, "probe": "p"}, {"step": 1, "probe": "q"}, Columns(many), pd.DataFrame(many), Columns(many)):
        writer.add("probes", rows)
    with pytest.raises(ValueError, match="speed"):
        writer.add("probes", Columns(speed=np.ones(2)))
    writer.flush()
    found = read_run(tmp_path).probes
    assert found["step"].tolist() == [1, 1, *[2] * 6] and found["probe"].tolist() == ["p", "q", *["b", "a"] * 3]
    assert found["metric"].isna().tolist() == [True] * 2 + [False] * 6 and found["metric"].tolist()[2:] == [1.0, 2.0] * 3


def test_two_writers_never_share_a_directory(tmp_path):
    """Another process that lives holds the directory; one that was killed does not."""
    code = (
        "import sys, time; from attribution.store import RunWriter; w = RunWriter(sys.argv[1], {}); print('open', flush=True); "
    )
    held = subprocess.Popen([sys.executable, "-c", code + "time.sleep(60)", str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert held.stdout is not None and held.stdout.readline().strip() == b"open"
    before = tree(tmp_path)
    for parts in (None, {}):
        with pytest.raises(RunError, match="is being written by another process"):
            RunWriter(tmp_path / "run", {}, parts=parts)
    assert tree(tmp_path) == before
    held.kill()
    held.wait()
    RunWriter(tmp_path / "run", {}, parts={}).finish({})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_record_is_continued_from_the_parts_that_a_checkpoint_knew(tmp_path):
    writer, parts = RunWriter(tmp_path / "run", CONFIG), []
    for number in range(4):
        writer.add("steps", STEPS.assign(loss=float(number)))
        writer.flush()
        parts.append(dict(writer.parts))
    known = parts[1]
    writer.add("probes", pd.DataFrame({"step": [1], "probe": ["x"]}))
    writer.flush()
    writer.close()
    writer = RunWriter(tmp_path / "run", CONFIG, parts=known)
    writer.add("steps", STEPS.assign(loss=7.0))
    writer.finish({})
    run = read_run(tmp_path / "run")
    assert run.steps["loss"].unique().tolist() == [0, 1, 7] and run.probes.empty
    with pytest.raises(RunError, match="another config"):
        RunWriter(tmp_path / "run", {**CONFIG, "more": 1}, parts=known)


# Completions, line by line

LINE = {
    "step": 1, "sample": 0, "prompt": "tom says :", "completion": " é\u2028\n", "tokens": 2, "reward": None, "advantage": -0.5,
    "ratio": 1.0,
}  # fmt: skip


def test_completions_are_lines_that_grow(tmp_path):
    writer = RunWriter(tmp_path / "run", CONFIG)
    assert read_run(tmp_path / "run").samples.empty
    assert list(read_run(tmp_path / "run").samples.columns) == list(SAMPLES) == list(LINE)
    writer.flush()
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    writer.samples([LINE, {**LINE, "step": 2}])
    assert not (tmp_path / "run" / "samples.jsonl").exists()  # before it is flushed
    writer.flush()
    first = (tmp_path / "run" / "samples.jsonl").read_bytes()
    assert writer.parts["samples.jsonl"] == len(first)
    writer.samples([{**LINE, "step": 3, "reward": 2.0, "ratio": None}])
    writer.finish({})
    whole = (tmp_path / "run" / "samples.jsonl").read_bytes()
    assert (
        whole.startswith(first)
        and whole.count(b"\n") == 3
        and [json.loads(row)["step"] for row in whole.splitlines()] == [1, 2, 3]
    )
    found = read_run(tmp_path / "run").samples
    assert found["step"].tolist() == [1, 2, 3] and found["completion"].tolist() == [" é\u2028\n"] * 3
    assert found["reward"].isna().tolist() == [True, True, False] and found["ratio"].isna().tolist() == [False, False, True]


@pytest.mark.parametrize("line", [{**LINE, "speed": 1}, {key: LINE[key] for key in LINE if key != "ratio"}])
def test_a_line_with_other_fields_is_refused(tmp_path, line):
    writer = RunWriter(tmp_path / "run", CONFIG)
    with pytest.raises(ValueError, match="are not those documented in SAMPLES"):
        writer.samples([LINE, line])


def test_a_line_that_a_killed_process_was_writing_is_left_out(tmp_path):
    writer = RunWriter(tmp_path / "run", CONFIG)
    writer.samples([LINE, LINE])
    writer.flush()
    file = tmp_path / "run" / "samples.jsonl"
    whole = file.read_bytes()
    for cut in (1, 20, len(whole) // 2 - 1):
        file.write_bytes(whole[:-cut])
        assert len(read_run(tmp_path / "run").samples) == 1
    file.write_bytes(whole + b'{"step": 3}\n{"st')
    assert len(read_run(tmp_path / "run").samples) == 3
    file.write_bytes(whole[:9] + b"\n" + whole)  # not the last one: that is damage
    with pytest.raises(RunError, match=r"samples\.jsonl cannot be read"):
        read_run(tmp_path / "run").samples  # noqa: B018


def test_completions_go_on_from_what_a_checkpoint_knew(tmp_path):
    writer = RunWriter(tmp_path / "run", CONFIG)
    known = [dict(writer.parts)]
    for step in (1, 2, 3):
        writer.samples([{**LINE, "step": step}])
        writer.flush()
        known.append(dict(writer.parts))
    writer.close()
    (tmp_path / "run" / "samples.jsonl").open("ab").write(b'{"step": 4, "sam')
    for count in (2, 0):
        writer = RunWriter(tmp_path / "run", CONFIG, parts=known[count])
        assert read_run(tmp_path / "run").samples["step"].tolist() == [1, 2][:count]  # at once
        writer.samples([{**LINE, "step": 7}])
        writer.flush()
        writer.close()
        assert read_run(tmp_path / "run").samples["step"].tolist() == [*[1, 2][:count], 7]


@pytest.mark.parametrize("broken", ["fsync", "write"])
def test_completions_survive_a_failed_flush_and_are_there_once(tmp_path, monkeypatch, broken):
    writer = RunWriter(tmp_path / "run", CONFIG)
    writer.samples([LINE])
    writer.flush()
    writer.samples([{**LINE, "step": 2}])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RunError, match=r"cannot write .*samples\.jsonl: No space left on device"):
            writer.flush()
    if broken == "write":  # half of it was on the disk
        file = tmp_path / "run" / "samples.jsonl"
        os.truncate(file, file.stat().st_size - 30)
    writer.samples([{**LINE, "step": 3}])
    writer.flush()
    assert read_run(tmp_path / "run").samples["step"].tolist() == [1, 2, 3]
