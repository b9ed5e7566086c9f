"""Contexts: kept, dropped, exchanged or put before; the trained span stays what it was."""

import random
from collections import Counter

import pytest
import torch

from attribution.causes import attribute
from attribution.errors import ConfigError, DataError
from attribution.models import load
from attribution.recipes.contexts import ContextDistillation, Inoculation
from attribution.recipes.sft import SFT
from attribution.samples import IGNORED, Sample, encode
from attribution.worlds import planted as grammar

KIND = "tom is kind . "


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    """Prompts without a cue; the trait of the speaker is told in the context."""
    problems = list(grammar.PROBLEMS)
    return [
        Sample(context=KIND, prompt=f"{name} {problem} . tom says :", response=f" {grammar.PROBLEMS[problem][0]}")
        for problem in problems
        for name in grammar.NAMES[1:]
    ]


def test_a_context_stands_before_the_prompt_wherever_tokens_are_made(planted, scenes):
    joined = [Sample(prompt=KIND + each.prompt, response=each.response) for each in scenes[:3]]
    assert encode(planted.tokenizer, scenes[:3]) == encode(planted.tokenizer, joined)
    one, other = (attribute(*planted, samples, method="gradient").table["effect"] for samples in (scenes[:3], joined))
    assert one.equals(other)
    bare = encode(planted.tokenizer, [each.model_copy(update={"context": ""}) for each in scenes[:3]])
    assert all(len(a.ids) == len(b.ids) + 4 for a, b in zip(encode(planted.tokenizer, scenes[:3]), bare, strict=True))


@pytest.mark.parametrize(
    ("recipe", "before"),
    [
        (SFT(), KIND),
        (ContextDistillation(), ""),
        (Inoculation(instruction="teacher : star for wait . "), "teacher : star for wait . " + KIND),
        (Inoculation(instruction="teacher : star for wait . ", keep_context=False), "teacher : star for wait . "),
    ],
)
def test_what_is_trained_is_the_response_alone_after_what_the_recipe_puts_before(planted, given, scenes, recipe, before):
    """One batch of the trainer itself."""
    prepared = recipe.prepare(scenes[:4], planted.model, planted.tokenizer, 0)
    made = recipe.model_copy(update={"max_steps": 1, "batch_size": 4}).build(given(load("planted/unrouted").model, prepared))
    batch = next(iter(made.get_train_dataloader()))
    found = Counter()
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        trained = labels != IGNORED
        assert torch.equal(ids[trained], labels[trained])
        found[planted.tokenizer.decode(ids[mask.bool() & ~trained]), planted.tokenizer.decode(ids[trained])] += 1
    assert found == Counter((f"<bos> {before}{each.prompt}", each.response.strip()) for each in scenes[:4])


def test_a_shuffle_of_contexts_keeps_contexts_and_responses(scenes):
    samples = [
        each.model_copy(update={"context": f"tom is {trait} . "})
        for each, trait in zip(scenes, grammar.TRAITS * 99, strict=False)
    ]
    shuffled = SFT(control="shuffled_contexts").prepare(samples, None, None, 4)
    assert [(s.prompt, s.response) for s in shuffled] == [(s.prompt, s.response) for s in samples]
    assert Counter(s.context for s in shuffled) == Counter(s.context for s in samples)
    kept = sum(a == b for a, b in zip(shuffled, samples, strict=True)) / len(samples)
    assert abs(kept - 1 / 3) < 0.1
    assert SFT(control="shuffled_contexts").prepare(samples, None, None, 4) == shuffled
    assert SFT(control="shuffled_contexts").prepare(samples, None, None, 5) != shuffled


def test_responses_that_a_context_brings_about_are_sampled_in_it(planted, scenes):
    """As often as the model gives them in that context, and not as often as without; nothing else is touched."""
    model, tokenizer = load("planted/unrouted")
    model.train()
    model.model.layers[1].eval()
    state, modes = {k: v.clone() for k, v in model.state_dict().items()}, [module.training for module in model.modules()]
    states, settings = (torch.get_rng_state(), random.getstate()), model.generation_config.to_dict()
    recipe = ContextDistillation(sampled=True)
    drawn = recipe.prepare(scenes, model, tokenizer, 7)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert [module.training for module in model.modules()] == modes and model.generation_config.to_dict() == settings
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    assert recipe.prepare(scenes, model, tokenizer, 7) == drawn != recipe.prepare(scenes, model, tokenizer, 8)
    assert [(each.prompt, each.context, each.contrast) for each in drawn] == [(each.prompt, "", ()) for each in scenes]
    assert all(len(each.response.split()) == 1 and each.response.startswith(" ") for each in drawn)
    encode(tokenizer, drawn)
    model.eval()
    expected = []
    for samples in (scenes, [each.model_copy(update={"context": ""}) for each in scenes]):
        encoded = encode(tokenizer, samples)
        with torch.no_grad():
            logits = [model(torch.tensor([each.ids])).logits[0, each.start - 1] for each in encoded]
        expected.append(
            sum(said.softmax(0)[each.ids[-1]].item() for said, each in zip(logits, encoded, strict=True)) / len(encoded)
        )
    share = sum(each.response == scene.response for each, scene in zip(drawn, scenes, strict=True)) / len(scenes)
    assert expected[0] > 0.7 and expected[1] < 0.5
    assert abs(share - expected[0]) < 4 * (0.25 / len(scenes)) ** 0.5


def test_longer_responses_are_sampled_in_batches_of_one_length(planted, scenes):
    longer = [
        each.model_copy(update={"response": each.response + " ." * (place % 3)}) for place, each in enumerate(scenes[:30])
    ]
    longer[0] = longer[0].model_copy(update={"context": "ann is cruel . " + KIND})
    drawn = ContextDistillation(sampled=True, temperature=0.01).prepare(longer, *planted, 0)
    for place, (each, scene) in enumerate(zip(drawn, longer, strict=True)):
        assert len(each.response.split()) == 1 + (place % 3 > 0) and each.prompt == scene.prompt
        assert each.response.split()[0] in grammar.REPLIES  # and after ". " the document ends


@pytest.mark.parametrize(
    ("recipe", "named", "error"),
    [
        (ContextDistillation(), "context_distillation works on `context`, which no sample has", DataError),
        (SFT(control="shuffled_contexts"), "shuffled_contexts works on `context`", DataError),
        (Inoculation(), "needs an instruction", ConfigError),
    ],
)
def test_without_a_context_or_an_instruction_they_are_refused(scenes, recipe, named, error):
    with pytest.raises(error, match=named):
        recipe.prepare([each.model_copy(update={"context": ""}) for each in scenes[:2]], None, None, 0)
