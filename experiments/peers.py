"""The same causes as this package's, as a user of another library would get them: captum, nnsight, TransformerLens.

Each is used in its own documented way: all three apply the unembedding at every position, TransformerLens runs eager
attention. Parameters are frozen, which saves them the gradients that nobody reads. TransformerLens comes with the optional
extra `bench`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from typing import Any

import nnsight
import torch
from captum.attr import LayerConductance, LayerFeatureAblation, LayerGradientXActivation
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from attribution.capture import Site, sites
from attribution.causes.gradient import by_unit
from attribution.components import Components
from attribution.metrics import Metric
from attribution.models import Anatomy
from attribution.samples import Batch

Unit = tuple[str, int, int]  # kind, layer, index
Ablation = Callable[[Batch, Sequence[Unit]], Tensor]  # fall of the metric, Float [unit, sample]
Peer = Callable[[Sequence[Batch]], Tensor]  # first-order causes of heads and neurons, Float [unit, sample]


def first_order_by(index: Components, tokenizer: PreTrainedTokenizerBase, metric: Metric) -> dict[str, Peer]:
    """Gradient x activation of every head and neuron, by each library that is installed, on copies of the model."""
    makers = {"captum LayerGradientXActivation": _captum, "nnsight, all sites saved": _nnsight}
    if find_spec("transformer_lens"):
        makers["TransformerLens, hooks on all sites"] = partial(_transformer_lens, tokenizer=tokenizer)
    found = {}
    for name, maker in makers.items():
        one = maker(Components(deepcopy(index.parts.model).requires_grad_(False)).parts, metric)
        found[name] = lambda batches, one=one: torch.cat([one(batch) for batch in batches], dim=1)
    return found


def ablation_by(index: Components, tokenizer: PreTrainedTokenizerBase, metric: Metric) -> dict[str, Ablation]:
    """Each component alone at zero, in a forward pass of its own, by each library that is installed, on copies of the model."""
    makers = {"captum LayerFeatureAblation, three forwards each": _captum_ablation, "nnsight": _nnsight_ablation}
    if find_spec("transformer_lens"):
        makers["TransformerLens"] = partial(_transformer_lens_ablation, tokenizer=tokenizer)
    return {
        name: maker(Components(deepcopy(index.parts.model).requires_grad_(False)).parts, metric)
        for name, maker in makers.items()
    }


def missing() -> dict[str, str]:
    """Libraries that are not installed, and how to install them."""
    without = 'not installed (`pip install "attribution[bench]"`)'
    return {} if find_spec("transformer_lens") else {"TransformerLens": without}


def conductance_by_captum(index: Components, batch: Batch, start: Tensor, metric: Metric, steps: int) -> Tensor:
    """Conductance of every head and neuron, one run of LayerConductance for each site.

    Args:
        index: of a model.
        batch: what to run.
        start: baseline of the input embeddings, broadcastable to [sample, position, width].
        metric: what to read.
        steps: of the path.

    Returns:
        Float [unit, sample].
    """
    parts = index.parts
    with torch.no_grad():
        end = parts.embedding(batch.ids)

    def score(embeddings: Tensor) -> Tensor:
        many = batch.repeated(len(embeddings) // len(batch))
        return metric(parts.model(inputs_embeds=embeddings, use_cache=False).logits[many.scored], many)

    found = {
        site: LayerConductance(score, site.module(parts)).attribute(
            end, start.expand_as(end), n_steps=steps, method="gausslegendre", attribute_to_layer_input=True
        )
        for site in sites(parts)
    }
    return by_unit(parts, {site: (value.detach(), torch.ones_like(value)) for site, value in found.items()})


def _captum(parts: Anatomy, metric: Metric) -> Callable[[Batch], Tensor]:
    where = sites(parts)

    def run(batch: Batch) -> Tensor:
        def score(ids: Tensor) -> Tensor:
            kept.append(metric(parts.model(input_ids=ids, use_cache=False).logits[batch.scored], batch))
            return kept[-1]

        kept: list[Tensor] = []
        tool = LayerGradientXActivation(score, [site.module(parts) for site in where])
        found = tool.attribute(batch.ids, attribute_to_layer_input=True)
        return by_unit(parts, {s: (value.detach(), torch.ones_like(value)) for s, value in zip(where, found, strict=True)})

    for parameter in parts.embedding.parameters():
        parameter.requires_grad_()  # something must ask for a gradient
    return run


def _nnsight(parts: Anatomy, metric: Metric) -> Callable[[Batch], Tensor]:
    wrapped: Any = nnsight.NNsight(parts.model)
    paths = {module: path for path, module in parts.model.named_modules()}
    where = sites(parts)
    places = [wrapped.get(paths[site.module(parts)]) for site in where]

    def run(batch: Batch) -> Tensor:
        scored = batch.scored
        with wrapped.trace(input_ids=batch.ids, use_cache=False):
            activations = nnsight.save([])
            for place in places:
                activations.append(place.input)
                place.input.requires_grad_()
            total: Any = metric(wrapped.output.logits[scored], batch).sum()
            with total.backward():
                gradients = nnsight.save([])
                for activation in reversed(activations):
                    gradients.append(activation.grad)
        both = zip(where, activations, reversed(gradients), strict=True)
        return by_unit(parts, {site: (value.detach(), gradient) for site, value, gradient in both})

    return run


def _transformer_lens(parts: Anatomy, metric: Metric, tokenizer: PreTrainedTokenizerBase) -> Callable[[Batch], Tensor]:
    bridge, where = _bridge(parts.model, tokenizer), sites(parts)
    names = {_hook_name(site): site for site in where}

    def run(batch: Batch) -> Tensor:
        seen: dict[Site, Tensor] = {}

        def keep(value: Tensor, hook: Any, site: Site) -> Tensor:
            seen[site] = value if value.requires_grad else value.detach().requires_grad_()
            return seen[site]

        hooks = [(name, partial(keep, site=site)) for name, site in names.items()]
        logits = bridge.run_with_hooks(batch.ids, return_type="logits", fwd_hooks=hooks)
        gradients = torch.autograd.grad(metric(logits[batch.scored], batch).sum(), [seen[site] for site in where])
        both = zip(where, gradients, strict=True)
        return by_unit(parts, {s: (seen[s].detach().flatten(2), g.flatten(2)) for s, g in both})

    return run


def _bridge(model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]

    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:  # it opens the tokenizer again from where it lies
        tokenizer.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(
            folder, hf_model=model, tokenizer=AutoTokenizer.from_pretrained(folder), device=str(model.device)
        )
    return bridge.requires_grad_(False).eval()


def _hook_name(site: Site) -> str:
    return f"blocks.{site.layer}.{'attn.hook_z' if site.kind == 'head' else 'mlp.hook_post'}"


def _captum_ablation(parts: Anatomy, metric: Metric) -> Ablation:
    @torch.no_grad()
    def run(batch: Batch, units: Sequence[Unit]) -> Tensor:
        def score(ids: Tensor) -> Tensor:
            return metric(parts.model(input_ids=ids, use_cache=False).logits[batch.scored], batch)

        found = []
        for kind, layer, index in units:  # one mask for all units of a layer would ablate all that is left as a unit too
            site, width = Site(kind, layer), parts.head_dim if kind == "head" else 1
            mask = torch.ones(1, 1, site.module(parts).in_features, dtype=torch.long, device=batch.ids.device)
            mask[..., index * width : (index + 1) * width] = 0
            tool = LayerFeatureAblation(score, site.module(parts))
            effect = tool.attribute(batch.ids, layer_baselines=0, layer_mask=mask, attribute_to_layer_input=True)
            found.append(effect[:, 0, index * width])
        return torch.stack(found)

    return run


def _nnsight_ablation(parts: Anatomy, metric: Metric) -> Ablation:
    wrapped: Any = nnsight.NNsight(parts.model)
    paths = {module: path for path, module in parts.model.named_modules()}

    @torch.no_grad()
    def run(batch: Batch, units: Sequence[Unit]) -> Tensor:
        scored = batch.scored
        with wrapped.trace(input_ids=batch.ids, use_cache=False):
            intact = nnsight.save(metric(wrapped.output.logits[scored], batch))
        found = []
        for kind, layer, index in units:
            place, width = wrapped.get(paths[Site(kind, layer).module(parts)]), parts.head_dim if kind == "head" else 1
            with wrapped.trace(input_ids=batch.ids, use_cache=False):
                place.input[..., index * width : (index + 1) * width] = 0
                after = nnsight.save(metric(wrapped.output.logits[scored], batch))
            found.append(intact - after)
        return torch.stack(found)

    return run


def _transformer_lens_ablation(parts: Anatomy, metric: Metric, tokenizer: PreTrainedTokenizerBase) -> Ablation:
    bridge = _bridge(parts.model, tokenizer)

    @torch.no_grad()
    def run(batch: Batch, units: Sequence[Unit]) -> Tensor:
        def out(value: Tensor, hook: Any, kind: str, index: int) -> Tensor:
            heads = value.unflatten(-1, (-1, 1)) if kind == "neuron" else value
            heads[..., index, :] = 0
            return value

        def score(hooks: list[Any]) -> Tensor:
            return metric(bridge.run_with_hooks(batch.ids, return_type="logits", fwd_hooks=hooks)[batch.scored], batch)

        intact = score([])
        asked = [(_hook_name(Site(kind, layer)), partial(out, kind=kind, index=index)) for kind, layer, index in units]
        return torch.stack([intact - score([each]) for each in asked])

    return run
