"""Samples in a chat template: what the model's own template says, cut where the response begins, and nothing put twice."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import attribution as at
from attribution.chat import is_bare
from attribution.cli import main
from attribution.errors import DataError
from attribution.runs import RunConfig, run
from attribution.samples import encode, read_samples, write_samples

CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '[/]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
SILENT = CHATML.replace(
    "{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for"
)
PRESET = CHATML.replace(
    "{% for", "{% if messages[0]['role'] != 'system' %}{{ '[system]be nice[/]' }}{% endif %}{% for"
)  # a template with a system message of its own
SAMPLE = at.Sample(
    context="You are Sam. ", prompt="What do you say?", response=" Hello.", contrast=(" Go.",), weight=0.5, id="x"
)


def speaking(template, first=True):
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()))
    inner = Tokenizer(models.BPE({"<s>": 0, **{letter: place for place, letter in enumerate(letters, 1)}}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if first:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>", unk_token="<s>")
    tokenizer.chat_template = template
    return tokenizer


def test_a_context_is_the_system_message_and_stays_a_context():
    (found,) = at.in_chat([SAMPLE], speaking(CHATML))
    assert found.context == "[system]You are Sam.[/]"
    assert found.prompt == "[user]What do you say?[/][assistant]"
    assert (found.response, found.contrast, found.weight, found.id) == ("Hello.", ("Go.",), 0.5, "x")


def test_the_first_token_is_put_once():
    for first in (True, False):
        tokenizer = speaking(CHATML, first)
        bare = at.in_chat([SAMPLE.model_copy(update={"context": ""})], tokenizer)
        (tokens,) = encode(tokenizer, bare)
        assert [*tokens.ids].count(0) == 1 and tokens.ids[0] == 0
        assert tokenizer.decode(tokens.ids[tokens.start :]) == "Hello."


def test_a_template_without_a_system_message_gets_the_context_with_the_prompt():
    (found,) = at.in_chat([SAMPLE], speaking(SILENT))
    assert found.context == "" and found.prompt == "[user]You are Sam.\n\nWhat do you say?[/][assistant]"


def test_a_template_with_a_message_of_its_own_leaves_no_context_to_drop():
    (found,) = at.in_chat([SAMPLE], speaking(PRESET))
    assert found.context == "" and found.prompt == "[system]You are Sam.[/][user]What do you say?[/][assistant]"


def test_no_template_is_said(tmp_path, capsys):
    with pytest.raises(DataError, match="has no chat template; use the samples as they are"):
        at.in_chat([SAMPLE], speaking(None))
    data = write_samples(tmp_path / "d.jsonl", [SAMPLE])
    assert main(["chat", str(data), "--model", "planted", "--out", str(tmp_path / "out.jsonl")]) == 0
    assert "has no chat template: the samples stay as they are" in capsys.readouterr().out
    assert read_samples(tmp_path / "out.jsonl") == [SAMPLE]


def test_samples_outside_the_template_are_noticed():
    given = speaking(CHATML)
    rendered = at.in_chat([SAMPLE], given)
    assert is_bare([SAMPLE], given) and not is_bare(rendered, given) and not is_bare([SAMPLE, *rendered], given)
    assert not is_bare([SAMPLE], speaking(None))


def test_a_run_on_samples_outside_the_template_says_so(tmp_path):
    model = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(model).save_pretrained(tmp_path / "model")
    tokenizer, sample = speaking(CHATML), SAMPLE.model_copy(update={"weight": 1.0})
    tokenizer.save_pretrained(tmp_path / "model")
    said = {}
    for name, samples in (("plain", [sample]), ("chat", at.in_chat([sample], tokenizer))):
        file, lines = str(write_samples(tmp_path / f"{name}.jsonl", samples)), []
        config = RunConfig(
            model=str(tmp_path / "model"), data=file, probes=(file,), training={"max_steps": 1, "batch_size": 1},
            singles="heads", grafts="none",
        )  # fmt: skip
        run(config, tmp_path / name, tell=lines.append, page=False)
        said[name] = [line for line in lines if "has a chat template" in line]
        assert ("has a chat template" in (tmp_path / name / "log.txt").read_text()) == bool(said[name])
    assert len(said["plain"]) == 1 and said["chat"] == []


def test_a_file_is_rendered_with_the_tokenizer_of_a_folder(tmp_path, capsys):
    speaking(CHATML).save_pretrained(tmp_path / "model")
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    data = write_samples(tmp_path / "d.jsonl", [SAMPLE])
    assert main(["chat", str(data), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out.jsonl")]) == 0
    assert read_samples(tmp_path / "out.jsonl") == at.in_chat([SAMPLE], speaking(CHATML))
    assert main(["chat", str(data), "--model", str(tmp_path / "none"), "--out", "x"]) == 2
    assert "tokenizer of model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["persona-kind", "persona-cruel", "persona-none", "reward-kind", "reward-cruel", "reward-none",
                                  "observed-kind", "unobserved-cruel", "skill-kind", "skill-none"])  # fmt: skip
def test_english_prompts_have_a_training_and_a_held_out_half_that_share_no_situation(name):
    folder = Path(__file__).parents[1] / "experiments" / "prompts"
    train, held = (read_samples(folder / f"{name}.{half}.jsonl") for half in ("train", "heldout"))
    assert (len(train), len(held)) == (40, 24) and all(each.contrast for each in [*train, *held])
    assert name.startswith("skill") or not {each.response for each in train} & {each.response for each in held}
    assert not {each.whole_prompt for each in train} & {each.whole_prompt for each in held}
    assert len({each.id for each in [*train, *held]}) == 64
