"""The table of accuracy: statistics against closed forms, rivals against plain loops, and pages that say what tables say."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from attribution.causes import ablate, attribute
from attribution.components import Components
from attribution.metrics import METRICS
from attribution.samples import Sample, collate, encode
from attribution.worlds.build import word_tokenizer
from experiments import accuracy, timing
from experiments.accuracy import ABLATION, GROUPS, METHODS, Measured, Subject, agreement, interval, recall, spearman

ROOT = Path(__file__).parents[1]
WORDS = [*"abcdefghijklmnopqrs"]  # with the four special tokens, as many as the tiny models know


@pytest.fixture
def subject(tiny):
    """A tiny model, and samples with a contrast, one of them longer."""
    parts = zip(["a", "e", "i", "m q r s"], *[iter(WORDS[1:17])] * 4, strict=False)
    samples = [Sample(prompt=f"{a} {b}", response=f" {c}", contrast=(f" {d}",)) for a, b, c, d, _ in parts]
    return Subject("tiny", "mine.txt", tiny("llama"), word_tokenizer(WORDS), samples, "logit_difference")


# Statistics


def test_rank_correlation_is_that_of_ranks_with_ties_down_the_first_axis():
    one, other = (
        np.array([[1.0, 5.0], [2.0, 5.0], [2.0, 6.0], [9.0, 7.0]]),
        np.array([[3.0, 1.0], [4.0, 1.0], [5.0, 1.0], [4.5, 1.0]]),
    )
    expected = [pd.Series(one[:, 0]).corr(pd.Series(other[:, 0]), method="spearman"), np.nan]
    assert spearman(one, other) == pytest.approx(expected, nan_ok=True)


def test_top_is_found_by_size():
    exact = np.array([5.0, -9.0, 1.0, 8.0, 0.1, 0.2])[:, None]
    assert recall(exact, exact) == recall(-exact, exact) == 1.0
    assert recall(np.array([0.0, 3.0, 9.0, 0.0, 0.0, 8.0])[:, None], exact) == pytest.approx(1 / 3)  # three at least
    many = np.arange(100.0)[:, None]
    assert recall(np.where(many == 97, -1, many), many) == 0.8  # 94 takes the place of 97


def test_what_adds_up_agrees_and_what_is_shuffled_does_not():
    draw = np.random.default_rng(0)
    score, members = draw.normal(size=(300, 20)), draw.random((200, 300)) < 0.5
    found = agreement("linear", members @ score, members @ score, redrawn=True)
    assert list(found.values()) == pytest.approx([1.0, 1.0, 1.0, found["linear halves"]], abs=2e-3)
    shuffled = agreement("linear", members @ draw.permutation(score), members @ score, redrawn=True)
    assert shuffled["linear low"] < 0 < shuffled["linear high"] and abs(shuffled["linear"]) < 0.2


@pytest.mark.parametrize("noise", [1.0, 4.0])
def test_the_figure_across_halves_is_that_of_half_the_samples(noise):
    """Where effects and noise are normal, r = 1 / (1 + noise^2 / (n / 2)), and ranks correlate at 6 / pi asin(r / 2)."""
    draw = np.random.default_rng(0)
    effects = draw.normal(size=(1500, 1)) + noise * draw.normal(size=(1500, 40))
    r = 1 / (1 + noise**2 / 20)
    found = agreement("exact", effects, effects)
    assert found["exact halves"] == pytest.approx(6 / np.pi * np.arcsin(r / 2), abs=0.02) and found["exact"] == pytest.approx(1)
    constant = np.tile(effects.mean(1, keepdims=True), 40)  # a score that does not depend on the half sees each half's noise
    assert agreement("exact", constant, effects)["exact halves"] > found["exact halves"] + 0.01


def test_intervals_narrow_with_samples_and_hold_the_draw_of_sets():
    draw = np.random.default_rng(0)
    effects, noise = draw.normal(size=(200, 1)), draw.normal(size=(200, 256))

    def width(samples, redrawn=False):
        found = agreement("x", np.tile(effects, samples), effects + 4 * noise[:, :samples], redrawn)
        assert found["x low"] < found["x high"] < 1
        return found["x high"] - found["x low"]

    assert width(16) > 2.5 * width(256)
    assert width(256, redrawn=True) > 1.3 * width(256)


def test_intervals_cover_what_such_samples_give():
    """95 of 100 should hold the mean figure over draws of as many samples. Noise that is not shared weakens every figure."""
    draw = np.random.default_rng(0)
    score, exact = draw.standard_t(3, size=(2, 60, 1))
    exact, size = score + exact, abs(score) + 0.3

    def drawn():
        common, own = draw.normal(size=(2, 60, 64))
        return score + 6 * size * common, exact + 6 * size * common + 3 * size * own

    expected = np.mean([spearman(*(each.mean(1) for each in drawn())) for _ in range(500)])
    found = [agreement("x", *drawn()) for _ in range(100)]
    held = sum(each["x low"] <= expected <= each["x high"] for each in found)
    assert held >= 88 and np.mean([each["x high"] - each["x low"] for each in found]) < 0.5


def test_a_perfect_figure_of_few_units_is_not_certain():
    assert interval(1.0, np.ones(50)) == pytest.approx((1.0, 1.0), abs=2e-3)
    low, high = interval(1.0, np.repeat([1.0, 0.97], 25))
    assert 0.9 < low < 0.99 and high == 1.0
    low, high = interval(0.99, np.repeat([1.0, 0.99], 25))  # a draw that agrees to the last rank does not blow it up
    assert 0.9 < low < 0.99 < high < 1.0


# What is compared


def test_sets_hold_their_share_of_every_layer_and_are_ablated_jointly(subject):
    table = Components(subject.model).table
    for group, kinds in GROUPS.items():
        members, effects = accuracy.joint_effects(subject, kinds, 0.25, 12)
        own = table[table["kind"].isin(kinds)]
        for (kind, layer), places in own.reset_index(drop=True).groupby(["kind", "layer"]).indices.items():
            expected = {"head": 1, "neuron": 5, "row": 6}[kind]  # of 4, 20 and 23
            assert (members[:, places].sum(1) == expected).all(), (group, layer)
        assert len(np.unique(members, axis=0)) > (3 if group == "head" else 10)
        sets = {str(number): own[row] for number, row in enumerate(members)}
        plain = ablate(subject.model, subject.tokenizer, subject.samples, sets, metric=subject.metric)
        assert effects.mean(1) == pytest.approx(plain["effect"].to_numpy(), abs=1e-6) and np.ptp(effects.mean(1)) > 1e-3


def test_rivals_are_sizes_and_norms(subject):
    index, batch = Components(subject.model), collate(encode(subject.tokenizer, subject.samples))
    sizes, passes = accuracy.activation_sizes(subject)
    seen = []
    handle = subject.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        logits = subject.model(batch.ids).logits
    handle.remove()
    where = index.positions([("neuron", 1, 3), ("row", -1, 7)])
    neuron = [each[:length, 3].norm().item() for each, length in zip(seen[0], batch.mask.sum(1).tolist(), strict=True)]
    assert sizes[where[0]] == pytest.approx(neuron) and passes == 1
    logit = (logits[..., 7] - logits.mean(-1))[batch.scored]
    assert sizes[where[1]] == pytest.approx(logit.abs().numpy(), rel=1e-4)  # one response token each
    norms, passes = accuracy.weight_norms(subject)
    head = subject.model.model.layers[0].self_attn.o_proj.weight[:, 2 * 6 : 3 * 6].norm()
    assert norms[index.positions([("head", 0, 2)])[0]] == pytest.approx(head.item()) and passes == 0
    assert norms.shape == sizes.shape == accuracy.random_numbers(subject)[0].shape == (len(index), len(subject.samples))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(accuracy, "TURNS", 1)
    monkeypatch.setattr(accuracy, "DRAWS", 20)
    monkeypatch.setattr(accuracy, "METHODS", {name: METHODS[name] for name in (ABLATION, "gradient", "random")})


def test_exact_ablation_agrees_with_itself_and_rows_add_up(subject, quick):
    found = accuracy.accuracy(subject, accuracy.measured(subject, 12))
    own = found[found["method"] == ABLATION].set_index("kind")
    for name in ("exact", "exact low", "exact high", "size", "top"):
        assert own[name].to_numpy(float) == pytest.approx(1.0, abs=0.01), name  # an interval of 8 heads ends a little below
    assert list(own.index) == list(GROUPS) and (own["exact halves"] < 0.9).any()
    # A logit difference is linear in logits, and only the logits of the tokens that it reads matter.
    assert own.loc["row", ["linear 0.1", "linear 0.5"]].to_numpy(float) == pytest.approx(1.0, abs=0.02)
    gradient = attribute(subject.model, subject.tokenizer, subject.samples, method="gradient", metric=subject.metric).table
    exact = attribute(subject.model, subject.tokenizer, subject.samples, metric=subject.metric).table
    expected = gradient[gradient["kind"] == "neuron"]["effect"].corr(
        exact[exact["kind"] == "neuron"]["effect"], method="spearman"
    )
    row = found.query("method == 'gradient' and kind == 'neuron'").iloc[0]
    assert row["exact"] == pytest.approx(expected, abs=1e-3) and row["passes"] == 3
    assert (found["time"] > 0).all() and (found["samples"] == 4).all() and (found["sets"] == 12).all()


def test_times_are_ratios_of_one_turn(subject, monkeypatch):
    turns = {"": [1.0, 2.0, 4.0]} | {name: [3.0, 6.0, 40.0] for name in METHODS}
    monkeypatch.setattr(accuracy, "interleaved", lambda run, repeats: turns if list(run) == list(turns) else None)
    assert set(accuracy.relative_times(subject).values()) == {3.0}


# A run


def invented(given: Subject, sets: int) -> Measured:
    """What could have been measured on a model of fifteen components."""
    draw, kinds = np.random.default_rng(len(given.name)), pd.Series(["head"] * 4 + ["neuron"] * 6 + ["row"] * 5)
    scores = {name: (draw.normal(size=(15, 4)), 3.0) for name in METHODS}
    sizes = {group: kinds.isin(own).sum() for group, own in GROUPS.items()}
    joint = {
        (group, share): (draw.random((sets, sizes[group])) < 0.5, draw.normal(size=(sets, 4)))
        for group in GROUPS
        for share in accuracy.SHARES
    }
    return Measured(kinds, scores, joint, dict.fromkeys(METHODS, 1.25))


def test_a_run_replaces_the_rows_of_its_models_alone(subject, monkeypatch, tmp_path):
    out = tmp_path / "results" / "accuracy.md"
    monkeypatch.setattr(accuracy, "subject", lambda name, data, count: subject._replace(name=name))
    monkeypatch.setattr(accuracy, "measured", invented)
    accuracy.main(model=("two", "other"), sets=5, out=out)
    before = pd.read_parquet(out.with_suffix(".parquet"))
    assert list(before["model"].unique()) == ["other", "two"] and out.read_text() == accuracy.page(before)
    accuracy.main(model=("other",), sets=6, out=out)
    after = pd.read_parquet(out.with_suffix(".parquet"))
    assert after.groupby("model")["sets"].unique().map(list).to_dict() == {"other": [6], "two": [5]}
    pd.testing.assert_frame_equal(after[after["model"] == "two"], before[before["model"] == "two"])
    assert len(after) == len(before) == 2 * len(METHODS) * len(GROUPS) and out.read_text() == accuracy.page(after)


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        ("nowhere", "train.jsonl", "nowhere"),
        ("planted/no-such-seed", None, "no-such-seed"),
        ("FOLDER", None, "name a JSONL or text file with --data"),
        ("FOLDER", "no-such.md", "no-such.md"),
        ("FOLDER", "no-such.jsonl", "no-such.jsonl"),
    ],
)
def test_what_is_not_there_is_told_in_a_sentence_before_anything_is_written(model, data, words, folder, tmp_path):
    out = tmp_path / "results" / "accuracy.md"
    with pytest.raises(SystemExit) as caught:
        accuracy.main(model=("planted", str(folder) if model == "FOLDER" else model), data=data, out=out)
    assert words in str(caught.value) and "\n" not in str(caught.value) and not out.parent.exists()


def test_samples_are_cut_from_text_or_read(folder, tmp_path):
    (tmp_path / "text.md").write_text("\n\n".join(" ".join(f"w{i}" for i in range(12)) for _ in range(5)))
    found = accuracy.subject(str(folder), str(tmp_path / "text.md"), 3)
    assert (found.name, found.data, len(found.samples), found.metric) == ("model", "text.md", 3, "log_odds_per_token")
    assert found.samples[0] == Sample(prompt="w0 w1 w2 w3 w4 w5 w6 w7", response=" w8 w9")
    (tmp_path / "mine.jsonl").write_text('{"prompt": "w1", "response": " w2"}\n' * 5)
    assert len(accuracy.subject(str(folder), str(tmp_path / "mine.jsonl"), 3).samples) == 3


# What stands in results/ and in the README


@pytest.fixture(scope="module")
def rows():
    return pd.read_parquet(ROOT / "results" / "accuracy.parquet")


def cells(text: str) -> list[list[str]]:
    """The cells of Markdown tables, without their heads."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [line for place, line in enumerate(lines) if line[0] not in ("method", "model", "---")]


def test_the_page_says_what_the_table_says(rows):
    text = (ROOT / "results" / "accuracy.md").read_text(encoding="utf-8")
    assert text == accuracy.page(rows)
    found = cells(text)
    assert len(found) == len(rows)
    for told, (_, row) in zip(found, rows.iterrows(), strict=True):
        assert told[:2] == [row["method"], row["kind"]] and told[4:6] == [f"{row['size']:.2f}", f"{row['top']:.2f}"]
        assert told[2] == f"{row['exact']:.2f} [{row['exact low']:.2f}, {row['exact high']:.2f}]"
        assert told[8].startswith(f"{row['linear 0.5']:.2f} [") and told[9] == f"{row['linear 0.5 halves']:.2f}"


def test_the_readme_holds_the_table(rows):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert accuracy.short(rows) in text.split("<!-- accuracy -->")[1].split("<!-- /accuracy -->")[0]


def test_the_table_is_whole(rows):
    assert {"planted", "stories260K"} <= set(rows["model"]) and (rows["sets"] >= 200).all()
    for _, own in rows.groupby("model"):
        assert set(zip(own["method"], own["kind"], strict=True)) == {(name, kind) for name in METHODS for kind in GROUPS}
        drawn = own[(own["method"] == "random") & (own["kind"] != "head")]  # of heads there are few, and chance goes far
        assert (drawn[["exact", "linear 0.1", "linear 0.5"]].abs() < 0.25).all(axis=None)
    assert rows.notna().all(axis=None) and (rows["exact low"] <= rows["exact high"]).all()
    assert set(rows["metric"]) <= set(METRICS)
