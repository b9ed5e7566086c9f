"""Samples: what is written is read back, what would be trained on wrongly is refused, every token is where it belongs."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from attribution.errors import DataError
from attribution.samples import (
    IGNORED,
    Encoded,
    ProbeSet,
    Sample,
    batches,
    collate,
    encode,
    read_samples,
    samples_from_text,
    write_samples,
)
from attribution.worlds.build import word_tokenizer

WEIGHT = st.floats(allow_nan=False, allow_infinity=False)
SAMPLE = st.builds(
    Sample,
    prompt=st.text(),
    response=st.text(),
    weight=WEIGHT,
    contrast=st.lists(st.text(), max_size=3).map(tuple),
    id=st.none() | st.text(),
)


@pytest.fixture(scope="module")
def words():
    """One token per word, with a beginning token: <pad> <bos> <eos> <unk> are 0 to 3."""
    return word_tokenizer(["in", "side", "inside", "out", "a", "b", "c", "d"])


@pytest.fixture(scope="module")
def pieces():
    """Byte-level pair encoding with the merges of "hello" and " low", and no special tokens."""
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "l"), ("o", "w"), ("Ġl", "ow")]
    vocabulary = {token: i for i, token in enumerate([*"helowĠ", *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def one(tokenizer, prompt="a b", response=" c d", contrast=(), **options):
    (encoded,) = encode(tokenizer, [Sample(prompt=prompt, response=response, contrast=contrast)], **options)
    return encoded


# JSONL


@given(st.lists(SAMPLE, min_size=1, max_size=4))
@example([Sample(prompt="a\u2028b\x85c\x0bd", response="\r\n\x1c")])  # line ends to str.splitlines, not to JSON
def test_what_is_written_is_read_back(samples):
    with tempfile.TemporaryDirectory() as folder:
        path = write_samples(Path(folder) / "new" / "s.jsonl", samples)
        assert read_samples(path) == samples
        assert ProbeSet.read(path) == ProbeSet(name="s", samples=tuple(samples))


def test_counterfactuals_are_read_from_a_second_file(tmp_path):
    first = write_samples(tmp_path / "a.jsonl", [Sample(prompt="a", response=" b")])
    second = write_samples(tmp_path / "b.jsonl", [Sample(prompt="c", response=" d")] * 2)
    probes = ProbeSet.read(first, name="mine", counterfactuals=second)
    assert (probes.name, len(probes.samples), [s.prompt for s in probes.counterfactuals]) == ("mine", 1, ["c", "c"])
    assert ProbeSet.read(first).counterfactuals == ()


def test_defaults_are_not_written(tmp_path):
    path = write_samples(tmp_path / "s.jsonl", [Sample(prompt="a", response=" é")])
    assert path.read_bytes() == '{"prompt": "a", "response": " é"}\n'.encode()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "responce": "b"}', "response: field required"),
        (
            '{"prompt": "a", "response": "b", "wieght": 2}',
            "wieght: extra inputs are not permitted; fields are prompt, response, weight",
        ),
        ('{"prompt": "a"', "not JSON"),
        ('{"prompt": "a", "response": ' + "9" * 5000 + "}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("prompt,response", "not JSON"),
        ('["a", "b"]', "valid dictionary"),
        ("3", "valid dictionary"),
        ("null", "valid dictionary"),
        ('{"prompt": 3, "response": "b"}', "prompt: input should be a valid string"),
        ('{"prompt": "a", "response": "b", "contrast": "c"}', "contrast: input should be a valid tuple"),
        ('{"prompt": "a", "response": "b", "contrast": ["c", 1]}', "contrast.1: input should be a valid string"),
        ('{"prompt": "a", "response": "b", "weight": NaN}', "weight: input should be a finite number"),
        ('{"prompt": "a", "response": "b", "weight": "much"}', "weight: input should be a valid number"),
        ('{"prompt": "\\ud800", "response": "b"}', "prompt: value error, half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "s.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=f"s.jsonl, line 3: .*({said})"):
        read_samples(path)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
        read_samples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="Is a directory"):
        read_samples(tmp_path)
    for content in ("", "\n \n"):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(DataError, match=r"empty\.jsonl holds no samples"):
            read_samples(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "response": "b"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl: it is not UTF-8 text"):
        read_samples(tmp_path / "latin.jsonl")
    with pytest.raises(DataError, match="cannot write samples"):
        write_samples(tmp_path / "latin.jsonl" / "below.jsonl", [])


def test_windows_line_ends_are_read(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(b'{"prompt": "a", "response": "b"}\r\n' * 2)
    assert len(read_samples(tmp_path / "s.jsonl")) == 2


def test_samples_and_probe_sets_take_no_unknown_fields_and_do_not_change():
    with pytest.raises(ValidationError):
        Sample(prompt="a", response="b", label=1)
    with pytest.raises(ValidationError):
        ProbeSet(name="", samples=())
    with pytest.raises(ValidationError):
        Sample(prompt="a", response="b").prompt = "c"


# Tokens


def test_the_beginning_token_comes_first_where_the_tokenizer_adds_one(words, pieces):
    assert one(words) == Encoded(ids=(1, 8, 9, 10, 11), start=3, weight=1.0, contrasts=())
    assert one(words, prompt="").ids == (1, 10, 11)
    found = one(pieces, "hello", " low")
    assert pieces.convert_ids_to_tokens(found.ids) == ["hello", "Ġlow"] and found.start == 1
    with pytest.raises(DataError, match="sample 1: the prompt is empty"):
        one(pieces, "", "hello")


def test_labels_mask_exactly_the_prompt(words):
    found = one(words)
    assert found.labels == [IGNORED, IGNORED, IGNORED, 10, 11]
    assert found.labels[found.start :] == list(found.ids[found.start :])


def test_an_end_token_is_appended_only_when_asked(words, pieces):
    assert one(words, end=True).ids == (*one(words).ids, words.eos_token_id)
    assert one(words, end=True).labels[-1] == words.eos_token_id
    with pytest.raises(DataError, match="no end-of-sequence token"):
        one(pieces, "hello", " low", end=True)


def test_a_fused_boundary_is_refused(words, pieces):
    with pytest.raises(DataError, match=r"sample 1: prompt and response fuse .*'a in' \+ 'side'.*start of the response"):
        one(words, "a in", "side")
    with pytest.raises(DataError, match="fuse at their boundary"):
        one(pieces, "he", "llo")
    with pytest.raises(DataError, match="fuse at their boundary"):
        one(pieces, "hello ", "low")
    with pytest.raises(DataError, match="fuse at their boundary"):
        one(words, "a in", " out", contrast=["side"])


def test_a_fused_boundary_is_refused_by_a_real_tokenizer(stories):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    assert one(tokenizer, "Once upon", " a time").ids == tuple(tokenizer("Once upon a time")["input_ids"])
    with pytest.raises(DataError, match="fuse at their boundary"):
        one(tokenizer, "Once up", "on a time")


def test_an_unknown_word_is_refused(words):
    for arguments in ({"prompt": "a zebra"}, {"response": " zebra"}, {"contrast": [" zebra"]}, {"response": "c"}):
        with pytest.raises(DataError, match=r"sample 1: the tokenizer does not know a word of .*(zebra|bc)"):
            one(words, **arguments)
    assert words.unk_token_id in one(words, prompt="a <unk>").ids  # written out, it is meant


@pytest.mark.parametrize("response", ["", " ", "\n"])
def test_a_response_of_no_tokens_is_refused(words, response):
    with pytest.raises(DataError, match="tokenizes to nothing"):
        one(words, response=response)


def test_what_does_not_fit_the_context_is_refused(words):
    assert one(words, context=5)
    with pytest.raises(DataError, match="sample 1: 5 tokens do not fit the model's context window of 4"):
        one(words, context=4)
    with pytest.raises(DataError, match="6 tokens"):
        one(words, context=5, end=True)


@pytest.mark.parametrize("contrast", [" c d", " c", " c d a"])
def test_a_contrast_that_never_differs_is_refused(words, contrast):
    with pytest.raises(DataError, match="equals the response ' c d' or begins like it"):
        one(words, contrast=[contrast])


def test_a_contrast_is_read_where_it_first_differs(words):
    assert one(words, contrast=[" a d", " c b a", " b"]).contrasts == ((3, 8), (4, 9), (3, 9))


def test_the_bad_sample_is_named(words):
    good, bad = Sample(prompt="a", response=" b"), Sample(prompt="a", response="")
    with pytest.raises(DataError, match=r"^sample 2:"):
        encode(words, [good, bad])
    with pytest.raises(DataError, match=r"^sample mine:"):
        encode(words, [good, bad.model_copy(update={"id": "mine"})])
    with pytest.raises(DataError, match="there are no samples"):
        encode(words, [])


# Batches


@st.composite
def encoded(draw):
    """Samples as tokens: any lengths, contrasts anywhere in the response."""
    ids = draw(st.lists(st.integers(0, 9), min_size=2, max_size=8))
    start = draw(st.integers(1, len(ids) - 1))
    where = draw(st.lists(st.integers(start, len(ids) - 1), max_size=3))
    return Encoded(tuple(ids), start, draw(st.floats(-2, 2)), tuple((w, (ids[w] + 1) % 10) for w in where))


@given(st.lists(encoded(), min_size=1, max_size=5))
def test_every_token_of_a_batch_is_where_it_belongs(samples):
    batch = collate(samples)
    assert len(batch) == len(samples)
    assert batch.ids.shape == batch.mask.shape == batch.labels.shape == batch.scored.shape
    for row, sample in enumerate(samples):
        n = len(sample.ids)
        assert batch.ids[row, :n].tolist() == list(sample.ids)
        assert batch.mask[row].tolist() == [1] * n + [0] * (batch.ids.shape[1] - n)
        assert batch.labels[row].tolist() == sample.labels + [IGNORED] * (batch.ids.shape[1] - n)
        assert batch.scored[row].nonzero().flatten().tolist() == list(range(sample.start - 1, n - 1))
    assert batch.weights.tolist() == pytest.approx([s.weight for s in samples])
    assert batch.lengths.tolist() == [len(s.ids) - s.start for s in samples]
    row, position = batch.scored.nonzero().unbind(1)
    assert torch.equal(batch.tokens, batch.ids[row, position + 1])
    assert torch.equal(batch.sample_of, row)
    expected = [(n, position, s.ids[position], token) for n, s in enumerate(samples) for position, token in s.contrasts]
    found = [
        (n, int(position[t]) + 1, wanted, other)
        for n, t, wanted, other in batch.contrast.tolist()
        if int(batch.sample_of[t]) == n
    ]
    assert found == expected


def test_batches_keep_the_order(words):
    texts = [" a", " b c", " d", " a b c d", " c"]
    rows = encode(words, [Sample(prompt="a", response=text) for text in texts])
    found = batches(rows, 2)
    assert [len(batch) for batch in found] == [2, 2, 1]
    assert torch.cat([batch.tokens for batch in found]).tolist() == [token for row in rows for token in row.ids[row.start :]]


# Plain text


def numbered(*lengths):
    """Paragraphs of these many words, all words different."""
    return "\n\n".join(" ".join(f"p{p}w{w}" for w in range(length)) for p, length in enumerate(lengths))


def test_text_is_cut_into_consecutive_words_without_overlap_within_paragraphs():
    found = samples_from_text(numbered(10, 3, 4), prompt_words=3, response_words=1)
    assert [(s.prompt, s.response) for s in found] == [
        ("p0w0 p0w1 p0w2", " p0w3"),
        ("p0w4 p0w5 p0w6", " p0w7"),
        ("p2w0 p2w1 p2w2", " p2w3"),
    ]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 4))
def test_no_word_is_in_two_samples_and_none_is_lost_but_the_rest(lengths, prompt, response):
    count = sum(length // (prompt + response) for length in lengths)
    if not count:
        with pytest.raises(DataError, match=f"no paragraph has {prompt + response} words"):
            samples_from_text(numbered(*lengths), prompt_words=prompt, response_words=response)
        return
    found = samples_from_text(numbered(*lengths), prompt_words=prompt, response_words=response)
    assert len(found) == count
    used = [word for s in found for word in (s.prompt + s.response).split()]
    assert len(used) == len(set(used)) == count * (prompt + response)


def test_a_limit_spreads_samples_evenly():
    text = numbered(*[2] * 20)
    found = samples_from_text(text, prompt_words=1, response_words=1, limit=6)
    at = [int(s.prompt[1:-2]) for s in found]
    assert at[0] == 0 and len(at) == 6
    assert {b - a for a, b in zip(at, [*at[1:], 20], strict=True)} == {3, 4}
    assert len(samples_from_text(text, prompt_words=1, response_words=1, limit=99)) == 20


@pytest.mark.parametrize("parts", [(0, 0), (0, 3), (3, 0), (-1, 3)])
def test_parts_without_words_are_refused(parts):
    with pytest.raises(DataError, match="at least 1 of each"):
        samples_from_text("a b c d", prompt_words=parts[0], response_words=parts[1])


def test_file_holds_one_object_per_line(tmp_path):
    path = write_samples(tmp_path / "s.jsonl", [Sample(prompt="a\nb", response=" c", contrast=(" d",), id="x")] * 3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"prompt": "a\nb", "response": " c", "contrast": [" d"], "id": "x"}] * 3
