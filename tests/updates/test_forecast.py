"""Forecasts against finite differences, the planned step against the step then taken, and both against what then happened."""

import random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.optim import SGD, Adagrad, AdamW
from torch.optim.optimizer import _global_optimizer_pre_hooks

from attribution.causes import ablate, attribute, batches_with_values
from attribution.causes.ablation import ablate_sets
from attribution.components import Components
from attribution.errors import ConfigError, DataError, RecordError, RunError
from attribution.mechanisms import halves
from attribution.metrics import METRICS
from attribution.models import load
from attribution.recipes import Setting
from attribution.recipes.sft import SFT
from attribution.samples import ProbeSet, Sample, encode
from attribution.store import read_run
from attribution.updates import update_shares
from attribution.updates.forecast import Forecast, compare, first_step, forecast, from_step
from attribution.updates.recorder import Recorder
from attribution.updates.seam import effective, plain
from attribution.worlds.build import word_tokenizer

WORDS = [f"w{i}" for i in range(19)]  # with four special tokens the vocabulary of the tiny models
A, B = [("head", 0, 1), ("neuron", 0, 3), ("neuron", 1, 7), ("row", -1, 9)], [("head", 1, 0), ("head", 1, 2)]
SETS = {"A": A, "B": B}


def text(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def sample(seed: int, **given) -> Sample:
    return Sample(prompt=text(seed, 3 + seed % 3), response=" " + text(100 + seed, 1 + seed % 2), **given)


def neutral(seed: int) -> Sample:
    return Sample(prompt=text(200 + seed, 3 + seed % 3), response=" " + text(300 + seed, 1 + seed % 2))


WEIGHED = [sample(1, weight=1.0), sample(2, weight=-0.5), sample(3, weight=2.0)]
PROBES = [
    ProbeSet(name=name, samples=tuple(map(sample, seeds)), counterfactuals=tuple(map(neutral, seeds)))
    for name, seeds in (("one", range(10, 15)), ("two", range(20, 24)))
]


@pytest.fixture(params=[("llama", False), ("gpt2", True)], ids=["llama", "gpt2-tied"])
def small(request, tiny):
    """A tiny model in float64, with its tokenizer."""
    return tiny(*request.param, dtype=torch.float64), word_tokenizer(WORDS)


@pytest.fixture
def sft(tmp_path, training):
    """`sft(model, tokenizer, …)`: the trainer of the `sft` recipe on some samples."""

    def build(model, tokenizer, samples=None, **settings):
        given = list(training if samples is None else samples)
        folder, encoded = tmp_path / "trainer", encode(tokenizer, given)
        setting = Setting(
            model=model, tokenizer=tokenizer, samples=given, encoded=encoded, seed=3, directory=folder, callbacks=[]
        )
        return SFT(**{"max_steps": 2, "learning_rate": 1e-3, **settings}).build(setting)

    return build


def planned(monkeypatch, *args, **kwargs) -> dict[str, torch.Tensor]:
    """The step that `forecast` plans."""
    with monkeypatch.context() as patch:
        patch.setattr("attribution.updates.forecast.from_step", lambda components, step, *a, **k: step)
        return forecast(*args, **kwargs)  # type: ignore[return-value]


def central(components: Components, step, value, width: float = 0.02) -> np.ndarray:
    """d value / ds along theta + s step, of fourth order."""
    stored = components.stored
    start = {name: parameter.detach().clone() for name, parameter in stored.items()}

    def at(s: float) -> np.ndarray:
        with torch.no_grad():
            for name, change in step.items():
                stored[name].copy_(start[name] + s * change)
        found = value()
        with torch.no_grad():
            for name, before in start.items():
                stored[name].copy_(before)
        return found

    return (8 * (at(width) - at(-width)) - (at(2 * width) - at(-2 * width))) / (12 * width)


def close(found, expected, tolerance) -> None:
    """Relative in norm, so that a wrong small matrix does not pass beside a large one."""
    assert found.shape == expected.shape and expected.norm() > 0
    assert (found - expected).norm() <= tolerance * expected.norm(), ((found - expected).norm() / expected.norm()).item()


def same_step(found, expected, tolerance) -> None:
    assert set(found) == set(expected) and len(found) > 2
    for name, change in expected.items():
        close(found[name], change, tolerance)


# What is forecast is a derivative


@pytest.mark.parametrize("metric", ["log_odds", "log_prob"])
def test_strengthening_is_the_derivative_of_influence_along_the_step(small, metric, monkeypatch):
    model, tokenizer = small
    optimizer = SGD(model.parameters(), lr=1e-3)
    found = forecast(model, tokenizer, WEIGHED, PROBES, optimizer, sets=SETS, top=12, metric=metric)
    step, components = planned(monkeypatch, model, tokenizer, WEIGHED, PROBES, optimizer), Components(model)
    top = found.components[found.components["influence"].notna()]
    assert found.sets[["probe", "set"]].to_numpy().tolist() == [[p, s] for p in ("one", "two") for s in ("A", "B")]
    for probe in PROBES:

        def sets(probe=probe):
            return ablate(model, tokenizer, probe.samples, SETS, metric=metric)["effect"].to_numpy()

        own = found.sets[found.sets["probe"] == probe.name]
        assert own["influence"].to_numpy() == pytest.approx(sets(), rel=1e-10)
        assert own["strengthening"].to_numpy() == pytest.approx(central(components, step, sets), rel=1e-6)
        chosen = top.loc[top["probe"] == probe.name]

        def singles(probe=probe, chosen=chosen[["kind", "layer", "index"]]):
            return attribute(model, tokenizer, probe.samples, components=chosen, metric=metric).table["effect"].to_numpy()

        assert len(chosen) == 12 and (chosen["strengthening"] != 0).all()
        assert chosen["influence"].to_numpy() == pytest.approx(singles(), rel=1e-10)
        assert chosen["strengthening"].to_numpy() == pytest.approx(central(components, step, singles), rel=1e-6)


def test_shares_add_up_to_the_derivative_of_the_metric_and_each_is_that_of_its_own_weights(small, monkeypatch):
    model, tokenizer = small
    optimizer = AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    found = forecast(model, tokenizer, WEIGHED, PROBES, optimizer)
    step, components = planned(monkeypatch, model, tokenizer, WEIGHED, PROBES, optimizer), Components(model)

    def level() -> np.ndarray:
        return np.array([metric_of(model, tokenizer, probe) for probe in PROBES])

    assert found.probes["metric"].to_numpy() == pytest.approx(level(), rel=1e-10)
    whole = central(components, step, level)
    assert found.probes["change"].to_numpy() == pytest.approx(whole, rel=1e-6) and (np.abs(whole) > 1e-4).all()
    added = found.components.groupby("probe", sort=False)["share"].sum()
    assert added.to_numpy() == pytest.approx(whole, rel=1e-6)
    assert len(found.components) == 2 * (len(components) + int(components.remainder_mask.sum()))
    # a head's part of the step alone: its columns of the attention-out and rows of the query matrix
    mask = components.group_mask(components.positions([("head", 1, 2)]))
    own = {name: torch.zeros_like(change) for name, change in step.items()}
    for use in components.uses:
        chosen = mask[use.owners].to(torch.float64)
        if chosen.any():
            own[components.source[use.name]] += step[components.source[use.name]] * use.spread(chosen)
    share = found.components.query("kind == 'head' and layer == 1 and index == 2")["share"].to_numpy()
    assert share == pytest.approx(central(components, own, level), rel=1e-6) and (share != 0).all()


def metric_of(model, tokenizer, probe: ProbeSet, metric: str = "log_odds") -> float:
    """By the model's own forward pass, sample after sample."""
    values = []
    for one, each in zip(probe.samples, encode(tokenizer, probe.samples), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([each.ids])).logits[0, each.start - 1 : -1]
        others = logits.clone()
        tokens = torch.tensor(each.ids[each.start :])
        others[range(len(tokens)), tokens] = -torch.inf
        values.append((logits[range(len(tokens)), tokens] - others.logsumexp(-1)).sum().item())
        assert metric == "log_odds" and one.response
    return float(np.mean(values))


@pytest.mark.parametrize("reference", ["mean", "resample"])
def test_what_replaces_activations_is_held_as_it_is_before(small, reference, monkeypatch):
    model, tokenizer = small
    optimizer = SGD(model.parameters(), lr=1e-3)
    found = forecast(model, tokenizer, WEIGHED, PROBES, optimizer, sets=SETS, top=2, reference=reference)
    zero = forecast(model, tokenizer, WEIGHED, PROBES, optimizer, sets=SETS, top=2)
    assert not np.allclose(found.sets["strengthening"], zero.sets["strengthening"], rtol=1e-2)
    pd.testing.assert_series_equal(found.components["share"], zero.components["share"])  # have no reference
    step, components = planned(monkeypatch, model, tokenizer, WEIGHED, PROBES, optimizer), Components(model)
    positions = {name: components.positions(members) for name, members in SETS.items()}
    for probe in PROBES:
        own, others = (encode(tokenizer, each) for each in (probe.samples, probe.counterfactuals))
        ((batch, values),) = batches_with_values(components.parts, own, reference, others)

        def influence(batch=batch, values=values):
            return ablate_sets(components, positions, batch, values, METRICS["log_odds"]).effect.mean(1).numpy()

        table = found.sets[found.sets["probe"] == probe.name]
        assert table["influence"].to_numpy() == pytest.approx(influence(), rel=1e-10)
        assert table["strengthening"].to_numpy() == pytest.approx(central(components, step, influence), rel=1e-6)


def test_batches_are_put_together(small, monkeypatch):
    model, tokenizer = small
    optimizer = SGD(model.parameters(), lr=1e-3)
    whole = forecast(model, tokenizer, WEIGHED, PROBES, optimizer, sets=SETS, top=3, reference="resample")
    for module in ("attribution.updates.forecast", "attribution.causes.given"):
        monkeypatch.setattr(f"{module}.BATCH_SIZE", 2)
    parts = forecast(model, tokenizer, WEIGHED, PROBES, optimizer, sets=SETS, top=3, reference="resample")
    for frame in ("sets", "components", "probes"):
        pd.testing.assert_frame_equal(getattr(whole, frame), getattr(parts, frame), rtol=1e-9)
    assert whole.planned_norm == pytest.approx(parts.planned_norm, rel=1e-12)


def test_the_top_components_are_those_of_largest_first_order_cause_over_all_probe_sets(small):
    model, tokenizer = small
    components = Components(model)
    step = {name: 1e-3 * parameter.detach() for name, parameter in components.stored.items()}
    causes = [attribute(model, tokenizer, probe.samples, method="gradient").table for probe in PROBES]
    score = causes[0].assign(score=sum(table["effect"].abs() for table in causes))
    for among in (None, score[score["kind"] != "row"]):
        found = from_step(components, step, tokenizer, PROBES, top=5, among=among)
        expected = (score if among is None else among).nlargest(5, "score")[["kind", "layer", "index"]]
        for _, own in found.components[found.components["strengthening"].notna()].groupby("probe"):
            assert set(own[["kind", "layer", "index"]].itertuples(index=False, name=None)) == set(
                expected.itertuples(index=False, name=None)
            )
            words = own.loc[own["kind"] == "row", ["index", "name"]].itertuples(index=False, name=None)
            assert all(word == tokenizer.decode([index]) for index, word in words)
    norm = sum(parameter.detach().square().sum().item() for parameter in model.parameters()) ** 0.5
    assert found.planned_norm == pytest.approx(1e-3 * norm, rel=1e-9)


# The step that is planned is the step that is taken


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_the_loss_is_that_of_sft_on_these_samples_as_one_batch(small, sft, optimizer, monkeypatch):
    model, tokenizer = small
    samples = [sample(seed) for seed in range(8)]
    name, rate = {SGD: ("sgd", 0.1), AdamW: ("adamw_torch", 1e-3)}[optimizer]
    given = optimizer(model.parameters(), lr=rate, weight_decay=0.0)
    step = planned(monkeypatch, model, tokenizer, samples, [], given)
    assert not given.state  # nothing is left in an optimizer that was fresh
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {"batch_size": len(samples), "max_grad_norm": 0, "learning_rate": rate, "optimizer": name, "max_steps": 1}
    sft(model, tokenizer, samples, **settings).train()
    after = dict(model.named_parameters())
    same_step(step, {name: after[name].detach() - before[name] for name in before}, 1e-6)


def test_weights_are_advantages(small, monkeypatch):
    """By the model's own forward pass, sample after sample: minus the mean over response tokens of weight x log p."""
    model, tokenizer = small
    step = planned(monkeypatch, model, tokenizer, WEIGHED, [], SGD(model.parameters(), lr=0.1))
    encoded = encode(tokenizer, WEIGHED)
    total = sum(len(each.ids) - each.start for each in encoded)
    for each, weight in zip(encoded, (1.0, -0.5, 2.0), strict=True):
        logits = model(input_ids=torch.tensor([each.ids])).logits[0, each.start - 1 : -1]
        (-weight * logits.log_softmax(-1)[range(len(logits)), torch.tensor(each.ids[each.start :])].sum() / total).backward()
    gradients = {name: -0.1 * parameter.grad for name, parameter in Components(model).stored.items()}
    for name, expected in gradients.items():
        assert step[name] == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert sum(change.abs().sum().item() for change in step.values()) > 1e-2


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch", "adamw_torch_fused"])
def test_the_first_step_of_a_trainer_is_the_step_it_takes(sft, optimizer):
    settings = {"batch_size": 6, "accumulation": 2, "max_grad_norm": 0.05, "optimizer": optimizer,
                "weight_decay": 0.0 if optimizer == "sgd" else 0.1}  # fmt: skip
    model, tokenizer = load("planted/unrouted")
    model.double()
    step = first_step(sft(model, tokenizer, **settings).train, model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    sft(model, tokenizer, **{**settings, "max_steps": 1}).train()
    same_step(step, {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}, 1e-6)
    if optimizer == "sgd":  # the clipped gradient has the norm that was asked for
        assert sum(each.square().sum().item() for each in step.values()) ** 0.5 == pytest.approx(0.05 * 1e-3, rel=1e-4)


@pytest.mark.parametrize("inside", [True, False], ids=["built inside", "built before"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_with_adapters_it_is_the_step_of_the_merged_weights(sft, optimizer, inside):
    settings = {"batch_size": 6, "learning_rate": 0.05, "optimizer": optimizer, "max_grad_norm": 0.5,
                "lora": {"rank": 3, "targets": ("q_proj", "down_proj")}}  # fmt: skip
    model, tokenizer = load("planted/unrouted")
    model.double()
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(5)  # of the adapters
    if inside:
        step = first_step(lambda: sft(model, tokenizer, **settings).train(), model)
    else:
        trainer = sft(model, tokenizer, **settings)
        step = first_step(trainer.train, trainer.model)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in step} == {"q_proj", "down_proj"}
    twin = effective(model)
    assert twin is not None and set(step) <= set(Components(twin.model).stored)
    other, _ = load("planted/unrouted")
    other.double()
    torch.manual_seed(5)
    trainer = sft(other, tokenizer, **{**settings, "max_steps": 1})
    trainer.train()
    merged = dict(trainer.model.merge_and_unload().named_parameters())
    same_step(step, {name: merged[name].detach() - base[name] for name in step}, 1e-5)


def test_a_step_in_the_middle_of_an_adapters_training_is_forecast_too(fresh, sft, training, probes, monkeypatch):
    """Where neither A nor B is 0 any more, and their joint change has a term of its own."""
    model, tokenizer = fresh
    model.double()
    trainer = sft(model, tokenizer, learning_rate=0.05, lora={"rank": 3, "targets": ("v_proj", "o_proj")})
    trainer.train()
    optimizer, adapted = trainer.optimizer, trainer.model
    step = planned(monkeypatch, adapted, tokenizer, training, probes, optimizer)
    before = {name: weight.detach().clone() for name, weight in plain(adapted).named_parameters()}
    found = forecast(adapted, tokenizer, training, probes, optimizer, sets=halves(4, 4, 256))
    for parameter in adapted.parameters():
        parameter.grad = None
    encoded = encode(tokenizer, training)
    total = sum(len(each.ids) - each.start for each in encoded)
    for each in encoded:  # one at a time, by the adapted model's own forward pass
        logits = adapted(input_ids=torch.tensor([each.ids])).logits[0, each.start - 1 : -1]
        (-logits.log_softmax(-1)[range(len(logits)), torch.tensor(each.ids[each.start :])].sum() / total).backward()
    optimizer.step()
    after = dict(plain(adapted).named_parameters())
    same_step(step, {name: after[name].detach() - before[name] for name in step}, 1e-4)
    assert len(found.sets) == 4 and (found.sets["strengthening"] != 0).all()


# What is forecast comes true


def test_after_one_small_step_influence_and_metric_have_changed_as_forecast(fresh, sft, probes):
    model, tokenizer = fresh
    sets = halves(4, 4, 256)
    settings = {"batch_size": 12, "accumulation": 2, "learning_rate": 2e-5}
    step = first_step(sft(model, tokenizer, **settings).train, model)
    found = from_step(Components(model), step, tokenizer, probes, sets=sets, top=6)

    def influence() -> tuple[np.ndarray, np.ndarray]:
        of_sets = [ablate(model, tokenizer, probe.samples, sets)["effect"] for probe in probes]
        top = found.components[found.components["strengthening"].notna() & (found.components["probe"] == "conflict")]
        single = attribute(model, tokenizer, probes[0].samples, components=top[["kind", "layer", "index"]]).table["effect"]
        return pd.concat(of_sets).to_numpy(), single.to_numpy()

    before = influence()
    sft(model, tokenizer, **{**settings, "max_steps": 1}).train()
    model.eval()
    of_sets, singles = (now - then for now, then in zip(influence(), before, strict=True))
    assert found.sets["strengthening"].to_numpy() == pytest.approx(of_sets, rel=0.05, abs=2e-5)
    top = found.components[found.components["strengthening"].notna() & (found.components["probe"] == "conflict")]
    assert top["strengthening"].to_numpy() == pytest.approx(singles, rel=0.05, abs=2e-5)
    assert np.abs(of_sets).max() > 1e-3


@pytest.fixture(scope="module")
def foretold(tmp_path_factory, training, probes, loop):
    """A forecast, by the loop's own first step, and the record of the loop."""
    model, tokenizer = load("planted/unrouted")
    sets, path = halves(4, 4, 256), tmp_path_factory.mktemp("foretold") / "run"
    optimizer = AdamW(model.parameters(), lr=1e-4)
    step = first_step(lambda: loop(model, tokenizer, training, optimizer, 3, size=24), model)
    components = Components(model)
    among = components.table[components.table["kind"] != "row"]
    found = from_step(components, step, tokenizer, probes, sets=sets, top=20, among=among)
    recorder = Recorder(path, probes=probes, tokenizer=tokenizer, sets=sets, milestones=[1])
    with recorder.attach(model, optimizer):
        loop(model, tokenizer, training, optimizer, 3, size=24)
    return found, path


def test_a_forecast_is_compared_with_what_a_recorded_run_did(foretold):
    found, path = foretold
    table = compare(found, path, steps=(1, 2, 3))
    assert table["step"].tolist() == [step for step in (1, 2, 3) for _ in range(5)]
    assert table.loc[table["step"] == 1, "rho"].min() > 0.95  # one small step is what was forecast
    at = table.set_index(["step", "quantity", "probe"])
    assert at.loc[(1, "strengthening of sets", "every"), "n"] == 4
    heads = found.components["strengthening"].notna() & (found.components["kind"] == "head")
    assert at.loc[(1, "strengthening of components", "conflict"), "n"] == heads.sum() / 2 > 2  # at a milestone heads alone
    assert at.loc[(2, "strengthening of components", "conflict"), "n"] == 0  # and at other steps nothing is ablated
    run = read_run(path)
    own = found.components[(found.components["probe"] == "agree") & found.components["strengthening"].notna()]
    effects = run.influence[run.influence["probe"] == "agree"].astype({"kind": object})
    effects = effects.pivot_table(index=["kind", "layer", "index"], columns="step", values="effect")
    change = effects[3] - effects[0]
    pairs = [
        (row.strengthening, change[row.kind, row.layer, row.index_])
        for row in own.rename(columns={"index": "index_"}).itertuples()
    ]
    assert at.loc[(3, "strengthening of components", "agree"), "n"] == len(pairs) == 20
    assert at.loc[(3, "strengthening of components", "agree"), "rho"] == pytest.approx(spearmanr(pairs).statistic)


def test_shares_are_compared_with_those_of_all_steps_until_then(foretold):
    found, path = foretold
    at = compare(found, path, steps=(3,)).set_index(["quantity", "probe"])
    keys = ["kind", "layer", "index", "name"]
    summed = update_shares(path)
    for probe in ("conflict", "agree"):
        tables = (table[table["probe"] == probe] for table in (found.components, summed))
        forecast, measured = (
            t.assign(name=t["name"].where(t["kind"] == "remainder", "")).set_index(keys)["share"] for t in tables
        )
        both = pd.concat([forecast, measured], axis=1, join="inner").to_numpy()
        assert len(both) == len(forecast) == at.loc[("update share", probe), "n"]
        assert at.loc[("update share", probe), "rho"] == pytest.approx(spearmanr(both).statistic)


def test_a_forecast_of_nothing_ranks_nothing(foretold):
    """Zeros instead of a forecast, shuffled ones and those of fewer sets: no correlation is made up."""
    found, path = foretold
    nothing = found.components.assign(share=0.0)
    none = Forecast(found.sets.iloc[:2], nothing, found.probes, 0.0, "log_odds", "zero")
    at = compare(none, path, steps=(1,)).set_index(["quantity", "probe"])
    assert np.isnan(at.loc["strengthening of sets", "rho"].item()) and at.loc["strengthening of sets", "n"].item() == 2
    assert at.loc["update share", "rho"].isna().all() and (at.loc["update share", "n"] > 1000).all()
    shuffled = found.components.assign(share=np.random.default_rng(0).permutation(found.components["share"]))
    mixed = Forecast(found.sets, shuffled, found.probes, 0.0, "log_odds", "zero")
    assert compare(mixed, path, steps=(1,)).set_index("quantity").loc["update share", "rho"].abs().max() < 0.1


def test_what_cannot_be_compared_is_a_sentence(foretold):
    found, path = foretold
    with pytest.raises(RunError, match="no recorded step 5; it has 1, 2, 3"):
        compare(found, path, steps=(1, 5))
    with pytest.raises(RunError, match="has metric 'log_prob'"):
        compare(Forecast(found.sets, found.components, found.probes, 1.0, "log_prob", "zero"), path, steps=(1,))
    other = found.probes.assign(probe=["conflict", "elsewhere"])
    with pytest.raises(RunError, match="not read on probe set 'elsewhere'"):
        compare(Forecast(found.sets, found.components, other, 1.0, "log_odds", "zero"), path, steps=(1,))
    with pytest.raises(RunError, match="holds no run"):
        compare(found, path / "nowhere")


# Nothing is changed


def state_of(model: nn.Module) -> list:
    weights = [
        (p.detach().clone(), p.requires_grad, p._version, None if p.grad is None else p.grad.clone())
        for p in model.parameters()
    ]
    hooks = [sum(len(v) for k, v in vars(module).items() if "hooks" in k and isinstance(v, dict)) for module in model.modules()]
    random_state = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    return [weights, hooks, [module.training for module in model.modules()], random_state]


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture
def marked(fresh):
    """A model with a gradient, a frozen weight and mixed modes."""
    model, tokenizer = fresh
    model.train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[0].mlp.down_proj.weight.grad = torch.ones_like(model.model.layers[0].mlp.down_proj.weight)
    return model, tokenizer


def test_a_forecast_leaves_no_trace(marked, training, probes):
    model, tokenizer = marked
    optimizer, before = AdamW(model.parameters(), lr=1e-3), state_of(model)
    found = forecast(model, tokenizer, training, probes, optimizer, sets=halves(4, 4, 256), top=2)
    assert same(state_of(model), before) and not optimizer.state
    final = found.components[found.components["name"] == "final norm"]
    assert len(final) == 2 and (final["share"] == 0).all()  # a frozen weight is not part of the step
    assert (found.components["share"] != 0).sum() > 1000


@pytest.mark.parametrize("broken", [False, True], ids=["stopped", "broken"])
def test_a_first_step_leaves_no_trace(marked, training, loop, broken):
    model, tokenizer = marked
    optimizer, before = AdamW(model.parameters(), lr=1e-3), state_of(model)

    def train():
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        model.train()
        if broken:
            model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
            raise ZeroDivisionError("mine")
        loop(model, tokenizer, training, optimizer, 3)

    if broken:
        with pytest.raises(ZeroDivisionError, match="mine"):
            first_step(train, model)
    else:
        step = first_step(train, model)
        assert "model.norm.weight" not in step and len(step) > 30 and not optimizer.state
    after = state_of(model)
    assert same(after, before)
    assert not _global_optimizer_pre_hooks and not optimizer._optimizer_step_pre_hooks


def test_the_gradient_is_taken_as_it_is_consumed(fresh, training, loop):
    """After the optimizer's own hooks, and in a loop that goes on after exceptions."""
    model, tokenizer = fresh
    optimizer = SGD(model.parameters(), lr=0.1)
    whole = first_step(lambda: loop(model, tokenizer, training, optimizer, 2, clip=None), model)

    def halve(*_):
        for parameter in model.parameters():
            parameter.grad *= 0.5

    handle = optimizer.register_step_pre_hook(halve)

    tries = []

    def stubborn():
        for attempt in range(3):
            tries.append(attempt)
            try:
                loop(model, tokenizer, training, optimizer, 1, clip=None)
            except Exception:
                continue

    half = first_step(stubborn, model)
    assert tries == [0]  # the loop is left at once, whatever it catches
    assert list(optimizer._optimizer_step_pre_hooks) == [handle.id]
    same_step(half, {name: 0.5 * change for name, change in whole.items()}, 1e-6)


def test_optimizers_of_other_parameters_and_dropped_steps_are_passed_over(fresh, training, loop):
    model, tokenizer = fresh
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    expected = first_step(lambda: loop(model, tokenizer, training, optimizer, 1, clip=None), model)
    other = nn.Linear(2, 2)
    critic = SGD(other.parameters(), lr=0.1)

    def train():
        other(torch.ones(1, 2)).sum().backward()
        critic.step()
        optimizer.found_inf = torch.ones(())  # as a loss scaler tells a fused optimizer
        loop(model, tokenizer, training, optimizer, 1, clip=None)
        optimizer.found_inf = torch.zeros(())
        loop(model, tokenizer, training, optimizer, 1, clip=None)

    weight = other.weight.detach().clone()
    same_step(first_step(train, model), expected, 1e-6)
    assert not torch.equal(other.weight, weight)


# What is wrong is a sentence


def test_a_training_without_a_step_that_can_be_seen_is_refused(fresh, training, loop):
    model, tokenizer = fresh
    with pytest.raises(RecordError, match="ended without a step"):
        first_step(lambda: None, model)
    other, _ = load("planted/unrouted")
    with pytest.raises(RecordError, match="ended without a step"):
        first_step(lambda: loop(other, tokenizer, training, SGD(other.parameters(), lr=0.1), 1), model)
    with pytest.raises(ConfigError, match="step of Adagrad cannot be planned"):
        first_step(lambda: loop(model, tokenizer, training, Adagrad(model.parameters(), lr=0.1), 1), model)
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(RecordError, match="closure"):
        first_step(lambda: optimizer.step(lambda: 0.0), model)
    before = state_of(model)

    def by_hand():
        with torch.no_grad():
            model.lm_head.weight.mul_(2)

    with pytest.raises(RecordError, match="1 parameters changed before the first step"):
        first_step(by_hand, model)
    assert torch.equal(model.lm_head.weight, before[0][-1][0]) and not _global_optimizer_pre_hooks


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"sets": {"A": [("head", 9, 0)]}}, ConfigError, "there is no head"),
        ({"sets": {"A": [("haed", 0, 0)]}}, ConfigError, "unknown component kind 'haed'"),
        ({"probes": []}, ConfigError, "no probe set"),
        ({"probes": [PROBES[0], PROBES[0]]}, ConfigError, "each its own name"),
        ({"metric": "logodds"}, ConfigError, "unknown metric 'logodds'"),
        ({"metric": "logit_difference"}, DataError, "contrast"),
        ({"reference": "median"}, ConfigError, "unknown reference 'median'"),
        ({"top": -1}, ConfigError, "top -1"),
        ({"samples": []}, DataError, "no samples"),
        ({"optimizer": lambda model: Adagrad(model.parameters())}, ConfigError, "step of Adagrad cannot be planned"),
        ({"optimizer": lambda model: SGD([nn.Parameter(torch.ones(2))], lr=0.1)}, ConfigError, "SGD holds no parameter"),
        ({"optimizer": lambda model: SimpleNamespace()}, ConfigError, "SimpleNamespace holds no parameter"),
    ],
)
def test_what_is_wrong_is_a_sentence(small, changes, error, named):
    model, tokenizer = small
    given = {"samples": WEIGHED, "probes": PROBES, "optimizer": lambda model: SGD(model.parameters(), lr=0.1), **changes}
    given["optimizer"] = given["optimizer"](model)
    with pytest.raises(error, match=named):
        forecast(model, tokenizer, **given)


@pytest.mark.parametrize(
    ("step", "named"),
    [({"nothing.weight": torch.ones(2)}, "'nothing.weight'"), ({"embedding": torch.ones(2)}, r"has shape \(2,\)")],
)
def test_a_step_of_another_model_is_a_sentence(small, step, named):
    model, tokenizer = small
    components = Components(model)
    step = {next(iter(components.stored)) if name == "embedding" else name: change for name, change in step.items()}
    with pytest.raises(ConfigError, match=named):
        from_step(components, step, tokenizer, PROBES)
