"""How well update shares add up where it matters: the shipped models, a small real one, and one with norms behind modules."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from attribution.models import load
from attribution.samples import ProbeSet, Sample
from attribution.store import read_run
from attribution.updates.recorder import Recorder
from attribution.worlds import planted as grammar
from attribution.worlds.build import word_tokenizer

STEPS = 10
OPTIMIZERS = {
    "AdamW 1e-4": lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0),
    "AdamW 1e-3": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


def subject(name: str, stories):
    """Model, tokenizer, training and held-out samples."""
    if name == "planted":
        rows = [grammar.prompts(24, 1, problems=grammar.TRAINING), grammar.prompts(16, 2, star="conflict")]
        return *load("planted/31"), *([Sample(**row) for row in found] for found in rows)
    if name == "stories":
        names = ("Tom", "Lily", "Ben", "Sue", "Max", "Amy", "Tim", "Mia")
        pets = ("dog", "cat", "bird", "fish", "frog", "cow")
        found = [
            Sample(prompt=f"Once upon a time, there was a {pet} named {name}.", response=" He saw a tree.")
            for pet in pets for name in names
        ]  # fmt: skip
        return *load(str(stories)), found[::2], found[1::4]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "olmo2", vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    draw = torch.randint(0, 20, (40, 8)).tolist()
    found = [
        Sample(prompt=" ".join(f"w{i}" for i in row[:5]), response=" " + " ".join(f"w{i}" for i in row[5:])) for row in draw
    ]
    return AutoModelForCausalLM.from_config(config), word_tokenizer([f"w{i}" for i in range(60)]), found[:24], found[24:]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["planted", "stories", "random OLMo2"])
def test_nearly_every_step_resolves(tmp_path, request, loop, name, optimizer):
    stories = request.getfixturevalue("stories") if name == "stories" else None
    model, tokenizer, training, held_out = subject(name, stories)
    made = OPTIMIZERS[optimizer](model.parameters())
    probes = [ProbeSet(name="held out", samples=held_out)]
    recorder = Recorder(
        tmp_path / "run", probes=probes, tokenizer=tokenizer, metric="log_odds", milestones="ends", everything=False,
        kinds=("head",), singles="heads",
    )  # fmt: skip
    with recorder.attach(model, made):
        loop(model, tokenizer, training, made, STEPS)
    found = read_run(tmp_path / "run").probes.query("step > 0")
    relative = (found["residual"].abs() / found["change"].abs()).astype(float)
    refined = (found["passes"] > 1).mean()
    print(
        f"\n{name}, {optimizer}: {found['resolved'].mean():.0%} resolved, residual of the change {relative.median():.2%} "
        f"(median) {relative.max():.2%} (largest), {refined:.0%} refined, at most {found['passes'].max()} passes, "
        f"change {found['change'].sum():+.2f}"
    )
    assert len(found) == STEPS and found["change"].abs().max() > 1e-3
    assert found["resolved"].mean() >= 0.95
