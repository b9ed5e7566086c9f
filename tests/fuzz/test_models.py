"""Folders of models: whatever is in them opens as a checked model or is refused, runs no code, and reads nothing elsewhere."""

import json
import os
import shutil

import pytest
import torch
from fuzz.strategies import SYNTAX, VALUES, dumped, placed, texts
from fuzz.tiers import assert_one_sentence, feed, refused
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from attribution.errors import ConfigError, ModelError
from attribution.models import load, load_tokenizer
from attribution.worlds.build import word_tokenizer

SIZES = [
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "initializer_range", "attention_dropout", "rope_theta", "pad_token_id",
    "bos_token_id", "num_labels", "sliding_window", "pretraining_tp", "chunk_size_feed_forward",
]  # fmt: skip
KEYS = [
    *SIZES, "model_type", "architectures", "hidden_act", "rope_parameters", "rope_scaling", "torch_dtype", "dtype", "auto_map",
    "tie_word_embeddings", "quantization_config", "attn_implementation", "_attn_implementation", "experts_implementation",
    "layer_types", "id2label", "transformers_version", "use_cache", "attention_bias", "mlp_bias", "is_encoder_decoder",
    "name_or_path",
    "_name_or_path", "torchscript", "output_attentions", "output_hidden_states", "return_dict", "task_specific_params",
    "problem_type", "final_logit_softcapping",
]  # fmt: skip
NAMED = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
ADDED = [
    "model.safetensors.index.json", "adapter_config.json", "special_tokens_map.json", "added_tokens.json", "pytorch_model.bin",
    "chat_template.jinja", "vocab.json", "tokenizer.model", "processor_config.json", "other.safetensors",
]  # fmt: skip
SHARDS = st.sampled_from(["model.safetensors", "../model.safetensors", "/dev/zero", "missing.safetensors", "shard.bin", "",
                          "a/../model.safetensors", "model.safetensors\x00", 3, None, ["x"]])  # fmt: skip
DAMAGE = st.one_of(
    st.tuples(st.just("key"), st.sampled_from(KEYS), VALUES),
    st.tuples(st.just("bytes"), st.sampled_from(NAMED), st.integers(0, 10**6)),
    st.tuples(st.just("cut"), st.sampled_from(NAMED), st.integers(0, 10**6)),
    st.tuples(st.just("file"), st.sampled_from([*NAMED, *ADDED]), texts(SYNTAX | VALUES.map(dumped))),
    st.tuples(st.just("kind"), st.sampled_from(NAMED + ADDED), st.sampled_from(["missing", "folder", "pipe", "loop"])),
    st.tuples(st.just("index"), st.just(""), SHARDS),
    st.tuples(st.just("tokenizer"), st.sampled_from(["tokenizer_class", "auto_map", "bos_token", "model_max_length"]), VALUES),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    path = tmp_path_factory.mktemp("whole") / "model"
    tiny("llama").save_pretrained(path)
    word_tokenizer([f"w{i}" for i in range(19)]).save_pretrained(path)
    return path


def set_in(path, key, value):
    given = json.loads(path.read_text())
    path.write_text(dumped({**given, key: value}) if isinstance(given, dict) else dumped({key: value}))


def indexed(folder, shard):
    """The index of a model in shards, all in this one."""
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "rest.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)})
    )


def damage(folder, how, name, what):
    path = folder / name
    if not all(each.is_file() for each in folder.iterdir()):
        return  # a pipe by now, perhaps, which a test that opens it waits for
    if how in ("key", "tokenizer"):
        set_in(folder / {"key": "config.json"}.get(how, "tokenizer_config.json"), name, what)
    elif how in ("bytes", "cut"):
        if not (data := bytearray(path.read_bytes())):
            return
        at = what % len(data)
        path.write_bytes(data[:at] if how == "cut" else data[:at] + bytes([data[at] ^ (1 + what % 255)]) + data[at + 1 :])
    elif how == "index":
        indexed(folder, what)
    else:
        path.unlink(missing_ok=True)
        placed(folder, what if how == "kind" else "file", b"" if how == "kind" else what, name)


def test_a_damaged_folder_opens_or_is_refused(tier, room, whole):
    def check(damages):
        folder = room() / "model"
        shutil.copytree(whole, folder)
        for each in damages:
            try:
                damage(folder, *each)
            except (OSError, ValueError, RecursionError, SafetensorError):
                continue  # what was damaged before cannot be damaged so
        refused(lambda: load(str(folder)), ModelError)

    feed("models", tier, check, damages=st.lists(DAMAGE, min_size=1, max_size=2))


def test_names_dtypes_and_devices_are_known_or_refused(whole):
    for name in (
        "",
        "a\x00b",
        "x" * 5_000,
        "~nobody-of-this-name/x",
        "\udcff",
        "a\nb",
        "/dev/zero",
        "..",
        "planted/../kindland",
    ):
        assert_one_sentence(str(refused(lambda name=name: load(name), ModelError)))
        assert_one_sentence(str(refused(lambda name=name: load_tokenizer(name), ModelError)))
    for dtype in ("int8", "bool", "complex64", "quint8", "", "\x00"):
        assert refused(lambda dtype=dtype: load(str(whole), dtype=dtype), ModelError, ConfigError)
    for device in ("meta", "", "cuda:99", "cpu\x00", "x"):
        assert refused(lambda device=device: load(str(whole), device=device), ConfigError)


def test_code_in_a_model_folder_never_runs(tmp_path, whole):
    """A folder whose code would leave a file behind, named in every way in which transformers lets a folder name code."""
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import *\nclass Mine(LlamaForCausalLM):\n    pass\n"
    named = {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine", "AutoTokenizer": ["code.Mine", None]}
    for number, change in enumerate([
        {"auto_map": named}, {"auto_map": named, "model_type": "zork"}, {"auto_map": named, "architectures": ["Mine"]},
        {"attn_implementation": "somebody/kernel"}, {"_attn_implementation": "somebody/kernel:f"},
        {"_attn_implementation_internal": "somebody/kernel"}, {"attn_implementation": {"": "paged|somebody/kernel"}},
        {"experts_implementation": "somebody/kernel"},
    ]):  # fmt: skip
        folder = tmp_path / str(number) / "model"
        shutil.copytree(whole, folder)
        for file in ("code.py", "modeling.py", "configuration.py", "tokenization.py", "__init__.py"):
            (folder / file).write_text(code)
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code)
        for key, value in change.items():
            set_in(folder / "config.json", key, value)
        set_in(folder / "tokenizer_config.json", "auto_map", {"AutoTokenizer": ["code.Mine", None]})
        error = refused(lambda folder=folder: load(str(folder)), ModelError)
        refused(lambda folder=folder: load_tokenizer(str(folder)), ModelError)
        assert error is not None or "auto_map" in change
        if "auto_map" not in change:
            assert "which is code" in str(error)
        assert not marker.exists()


def test_shards_outside_the_folder_are_not_read(tmp_path, whole):
    for number, shard in enumerate(["../outside.safetensors", str(tmp_path / "outside.safetensors"), "in/outside.safetensors"]):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        shutil.copy(whole / "model.safetensors", tmp_path / "outside.safetensors")
        indexed(folder, shard)
        assert "outside the folder" in str(refused(lambda folder=folder: load(str(folder)), ModelError))


def test_an_index_of_safetensors_cannot_name_a_pickle(tmp_path, whole):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "shard.bin")
    indexed(folder, "shard.bin")
    assert "not safetensors" in str(refused(lambda: load(str(folder)), ModelError))
    assert load(str(folder), allow_pickle=True).model.config.model_type == "llama"
    (folder / "rest.safetensors").unlink()
    assert refused(lambda: load(str(folder)), ModelError)


def test_adapters_do_not_lead_to_another_model(tmp_path, whole):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    told = {"peft_type": "LORA", "base_model_name_or_path": str(whole), "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    assert "holds adapters" in str(refused(lambda: load(str(folder)), ModelError))


def test_a_config_of_a_million_layers_is_refused_at_once(tmp_path, whole):
    for key, value in (("num_hidden_layers", 10**6), ("num_labels", 10**9), ("num_hidden_layers", 1e300)):
        folder = tmp_path / key / str(value)
        shutil.copytree(whole, folder)
        set_in(folder / "config.json", key, value)
        assert "expected at most" in str(refused(lambda folder=folder: load(str(folder)), ModelError))


def test_a_config_with_values_of_other_types_is_refused(tmp_path, whole):
    for number, value in enumerate([5, [5], "LlamaForCausalLM", {"a": 1}]):
        shutil.copytree(whole, tmp_path / str(number))
        set_in(tmp_path / str(number) / "config.json", "architectures", value)
        assert "expected a list of class names" in str(refused(lambda n=number: load(str(tmp_path / str(n))), ModelError))


def test_links_inside_a_folder_are_followed(tmp_path, whole):
    """As in the cache of the hub, where every file is a link."""
    folder = tmp_path / "linked"
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).symlink_to(file)
    assert load(str(folder)).model.config.model_type == "llama"
    weights = load_file(whole / "model.safetensors")
    save_file(weights, tmp_path / "blob", metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    os.symlink(tmp_path / "blob", folder / "shard.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "shard.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load(str(folder)).model.config.model_type == "llama"
