"""Steering: a direction in the residual stream that tells two sets of prompts apart, turned up, or taken out.

The direction before a layer is the mean of the residual stream over one set minus the mean over the other (difference of
means: Marks & Tegmark 2023; Rimsky et al. 2024, contrastive activation addition; Chen et al. 2025, persona vectors). Adding it
asks what the model does with more of what it stands for; projecting it out (Arditi et al. 2024), what the model does without.

Knows streams and prompts; knows nothing about components.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from attribution.capture import Edit, evaluating, scored_logits, streamed
from attribution.causes.given import BATCH_SIZE, encoded_for
from attribution.errors import ConfigError, DataError, ModelError
from attribution.metrics import check_scorable, metric_named
from attribution.models import Anatomy, anatomy
from attribution.samples import Batch, ProbeSet, Sample, batches

POSITIONS = ("last", "mean")


@dataclass(frozen=True)
class Steering:
    """Directions, one before every layer and one before the final norm.

    Attributes:
        vectors: Float [depth + 1, width], in units of the stream, or of length 1 where normalized.
        position: what was read: "last" prompt token, or the "mean" over prompt tokens.
        normalized: whether every vector has length 1.
        toward, away: names of the two sets.
    """

    vectors: Tensor
    position: str
    normalized: bool
    toward: str
    away: str

    @contextmanager
    def add(self, model: nn.Module, layer: int, coefficient: float = 1.0) -> Iterator[None]:
        """Add coefficient x direction to the stream before a layer, at every position of every pass inside the block.

        Args:
            model: of the width and depth of the directions.
            layer: 0 to depth; depth is before the final norm.
            coefficient: 1 moves the stream by the difference of the two means.

        Raises:
            ConfigError: no such layer.
            ModelError: a model of another shape.
        """
        parts = self._fitting(model, layer)
        direction = coefficient * self.vectors[layer]
        with streamed(parts, {layer: lambda stream: stream + direction.to(stream)}):
            yield

    @contextmanager
    def project_out(self, model: nn.Module, layer: int, *, everywhere: bool = False) -> Iterator[None]:
        """Take the direction of a layer out of the stream, at every position of every pass inside the block.

        Args:
            model, layer: as `add`.
            everywhere: before every layer and the final norm (directional ablation, Arditi et al. 2024), not before this
                layer alone, after which later layers may write it again.

        Raises:
            ConfigError: no such layer, or a direction of length zero.
            ModelError: a model of another shape.
        """
        parts = self._fitting(model, layer)
        length = self.vectors[layer].norm()
        if not length > 0:
            raise ConfigError(f"the direction before layer {layer} has length zero; the two sets do not differ there")
        unit = self.vectors[layer] / length

        def without(stream: Tensor) -> Tensor:
            direction = unit.to(stream)
            return stream - (stream @ direction)[..., None] * direction

        layers = range(parts.depth + 1) if everywhere else [layer]
        edits: dict[int, Edit] = dict.fromkeys(layers, without)
        with streamed(parts, edits):
            yield

    def read(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        samples: Sequence[Sample],
        layer: int,
        *,
        coefficients: Sequence[float] = (-1.0, 0.0, 1.0),
        metric: str = "log_odds",
    ) -> pd.DataFrame:
        """The metric under steering.

        Args:
            model, layer: as `add`.
            tokenizer: of the model.
            samples: prompts with responses.
            coefficients: of `add`.
            metric: one of `metrics.METRICS`.

        Returns:
            One row per intervention: layer, intervention ("add" or "project out"), coefficient (NaN for the latter), metric
            (mean over samples), change (from the model as it is, each sample times its weight).

        Raises:
            ConfigError, DataError, ModelError: as `add` and `project_out`, or samples that cannot be encoded or scored.
        """
        parts = self._fitting(model, layer)
        score = metric_named(metric)
        device = next(parts.model.parameters()).device
        found = batches(encoded_for(parts, tokenizer, samples), BATCH_SIZE, device)
        check_scorable(score, found, parts.vocabulary)
        weights = torch.tensor([sample.weight for sample in samples], dtype=torch.float64)

        @torch.no_grad()
        def values(inside: AbstractContextManager[None]) -> Tensor:
            with inside, evaluating(parts.model):
                return torch.cat([score(scored_logits(parts, batch), batch) for batch in found]).double().cpu()

        intact = values(nullcontext())
        cases = [("add", float(c), self.add(model, layer, c)) for c in coefficients]
        cases.append(("project out", float("nan"), self.project_out(model, layer)))
        rows = []
        for intervention, coefficient, inside in cases:
            value = values(inside)
            change = ((value - intact) * weights).mean().item()
            rows.append((layer, intervention, coefficient, value.mean().item(), change))
        return pd.DataFrame(rows, columns=["layer", "intervention", "coefficient", "metric", "change"])

    def save(self, path: str | Path) -> Path:
        """Write the directions as safetensors."""
        told = {"position": self.position, "normalized": self.normalized, "toward": self.toward, "away": self.away}
        try:
            save_file({"vectors": self.vectors.contiguous()}, path, {"steering": json.dumps(told)})
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot write {path}: {error}; choose a place you can write to") from None
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Steering:
        """Read what `save` wrote. Raises DataError where there is none."""
        try:
            with safe_open(path, "pt") as file:
                return cls(vectors=file.get_tensor("vectors"), **json.loads((file.metadata() or {})["steering"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path} holds no steering directions ({error}); name a file that Steering.save wrote") from None

    def _fitting(self, model: nn.Module, layer: int) -> Anatomy:
        parts = anatomy(model)
        shape = (parts.depth + 1, parts.model.config.hidden_size)
        if tuple(self.vectors.shape) != shape:
            raise ModelError(
                f"directions for {len(self.vectors) - 1} layers of width {self.vectors.shape[1]} do not fit a model of "
                f"{parts.depth} layers of width {shape[1]}; find them on a model of this shape"
            )
        if not 0 <= layer <= parts.depth:
            raise ConfigError(f"there is no stream before layer {layer}; expected 0 to {parts.depth} (before the final norm)")
        return parts


def steering(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    toward: ProbeSet,
    away: ProbeSet,
    *,
    position: str = "last",
    normalized: bool = False,
) -> Steering:
    """Find the direction from one set of prompts to another, before every layer. Responses are not read.

    Args:
        model: a causal language model, as `attribution.load` returns it.
        tokenizer: of the model.
        toward, away: the two sets; the direction is the mean over `toward` minus the mean over `away`.
        position: "last" (the last token of each prompt) or "mean" (over the tokens of each prompt).
        normalized: scale every vector to length 1.

    Raises:
        ConfigError: unknown position, or a direction of length zero to normalize.
        DataError: samples that cannot be encoded.
        ModelError: an architecture without a row, or weights that are not in memory.
    """
    one, other = (mean_streams(model, tokenizer, probe.samples, position) for probe in (toward, away))
    vectors = one - other
    if normalized:
        lengths = vectors.norm(dim=1, keepdim=True)
        if not (lengths > 0).all():
            raise ConfigError(
                f"the two sets do not differ before layer {int(lengths.argmin())} at position {position!r}, and a direction "
                "of length zero cannot be normalized; give sets that differ there, or normalized=False"
            )
        vectors = vectors / lengths
    return Steering(vectors, position, normalized, toward.name, away.name)


@torch.no_grad()
def mean_streams(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], position: str = "last"
) -> Tensor:
    """Mean over samples of the stream before every layer and the final norm: Float [depth + 1, width], on the CPU.

    Args, errors: as `steering`.
    """
    if position not in POSITIONS:
        raise ConfigError(f"unknown position {position!r}; expected {', '.join(POSITIONS)}")
    parts = anatomy(model)
    total = torch.zeros(parts.depth + 1, parts.model.config.hidden_size, dtype=torch.float64)
    device = next(parts.model.parameters()).device
    for batch in batches(encoded_for(parts, tokenizer, samples), BATCH_SIZE, device):
        read = _prompt_weights(batch, position)

        def add(layer: int, read: Tensor = read) -> Edit:
            def look(stream: Tensor) -> Tensor:
                total[layer] += torch.einsum("bt,btw->w", read.to(stream.device).double(), stream.double()).cpu()
                return stream

            return look

        with evaluating(parts.model), streamed(parts, {layer: add(layer) for layer in range(parts.depth + 1)}):
            parts.model.base_model(input_ids=batch.ids, use_cache=False)
    return (total / len(samples)).float()


def _prompt_weights(batch: Batch, position: str) -> Tensor:
    """Float [sample, position]: the weight of each position in its sample's mean."""
    lengths = batch.scored.int().argmax(1) + 1  # the first scored position is the last of the prompt
    places = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    if position == "last":
        return (places == lengths[:, None] - 1).float()
    return (places < lengths[:, None]).float() / lengths[:, None]
