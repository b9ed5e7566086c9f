"""What passes over a model take, from its shapes: the model's own code runs on tensors that have a shape and no content.

Every operation of forward and backward is seen, so that memory, floating-point operations and traffic are counted and not
estimated; nothing is computed or allocated. Kernels are those of the CPU, whose attention keeps, like the fused kernels of
GPUs, no matrix of attention weights. Knows torch's dispatch; knows nothing about studies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary
from transformers.integrations import moe

from attribution.capture import sites, streamed, tapped
from attribution.components import Components
from attribution.doctor.opening import shaped
from attribution.models import Anatomy, anatomy

PART = (2, 4)  # layers: of a deeper model these depths are run, since all that is counted grows evenly with every layer


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _experts(tokens: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * tokens[0] * weight[1] * weight[2]


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.transformers.grouped_mm_fallback: _experts,
    torch.ops.transformers.grouped_mm_fallback_backward: lambda *shapes, **_: 2 * _experts(*shapes),
}


@contextmanager
def _experts_by_shape() -> Iterator[None]:
    """Let the experts of a mixture run by transformers' own stand-in for torch's kernel, which refuses what has no content."""
    kept, moe._can_use_grouped_mm = moe._can_use_grouped_mm, lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = kept


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass.

    Attributes:
        early, late: most bytes alive at once beyond what was alive before, gradients included: until the backward pass has
            come half through the layers, and from there on.
        kept: bytes alive after the forward pass: what the backward pass needs.
        forward, flops: floating-point operations of products of matrices, of the forward pass and of both.
        traffic: bytes that all other operations read and write, of both.
    """

    early: float
    late: float
    kept: float
    forward: float
    flops: float
    traffic: float

    @property
    def peak(self) -> float:
        """Most bytes alive at once: bytes grow or shrink evenly from layer to layer, so it is near one of the ends."""
        return max(self.early, self.late)


class Shapes:
    """Counts passes of a model of which there is only a config, dropout off as recipes have it by default.

    Args:
        config: of the model.
        dtype: name of the type of its weights.
    """

    def __init__(self, config: Any, dtype: str):
        depth, self._fake = config.num_hidden_layers, FakeTensorMode()
        with self._fake:
            depths = (depth,) if depth <= PART[-1] else PART
            self._models = [shaped(_shallow(config, each), dtype).eval() for each in depths]
        self._found: dict[tuple[Any, ...], Pass] = {}
        self._beyond = (depth - depths[0]) / max(depths[-1] - depths[0], 1)

    def training(self, samples: int, length: int, *, accumulating: bool = False, checkpointing: bool = False) -> Pass:
        """A pass of the training loss over the samples; `accumulating`: gradients of a pass before are there already."""
        return self._deep(self._training, samples, length, accumulating, checkpointing)

    def probe(self, samples: int, length: int, response: int) -> Pass:
        """A reading of a probe set: gradient for every use of a parameter, at every head and neuron, and at the logits."""
        return self._deep(self._probe, samples, length, response)

    def _deep(self, count: Callable[..., Pass], *asked: Any) -> Pass:
        """What is counted at the depths that are run, carried on to the depth of the model."""
        key = (count.__name__, *asked)
        if key not in self._found:
            each = [astuple(count(model, *asked)) for model in self._models]
            found = (a + self._beyond * (b - a) for a, b in zip(each[0], each[-1], strict=True))
            self._found[key] = Pass(*found)
        return self._found[key]

    def _training(self, model: Any, samples: int, length: int, accumulating: bool, checkpointing: bool) -> Pass:
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        with self._fake, _counted(anatomy(model), list(model.parameters()) if accumulating else []) as seen:
            ids = torch.zeros(samples, length, dtype=torch.long)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            seen.middle()
            loss.backward()
        model.zero_grad()
        if checkpointing:
            model.eval().gradient_checkpointing_disable()
        return seen.result()

    def _probe(self, model: Any, samples: int, length: int, response: int) -> Pass:
        components = Components(model)
        with self._fake, components.untied(), _counted(components.parts, []) as seen:
            ids = torch.zeros(samples, length, dtype=torch.long)
            with tapped(components.parts, sites(components.parts), differentiable=True) as taps:
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=response).logits.flatten(0, 1).float()
            seen.middle()
            gradients = components.gradients(logits.log_softmax(-1).sum(), {**taps, "logits": logits})
            del gradients
        return seen.result()


class _Counter(TorchDispatchMode):
    """Bytes alive by storage, as they are born and die, and bytes that operations without a count of their own move."""

    def __init__(self, flops: FlopCounterMode) -> None:
        super().__init__()
        self.now = self.kept = 0
        self.peaks = [0, 0]
        self.half = False
        self.traffic = self.forward = 0.0
        self.flops = flops
        self._alive: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read, made = ([each for each in tree_leaves(tree) if isinstance(each, Tensor)] for tree in ((args, kwargs), out))
        if not (func.is_view or func._overloadpacket in self.flops.flop_registry):
            self.traffic += sum(each.numel() * each.element_size() for each in (*read, *made))
        known = {each.untyped_storage() for each in read}
        for storage in {each.untyped_storage() for each in made} - known:
            if storage not in self._alive:
                self._alive[storage] = None
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def middle(self) -> None:
        """The forward pass is over."""
        self.kept, self.forward = self.now, float(self.flops.get_total_flops())

    def halfway(self, hidden: Tensor) -> Tensor:
        """Notice when the gradient arrives at this residual stream."""
        if hidden.requires_grad:  # under checkpointing it runs a second time
            hidden.register_hook(lambda _gradient: setattr(self, "half", True))
        return hidden

    def result(self) -> Pass:
        early, late = self.peaks
        return Pass(early, late, self.kept, self.forward, float(self.flops.get_total_flops()), self.traffic)

    def _add(self, size: int) -> None:
        self.now += size
        self.peaks[self.half] = max(self.peaks[self.half], self.now)


@contextmanager
def _counted(parts: Anatomy, accumulated: Sequence[nn.Parameter]) -> Iterator[_Counter]:
    """Count what runs inside; gradients of the parameters given are there before."""
    for parameter in accumulated:
        parameter.grad = torch.empty_like(parameter)
    counter = _Counter(FlopCounterMode(display=False, custom_mapping=_FLOPS))
    with streamed(parts, {parts.depth // 2: counter.halfway}), _experts_by_shape(), counter.flops, counter:
        yield counter


def _shallow(config: Any, depth: int) -> Any:
    """The config of the first layers."""
    config = deepcopy(config)
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    return config
