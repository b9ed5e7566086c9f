"""What passes over a model take, from its shapes: the model's own code runs on tensors that have a shape and no content.

Every operation of forward and backward is seen, so that memory, floating-point operations and traffic are counted and not
estimated; nothing is computed or allocated. Kernels are those of the CPU, whose attention keeps, like the fused kernels of
GPUs, no matrix of attention weights. Knows torch's dispatch; knows nothing about studies.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import astuple, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary
from transformers.integrations import moe
from transformers.pytorch_utils import Conv1D

from attribution.capture import only_at, read_by_logits_alone, sites, streamed, tapped, tapped_for_logits
from attribution.components import Components
from attribution.doctor.opening import shaped
from attribution.metrics import log_odds
from attribution.models import Anatomy, anatomy
from attribution.samples import Batch
from attribution.updates.share import handed
from attribution.updates.sizes import Sizes

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
        depth, self._fake, self._dtype = config.num_hidden_layers, FakeTensorMode(), dtype
        with self._fake:
            depths = (depth,) if depth <= PART[-1] else PART
            self._models = [shaped(_shallow(config, each), dtype).eval() for each in depths]
        self._found: dict[tuple[Any, ...], Pass] = {}
        self._adapted: dict[tuple[int, int], Any] = {}
        self._beyond = (depth - depths[0]) / max(depths[-1] - depths[0], 1)

    def training(self, samples: int, length: int, *, accumulating: bool = False, checkpointing: bool = False) -> Pass:
        """A pass of the training loss over the samples; `accumulating`: gradients of a pass before are there already."""
        return self._deep(self._training, samples, length, accumulating, checkpointing)

    def trained(
        self, samples: int, length: int, scored: int, *, lora: int = 0, accumulating: bool = False, checkpointing: bool = False
    ) -> Pass:
        """The same as trainers of TRL run it: the unembedding by tiles of logits, of `scored` positions of each sample.

        With `lora`, adapters of that rank on all linears are trained, and their gradients are counted alone.
        """
        return self._deep(self._trained, samples, length, scored, lora, accumulating, checkpointing)

    def probe(self, samples: int, length: int, response: int) -> Pass:
        """A reading of a probe set: gradient for every use of a parameter, at every head and neuron, and at the logits."""
        return self._deep(self._probe, samples, length, response, True)

    def causes(self, samples: int, length: int, response: int) -> Pass:
        """First-order causes: the same without the gradients of parameters."""
        return self._deep(self._probe, samples, length, response, False)

    def refined(self, samples: int, length: int, response: int) -> Pass:
        """A reading between two steps: every gradient is multiplied as soon as it is made, and none is kept."""
        return self._deep(self._refined, samples, length, response)

    def again(self, samples: int, length: int, response: int) -> Pass:
        """A training batch once more, for the gradient of output weights alone."""
        return self._deep(self._again, samples, length, response)

    def words(self, copies: int, length: int, response: int) -> Pass:
        """Copies of one prompt at places of a path, for the gradient at the embeddings."""
        return self._deep(self._words, copies, length, response)

    def quiet(self, samples: int, length: int, response: int) -> Pass:
        """The metric without gradients; all of it is its forward pass."""
        return self._deep(self._quiet, samples, length, response)

    def _deep(self, count: Callable[..., Pass], *asked: Any) -> Pass:
        """What is counted at the depths that are run, carried on to the depth of the model."""
        key = (count.__name__, *asked)
        if key not in self._found:
            each = [astuple(count(model, *asked)) for model in self._models]
            found = (a + self._beyond * (b - a) for a, b in zip(each[0], each[-1], strict=True))
            self._found[key] = Pass(*found)
        return self._found[key]

    def _training(self, model: Any, samples: int, length: int, accumulating: bool, checkpointing: bool) -> Pass:
        with self._updating(model, anatomy(model), accumulating, checkpointing) as seen:
            ids = torch.zeros(samples, length, dtype=torch.long)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            seen.middle()
            loss.backward()
        return seen.result()

    def _trained(
        self, model: Any, samples: int, length: int, scored: int, lora: int, accumulating: bool, checkpointing: bool
    ) -> Pass:
        parts, model = self._with_adapters(model, lora) if lora else (anatomy(model), model)
        with self._updating(model, parts, accumulating, checkpointing) as seen:
            loss = tiled_loss(model, torch.zeros(samples, length, dtype=torch.long), scored)
            seen.middle()
            loss.backward()
        return seen.result()

    @contextmanager
    def _updating(self, model: Any, parts: Anatomy, accumulating: bool, checkpointing: bool) -> Iterator[_Counter]:
        """Count a training pass of the model, which is then as it was."""
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with self._fake, _counted(parts, trained if accumulating else []) as seen:
            yield seen
        model.zero_grad()
        if checkpointing:
            model.eval().gradient_checkpointing_disable()

    def _with_adapters(self, model: Any, rank: int) -> tuple[Anatomy, Any]:
        """A copy of the model with adapters on all linears of its layers, and its parts."""
        if (key := (model.config.num_hidden_layers, rank)) not in self._adapted:
            with self._fake:
                own = shaped(deepcopy(model.config), self._dtype).eval().requires_grad_(False)
                parts = anatomy(own)
                for layer in parts.layers:
                    for name, linear in list(layer.named_modules()):
                        if isinstance(linear, (nn.Linear, Conv1D)):
                            layer.set_submodule(name, _Adapted(linear, rank))
            self._adapted[key] = parts, own
        return self._adapted[key]

    def _probe(self, model: Any, samples: int, length: int, response: int, parameters: bool) -> Pass:
        components = Components(model)
        with self._fake, components.untied(), _counted(components.parts, []) as seen:
            batch = _responses(samples, length, response)
            with ExitStack() as stack:
                if parameters:
                    taps, _beside = stack.enter_context(tapped_for_logits(components.parts, batch))
                else:
                    taps = stack.enter_context(tapped(components.parts, sites(components.parts), differentiable=True))
                logits = _logits(components.parts, samples, length, response)
            total = log_odds(logits, batch).sum() / samples
            seen.middle()
            if parameters:
                gradients = components.gradients(total, {**taps, "logits": logits})
            else:
                gradients = dict(zip((*taps, "logits"), torch.autograd.grad(total, [*taps.values(), logits]), strict=True))
            Sizes(components).add_rows(logits.detach(), gradients.pop("logits"), samples)
            del gradients
        return seen.result()

    def _refined(self, model: Any, samples: int, length: int, response: int) -> Pass:
        components = Components(model)

        def multiplied(_use: Any, _gradient: Tensor) -> None:
            """A block at a time, which is not counted here."""

        with self._fake, components.untied(), handed(components, multiplied), _counted(components.parts, []) as seen:
            total = _odds_alone(components.parts, samples, length, response).sum()
            seen.middle()
            components.gradients(total / samples)
        return seen.result()

    def _again(self, model: Any, samples: int, length: int, response: int) -> Pass:
        components = Components(model)
        with self._fake, components.untied(), _counted(components.parts, []) as seen:
            logits = _logits(components.parts, samples, length, response)
            tokens = torch.zeros(len(logits), 1, dtype=torch.long)
            total = logits.log_softmax(-1).gather(-1, tokens).sum()
            del logits
            seen.middle()
            torch.autograd.grad(total, [use.parameter for use in components.uses if use.output])
        return seen.result()

    def _words(self, model: Any, copies: int, length: int, response: int) -> Pass:
        parts, start = anatomy(model), []
        with self._fake, _counted(parts, []) as seen:
            with streamed(parts, {0: lambda hidden: start.append(hidden) or hidden}):
                logits = _logits(parts, copies, length, response)
            total = log_odds(logits, _responses(copies, length, response)).sum()
            del logits
            seen.middle()
            torch.autograd.grad(total, start)
        return seen.result()

    def _quiet(self, model: Any, samples: int, length: int, response: int) -> Pass:
        with self._fake, torch.no_grad(), _counted(parts := anatomy(model), []) as seen:
            _odds_alone(parts, samples, length, response)
            seen.middle()
        return seen.result()


class _Adapted(nn.Module):
    """A frozen linear with an adapter of low rank, as PEFT's LoRA runs it; its own cannot be made without content."""

    def __init__(self, linear: nn.Module, rank: int) -> None:
        super().__init__()
        weight = linear.get_parameter("weight")
        wide, out = weight.shape if isinstance(linear, Conv1D) else reversed(weight.shape)
        self.linear, self.scale = linear, 1.0 / rank
        self.down = nn.Linear(wide, rank, bias=False, dtype=weight.dtype)
        self.up = nn.Linear(rank, out, bias=False, dtype=weight.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden) + self.up(self.down(hidden)) * self.scale


class _Responses:
    """As much of a `samples.Batch` as is asked for here; samples and responses of equal length."""

    def __init__(self, samples: int, length: int, response: int) -> None:
        self.tokens = torch.zeros(samples * response, dtype=torch.long)
        self.sample_of = torch.zeros(samples * response, dtype=torch.long)
        self.scored_at = tuple(torch.zeros(2, samples * response, dtype=torch.long))
        self.others_at = tuple(torch.zeros(2, samples * (length - response), dtype=torch.long))
        self._samples = samples

    def __len__(self) -> int:
        return self._samples


def _responses(samples: int, length: int, response: int) -> Batch:
    return cast(Batch, _Responses(samples, length, response))


def _odds_alone(parts: Anatomy, samples: int, length: int, response: int) -> Tensor:
    """Log-odds of each sample, as `capture.logits_alone` gives them."""
    batch = _responses(samples, length, response)
    with only_at(read_by_logits_alone(parts), batch.scored_at):
        return log_odds(_logits(parts, samples, max(response, length - 1), response), batch)


def _logits(parts: Anatomy, samples: int, length: int, response: int) -> Tensor:
    """As `capture.scored_logits`, where every sample is as long as every other."""
    ids = torch.zeros(samples, length, dtype=torch.long)
    hidden = parts.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return parts.unembed(hidden[:, -response:].flatten(0, 1))


def tiled_loss(model: Any, ids: Tensor, scored: int) -> Tensor:
    """The loss as TRL's fused unembedding makes it, of the last positions of every sample."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    head, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -scored:].flatten(0, 1)
    tokens = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, tokens, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, cap, 1.0, ("entropy", "is_top1")
    )
    return -log_probs.mean()


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
