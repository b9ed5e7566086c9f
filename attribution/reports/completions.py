"""What a run sampled, or was given as preferred, as small tables: rewards and advantages over steps, causes, examples, words.

Knows the frames of `store` and how `quantities` writes numbers; knows nothing about figures, HTML or Markdown. A cause is
first-order, of the metric of one completion, read before the step that trains on it, in nats. `high` and `low` go by the
sign of the advantage that the step used, which a control may have parted from the reward.
"""

from __future__ import annotations

import pandas as pd

from attribution.reports.quantities import METRICS, listed, metric_name, shown, signed
from attribution.store import BATCH, Run

MOST_STEPS = 300  # points of a curve: of a longer run, each stands for several steps
LAST, EXAMPLES = 3, 4  # examples come from so many last steps; so many of either side
PROMPT, COMPLETION = 100, 160  # characters of an example
SUMMED, UNIT = "summed cause × advantage", "nats × advantage"
IMPLICIT = "β × (log p − log p of the reference)"
_OTHER_LOSS = {"loss_type", "loss_weights", "label_smoothing"}  # settings of DPOTrainer that may turn an advantage's sign
NOT_READ = (
    "Which components produced the completions was not read: the record holds no first-order causes of completions "
    "(setting “completions”: 0 reads none, k those of every k-th step)."
)


def preferred(run: Run) -> bool:
    """Whether the completions are responses of preference pairs, which nobody sampled."""
    return run.config.get("recipe") == "dpo"


def sides(run: Run) -> dict[str, str]:
    """What completions with a positive and with a negative advantage are called.

    Of preference pairs, chosen and rejected responses: DPO's own loss gives them these signs, other losses may not.
    """
    if preferred(run) and not _OTHER_LOSS & set(run.config.get("training", {}).get("trainer", {})):
        return {"high": "chosen responses", "low": "rejected responses"}
    return {"high": "completions with a positive advantage", "low": "completions with a negative advantage"}


def named(run: Run) -> dict[str, str]:
    """What the columns of `causes` are called where there is little room."""
    chosen = sides(run)["high"].startswith("chosen")
    high, low = ("chosen responses", "rejected responses") if chosen else ("positive advantage", "negative advantage")
    both = " minus ".join(name.split()[0] for name in (high, low))
    return {"rewarded": SUMMED, "contrast": f"cause, {both}", "high": f"cause, {high}", "low": f"cause, {low}"}


def metric(run: Run) -> str:
    """The metric of a completion in words; as it has no contrast, log-odds stand for the logit difference."""
    return METRICS["log_odds"] if run.config.get("metric") == "logit_difference" else metric_name(run)


def reward_name(run: Run) -> str:
    """What stands in the column reward, in words."""
    return "implicit reward" if preferred(run) else "reward"


def steps_in_words(count: int) -> str:
    """1 step, 2 steps."""
    return f"{count} step{'s' if count != 1 else ''}"


def rewards(run: Run) -> pd.DataFrame:
    """Rewards over steps: of all completions, or of either response of the pairs of preference training.

    Returns:
        One row per step, or window of steps, and side (all, high or low): step, side, mean (of completions), count, lower and
        upper (quartiles of the means of a prompt in a step: of single rewards that are 0 or 1 they would say little); no row
        where none was scored.
    """
    table = _in_windows(run.samples)
    table = table.assign(reward=table["reward"].astype("float64"), side="all").dropna(subset="reward")
    if preferred(run):
        table["side"] = table["advantage"].map(lambda advantage: "high" if advantage > 0 else "low" if advantage < 0 else "")
        table = table[table["side"] != ""]
    found = table.groupby(["side", "window"])["reward"].agg(["mean", "count"])
    prompts = table.groupby(["side", "window", "step", "sample"])["reward"].mean().groupby(["side", "window"])
    quartiles = {"lower": prompts.quantile(0.25), "upper": prompts.quantile(0.75)}
    return found.assign(**quartiles).reset_index().rename(columns={"window": "step"})


def advantages(run: Run) -> pd.DataFrame:
    """Sizes of advantages over steps.

    Returns:
        One row per step, or window of steps: step, first and last, steps, size (mean |advantage|), and silent: steps on
        which every advantage was zero, so that nothing was pushed up or down.
    """
    table = _in_windows(run.samples)
    sizes = table.assign(size=table["advantage"].astype("float64").abs()).groupby(["window", "step"])["size"]
    steps = pd.DataFrame({"sum": sizes.sum(), "count": sizes.count(), "silent": sizes.max() == 0}).reset_index()
    found = steps.groupby("window").agg(
        first=("step", "min"), last=("step", "max"), steps=("step", "count"), silent=("silent", "sum"),
        sum=("sum", "sum"), count=("count", "sum"),
    )  # fmt: skip
    found["size"] = found["sum"] / found["count"]
    return found.drop(columns=["sum", "count"]).reset_index().rename(columns={"window": "step"})


def causes(run: Run, kind: str) -> pd.DataFrame:
    """First-order causes of the completions, per component of one kind.

    Returns:
        One row per component: layer, index, rewarded (each completion's cause times its advantage, mean over completions,
        summed over the steps read; nats × advantage), high and low (mean over steps of the mean over completions with a
        positive, a negative advantage; nats), contrast (mean of their difference over steps that have both), and steps.
        Of a model too large to write every component at every step, those written most often.
    """
    key, parts = ["layer", "index"], run.parts
    chosen = (parts["probe"] == BATCH) & (parts["kind"] == kind) & (parts["index"] >= 0) & parts["cause_rewarded"].notna()
    names = {"cause_rewarded": "rewarded", "cause_high": "high", "cause_low": "low"}
    rows = parts.loc[chosen, [*key, *names]].rename(columns=names).astype(dict.fromkeys(names.values(), "float64"))
    rows["contrast"] = rows["high"] - rows["low"]
    grouped = rows.groupby(key)
    table = grouped[["contrast", "high", "low"]].mean().assign(rewarded=grouped["rewarded"].sum(), steps=grouped.size())
    table = table[table["steps"] == table["steps"].max()].reset_index()
    return table.astype({"layer": int, "index": int})[[*key, *named(run), "steps"]]


def steps_read(run: Run) -> list[int]:
    """Steps before which causes of completions were read."""
    rows = run.parts
    return sorted(int(step) for step in rows.loc[(rows["probe"] == BATCH) & rows["cause_rewarded"].notna(), "step"].unique())


def examples(run: Run) -> pd.DataFrame:
    """A few completions of the last steps: those with the largest advantages, downwards, then the smallest.

    The same completion of the same prompt is taken once. Where every advantage is zero, the last few completions.

    Returns:
        Rows of `run.samples`.
    """
    table = run.samples
    last = table[table["step"].isin(sorted(table["step"].unique())[-LAST:])]
    by_size = last.iloc[::-1].sort_values("advantage", key=lambda column: -column.abs(), kind="stable")  # of equals, the newest
    once = by_size.drop_duplicates(["sample", "completion"])
    above, below = once[once["advantage"] > 0].head(EXAMPLES), once[once["advantage"] < 0].head(EXAMPLES)
    return pd.concat([above, below.iloc[::-1]]) if len(above) + len(below) else once.head(EXAMPLES)


def example_names(run: Run) -> list[str]:
    """Headings of `example_cells`."""
    if preferred(run):  # nobody sampled it, so there is no ratio
        return ["step", "prompt", "response", reward_name(run), "advantage"]
    return ["step", "prompt", "completion", reward_name(run), "advantage", "ratio"]


def example_cells(run: Run) -> list[list[str]]:
    """Rows of `examples` as text, with the end of the prompt and the beginning of the completion. Not escaped."""
    cells = [
        [
            str(row["step"]),
            ("…" if len(row["prompt"]) > PROMPT else "") + shown(row["prompt"][-PROMPT:], 4 * PROMPT),
            shown(row["completion"], COMPLETION),
            signed(row["reward"]).lstrip("+"),
            signed(row["advantage"]),
            signed(row["ratio"]).lstrip("+"),
        ]
        for row in examples(run).to_dict("records")
    ]
    return [row[: len(example_names(run))] for row in cells]


def not_read(run: Run) -> list[str]:
    """What of completions the record lacks, one sentence each; nothing where there are no completions."""
    if run.samples.empty:
        return []
    if not (read := steps_read(run)):
        return [NOT_READ]
    told = run.samples["step"].nunique()
    return [f"First-order causes of completions: read at {len(read)} of {told} steps."] if len(read) < told else []


def sentences(run: Run) -> list[str]:
    """Rewards at the start and end, steps without advantage, and the heads that tell the two sides apart: one paragraph."""
    return [" ".join([_course(run), *_silence(run), *_told_apart(run)])] if len(run.samples) else []


def _course(run: Run) -> str:
    table, given = run.samples, preferred(run)
    steps = sorted(table["step"].unique())
    if table["reward"].isna().all():
        return f"The completions of {steps_in_words(len(steps))} were recorded without rewards."
    width = max(1, len(steps) // 10)
    pushed = {"high": table["advantage"] > 0, "low": table["advantage"] < 0}
    groups = {name: table[pushed[side]] for side, name in sides(run).items()} if given else {"completions": table}
    courses = []
    for name, own in groups.items():
        means = (own.loc[own["step"].isin(few), "reward"].astype("float64").mean() for few in (steps[:width], steps[-width:]))
        first, last = (signed(mean).lstrip("+") for mean in means)
        courses.append(f"that of {name} from {first} to {last}" if courses else f"of {name} went from {first} to {last}")
    few = f"{width} steps" if width > 1 else "step"
    meaning = f", {IMPLICIT}," if given else ""
    return f"Between the first and the last {few} of {len(steps)}, the mean {reward_name(run)}{meaning} {listed(courses)}."


def _silence(run: Run) -> list[str]:
    table = advantages(run)
    silent, steps = int(table["silent"].sum()), int(table["steps"].sum())
    return [f"On {silent} of {steps} steps every advantage was zero, so no completion was pushed up or down."] if silent else []


def _told_apart(run: Run) -> list[str]:
    if not (read := steps_read(run)):
        return [NOT_READ]
    table = causes(run, "head")
    if not table["contrast"].any():
        return []
    ends = table[table["contrast"] > 0].nlargest(3, "contrast"), table[table["contrast"] < 0].nsmallest(3, "contrast")
    high, low = sides(run).values()
    each = f"each of {len(read)} steps" if len(read) > 1 else f"step {read[0]}"
    told = [f"{way} above all in {_named(rows)}" for way, rows in zip(("larger", "smaller"), ends, strict=True) if len(rows)]
    return [
        f"First-order causes of the {metric(run)} of completions were read before {each}. In heads (layer.head), compared with "
        f"those for {low}, those for {high} are {' and '.join(told)} (nats, mean difference)."
    ]


def _named(table: pd.DataFrame) -> str:
    return listed([
        f"{layer}.{index} ({signed(contrast)})"
        for layer, index, contrast in zip(table["layer"], table["index"], table["contrast"], strict=True)
    ])  # fmt: skip


def _in_windows(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the window of every row: its step, or in a long run the middle of the steps drawn as one point."""
    steps = pd.Series(sorted(table["step"].unique()), dtype="int64")
    width = -(-len(steps) // MOST_STEPS) or 1
    middle = steps.groupby(steps.index // width).transform(lambda some: some.iloc[len(some) // 2])
    return table.assign(window=table["step"].map(dict(zip(steps, middle, strict=True))))
