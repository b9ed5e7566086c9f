"""The index of components of one model, and the exact partition of its parameters among them and the remainder.

Ownership: head h owns its columns of the attention-out matrix (*writing*) and its query rows (*routing*); neuron n its
column of the MLP-out matrix (*writing*) and its gate and up rows (*gating*); row v its row of the unembedding. Keys,
values, biases, norms and embeddings belong to named remainder groups, in every architecture alike, so that results
compare. A tied matrix is counted once per use: as embedding and as unembedding.

Knows shapes and ownership; computes nothing about samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from attribution.errors import ConfigError, ModelError
from attribution.models import Anatomy, ExpertsOut, anatomy
from attribution.sharding import Processes, gradients, rows_here, settle, shards
from attribution.uses import Made, Use, sums_of_all

KINDS = ("head", "neuron", "row")
OUTPUT = "writing"  # the part whose <weight, gradient> is the component's first-order cause


class Component(NamedTuple):
    """One attention head, MLP neuron or unembedding row (layer -1, index the token id)."""

    kind: str
    layer: int
    index: int


class Components:
    """The components of one model and the partition of its parameters.

    Attributes:
        parts: the model's anatomy.
        table: one row per component: kind, layer, index.
        groups: one row per group of the partition: kind, layer, index, part; remainder groups have kind "remainder",
            index -1 and their name as part.
        uses: every parameter, once per use, with its owners.
        stored: every parameter once, by the name of its first use.
        source: for every use, by name, the name of its parameter in `stored`; two uses of a tied matrix share one.
        together: the processes that hold the model in shards, over which every sum here is taken: all of them ask for it.

    Raises:
        ModelError: a model without a row in `architectures`, or one that lies in processes as is not read.
    """

    def __init__(self, model: nn.Module | Anatomy):
        whole = model.model if isinstance(model, Anatomy) else model
        settle(whole)
        self.together: Processes = shards(list(whole.parameters()))
        if self.together.several and any(type(module).__name__.endswith("Experts") for module in whole.modules()):
            raise ModelError("a mixture of experts in shards is not read; open it where it fits in the memory of one process")
        self.parts = model if isinstance(model, Anatomy) else anatomy(model)
        self._cut: list[tuple[Tensor, Tensor]] | None = None  # tokens and embeddings of a pass, see `_parted`
        self._owned: dict[tuple[str, ...], Tensor] = {}  # group of each sum of these uses
        p = self.parts
        layers, heads, neurons = p.depth, p.heads, p.neurons
        self._counts = {"head": heads, "neuron": neurons, "row": p.vocabulary}  # of each layer; of the model
        self._offsets = {
            ("head", "writing"): 0,
            ("head", "routing"): layers * heads,
            ("neuron", "writing"): 2 * layers * heads,
            ("neuron", "gating"): 2 * layers * heads + layers * neurons,
            ("row", "writing"): 2 * layers * heads + 2 * layers * neurons,
        }
        self._remainder: dict[tuple[int, str], int] = {}
        self._first_remainder = self._offsets["row", "writing"] + p.vocabulary
        self.uses = tuple(self._placed(use) for use in self._all_uses())
        names = {use.parameter: use.name for use in reversed(self.uses)}
        self.source = {use.name: names[use.parameter] for use in self.uses}
        self.stored = {use.name: use.parameter for use in self.uses if self.source[use.name] == use.name}

    def __len__(self) -> int:
        """Number of components."""
        return self.parts.depth * (self.parts.heads + self.parts.neurons) + self.parts.vocabulary

    @property
    def group_count(self) -> int:
        return self._first_remainder + len(self._remainder)

    @cached_property
    def table(self) -> pd.DataFrame:
        return pd.concat([self._block(kind) for kind in KINDS], ignore_index=True)

    @cached_property
    def groups(self) -> pd.DataFrame:
        blocks = [self._block(kind).assign(part=part) for kind, part in self._offsets]
        rest = pd.DataFrame(
            [("remainder", layer, -1, name) for layer, name in self._remainder], columns=["kind", "layer", "index", "part"]
        )
        return pd.concat([*blocks, rest], ignore_index=True)

    @cached_property
    def output_groups(self) -> np.ndarray:
        """Group id of the output weights of every component, in the order of `table`."""
        return np.flatnonzero((self.groups["part"] == OUTPUT) & (self.groups["kind"] != "remainder"))

    @cached_property
    def of_features(self) -> Tensor:
        """Int64 [feature]: position in `table` of whose each feature is: `head_dim` of a head, one of a neuron or row."""
        widths = np.where(self.table["kind"] == "head", self.parts.head_dim, 1)
        return torch.as_tensor(np.repeat(np.arange(len(self)), widths))

    def positions(self, chosen: Iterable[Component] | pd.DataFrame) -> np.ndarray:
        """Positions in `table` of a set of components, sorted and without repetition.

        Raises:
            ConfigError: a kind, layer or index that this model does not have.
        """
        listed: Any = chosen
        if isinstance(listed, pd.DataFrame):
            listed = listed[["kind", "layer", "index"]].itertuples(index=False, name=None)
        return np.unique(np.array([self._position(Component(*each)) for each in listed], dtype=np.int64))

    def places(self, positions: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
        """Kind, layer and indices of the components at these positions of `table`, one layer of one kind after the other."""
        start = 0
        for kind, count in self._counts.items():
            size = count * (1 if kind == "row" else self.parts.depth)
            layers, indices = np.divmod(positions[(positions >= start) & (positions < start + size)] - start, count)
            for layer in np.unique(layers):
                yield kind, -1 if kind == "row" else int(layer), indices[layers == layer]
            start += size

    def group_mask(self, positions: np.ndarray) -> Tensor:
        """Bool [groups]: every part of the components at these positions of `table`."""
        mask = torch.zeros(self.group_count, dtype=torch.bool)
        for kind, layer, indices in self.places(positions):
            for (owner, _part), offset in self._offsets.items():
                if owner == kind:
                    mask[offset + max(layer, 0) * self._counts[kind] + torch.as_tensor(indices)] = True
        return mask

    @property
    def remainder_mask(self) -> Tensor:
        """Bool [groups]: every remainder group."""
        return torch.arange(self.group_count) >= self._first_remainder

    def reduce(
        self,
        value: Callable[[Use], Tensor | tuple[Tensor, ...] | None],
        of: Callable[..., Tensor] | None = None,
        *,
        output_only: bool = False,
    ) -> Tensor:
        """Sum an elementwise quantity within every group.

        Args:
            value: for a use, an array shaped like its `values`, or several of which `of` makes one, or None for zero.
            of: makes what is summed, element by element: `torch.square`, say. No array as large as a parameter is made by it.
            output_only: visit only the output weights of components.

        Returns:
            Float64 [groups], on the CPU.
        """
        made = of or (lambda value: value)
        found = ((use, value(use)) for use in self.by_shape if use.output or not output_only)
        visits = ((use, given if isinstance(given, tuple) else (given,)) for use, given in found if given is not None)
        return self.grouped(sums_of_all(visits, lambda *blocks: [made(*blocks)], self.elements))[0]

    def grouped(self, sums: Mapping[str, Tensor], quantities: int = 1) -> Tensor:
        """Sums by the name of a use, as `Use.sums` makes them, within every group: Float64 [quantity, groups], on the CPU."""
        total = torch.zeros(quantities, self.group_count, dtype=torch.float64)
        if sums:
            found = [use for use in self.uses if use.name in sums]  # in one order, so that few sets of uses are met
            names = tuple(use.name for use in found)
            if names not in self._owned:
                self._owned[names] = torch.cat([use.here(use.owners) for use in found])
            device = sums[names[0]].device  # which is waited for once, not for each use
            together = torch.cat([sums[name].to(device) for name in names], dim=1).cpu().double()
            total.index_add_(1, self._owned[names], together)
        return self.together.sum(total)

    @cached_property
    def by_shape(self) -> list[Use]:
        """The uses, those of one shape and the same axes one after the other: in every process alike."""
        return sorted(self.uses, key=lambda use: (use.axes, use.parameter.shape))

    @cached_property
    def elements(self) -> int:
        """Number of parameter elements that lie here, those of each use."""
        return sum(use.values.numel() for use in self.uses)

    @cached_property
    def sizes(self) -> Tensor:
        """Float64 [groups]: number of parameter elements of each group."""
        one = torch.ones((), dtype=torch.float64)  # float32 counts to 2^24 only
        return self.reduce(lambda use: one.expand(use.values.shape))

    def first_order(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """First-order cause of every component from output weights and their gradients: <W_c, dM/dW_c>.

        Summed over positions and samples this equals activation x gradient with a zero baseline; for rows the
        activation is the logit minus its vocabulary mean, so the mean row is subtracted from W: the mean logit is
        linear in the same hidden state. This logit is what the row itself gives, see `Anatomy.rows_of`.

        Args:
            gradients: gradient of a scalar by use name, shaped like `Use.values`, see `gradients`; a missing one counts as
                zero.

        Returns:
            Float64 [components], in the order of `table`.
        """
        uses = [use for use in self.by_shape if use.output and use.name in gradients]
        return self._with_gradients(uses, gradients, _product, 1)[0][torch.as_tensor(self.output_groups)]

    def norms_and_causes(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """In one visit, squared norms of weights and gradients, Float64 [groups] each, and `first_order`, which see."""
        weights, given, causes = self._with_gradients(self.by_shape, gradients, _squares_and_product, 3)
        return weights, given, causes[torch.as_tensor(self.output_groups)]

    def _with_gradients(self, uses: Iterable[Use], gradients: Mapping[str, Tensor], of: Made, quantities: int) -> Tensor:
        """Sums of what `of` makes of weights, gradients (zero where missing) and, of rows, the mean row: [quantity, groups]."""
        visits, rows = [], []
        for use in uses:
            (rows if use.output and use.module is self.parts.unembedding else visits).append(use)
        sums = sums_of_all(((use, (use.values, use.given(gradients))) for use in visits), of, self.elements)
        for use in rows:
            mean = self._mean_row(use.values)
            sums[use.name] = use.sums(use.values, use.given(gradients), of=partial(of, mean=mean))
        return self.grouped(sums, quantities)

    def gradients(self, scalar: Tensor, also: Mapping[Any, Tensor] | None = None) -> dict[Any, Tensor]:
        """Gradient of a scalar for every use, and for further tensors by their keys, without touching `.grad`.

        Of a sharded model, of the mean of the processes' scalars, and of each use what lies here.

        Raises:
            ValueError: the unembedding is tied; run the forward pass and this inside `untied`, so that uses part.
        """
        if self.parts.tied and self._cut is None:
            raise ValueError("gradients by use need the forward pass to run inside Components.untied()")
        if self.together.several:
            return self._gradients_of_shards(scalar, also or {})
        wanted = [use for use in self.uses if use.parameter.requires_grad]
        tensors = {**{use.name: use.parameter for use in wanted}, **(also or {})}
        found = torch.autograd.grad(scalar, list(tensors.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(tensors, found, strict=True))

    @contextmanager
    def untied(self) -> Iterator[None]:
        """Give the unembedding its own copy of a tied matrix, so that gradients and swaps part by use; undone on exit.

        FSDP lets no process replace a sharded matrix: there gradients alone are parted, where the embedding puts out.
        """
        if self.together.several:
            with self._parted():
                yield
            return
        unembedding = self.parts.unembedding
        shared = unembedding.weight
        if shared is not self.parts.embedding.weight:
            yield
            return
        unembedding.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        try:
            yield
        finally:
            unembedding.weight = shared

    def embedding_gradient(self, tokens: Tensor, gradient: Tensor, into: Tensor | None = None) -> Tensor:
        """Gradient of the embedding, what of it lies here, from that of what it put out for these tokens.

        Args:
            tokens: Int [token].
            gradient: Float [token, width].
            into: what it is added to; None: nothing yet.
        """
        embedding = self.parts.embedding
        use = next(use for use in self.uses if use.module is embedding and use.attribute == "weight")
        wide = torch.promote_types(use.values.dtype, torch.float32)  # half precision would round at every token
        found = torch.zeros_like(use.values, dtype=wide) if into is None else into
        start = use.rows.start if use.rows else 0
        kept = (tokens >= start) & (tokens < start + len(found))
        if embedding.padding_idx is not None:
            kept &= tokens != embedding.padding_idx
        return found.index_add_(0, tokens[kept] - start, gradient[kept].to(found.dtype) * self.parts.embedding_scale)

    def check_separable(self) -> None:
        """Raise ModelError where the two uses of a tied matrix cannot be given different values."""
        if self.parts.tied and self.together.several:
            raise ModelError(
                "the embedding is tied to the unembedding and sharded, so that neither can be changed alone; untie the two "
                "(tie_word_embeddings=False), or do this with the model in one process"
            )

    def _mean_row(self, weight: Tensor) -> Tensor:
        """Mean of the unembedding's rows, [1, width], from those of them that lie here."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        if not self.together.several:
            return weight.mean(0, keepdim=True, dtype=wide)
        return self.together.sum(weight.sum(0, keepdim=True, dtype=wide)) / self.parts.vocabulary

    @contextmanager
    def _parted(self) -> Iterator[None]:
        """End the backward pass at what a tied embedding puts out, so that its matrix gets the unembedding's gradient alone."""
        if not self.parts.tied:
            yield
            return

        def cut(_module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            assert self._cut is not None
            leaf = out.detach().requires_grad_()
            self._cut.append((args[0].detach().flatten(), leaf))
            return leaf

        self._cut = []
        handle = self.parts.embedding.register_forward_hook(cut)
        try:
            yield
        finally:
            handle.remove()
            self._cut = None

    def _gradients_of_shards(self, scalar: Tensor, also: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        embeddings, self._cut = self._cut or [], None if self._cut is None else []
        others = [*also.values(), *(leaf for _, leaf in embeddings)]
        found = gradients(self.parts.model, scalar, list(self.stored.values()), others)
        by_name = dict(zip(self.stored, found, strict=False))
        result: dict[Any, Tensor] = {use.name: by_name[self.source[use.name]] for use in self.uses}
        beside = found[len(self.stored) :]
        for (tokens, _), gradient in zip(embeddings, beside[len(also) :], strict=True):
            name = next(use.name for use in self.uses if use.module is self.parts.embedding)
            result[name] = self.embedding_gradient(tokens, gradient.flatten(0, -2))
        return {**result, **dict(zip(also, beside, strict=False))}

    def _block(self, kind: str) -> pd.DataFrame:
        if kind == "row":
            return pd.DataFrame({"kind": kind, "layer": -1, "index": np.arange(self.parts.vocabulary)})
        count = self._counts[kind]
        layer, index = np.divmod(np.arange(self.parts.depth * count), count)
        return pd.DataFrame({"kind": kind, "layer": layer, "index": index})

    def _position(self, component: Component) -> int:
        kind, layer, index = component
        p, counts = self.parts, self._counts
        if kind not in counts:
            raise ConfigError(f"unknown component kind {kind!r}; expected {', '.join(KINDS)}")
        if kind == "row":
            layer = 0 if layer == -1 else -1  # a row belongs to no layer
        if not (0 <= layer < p.depth and 0 <= index < counts[kind]):
            raise ConfigError(
                f"there is no {kind} ({component.layer}, {index}); this model has {p.depth} layers of {p.heads} heads and "
                f"{p.neurons} neurons, and {p.vocabulary} rows (layer -1)"
            )
        start = {"head": 0, "neuron": p.depth * p.heads, "row": p.depth * (p.heads + p.neurons)}[kind]
        return start + layer * counts[kind] + index

    def _all_uses(self) -> Iterator[Use]:
        """Every parameter of every module, with its owners; the claims of components first, the rest by name."""
        claims = dict(self._claims())
        layer_of = {}
        for number, layer in enumerate(self.parts.layers):
            layer_of.update(dict.fromkeys(layer.modules(), number))
        for path, module in self.parts.model.named_modules():
            for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False):
                name = f"{path}.{attribute}" if path else attribute
                if (module, attribute) not in claims:
                    group = self._remainder_group(layer_of.get(module, -1), self._remainder_name(module, attribute))
                    yield Use(name, module, attribute, (), torch.tensor([group]), False)
                    continue
                yield Use(name, module, attribute, *claims[module, attribute])

    def _placed(self, use: Use) -> Use:
        parameter = use.parameter
        several = self.together.several
        return replace(use, sharded=parameter, rows=rows_here(parameter, self.together)) if several else use

    def _claims(self) -> Iterator[tuple[tuple[nn.Module, str], tuple[tuple[int, ...], Tensor, bool]]]:
        """((module, attribute), (axes, owners, output)) for every parameter that components own."""
        p = self.parts
        reads, writes = (1, 0) if p.row.transposed else (0, 1)  # axis of output features, of input features
        for layer in range(p.depth):
            heads, neurons = self._ids("head", "writing", layer), self._ids("neuron", "writing", layer)
            yield (p.attention_out[layer], "weight"), ((writes,), heads.repeat_interleave(p.head_dim), True)
            out = p.mlp_out[layer]
            if isinstance(out, ExpertsOut):  # [expert, width, neuron], and gates before inputs as [expert, 2 x neuron, width]
                gating = self._ids("neuron", "gating", layer).view(p.experts, 1, -1).expand(-1, 2, -1)
                yield (out.experts, "down_proj"), ((0, 2), neurons, True)
                yield (out.experts, "gate_up_proj"), ((0, 1), gating.flatten(), False)
            else:
                yield (out, "weight"), ((writes,), neurons, True)
            for projection in p.row.projections:
                part_of, unit_of = p.owners(projection)
                owners = torch.zeros_like(unit_of)
                for place, part in enumerate(projection.parts):
                    here = part_of == place
                    owners[here] = self._owners(part, layer)[unit_of[here]]
                yield (p.projection(layer, projection), "weight"), ((reads,), owners, False)
        yield (p.unembedding, "weight"), ((0,), self._ids("row", "writing", 0), True)

    def _owners(self, part: str, layer: int) -> Tensor:
        """Group of each head, key and value head, or neuron that owns a part."""
        if part == "q":
            return self._ids("head", "routing", layer)
        if part in ("gate", "up"):
            return self._ids("neuron", "gating", layer)
        return torch.full((self.parts.kv_heads,), self._remainder_group(layer, {"k": "keys", "v": "values"}[part]))

    def _ids(self, kind: str, part: str, layer: int) -> Tensor:
        count = {"head": self.parts.heads, "neuron": self.parts.neurons, "row": self.parts.vocabulary}[kind]
        start = self._offsets[kind, part] + layer * count
        return torch.arange(start, start + count)

    def _remainder_group(self, layer: int, name: str) -> int:
        return self._remainder.setdefault((layer, name), self._first_remainder + len(self._remainder))

    def _remainder_name(self, module: nn.Module, attribute: str) -> str:
        p = self.parts
        named = {p.embedding: "embedding", p.final_norm: "final norm", p.unembedding: "unembedding bias"}
        if module in named:
            return named[module]
        if "norm" in type(module).__name__.lower():
            return "norms"
        if "router" in type(module).__name__.lower():
            return "router"
        if isinstance(module, nn.Embedding):
            return "positions"
        return "biases" if attribute == "bias" else "other"


def _product(weight: Tensor, gradient: Tensor, mean: Tensor | None = None) -> Iterator[Tensor]:
    yield weight * gradient if mean is None else (weight - mean).mul_(gradient)


def _squares_and_product(weight: Tensor, gradient: Tensor, mean: Tensor | None = None) -> Iterator[Tensor]:
    yield weight.square()
    yield gradient.square()
    yield from _product(weight, gradient, mean)
