"""The columns of every frame, with units, and the names that stand in them. Data; imports nothing."""

from __future__ import annotations

FORMAT = 1
BATCH = "batch"  # the name under which the training batch stands among the probe sets
TRAINING = "training samples"  # and the samples of the training file on which causes were measured before training
# Other readings of a set's influence, beside that with the run's own reference
OWN_MEAN, BASE_MEAN, NORMS_KEPT = "mean", "base mean", "norms before training"
BESIDE = (OWN_MEAN, BASE_MEAN, NORMS_KEPT)

SAMPLES = {  # fields of a line of samples.jsonl: one completion that one step trained on
    "step": "optimizer step, from 1; a completion that is trained on in two steps has two lines",
    "sample": "place of its prompt in the training data, from 0",
    "prompt": "the prompt, with its context",
    "completion": "what was sampled; of a preference pair either response",
    "tokens": "tokens of the completion",
    "reward": "as given, controls applied; of a preference pair beta x (log p - log p of the reference); null: none",
    "advantage": "how much the step pushes it: as the trainer uses it, in preference training minus the derivative of the loss "
    "of a pair by the log-probability of the completion",
    "ratio": "p(completion) now / when it was sampled, as far as the loss sees the two differ; null where nobody sampled it",
}
_KEY = {
    "step": "optimizer steps done after this row's update (1 … T); in `probes` and `influence` 0 is the start",
    "probe": f"name of the probe set, {BATCH!r} for the training batch, or {TRAINING!r} (influence at step 0: the causes)",
    "kind": "head, neuron, row, or remainder",
    "layer": "layer, -1 where a component belongs to none",
    "index": "head, neuron or token id within its layer; -1 for a remainder group or a whole layer",
}
COLUMNS: dict[str, dict[str, str]] = {
    "steps": {
        "step": _KEY["step"],
        "loss": "training loss as differentiated, or, where the pass does not tell, as the trainer logged it",
        "learning_rate": "of the first parameter group",
        "grad_norm": "norm of the gradient the optimizer consumed, over its parameters",
        "grad_norm_raw": "the same before clipping (grad_norm / clip_factor)",
        "clip_factor": "consumed / raw gradient of one reference tensor",
        "update_norm": "norm of the parameter change",
        "grad_dot_update": "<g, dtheta>: first-order change of the training loss",
        "normalizer": "the loss is a sum over labels divided by this (null: unknown, causes are of the loss as optimized)",
        "batch_before": "sum of log p(label) over the batch before the step (null where the pass cannot be replayed)",
        "batch_after": "the same after the step, same dropout masks",
        "seconds": "wall time since the previous step",
        "recorder_seconds": "of which the recorder's own",
        "reward": "mean reward of the completions trained on, or as the trainer logged it or the loop told (null: none does)",
        "advantage": "mean size of their advantages, alike: 0 where nothing is pushed up or down",
        "skipped": "whether the update was dropped: overflow under a loss scale, or gradients zeroed before the step",
    },
    "probes": {
        "step": _KEY["step"],
        "probe": _KEY["probe"],
        "metric": "mean over the probe set of the metric named in config.json (of sets only watched: of log-odds)",
        "kl": "mean KL(model now || model at the start) per response token, nats",
        "probability": "mean probability of the whole response",
        "change": "metric minus the metric at the step recorded before",
        "share_sum": "sum of the update shares of all groups since then, along the straight line between the two",
        "residual": "change - share_sum",
        "resolved": "residual within 1 % of the change + 1e-5",
        "passes": "gradient passes spent on this step's shares, shared end points counted once",
    },
    "components": {
        **_KEY,
        "part": "writing (output weights), routing (q), gating (gate, up) or the name of a remainder group",
        "cause_before": "first-order cause before the step; sum over the batch, or mean over the probe set",
        "cause_after": "the same after the step",
        "cause_rewarded": "first-order cause of the step's completions before the step (batch rows only, as the next two): of "
        "the response metric, each completion times its advantage, mean over completions",
        "cause_high": "the same of completions with a positive advantage, not weighted",
        "cause_low": "the same of those with a negative advantage",
        "activation_before": "root mean square over tokens of the component's activation, before the step (a head: length of "
        "its slice; a row: centred logit at scored positions; null for rows of the batch)",
        "activation_after": "the same after the step (probe rows only, as the next but one)",
        "gradient_before": "the same of the gradient with respect to that activation: of each sample's own metric, or of the "
        "summed log p(label) of the batch (of minus the loss where that is no such sum)",
        "gradient_after": "the same after the step",
        "weight_norm": "norm of the part's weights before the step (batch rows only, as all below but `share`)",
        "grad_norm": "norm of the consumed gradient",
        "update_norm": "norm of the change",
        "intended_norm": "norm of the change that the optimizer computed, before rounding to the parameters' type (null where "
        "they are float32 or wider, or the optimizer is not known)",
        "grad_dot_update": "<g, dtheta>",
        "changed": "fraction of elements whose bits changed",
        "share": "update share of the probe set's metric since the step recorded before (probe rows only)",
    },
    "influence": {
        **_KEY,
        "effect": "metric(intact) - metric(component ablated), mean over the probe set",
        "kl": "KL(ablated || intact) per response token, nats",
    },
    "sets": {
        "step": _KEY["step"],
        "probe": _KEY["probe"],
        "set": "name of a set of components, ablated jointly",
        "reference": "what replaces the ablated activations: zero, mean (over counterfactuals, of the model as it is), "
        "resample; base mean: that of the model at the start; norms before training: the run's own reference, while every "
        "component's output weights are scaled to their norm at the start",
        "effect": "metric(intact) - metric(set ablated), mean over the probe set",
        "effect_even": "the same over samples 0, 2, 4, …",
        "effect_odd": "the same over samples 1, 3, 5, …",
        "kl": "KL(ablated || intact) per response token, nats",
    },
    "tokens": {
        "when": "before or after training",
        "probe": _KEY["probe"],
        "sample": "place in the probe set",
        "position": "of the token in the prompt",
        "token": "the token as text",
        "effect": "its integrated gradient: how much of the metric of the response it brings about, nats",
    },
    "set_grafts": {
        "probe": _KEY["probe"],
        "set": "whose change is put into the model at the start: a named set, or the remainder",
        "ablated": "named set that is ablated while reading, before and after; empty: none",
        "graft": "metric with the change - metric without",
    },
    "forecasts": {
        "probe": _KEY["probe"],
        "set": "name of a set of components",
        "influence": "effect of ablating it before training",
        "strengthening": "forecast of the change of that effect by the first step of the training",
    },
    "group_grafts": {
        "probe": "name of the probe set, or of the training samples, of which log-odds are read",
        "group": "rows: all unembedding rows; last layer: its heads and neurons; both: these together",
        "graft": "metric(start + the group's change) - metric(start)",
        "prune": "metric(end) - metric(end - the group's change)",
        "total": "metric(end) - metric(start)",
    },
    "linear_grafts": {
        "probe": _KEY["probe"],
        "number": "of a random set of components, 0, 1, …; each has as many of every kind and layer as any other",
        "predicted": "sum of the update shares of its members over the run, metric units",
        "graft": "metric(start + the change of all its members) - metric(start)",
        "prune": "metric(end) - metric(end - the change of all its members)",
    },
    "grafts": {
        **_KEY,
        "graft": "metric(start + the component's change) - metric(start)",
        "prune": "metric(end) - metric(end - the component's change)",
    },
}
