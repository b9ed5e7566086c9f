"""`attribution forecast`: a table before any training, files where they are asked for, and how a forecast turned out."""

import json

import pandas as pd
import pytest
import torch

import attribution as at
from attribution.cli import main
from attribution.components import Components
from attribution.recipes.sft import SFT
from attribution.reports.forecast import show
from attribution.runs import RunConfig, run
from attribution.runs.forecast import forecast_of
from attribution.updates.forecast import Forecast

SETTINGS = ["--training.max-steps", "2", "--training.batch-size", "12", "--training.learning-rate", "1e-4"]


def flags(data, *further: str) -> list[str]:
    return ["forecast", "--model", "planted", "--sets", "model", "--data", data["train"], "--probes", data["conflict"],
            data["agree"], *SETTINGS, *further]  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, data):
    """The run that is forecast."""
    path = tmp_path_factory.mktemp("recorded") / "run"
    training = SFT(max_steps=2, batch_size=12, learning_rate=1e-4)
    probes = (data["conflict"], data["agree"])
    config = RunConfig(data=data["train"], probes=probes, sets="model", training=training, singles="heads", grafts="sets")
    run(config, path, page=False)
    return path


def section(shown: str, title: str) -> list[list[str]]:
    """The cells of the table under a title, without its head."""
    lines = shown.split(title, 1)[1].split("\n\n", 1)[0].splitlines()
    return [line.split() for line in lines[3:]]


def test_what_would_be_strengthened_is_printed_and_nothing_is_written(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(flags(data, "--top", "3", "--kinds", "head")) == 0
    shown = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    config = RunConfig(data=data["train"], probes=(data["conflict"], data["agree"]), sets="model", kinds=("head",),
                       training=SFT(max_steps=2, batch_size=12, learning_rate=1e-4))  # fmt: skip
    found = forecast_of(config, top=3)
    rows = section(shown, "Named sets")
    assert [row[:2] for row in rows] == found.sets[["probe", "set"]].to_numpy().tolist()
    for row, (influence, strengthening) in zip(rows, found.sets[["influence", "strengthening"]].to_numpy(), strict=True):
        assert float(row[2]) == pytest.approx(influence, abs=0.006)
        assert float(row[3]) == pytest.approx(strengthening, abs=1e-3) and row[4] == ("▲" if strengthening > 0 else "▼")
        assert float(row[5]) == pytest.approx(100 * strengthening / abs(influence), abs=0.006) and row[6] == "%"
    assert max(found.sets["strengthening"]) > 1e-3
    top = section(shown, "Components on agree")
    assert [row[0] for row in top] == ["head"] * 3
    signs = [float(row[3]) for row in top]
    assert signs == sorted(signs, reverse=True)
    whole = section(shown, "change on agree would sit")
    assert [row[0] for row in whole] == ["0", "1", "2", "3", "none", "all"]
    change = found.probes.set_index("probe").loc["agree", "change"]
    assert float(whole[-1][-1]) == pytest.approx(change, rel=0.01)
    assert sum(map(float, whole[-1][1:-1])) == pytest.approx(change, rel=0.02)


def test_a_forecast_is_written_and_compared_with_a_run(data, recorded, tmp_path, capsys):
    out = tmp_path / "foretold"
    assert main(["forecast", str(recorded / "config.json"), "--against", str(recorded), "--out", str(out), "--top", "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == str(out / "forecast.json")
    told = json.loads((out / "forecast.json").read_text())
    assert RunConfig.model_validate(told["config"]) == RunConfig.read(recorded / "config.json")
    assert told["planned_norm"] > 1e-3 and [probe["probe"] for probe in told["probes"]] == ["conflict", "agree"]
    compared = pd.read_parquet(out / "forecast-against.parquet")
    assert compared["step"].unique().tolist() == [1, 2] and len(pd.read_parquet(out / "forecast-sets.parquet")) == 4
    components = pd.read_parquet(out / "forecast-components.parquet")
    assert len(components) == 2 * (1141 + int(Components(at.load("planted").model).remainder_mask.sum()))
    first = compared[(compared["step"] == 1) & (compared["quantity"] == "update share")]
    assert (first["rho"] > 0.95).all()
    rows = [line for line in shown.splitlines() if line.startswith("update share")]
    assert [row.split()[2:4] for row in rows] == [[r.probe, f"{r.rho:+.2f}"] for r in first.itertuples()]
    assert compared.loc[compared["quantity"] == "strengthening of sets", "rho"].iloc[0] > 0.5


def test_adapters_are_forecast_as_the_change_of_effective_weights(data, capsys):
    torch.manual_seed(0)
    assert main(flags(data, "--top", "0", "--training.lora.rank", "2", "--training.learning-rate", "1e-2")) == 0
    shown = capsys.readouterr().out
    assert all(abs(float(row[3])) > 0 for row in section(shown, "Named sets")) and "Components on" not in shown
    assert float(section(shown, "change on agree would sit")[-1][3]) == 0  # no adapter on the unembedding


@pytest.mark.parametrize(
    ("further", "named"),
    [
        (["--against", "nowhere"], "holds no run"),
        (["--training.optimizer", "adafactor"], "step of Adafactor cannot be planned"),
        (["--recipe", "stf"], "unknown recipe 'stf'"),
        (["--metric", "logodds"], "unknown metric 'logodds'"),
        (["--top", "-1"], "top -1"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(data, tmp_path, monkeypatch, capsys, further, named):
    monkeypatch.chdir(tmp_path)
    assert main(flags(data, *further)) == 2
    shown = capsys.readouterr()
    assert named in shown.err and len(shown.err.strip().splitlines()) == 1 and shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_run_read_otherwise_is_not_compared(data, recorded, capsys):
    assert main(flags(data, "--against", str(recorded), "--metric", "log_prob", "--top", "0")) == 2
    assert "has metric 'log_prob'" in capsys.readouterr().err


def test_a_step_of_nothing_is_said_and_names_cannot_move_the_cursor(capsys):
    name = "p\x1b[31m[bold]"
    sets = pd.DataFrame({"probe": [name], "set": ["A"], "influence": [2.0], "strengthening": [0.0]})
    components = pd.DataFrame({
        "probe": [name] * 2, "kind": ["row", "remainder"], "layer": -1, "index": [4, -1], "name": ["\n", "embedding"],
        "share": 0.0, "influence": [-1.0, None], "strengthening": [0.0, None],
    }).astype({"influence": float, "strengthening": float})  # fmt: skip
    probes = pd.DataFrame({"probe": [name], "metric": [1.0], "change": [0.0]})
    show(Forecast(sets, components, probes, 0.0, "log_odds", "zero"), RunConfig(data="d", probes=("p",)))
    shown = capsys.readouterr().out
    assert "The planned step is 0" in shown and "works against the response" in shown
    assert "\x1b" not in shown and "p\\x1b[31m[bold]" in shown and "row '\\n'" in shown
