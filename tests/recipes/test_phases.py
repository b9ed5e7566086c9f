"""Interventions inside a trainer: every pass against a plain model with plain hooks, in a loop written by hand."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain

import pandas as pd
import pytest
import torch

from attribution.errors import ConfigError, RewardError
from attribution.models import load
from attribution.recipes.dpo import DPO
from attribution.recipes.rl import GRPO, RLOO
from attribution.recipes.sft import SFT
from attribution.samples import ProbeSet, Sample, encode
from attribution.store import BATCH, read_run
from attribution.updates.callback import RecorderCallback
from attribution.worlds import planted as grammar

SET = {("head", 0): [1], ("head", 2): [0, 3], ("neuron", 1): range(10, 60), ("neuron", 3): range(128)}  # kind, layer: units
TABLE = pd.DataFrame(
    [(kind, layer, unit) for (kind, layer), units in SET.items() for unit in units], columns=["kind", "layer", "index"]
)
WIDTH = {"head": 32, "neuron": 1}  # features of a unit of `planted`
NEUTRAL = [Sample(**row) for row in grammar.prompts(6, 9, trait=False)]
UNCUED = [Sample(**row) for row in grammar.prompts(12, 5, trait=False, problems=grammar.TRAINING)]  # with three likely replies
CHECKPOINTING = {
    "": {},
    "recomputed": {"activation_checkpointing": True},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
}
RL = {"generations": 4, "batch_size": 4, "completion_length": 3, "learning_rate": 0.05, "optimizer": "sgd", "max_grad_norm": 0}
BETA, EPSILON = 0.5, 3.0


def features(kind, units) -> list[int]:
    return [unit * WIDTH[kind] + place for unit in units for place in range(WIDTH[kind])]


def module_of(model, kind, layer):
    """The linear that the units of a layer write with; under adapters the layer that carries one."""
    path = f"layers.{layer}." + ("self_attn.o_proj" if kind == "head" else "mlp.down_proj")
    return next(module for name, module in model.named_modules() if name.endswith(path))


@contextmanager
def ablated(model, values=None) -> Iterator[None]:
    """The set at zero, or at its values, by plain hooks."""

    def hook(kind, layer, units):
        where = features(kind, units)

        def edit(_module, args):
            changed = args[0].clone()
            changed[..., where] = 0.0 if values is None else values[kind, layer][where]
            return (changed, *args[1:])

        return edit

    handles = [module_of(model, *key).register_forward_pre_hook(hook(*key, units)) for key, units in SET.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def means(model, tokenizer) -> dict:
    """Mean input of those linears over all tokens of the neutral samples."""
    found = {}
    for key in SET:
        kept = []
        handle = module_of(model, *key).register_forward_pre_hook(
            lambda _module, args, kept=kept: kept.append(args[0][0].detach())
        )
        for each in encode(tokenizer, NEUTRAL):
            model(torch.tensor([each.ids]))
        handle.remove()
        found[key] = torch.cat(kept).mean(0)
    return found


def own(name, parameter) -> torch.Tensor:
    """Bool, shaped like the parameter: what belongs to a component of the set."""
    mask = torch.zeros_like(parameter, dtype=torch.bool)
    for (kind, layer), units in SET.items():
        reads, writes = (("q_proj",), "o_proj") if kind == "head" else (("gate_proj", "up_proj"), "down_proj")
        if f"layers.{layer}." in name and name.endswith(f"{writes}.weight"):
            mask[:, features(kind, units)] = True
        if f"layers.{layer}." in name and name.endswith(tuple(f"{each}.weight" for each in reads)):
            mask[features(kind, units)] = True
    return mask


def log_probs(model, encoded) -> torch.Tensor:
    """Of every response token: Float [token]."""
    ids = torch.tensor([encoded.ids])
    return model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[encoded.start - 1 :, 0]


def log_odds(model, encoded) -> float:
    """Mean over samples of one response token each."""
    with torch.no_grad():
        chances = [log_probs(model, each).exp().item() for each in encoded]
    return sum(math.log(chance / (1 - chance)) for chance in chances) / len(chances)


def hooks_of(model) -> list:
    """Whatever hangs on modules and parameters."""
    modules = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return modules + [hook for p in model.parameters() for hook in (p._backward_hooks or {}).values()]


@pytest.fixture
def sets() -> dict:
    return {"mine": TABLE}


@pytest.fixture
def neutral(planted) -> list:
    return encode(planted.tokenizer, NEUTRAL)


CASES = [
    ("intact", "intact", "zero", False, ""),
    ("ablated", "intact", "zero", False, ""),
    ("intact", "ablated", "zero", False, ""),
    ("ablated", "ablated", "mean", False, ""),
    ("intact", "stopped", "zero", False, ""),
    ("ablated", "stopped", "mean", False, "recomputed"),
    ("ablated", "intact", "zero", False, "reentrant"),
    ("intact", "ablated", "mean", False, "recomputed"),
    ("intact", "ablated", "zero", False, "reentrant"),
    ("intact", "stopped", "zero", False, "reentrant"),
    ("ablated", "intact", "zero", True, ""),
    ("intact", "ablated", "mean", True, ""),
    ("ablated", "ablated", "zero", True, "recomputed"),
]


@pytest.mark.parametrize(("sampling", "updating", "reference", "lora", "kept"), CASES)
def test_every_pass_of_grpo_is_the_one_that_was_asked_for(
    planted, given, rewards, told, seen, sets, neutral, sampling, updating, reference, lora, kept
):
    """Gradient and importance ratio of four steps: ablated sampler, its log-probabilities, intact reference, update."""
    named = "" if (sampling, updating) == ("intact", "intact") else "mine"
    intervention = {"components": named, "sampling": sampling, "updating": updating, "reference": reference}
    recipe = GRPO(
        **RL, max_steps=4, accumulation=2, iterations=2, beta=BETA, epsilon=EPSILON, intervention=intervention,
        lora={"rank": 4 * lora}, reward=rewards("token"), trainer=CHECKPOINTING[kept],
    )  # fmt: skip
    setting = given(load("planted/unrouted").model, UNCUED, recorder=told, callbacks=[seen], sets=sets, neutral=neutral)
    recipe.check(setting)
    trainer = recipe.build(setting)
    spied = spy(trainer)
    trainer.train()

    passes = [key for key, count in trainer.phases.seen.items() if count]
    expected = {("sample", sampling == "ablated"), ("old", sampling == "ablated"), ("update", updating == "ablated")}
    assert set(passes) == (expected | ({("reference", False)} if lora else set()) if named else set())
    wanted = {("sample", sampling == "ablated"), ("update", updating == "ablated"), ("other", sampling == "ablated")}
    wanted |= {("other", False)} if lora else set()
    assert spied == wanted if kept != "reentrant" else spied >= wanted  # which goes forward without a gradient first

    base, model = planted.model, trainer.model.eval()
    values = means(base, planted.tokenizer) if reference == "mean" else None
    without = {"intact": nullcontext, "stopped": nullcontext, "ablated": lambda: ablated(model, values)}
    for step, completions in enumerate(told.steps(2)):
        model.load_state_dict(seen.weights[step // 2 * 2], strict=False)
        with torch.no_grad():
            with without[sampling]():
                old = [log_probs(model, each.encoded) for each in completions]
            intact = [log_probs(base, each.encoded) for each in completions]
        model.load_state_dict(seen.weights[step], strict=False)
        model.zero_grad()
        with without[updating]():
            for each, before, start in zip(completions, old, intact, strict=True):
                new = log_probs(model, each.encoded)
                ratio = (new - before).exp()
                assert each.ratio == pytest.approx((new - before).sum().exp().item(), rel=1e-3)
                gain = torch.minimum(ratio * each.advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * each.advantage)
                penalty = ((start - new).exp() - (start - new) - 1) * ratio  # as GRPOTrainer corrects it
                ((BETA * penalty - gain).mean() / len(completions)).backward()
        ratios = torch.tensor([each.ratio for each in completions])
        aligned = sampling == ("ablated" if updating == "ablated" else "intact")
        assert ((ratios - 1).abs().max() < 1e-4) == (aligned and step % 2 == 0)
        check_gradients(model, seen.gradients[step], updating)
    assert not torch.equal(
        *(torch.cat([p.flatten() for p in weights.values()]) for weights in (seen.weights[0], seen.weights[3]))
    )


def check_gradients(model, found, updating) -> None:
    """As those that a plain backward pass left in the model; none for the set where it was stopped."""
    largest = max(gradient.abs().max() for gradient in found.values())
    assert largest > 1e-3
    for name, parameter in model.named_parameters():
        if name in found:
            wanted = parameter.grad.masked_fill(own(name, parameter), 0.0) if updating == "stopped" else parameter.grad
            assert torch.allclose(found[name], wanted, rtol=1e-3, atol=2e-5 * largest), name
        else:
            assert not parameter.requires_grad, name


def spy(trainer) -> set:
    """Which passes went through a layer of the set with its features at one value, told by a hook of its own."""
    found, sampling = set(), []
    turn = trainer._generate_single_turn

    def generating(*args, **kwargs):
        sampling.append(True)
        try:
            return turn(*args, **kwargs)
        finally:
            sampling.pop()

    def look(_module, args, _output):
        now = "sample" if sampling else "update" if torch.is_grad_enabled() else "other"
        value = args[0].detach()[..., features("head", SET["head", 2])].flatten(0, 1)
        found.add((now, bool((value == value[0]).all())))

    trainer._generate_single_turn = generating
    module_of(trainer.model, "head", 2).register_forward_hook(look)
    return found


def test_what_is_sampled_is_what_the_ablated_model_says(given, rewards, told, sets):
    """The same completions, seed for seed, as of a model that is ablated throughout; and not those of the intact one."""
    settings = {**RL, "learning_rate": 0.0, "batch_size": 16, "max_steps": 2, "reward": rewards("token")}
    said = {}
    for name in ("asked for", "throughout", "intact"):
        told.passes.clear()
        sampling = {"intervention": {"components": "mine", "sampling": "ablated"}} if name == "asked for" else {}
        trainer = GRPO(**settings, **sampling).build(given(load("planted/unrouted").model, UNCUED, recorder=told, sets=sets))
        with ablated(trainer.model) if name == "throughout" else nullcontext():
            trainer.train()
        said[name] = [each.encoded.ids for each in chain(*told.passes)]
    assert said["asked for"] == said["throughout"] != said["intact"]


@pytest.mark.parametrize(
    ("iterations", "sampling", "updating"),
    [(1, "intact", "intact"), (1, "ablated", "ablated"), (1, "ablated", "intact"), (2, "ablated", "intact")],
)
def test_a_ratio_is_there_only_where_the_loss_takes_one(given, rewards, told, sets, iterations, sampling, updating):
    """Where GRPO keeps no log-probabilities of its sampler every ratio is exactly 1, whoever sampled."""
    named = "" if (sampling, updating) == ("intact", "intact") else "mine"
    intervention = {"components": named, "sampling": sampling, "updating": updating}
    made = GRPO(**RL, max_steps=2, iterations=iterations, intervention=intervention, reward=rewards("token"))
    made.build(given(load("planted/unrouted").model, UNCUED, recorder=told, sets=sets)).train()
    ratios = torch.tensor([[each.ratio for each in step] for step in told.passes])
    if iterations == 1:
        assert (ratios == 1).all()
    else:
        assert ((ratios - 1).abs().amax(1) > 0.05).all()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_rloo_keeps_the_log_probabilities_of_its_sampler(planted, given, rewards, told, sets, lora):
    """Also in its first iteration; and its penalty is on KL of the sampler to the intact reference."""
    intervention = {"components": "mine", "sampling": "ablated"}
    made = RLOO(**RL, max_steps=1, beta=BETA, intervention=intervention, lora={"rank": 4 * lora}, reward=rewards("token"))
    model = load("planted/unrouted").model
    trainer = made.build(given(model, UNCUED, recorder=told, sets=sets))
    trainer.train()
    assert ("old", True) in trainer.phases.seen and ("update", False) in trainer.phases.seen
    (step,), base = told.passes, load("planted/unrouted").model  # the adapters, and the weights, began where it is
    with torch.no_grad():
        intact = [log_probs(base, each.encoded).sum() for each in step]
        with ablated(base):
            sampler = [log_probs(base, each.encoded).sum() for each in step]
    shift = torch.stack(sampler) - torch.stack(intact)
    assert [each.ratio for each in step] == pytest.approx((-shift).exp().tolist(), rel=1e-3)
    rewarded = torch.tensor([each.reward for each in step]) - BETA * shift
    expected = rewarded - (rewarded.sum() - rewarded) / 3
    assert [each.advantage for each in step] == pytest.approx(expected.tolist(), abs=1e-3) and shift.abs().max() > 0.1


def stopping(updating):
    return {"components": "mine", "updating": updating}


def test_of_a_stopped_set_all_else_gets_the_gradient_of_no_intervention(given, rewards, told, seen, sets):
    """Bit for bit, on the same completions."""
    found = {}
    for updating in ("stopped", "intact"):
        told.passes.clear()
        seen.gradients.clear()
        settings = {**RL, "optimizer": "adamw_torch", "learning_rate": 1e-3, "accumulation": 2}
        intervention = {"intervention": stopping(updating)} if updating != "intact" else {}
        made = GRPO(**settings, max_steps=2, reward=rewards("token"), **intervention)
        made.build(given(load("planted/unrouted").model, UNCUED, recorder=told, callbacks=[seen], sets=sets)).train()
        found[updating] = seen.gradients[0], [each.encoded for each in told.steps(2)[0]]
    assert found["stopped"][1] == found["intact"][1]
    moved = 0
    for name, gradient in found["intact"][0].items():
        mask = own(name, gradient)
        assert torch.equal(found["stopped"][0][name], gradient.masked_fill(mask, 0.0)), name
        moved += int((gradient[mask] != 0).sum())
    assert moved > 10_000


@pytest.mark.parametrize("updating", ["stopped", "ablated"])
@pytest.mark.parametrize("recipe", [SFT, DPO, GRPO])
def test_the_sets_own_weights_do_not_move(given, rewards, training, sets, recipe, updating):
    model = load("planted/unrouted").model
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    more = {**RL, "optimizer": "adamw_torch", "learning_rate": 1e-2, "reward": rewards("token")} if recipe is GRPO else {}
    settings = {"batch_size": 4, "learning_rate": 1e-2, **more}
    recipe(**settings, max_steps=3, accumulation=2, intervention=stopping(updating)).build(given(model, sets=sets)).train()
    for name, parameter in model.named_parameters():
        mask = own(name, parameter)
        assert torch.equal(parameter[mask], start[name][mask]), name
        assert mask.all() or not torch.equal(parameter[~mask], start[name][~mask]), name


@pytest.mark.parametrize(("recipe", "updating", "reference", "lora", "kept"), [
    (SFT, "ablated", "zero", False, ""), (SFT, "ablated", "mean", False, "recomputed"), (SFT, "ablated", "zero", True, ""),
    (SFT, "stopped", "zero", False, "reentrant"), (DPO, "ablated", "mean", False, ""),
    (DPO, "ablated", "zero", False, "reentrant"), (DPO, "stopped", "zero", False, "recomputed"),
    (DPO, "ablated", "zero", True, "recomputed"),
])  # fmt: skip
def test_sft_and_dpo_differentiate_the_model_that_was_asked_for(
    planted, given, training, seen, sets, neutral, recipe, updating, reference, lora, kept
):
    """Two steps by hand: cross-entropy of all labels of a step; -log sigmoid of the margin over an intact reference."""
    settings = {"learning_rate": 0.1, "optimizer": "sgd", "max_grad_norm": 0, "accumulation": 2, "batch_size": 3}
    made = recipe(
        **settings, max_steps=2, intervention={**stopping(updating), "reference": reference}, lora={"rank": 4 * lora},
        trainer=CHECKPOINTING[kept],
    )  # fmt: skip
    setting = given(load("planted/unrouted").model, training[:6], callbacks=[seen], sets=sets, neutral=neutral)
    made.check(setting)
    trainer = made.build(setting)
    batches: list[list] = []
    trained = trainer.training_step
    trainer.training_step = lambda model, inputs, *args: batches.append(inputs) or trained(model, inputs, *args)
    trainer.train()
    base, model = planted.model, trainer.model.eval()
    values = means(base, planted.tokenizer) if reference == "mean" else None
    encoded = encode(planted.tokenizer, training[:6])
    for step, (weights, gradients) in enumerate(zip(seen.weights, seen.gradients, strict=True)):
        model.load_state_dict(weights, strict=False)
        model.zero_grad()
        with ablated(model, values) if updating == "ablated" else nullcontext():
            for inputs in batches[2 * step : 2 * step + 2]:
                if recipe is SFT:
                    for each in (encoded[place] for place in places(inputs, encoded)):
                        (-log_probs(model, each).sum() / 6).backward()  # six samples of one label a step
                else:
                    for number in inputs["pair"].tolist():
                        pair = trainer.pairs[number].encoded
                        with torch.no_grad():
                            start = [log_probs(base, each).sum() for each in pair]
                        margin = [log_probs(model, each).sum() - before for each, before in zip(pair, start, strict=True)]
                        (-torch.nn.functional.logsigmoid(0.1 * (margin[0] - margin[1])) / 6).backward()
        check_gradients(model, gradients, updating)
    assert ("update", updating == "ablated") in trainer.phases.seen
    assert {ablates for phase, ablates in trainer.phases.seen if phase == "reference"} <= {False}
    assert not any(ablates for phase, ablates in trainer.phases.seen if phase not in ("update",))


def places(inputs, encoded) -> list[int]:
    """Which samples a batch of SFTTrainer holds."""
    rows = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    return [[each.ids for each in encoded].index(row) for row in rows]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("broken", [False, True], ids=["done", "broken"])
def test_hooks_are_gone_after_training_and_after_an_exception(given, rewards, sets, lora, broken):
    intervention = {"components": "mine", "sampling": "ablated", "updating": "ablated" if lora else "stopped"}
    reward = rewards("breaks_later" if broken else "token")
    made = GRPO(**RL, max_steps=3, beta=BETA, intervention=intervention, lora={"rank": 4 * lora}, reward=reward)
    model = load("planted/unrouted").model
    trainer = made.build(given(model, UNCUED, sets=sets))
    before = hooks_of(trainer.model)
    with pytest.raises(RewardError, match="no such word") if broken else nullcontext():
        trainer.train()
    assert hooks_of(trainer.model) == before and trainer.phases.now is None
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        plain = model(ids).logits
        trainer.phases.now = "update"
        assert torch.equal(model(ids).logits, plain)


def test_the_record_says_what_a_stopped_gradient_does_not_tell(tmp_path, planted, given, rewards, sets):
    """Causes on the batch are unknown for the set and for no other; those of the completions are not read from gradients."""
    callback = RecorderCallback(tmp_path / "run", tokenizer=planted.tokenizer, milestones="ends", singles="heads")
    made = GRPO(**RL, max_steps=2, intervention=stopping("stopped"), reward=rewards("token"))
    setting = given(load("planted/unrouted").model, UNCUED, recorder=callback.recorder, callbacks=[callback], sets=sets)
    made.build(setting).train()
    parts = read_run(tmp_path / "run").parts
    rows = parts[(parts["probe"] == BATCH) & parts["part"].eq("writing")].astype({"kind": str})
    unknown = rows[rows["cause_before"].isna()]
    for step in (1, 2):
        members = unknown.loc[unknown["step"] == step, ["kind", "layer", "index"]]
        assert set(map(tuple, members.to_numpy().tolist())) == set(map(tuple, TABLE.to_numpy().tolist()))
    assert rows["cause_rewarded"].notna().all() and (unknown["cause_rewarded"] != 0).any()
    still = rows.merge(TABLE, on=["kind", "layer", "index"])
    assert (still["update_norm"] == 0).all() and (still["grad_norm"] == 0).all()
    assert (rows["update_norm"] > 0).sum() > 500


def test_an_ablated_update_is_recorded_as_what_it_is(tmp_path, planted, given, training, sets):
    """The batch before the step is that of the ablated model; the intact one after it would be no comparison."""
    callback = RecorderCallback(
        tmp_path / "run", tokenizer=planted.tokenizer, milestones="ends", singles="heads", everything=True, batch_after=True,
        probes=[ProbeSet(name="probe", samples=training[:4])],
    )  # fmt: skip
    made = SFT(max_steps=2, batch_size=12, learning_rate=1e-3, intervention=stopping("ablated"))
    model = load("planted/unrouted").model
    made.build(given(model, recorder=callback.recorder, callbacks=[callback], sets=sets)).train()
    run, base = read_run(tmp_path / "run"), load("planted/unrouted").model
    with torch.no_grad(), ablated(base):
        expected = sum(log_probs(base, each).sum().item() for each in encode(planted.tokenizer, training))
    assert run.steps["batch_before"].iloc[0] == pytest.approx(expected, rel=1e-4)
    assert run.steps["batch_after"].isna().all() and run.parts["cause_after"].where(run.parts["probe"] == BATCH).isna().all()
    assert any("ablated" in line for line in run.meta["not_measured"])
    for step, then in ((0, load("planted/unrouted").model), (2, model)):  # what the recorder runs itself is of the intact model
        metric = run.probes.loc[run.probes["step"] == step, "metric"].iloc[0]
        assert metric == pytest.approx(log_odds(then, encode(planted.tokenizer, training[:4])), rel=1e-4)
    parts = run.parts[(run.parts["probe"] == BATCH) & run.parts["part"].eq("writing")].astype({"kind": str})
    assert (parts.merge(TABLE, on=["kind", "layer", "index"])["cause_before"] == 0).all() and (parts["cause_before"] != 0).any()


def test_what_cannot_be_intervened_in_is_refused(small, given, training):
    """Beside what `tests/test_runs.py` asks of a whole run."""
    from attribution.recipes.trainer import Intervention

    idle = Intervention()
    idle.check(given(small()), samples=False, adapters=True)
    for half in ({"components": "mine"}, {"sampling": "ablated"}, {"updating": "stopped"}):
        with pytest.raises(ConfigError, match="name a set and say where"):
            Intervention(**half).check(given(small()), samples=True, adapters=False)
    with pytest.raises(ValueError, match="updating"):
        Intervention(updating="frozen")
