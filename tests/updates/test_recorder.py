"""The recorder: it changes nothing, misses nothing, and its columns are what they say."""

import copy
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from by_name import MIXTURES
from torch import nn

from attribution.capture import scored_logits
from attribution.causes import ablate, attribute
from attribution.causes.ablation import ablate_sets
from attribution.causes.reference import mean_activations
from attribution.components import Components
from attribution.errors import ConfigError, DataError, RecordError, RunError
from attribution.metrics import log_odds, metric_named
from attribution.models import anatomy, load
from attribution.samples import ProbeSet, Sample, batches, collate, encode
from attribution.store import BATCH, BESIDE, TRAINING, read_run
from attribution.updates import update_shares
from attribution.updates.recorder import Recorder, recordable
from attribution.updates.share import Path
from attribution.worlds import planted as grammar
from attribution.worlds.build import word_tokenizer


@pytest.fixture(scope="module")
def run(recorded):
    return read_run(recorded["path"])


def matrix(run, probe, column, step):
    """A column in the order of `Components.groups`."""
    parts = run.parts
    return parts[(parts["probe"] == probe) & (parts["step"] == step)][column].to_numpy(dtype="float64")


def test_every_step_and_probe_set_has_rows_that_are_not_zero(recorded, run, probes):
    groups = Components(recorded["model"]).group_count
    assert run.steps["step"].tolist() == [1, 2, 3, 4, 5]
    for step in range(1, 6):
        for name in (BATCH, *(probe.name for probe in probes)):
            columns = ["cause_before", "cause_after", *(["share"] if name != BATCH else ["update_norm", "grad_norm"])]
            for column in columns:
                found = matrix(run, name, column, step)
                assert len(found) == groups and np.nanmax(np.abs(found)) > 1e-4, (step, name, column)
    assert len(run.probes) == 2 * 6 and run.result["steps"] == 5 and run.status["state"] == "finished"


def test_norms_and_products_are_those_of_the_tensors(recorded, run):
    components = Components(recorded["model"])
    before, after, gradient = (recorded["weights"][2], recorded["weights"][3], recorded["consumed"][2])
    layer, head, width = 2, 1, components.parts.head_dim
    columns = slice(head * width, (head + 1) * width)
    name = f"model.layers.{layer}.self_attn.o_proj.weight"
    change = (after[name] - before[name])[:, columns]
    parts = run.parts
    row = parts[(parts["probe"] == BATCH) & (parts["step"] == 3) & (parts["kind"] == "head") & (parts["layer"] == layer)
                & (parts["index"] == head) & (parts["part"] == "writing")].iloc[0]  # fmt: skip
    assert row["weight_norm"] == pytest.approx(before[name][:, columns].norm().item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(gradient[name][:, columns].norm().item(), rel=1e-5)
    assert row["update_norm"] == pytest.approx(change.norm().item(), rel=1e-5)
    assert row["grad_dot_update"] == pytest.approx((gradient[name][:, columns] * change).sum().item(), rel=1e-4)
    assert row["changed"] == pytest.approx((change != 0).float().mean().item(), rel=1e-5)
    step = run.steps.iloc[2]
    total = sum((gradient[n] * (after[n] - before[n])).sum().item() for n in before)
    assert step["grad_dot_update"] == pytest.approx(total, rel=1e-4)
    assert step["update_norm"] == pytest.approx(sum((after[n] - before[n]).norm() ** 2 for n in before).sqrt().item(), rel=1e-5)
    assert step["grad_norm"] == pytest.approx(sum(gradient[n].norm() ** 2 for n in before).sqrt().item(), rel=1e-4)


def test_steps_say_loss_learning_rate_and_clipping(recorded, run):
    assert run.steps["loss"].tolist() == pytest.approx(recorded["losses"], rel=1e-5)
    assert (run.steps["learning_rate"] == np.float32(1e-3)).all()
    clipped = run.steps["clip_factor"] < 1
    assert clipped.any()
    assert run.steps["grad_norm"][clipped].to_numpy() == pytest.approx(0.5, rel=1e-4)
    assert (run.steps["grad_norm_raw"][clipped] > 0.5).all()
    assert (run.steps["normalizer"] == 8).all()


def test_the_batch_is_fitted_better_after_each_step(run):
    assert (run.steps["batch_after"] > run.steps["batch_before"]).all()


def test_after_one_step_is_before_the_next_on_probe_sets(run, probes):
    for probe in probes:
        for step in range(1, 5):
            after = matrix(run, probe.name, "cause_after", step)
            np.testing.assert_array_equal(after, matrix(run, probe.name, "cause_before", step + 1))


def test_causes_on_probe_sets_are_the_tapped_ones(recorded, run, probes):
    base = load("planted/unrouted")
    tapped = attribute(*base, probes[0].samples, method="gradient").table["effect"].to_numpy()
    components = Components(base.model)
    recorded_causes = matrix(run, probes[0].name, "cause_before", 1)[components.output_groups]
    assert recorded_causes == pytest.approx(tapped, abs=1e-5 * np.abs(tapped).max() + 1e-6)


def test_shares_add_up_per_step_and_over_the_run(run, probes):
    assert run.probes["resolved"].dropna().astype(bool).all()
    totals = update_shares(run.path)
    for probe in probes:
        rows = run.probes[run.probes["probe"] == probe.name]
        change = float(rows["metric"].iloc[-1] - rows["metric"].iloc[0])
        assert abs(change) > 0.05
        assert totals[totals["probe"] == probe.name]["share"].sum() == pytest.approx(change, abs=0.01 * abs(change) + 1e-4)
        assert rows["change"].sum() == pytest.approx(change, abs=1e-5)


def test_influence_at_both_ends_is_exact_ablation(recorded, run, probes):
    assert sorted(run.influence["step"].unique()) == [0, 5]
    for step, model in ((0, load("planted/unrouted").model), (5, recorded["model"])):
        found = run.influence[(run.influence["step"] == step) & (run.influence["probe"] == probes[1].name)]
        expected = attribute(model, recorded["tokenizer"], probes[1].samples, method="ablation").table
        assert len(found) == len(expected)
        merged = found.astype({"kind": object}).merge(expected, on=["kind", "layer", "index"], suffixes=("", "_expected"))
        assert merged["effect"].to_numpy() == pytest.approx(merged["effect_expected"].to_numpy(), abs=1e-5)
        assert merged["kl"].to_numpy() == pytest.approx(merged["kl_expected"].to_numpy(), abs=1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_weights_are_bit_identical_with_and_without(tmp_path, loop, training, probes, optimizer):
    ends = []
    for recording in (False, True):
        model, tokenizer = load("planted/unrouted")
        model.train()
        torch.manual_seed(7)
        made = optimizer(model.parameters(), lr=1e-3)
        if recording:
            with Recorder(tmp_path / "run", probes=probes, tokenizer=tokenizer, milestones="log").attach(model, made):
                loop(model, tokenizer, training, made, 4, accumulation=2)
        else:
            start = {name: p.clone() for name, p in model.state_dict().items()}
            loop(model, tokenizer, training, made, 4, accumulation=2)
        ends.append({name: p.clone() for name, p in model.state_dict().items()})
        assert model.training
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert all(not torch.equal(start[name], ends[0][name]) for name in start if "layers" in name)
    run = read_run(tmp_path / "run")
    assert sorted(run.influence["step"].unique()) == [0, 1, 2, 4]
    assert run.parts.groupby(["step", "probe"], observed=True).size().nunique() == 1


def test_hooks_are_gone_and_gradients_stay_the_loops_own(tmp_path, fresh, loop, training, probes):
    model, tokenizer = fresh
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    with Recorder(tmp_path / "run", probes=probes[:1], tokenizer=tokenizer, milestones="ends").attach(model, optimizer):
        optimizer.register_step_post_hook(lambda *_: seen.append(model.model.norm.weight.grad.clone()))
        loop(model, tokenizer, training, optimizer, 1)
    assert torch.equal(seen[0], model.model.norm.weight.grad)
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(module, kind) for module in model.modules() for kind in kinds)
    assert not optimizer._optimizer_step_pre_hooks and len(optimizer._optimizer_step_post_hooks) == 1


def test_zero_gradients_and_a_moving_optimizer_are_both_recorded(tmp_path, fresh, loop, training, probes):
    model, tokenizer = fresh
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    with Recorder(tmp_path / "run", probes=probes[:1], tokenizer=tokenizer, milestones="ends").attach(model, optimizer):
        loop(model, tokenizer, training, optimizer, 1)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    steps = read_run(tmp_path / "run").steps
    assert steps["grad_norm"].iloc[1] == 0 and steps["update_norm"].iloc[1] > 0
    assert steps["clip_factor"].isna().iloc[1] and steps["loss"].isna().iloc[1]


def test_a_learning_rate_of_zero_changes_exactly_nothing(tmp_path, fresh, loop, training, probes):
    model, tokenizer = fresh
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    with Recorder(tmp_path / "run", probes=probes[:1], tokenizer=tokenizer, milestones="ends").attach(model, optimizer):
        loop(model, tokenizer, training, optimizer, 2)
    run = read_run(tmp_path / "run")
    assert (run.parts["share"].dropna() == 0).all() and (run.parts["changed"].dropna() == 0).all()
    effects = run.influence.pivot(index=["kind", "layer", "index"], columns="step", values="effect")
    assert (effects[0] == effects[2]).all()


def test_a_tied_model_is_recorded_by_use(tmp_path, tiny, loop, training):
    model = tiny("llama", tied=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Recorder(tmp_path / "run").attach(model, optimizer):
        ids = torch.arange(2, 18).view(2, 8)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    run = read_run(tmp_path / "run")
    rows = run.parts[(run.parts["probe"] == BATCH) & (run.parts["step"] == 1)]
    embedding, unembedding = rows[rows["part"] == "embedding"], rows[rows["kind"] == "row"]
    assert embedding["grad_norm"].iloc[0] > 0 and (unembedding["grad_norm"] > 0).any()
    assert rows["grad_dot_update"].sum() == pytest.approx(run.steps["grad_dot_update"].iloc[0], rel=1e-4)
    # plain gradient descent: <g, dtheta> = -lr |g|^2 over parameters, whatever their uses
    assert run.steps["grad_dot_update"].iloc[0] == pytest.approx(-0.05 * run.steps["grad_norm"].iloc[0] ** 2, rel=1e-3)


@pytest.mark.parametrize(
    ("family", "tied"), [("gemma2", True), ("gpt_neox", False), ("phi3", False), ("mixtral", True), ("olmoe", False)]
)
def test_every_make_of_model_trains_bit_by_bit_as_if_nobody_looked(tmp_path, tiny, family, tied):
    tokenizer = word_tokenizer([f"w{i}" for i in range(19)])
    samples = [Sample(prompt="w1 w2 w3", response=" w4 w5"), Sample(prompt="w7 w2", response=" w9")]
    probes = [ProbeSet(name="probe", samples=samples)]
    ends = []
    for recording in (True, False):
        model = tiny(family, tied=tied).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        recorder = Recorder(tmp_path / "run", probes=probes, tokenizer=tokenizer)
        with recorder.attach(model, optimizer) if recording else nullcontext():
            ids = torch.arange(2, 18).view(2, 8)
            for _ in range(2):
                optimizer.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert not torch.equal(ends[0]["lm_head.weight"], tiny(family, tied=tied).lm_head.weight)
    run = read_run(tmp_path / "run")
    assert run.parts.loc[run.parts["probe"] == "probe", "share"].abs().max() > 0
    if family not in MIXTURES:  # where a token changes its experts the metric jumps, and the record says so
        assert run.probes["resolved"].dropna().astype(bool).all()


def test_a_large_model_is_recorded_in_part_by_a_stated_rule(tmp_path, fresh, loop, training, probes):
    model, tokenizer = fresh
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = Recorder(tmp_path / "run", probes=probes[:1], tokenizer=tokenizer, milestones=[2], everything=False)
    with recorder.attach(model, optimizer):
        loop(model, tokenizer, training, optimizer, 3)
    run = read_run(tmp_path / "run")
    neurons = run.parts[(run.parts["kind"] == "neuron") & (run.parts["probe"] == probes[0].name)]
    single = neurons[neurons["index"] >= 0].groupby("step")["index"].count() / 2
    assert single[1] == single[3] == 128 and single[2] == 1024
    sums = neurons[neurons["index"] < 0]
    every = neurons[(neurons["index"] >= 0) & (neurons["step"] == 2)].groupby(["layer", "part"], observed=True)["share"].sum()
    told = sums[sums["step"] == 2].set_index(["layer", "part"])["share"]
    for key, value in every.items():
        assert told[key] == pytest.approx(value, abs=1e-6)
    assert set(sums["step"]) == {1, 2, 3}
    ablated = run.influence[run.influence["step"] == 0]["kind"].value_counts()
    assert ablated["neuron"] == 128 and ablated["head"] == 16
    assert set(run.influence[run.influence["step"] == 2]["kind"]) == {"head"}
    assert "64 at random" in run.meta["not_measured"][0]
    shares = run.probes[run.probes["step"] == 1]["share_sum"].iloc[0]
    one = run.parts[(run.parts["probe"] == probes[0].name) & (run.parts["step"] == 1)]
    whole = one[(one["index"] < 0) | (one["kind"] == "head")]
    assert whole["share"].sum() == pytest.approx(shares, abs=1e-5)


class Broken(Exception):
    pass


@pytest.mark.parametrize(("error", "state"), [(Broken("mine"), "failed"), (KeyboardInterrupt(), "interrupted")])
def test_an_exception_leaves_a_readable_record(tmp_path, fresh, loop, training, probes, error, state):
    model, tokenizer = fresh
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = Recorder(tmp_path / "run", probes=probes[:1], tokenizer=tokenizer, milestones="ends")
    with pytest.raises(type(error)), recorder.attach(model, optimizer):
        loop(model, tokenizer, training, optimizer, 2)
        raise error
    run = read_run(tmp_path / "run")
    assert run.status["state"] == state and run.result is None
    assert run.steps["step"].tolist() == [1, 2] and len(run.parts)
    assert not model.model._forward_hooks and not optimizer._optimizer_step_pre_hooks


def test_a_gradient_that_is_not_finite_stops_before_it_is_applied(tmp_path, fresh, loop, training, probes):
    model, tokenizer = fresh
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = Recorder(tmp_path / "run", probes=probes[:1], tokenizer=tokenizer, milestones="ends")
    with (
        pytest.raises(RecordError, match=r"step 2: the gradient is not finite .*1 steps are recorded"),
        recorder.attach(model, optimizer),
    ):
        loop(model, tokenizer, training, optimizer, 1)
        before = model.model.norm.weight.detach().clone()
        model.model.norm.weight.grad[0] = float("nan")
        optimizer.step()
    assert torch.equal(before, model.model.norm.weight)
    assert read_run(tmp_path / "run").status["state"] == "failed"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"metric": "logodds"}, "'logodds'"),
        ({"milestones": "often"}, "'often'"),
        ({"probes": "twice"}, "its own name"),
        ({"probes": BATCH}, "none 'batch'"),
        ({"probes": TRAINING}, "'training samples'"),
    ],
)
def test_settings_that_mean_nothing_are_refused_at_once(tmp_path, probes, settings, named):
    if "probes" in settings:
        name = settings["probes"]
        settings = {"probes": [probes[0], probes[0]] if name == "twice" else [ProbeSet(name=name, samples=probes[0].samples)]}
    with pytest.raises(ConfigError, match=named):
        Recorder(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_recorded_truthfully_is_refused(fresh, tiny):
    model, _ = fresh
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RecordError, match="DataParallel"):
        recordable(nn.DataParallel(model), optimizer)
    with pytest.raises(RecordError, match="no torch optimizer"):
        recordable(model, object())
    with pytest.raises(RecordError, match="no parameter of this model"):
        recordable(tiny("llama"), optimizer)
    assert recordable(model, optimizer) is optimizer


def test_probes_need_a_tokenizer(tmp_path, fresh, probes):
    model, _ = fresh
    with (
        pytest.raises(ConfigError, match="tokenizer"),
        Recorder(tmp_path / "run", probes=probes).attach(model, torch.optim.SGD(model.parameters(), lr=0.1)),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_another_record_in_the_directory_is_refused_before_anything_is_touched(recorded, fresh, probes):
    model, tokenizer = fresh
    before = sorted(recorded["path"].rglob("*"))
    recorder = Recorder(recorded["path"], probes=probes[:1], tokenizer=tokenizer)
    with pytest.raises(RunError, match="another config"), recorder.attach(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        pass
    assert sorted(recorded["path"].rglob("*")) == before
    assert not model.model._forward_hooks


def test_an_optimizer_that_writes_into_gradients_is_noticed(tmp_path, fresh, loop, training, probes):
    class Halving(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(0.5)
            return super().step(closure)

    model, tokenizer = fresh
    optimizer = Halving(model.parameters(), lr=0.01)
    with Recorder(tmp_path / "run", probes=probes[:1], tokenizer=tokenizer, milestones="ends").attach(model, optimizer):
        loop(model, tokenizer, training, optimizer, 1)
    run = read_run(tmp_path / "run")
    assert run.steps["grad_dot_update"].isna().all()
    assert any("writes into the gradients" in line for line in json.loads((run.path / "meta.json").read_text())["not_measured"])


def test_named_sets_are_read_when_and_where_they_were_asked_for(tmp_path, fresh, loop, training, probes):
    model, tokenizer = fresh
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sets = {"mine": [("head", 1, 0), ("neuron", 0, 3)]}
    watched = [ProbeSet(name="watched", samples=probes[1].samples)]
    recorder = Recorder(
        tmp_path / "run", probes=probes, tokenizer=tokenizer, milestones="ends", everything=False, sets=sets,
        compared={"other": [("head", 2, 1)]}, compared_every=2, primary_only=True, singles="end", watched=watched,
    )  # fmt: skip
    with recorder.attach(model, optimizer):
        loop(model, tokenizer, training, optimizer, 3)
    run = read_run(tmp_path / "run")
    first, second = (probe.name for probe in probes)
    found = {(str(row.probe), str(row.set), int(row.step)) for row in run.sets.itertuples()}
    assert found == {(p, "mine", s) for p in (first, second) for s in range(4)} | {(first, "other", s) for s in (0, 2)}
    base = load("planted/unrouted")
    for step, now in ((0, base.model), (3, model)):
        expected = ablate(now, tokenizer, probes[0].samples, sets).iloc[0]
        row = run.sets[(run.sets["set"] == "mine") & (run.sets["step"] == step) & (run.sets["probe"] == first)].iloc[0]
        assert abs(expected["effect"]) > 1e-3
        assert row["effect"] == pytest.approx(expected["effect"], abs=1e-5)
        assert row["kl"] == pytest.approx(expected["kl"], abs=1e-5)
        assert (row["effect_even"] + row["effect_odd"]) / 2 == pytest.approx(row["effect"], abs=1e-5)
    kinds = {(int(s), str(p)): set(g["kind"]) for (s, p), g in run.influence.groupby(["step", "probe"], observed=True)}
    assert kinds == {(0, first): {"head"}, (0, second): {"head"}, (3, first): {"head", "neuron", "row"}, (3, second): {"head"}}
    seen = run.probes[run.probes["probe"] == "watched"].set_index("step")
    read = run.probes[run.probes["probe"] == second].set_index("step")  # the same samples, by the same metric
    assert seen["metric"].to_numpy() == pytest.approx(read["metric"].to_numpy(), abs=1e-5)
    assert seen["kl"].to_numpy() == pytest.approx(read["kl"].to_numpy(), abs=1e-6) and seen["change"].isna().all()
    assert seen["probability"].tolist() == pytest.approx(read["probability"].tolist(), abs=1e-6)
    for step, now in ((0, base.model), (3, model)):
        batch = collate(encode(tokenizer, probes[1].samples))
        odds = log_odds(scored_logits(anatomy(now), batch), batch)  # of responses of one token
        assert seen["probability"][step] == pytest.approx(odds.sigmoid().mean().item(), abs=1e-5)


def test_each_reading_may_be_on_the_first_probe_set_alone(tmp_path, fresh, loop, training, probes):
    neutral = [Sample(**row) for row in grammar.prompts(5, 44, trait=False)]
    given = [ProbeSet(name=probe.name, samples=probe.samples, counterfactuals=neutral) for probe in probes]
    recorder = Recorder(
        tmp_path / "run", probes=given, tokenizer=fresh.tokenizer, milestones="ends", everything=False, singles="heads",
        sets={"mine": [("head", 1, 0)]}, compared={"other": [("head", 2, 1)]}, beside=("mean",), primary_only=("compared",),
        share_passes=0,
    )  # fmt: skip
    optimizer = torch.optim.SGD(fresh.model.parameters(), lr=0.05)
    with recorder.attach(fresh.model, optimizer):
        loop(fresh.model, fresh.tokenizer, training, optimizer, 1)
    found = read_run(tmp_path / "run").sets.astype({"probe": str, "set": str, "reference": str})
    first, second = (probe.name for probe in probes)
    assert set(zip(found["probe"], found["set"], found["reference"], strict=True)) == {
        (first, "mine", "zero"), (second, "mine", "zero"), (first, "other", "zero"), (first, "mine", "mean"),
        (second, "mine", "mean"),
    }  # fmt: skip


def test_compared_sets_are_read_where_it_is_said_of_any(tmp_path, fresh, loop, training, probes):
    first, second = (probe.name for probe in probes)
    recorder = Recorder(
        tmp_path / "run", probes=probes, tokenizer=fresh.tokenizer, milestones="ends", everything=False, singles="heads",
        sets={"mine": [("head", 1, 0)]}, share_passes=0, compared_every=2,
        compared={"wrong": [("head", 2, 1)], "false": [("head", 0, 1)]},
        sets_on={first: ("mine", "wrong"), second: ("false",)},
    )  # fmt: skip
    optimizer = torch.optim.SGD(fresh.model.parameters(), lr=0.05)
    with recorder.attach(fresh.model, optimizer):
        loop(fresh.model, fresh.tokenizer, training, optimizer, 1)
    found = read_run(tmp_path / "run").sets.astype({"probe": str, "set": str})
    assert set(zip(found["step"], found["probe"], found["set"], strict=True)) == {
        (0, first, "mine"), (1, first, "mine"), (0, first, "wrong"), (0, second, "false"),
    }  # fmt: skip


def test_probe_sets_are_read_by_forward_passes_alone_where_no_shares_are_wanted(tmp_path, fresh, loop, training, probes):
    sets = {"mine": [("head", 1, 0), ("neuron", 0, 3)], "other": [("head", 2, 1)]}
    first, second = (probe.name for probe in probes)
    read = {}
    for passes, sets_on in ((9, None), (0, {first: ("other",), second: ()})):
        model, tokenizer = copy.deepcopy(fresh.model), fresh.tokenizer
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        recorder = Recorder(
            tmp_path / str(passes), probes=probes, tokenizer=tokenizer, milestones="ends", everything=False, sets=sets,
            share_passes=passes, sets_on=sets_on, singles="heads",
        )  # fmt: skip
        with recorder.attach(model, optimizer):
            loop(model, tokenizer, training, optimizer, 2)
        read[passes] = read_run(tmp_path / str(passes))
    whole, lean = read[9], read[0]
    assert lean.probes[["step", "probe"]].values.tolist() == whole.probes[["step", "probe"]].values.tolist()
    for column in ("metric", "kl"):
        assert lean.probes[column].to_numpy() == pytest.approx(whole.probes[column].to_numpy(), abs=1e-5)
    assert lean.probes["share_sum"].isna().all() and whole.probes["share_sum"].notna().any()
    assert set(lean.components["probe"]) == {"batch"} and set(whole.components["probe"]) == {"batch", first, second}
    assert {(str(row.probe), str(row.set)) for row in lean.sets.itertuples()} == {(first, "other")}
    keys = ["step", "probe", "set"]
    both = lean.sets.merge(whole.sets, on=keys)
    assert len(both) == 3 and both["effect_x"].to_numpy() == pytest.approx(both["effect_y"].to_numpy(), abs=1e-6)
    assert lean.influence["effect"].to_numpy() == pytest.approx(whole.influence["effect"].to_numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"share_passes": 1}, "share_passes is 1; expected at least 2, or 0"),
        ({"primary_only": ("luck",)}, "unknown reading 'luck' in primary_only; expected compared"),
        ({"sets_on": {"elsewhere": ()}}, "sets_on names the probe set 'elsewhere'; expected"),
        ({"sets_on": {"A": ("B",)}}, "sets_on names the set 'B' on 'A'; expected no set"),
    ],
)
def test_wrong_settings_of_what_is_read_are_refused(tmp_path, probes, given, said):
    with pytest.raises(ConfigError, match=said):
        Recorder(tmp_path / "run", probes=[ProbeSet(name="A", samples=probes[0].samples)], **given)


def test_readings_beside_the_reference(tmp_path, fresh, loop, training, probes):
    """Each against an ablation of its own: today's mean, the start's mean pasted in, and weights rescaled by hand."""
    model, tokenizer = fresh
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    sets = {"mine": [("head", 1, 0), ("head", 2, 3), ("neuron", 0, 3)]}
    neutral = [Sample(**row) for row in grammar.prompts(5, 44, trait=False)]
    given = [ProbeSet(name=probe.name, samples=probe.samples, counterfactuals=neutral) for probe in probes]
    recorder = Recorder(
        tmp_path / "run", probes=given, tokenizer=tokenizer, milestones="ends", everything=False, sets=sets,
        compared_every=2, primary_only=True, singles="heads", beside=BESIDE,
    )  # fmt: skip
    with recorder.attach(model, optimizer):
        loop(model, tokenizer, training, optimizer, 2)
    found = read_run(tmp_path / "run").sets.astype({"reference": str, "probe": str})
    first = probes[0].name
    assert set(found.loc[found["reference"] != "zero", "probe"]) == {first}
    assert set(found.loc[found["reference"] != "zero", "step"]) == {0, 2}
    values = found[found["probe"] == first].set_index(["reference", "step"])["effect"]

    base = load("planted/unrouted").model
    mean = [
        ablate(each, tokenizer, given[0].samples, sets, reference="mean", counterfactuals=neutral) for each in (base, model)
    ]
    assert values["mean", 0] == pytest.approx(mean[0]["effect"][0], abs=1e-5)
    assert values["mean", 2] == pytest.approx(mean[1]["effect"][0], abs=1e-5)
    assert values["base mean", 0] == values["mean", 0] and abs(values["base mean", 2] - values["mean", 2]) > 1e-5
    index = Components(model)
    batch = collate(encode(tokenizer, given[0].samples))
    pasted = mean_activations(Components(base).parts, batches(encode(tokenizer, neutral), 64, torch.device("cpu")))
    effect = ablate_sets(index, {"mine": index.positions(sets["mine"])}, batch, pasted, metric_named("log_odds")).effect
    assert values["base mean", 2] == pytest.approx(effect.mean().item(), abs=1e-5)

    assert values["norms before training", 0] == values["zero", 0]
    before, after = Components(base).parts, index.parts
    with torch.no_grad():
        for layer in range(after.depth):
            for then, now, width in (
                (before.attention_out[layer].weight, after.attention_out[layer].weight, after.head_dim),
                (before.mlp_out[layer].weight, after.mlp_out[layer].weight, 1),
            ):
                for column in range(0, now.shape[1], width):
                    unit = slice(column, column + width)
                    now[:, unit] *= then[:, unit].norm() / now[:, unit].norm()
        rows, old = after.unembedding.weight, before.unembedding.weight
        rescaled = rows * (old.norm(dim=1) / rows.norm(dim=1))[:, None]
        after.unembedding.weight = torch.nn.Parameter(rescaled)
    by_hand = ablate(model, tokenizer, given[0].samples, sets)["effect"][0]
    assert values["norms before training", 2] == pytest.approx(by_hand, abs=1e-5)
    assert abs(values["norms before training", 2] - values["zero", 2]) > 1e-5


@pytest.mark.parametrize(("beside", "error"), [(("medain",), ConfigError), (("mean",), DataError)])
def test_readings_that_cannot_be_made_are_refused(tmp_path, fresh, probes, beside, error):
    model, tokenizer = fresh
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(error),
        Recorder(tmp_path / "run", probes=probes, tokenizer=tokenizer, beside=beside).attach(model, optimizer),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_a_training_of_nothing_that_is_indexed_is_recorded(tmp_path, fresh, training):
    """A head of one's own beside the model, which alone trains."""

    class WithHead(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module, self.head = model, torch.nn.Linear(model.config.vocab_size, 1)
            self.config = model.config

        def forward(self, **given):
            out = self.module(**given)
            return self.head(out.logits).square().mean()

    model, tokenizer = fresh
    model.requires_grad_(False)
    whole, batch = WithHead(model), collate(encode(tokenizer, training[:4]))
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    with Recorder(tmp_path / "run", tokenizer=tokenizer, milestones="ends", singles="heads").attach(whole, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            whole(input_ids=batch.ids).backward()
            optimizer.step()
    found = read_run(tmp_path / "run").steps
    assert len(found) == 2 and (found["update_norm"] == 0).all()
    path = Path(Components(model), {})
    with path.at(0.5):
        assert not path.start
