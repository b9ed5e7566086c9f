"""How large activations and their gradients are, per component: root mean square over real tokens.

Of a head, the length of its slice; of a neuron, its entry; of a row, its logit minus the vocabulary mean at scored
positions. Squares are summed batch by batch, so nothing of the size of an activation is kept.

Knows activations and gradients; knows nothing about what the gradient is of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from attribution.capture import Site, sites
from attribution.components import Components
from attribution.sharding import Processes
from attribution.updates.watcher import Watcher

Key = Site | str
BLOCK = 2**18, 2**24  # elements that are squared at a time: on a CPU, where they stay in its cache, and elsewhere
BLOCK_OF_ONE = 2**20  # the same where one thread computes
_WIDE = (torch.float32, torch.float64)
_ROWS = "rows"


class Measured(NamedTuple):
    """Root mean squares over tokens, Float64 [components] each, NaN where nothing was added."""

    activation: Tensor
    gradient: Tensor


class Sizes:
    """Sums of squares over tokens, of activations and of gradients.

    Args:
        components: of the model.
    """

    def __init__(self, components: Components):
        self.components = components
        self._activation: dict[Key, Tensor] = {}
        self._gradient: dict[Key, Tensor] = {}
        self._tokens: dict[Key, int] = {}

    def add(
        self,
        seen: Mapping[Site, Tensor],
        gradients: Mapping[Site, Tensor],
        mask: Tensor,
        beside: Mapping[Site, Tensor],
        scale: float = 1.0,
    ) -> None:
        """Activations of one batch, Float [sample, position, feature], and gradients with respect to them.

        Args:
            seen, gradients: by site.
            mask: Int [sample, position], 0 where there is padding.
            beside: of sites given at some tokens alone, activations at all others, to which no gradient reaches.
            scale: by which gradients are multiplied.
        """
        tokens, real = counted(mask)
        for site, value in seen.items():
            among = None if site in beside else real
            activation = squares(value, among)
            if site in beside:
                activation += squares(beside[site], None)
            self.add_squares(site, activation, squares(gradients[site], among) * scale**2, tokens)

    def add_rows(self, rows: Tensor, gradient: Tensor, scale: float = 1.0) -> None:
        """What rows put out at scored positions, Float [token, vocabulary], and the gradient with respect to it."""
        centred = rows - rows.mean(-1, keepdim=True)
        self.add_squares(_ROWS, squares(centred, None), squares(gradient, None) * scale**2, len(rows))

    def add_squares(self, key: Key, activation: Tensor, gradient: Tensor, tokens: int) -> None:
        """Sums of squares over so many tokens."""
        for sums, value in ((self._activation, activation), (self._gradient, gradient)):
            sums[key] = sums[key] + value if key in sums else value
        self._tokens[key] = self._tokens.get(key, 0) + tokens

    def together(self, among: Processes) -> Sizes:
        """Over the tokens of several processes, with gradients of the mean of their scalars. Every process asks for it."""
        if not among.several:
            return self
        found, told = Sizes(self.components), []
        for key, count, width in self._blocks():
            nothing = torch.zeros(count * width)
            told += [self._activation.get(key, nothing), self._gradient.get(key, nothing) / among.size**2]
            told.append(torch.tensor([self._tokens.get(key, 0)]))
        total = among.sum(torch.cat([each.cpu().double() for each in told])).split([len(each) for each in told])
        for place, (key, _, _) in enumerate(self._blocks()):
            activation, gradient, tokens = total[3 * place : 3 * place + 3]
            if tokens > 0:
                found.add_squares(key, activation, gradient, int(tokens))
        return found

    def measured(self) -> Measured:
        """What was added, as sizes."""
        blocks, sums = self._blocks(), (self._activation, self._gradient)
        counts = torch.tensor([count for _, count, _ in blocks])
        tokens = torch.tensor([self._tokens.get(key, 0) for key, _, _ in blocks]).repeat_interleave(counts)
        total = torch.zeros(len(sums), len(tokens), dtype=torch.float64)
        if self._tokens:
            device = next(iter(self._activation.values())).device
            nothing = {key: torch.zeros(count * width) for key, count, width in blocks if key not in self._tokens}
            # a device is waited for once, not for each block
            found = torch.cat([{**nothing, **each}[key].to(device) for each in sums for key, _, _ in blocks])
            total.index_add_(1, self.components.of_features, found.view(len(sums), -1).cpu().double())
        return Measured(*(total / tokens).sqrt())  # of nothing 0 / 0

    def _blocks(self) -> list[tuple[Key, int, int]]:
        """What can be added, in the order of components: key, number of components, features of each."""
        parts = self.components.parts
        return [
            *((Site("head", layer), parts.heads, parts.head_dim) for layer in range(parts.depth)),
            *((Site("neuron", layer), parts.neurons, 1) for layer in range(parts.depth)),
            (_ROWS, parts.vocabulary, 1),
        ]


def counted(mask: Tensor) -> tuple[int, Tensor | None]:
    """How many tokens are real, and which, as `squares` takes it."""
    tokens = int(mask.count_nonzero())  # a sum in half precision would round
    return tokens, None if tokens == mask.numel() else mask.flatten().float()


def squares(value: Tensor, real: Tensor | None) -> Tensor:
    """Sum of squares over tokens, Float32 or wider [feature].

    Args:
        value: Float [..., feature].
        real: Float [token], 1 for those that count and 0 for padding; None: all count.
    """
    value = value.detach()
    if value.is_cpu and type(value) is Tensor and value.dtype in _WIDE and torch.get_num_threads() == 1:
        return torch.from_numpy(_squares_by_one_thread(value.numpy(), real))
    value = value.flatten(0, -2)
    wide = torch.promote_types(value.dtype, torch.float32)
    blocks = value.split(max(1, BLOCK[value.device.type != "cpu"] // value.shape[-1]))
    if real is None:
        return reduce(Tensor.add_, (block.to(wide).square().sum(0) for block in blocks))  # a norm over dim 0 takes much longer
    total = value.new_zeros(value.shape[-1], dtype=wide)
    for block, those in zip(blocks, real.to(wide).split(len(blocks[0])), strict=True):
        total.addmv_(block.to(wide).square().t(), those)  # a product that is not in place runs in half precision under autocast
    return total


def _squares_by_one_thread(value: np.ndarray, real: Tensor | None) -> np.ndarray:
    """The same in less time, of which most is what torch takes to begin."""
    value = value.reshape(-1, value.shape[-1])
    if real is None:
        return np.einsum("tf,tf->f", value, value)  # in one visit, with no matrix in between
    ones, tokens = real.numpy(), max(1, BLOCK_OF_ONE // value.shape[-1])
    total = ones[:tokens] @ np.square(value[:tokens])
    for at in range(tokens, len(value), tokens):
        total += ones[at : at + tokens] @ np.square(value[at : at + tokens])
    return total


class TrainingSizes(Watcher):
    """Watches the sizes in a model's own training passes, between `start` and `stop`.

    Squares of an activation are taken in the forward pass and counted only when a gradient reaches it, so passes that
    are not trained on, and recomputation under checkpointing, add nothing.

    Args:
        components: of the model.
        modules: the output linears as the training pass runs them, by site; those of `components` if left out.
    """

    def __init__(self, components: Components, modules: Mapping[Site, nn.Module] | None = None):
        self.components = components
        self._modules = modules or {site: site.module(components.parts) for site in sites(components.parts)}
        self._found = Sizes(components)
        self._real: Tensor | None = None  # of the pass under way, as `squares` takes it
        self._tokens: int | None = None

    def begin(self, mask: Tensor | None) -> None:
        """A pass begins, over tokens that are real where the mask [sample, position] is not 0; None: everywhere."""
        self._tokens, self._real = (None, None) if mask is None else counted(mask)

    def take(self) -> Sizes:
        """What was added since the last call."""
        found, self._found = self._found, Sizes(self.components)
        return found

    def _look(self, site: Site, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        value = args[0]
        if self._paused or self.idle or not torch.is_grad_enabled() or not value.requires_grad:
            return
        every = value.shape[:-1].numel()
        real = self._real if self._real is not None and len(self._real) == every else None
        tokens = every if real is None or self._tokens is None else self._tokens
        activation = squares(value, real)

        def arrived(gradient: Tensor) -> None:
            self._found.add_squares(site, activation, squares(gradient, real), tokens)

        value.register_hook(arrived)

    def _hooks(self) -> Iterator[Any]:
        return (module.register_forward_pre_hook(partial(self._look, site)) for site, module in self._modules.items())
