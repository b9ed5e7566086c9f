"""The training batch, watched during the training pass itself: what the loss was, and what its gradient says of causes.

No pass is added before the step. First-order causes of heads, neurons and rows are <output weights, their gradient>,
which the optimizer is about to consume; this file undoes what was done to that gradient on the way: clipping, the
loss's normalizer, and, where the unembedding is tied, the embedding's part. After the step one more pass over the same
tokens, with the same dropout masks, gives the same quantities again.

Where several processes train one model, the batch is that of all of them: what each saw is put together at the step.

Knows the model's forward and its gradients; knows nothing about trainers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from attribution.capture import Site, not_checkpointing
from attribution.components import Components
from attribution.samples import IGNORED
from attribution.sharding import ALONE, Processes, local, processes, usable
from attribution.updates.share import all_trainable
from attribution.updates.sizes import Sizes, TrainingSizes
from attribution.updates.watcher import Watcher

if TYPE_CHECKING:
    from attribution.updates.adapters import EffectiveGradients

_NOT_FOR_THE_BACKBONE = ("labels", "num_items_in_batch", "fused_lm_head", "logits_to_keep", "shift_labels", "return_dict")


@dataclass
class _Pass:
    """One micro-batch: its inputs, the random state its dropout began from, and what became of its loss."""

    inputs: dict[str, Any]
    random: list[Tensor]
    autocast: tuple[str, torch.dtype] | None = None  # device type and type, where it is on
    log_prob: float | None = None  # sum of log p(label)
    normalizer: float | None = None  # the loss is -log_prob / normalizer
    used: bool = False  # whether a backward pass went through it

    @property
    def replayable(self) -> bool:
        return self.log_prob is not None and "labels" in self.inputs and self.inputs.get("shift_labels") is None


@dataclass
class Watched:
    """One step's batch as the optimizer got it.

    Attributes:
        passes: its micro-batches in this process.
        clip_factor: consumed / raw gradient, None where no single factor explains the two.
        embedding_use: gradient through the embedding of a tied matrix, before clipping, what of it lies here; None where
            nothing is tied.
        sizes: of activations and gradients in the training passes.
        effective: raw gradients of effective weights under adapters, by name; None where the weights themselves train.
        scale: by which a loss scaler multiplied the loss, and so every raw gradient.
        consumed_scale: the same of gradients as the optimizer gets them; a fused optimizer divides by it itself.
        among: the processes that saw a part of the batch; the loss is the mean of theirs.
        told: by each of them, what it knows of its own part, see `own`.
    """

    passes: list[_Pass]
    clip_factor: float | None
    embedding_use: Tensor | None
    sizes: Sizes
    effective: dict[str, Tensor] | None = None
    scale: float = 1.0
    consumed_scale: float = 1.0
    among: Processes = ALONE
    told: list[tuple[float | None, float | None, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        unknown = float("nan")
        only, log_prob, replayable = self.own
        found = self.among.each(unknown if only is None else only, unknown if log_prob is None else log_prob, replayable)
        known = [[None if value != value else value for value in each] for each in found]
        self.told = [(each[0], each[1], bool(each[2])) for each in known]

    @property
    def own(self) -> tuple[float | None, float | None, bool]:
        """Of the passes in this process: the normalizer that they share, log_prob, whether they can be run again."""
        normalizers = {p.normalizer for p in self.passes}
        values = [p.log_prob for p in self.passes if p.log_prob is not None]
        return (
            normalizers.pop() if len(normalizers) == 1 else None,
            sum(values) if values and len(values) == len(self.passes) else None,
            all(p.replayable for p in self.passes),
        )

    @property
    def normalizer(self) -> float | None:
        """What the loss divides the summed log-probability by; None where it is no such sum, or differs in the batch."""
        found = {only for only, _, _ in self.told}
        only = found.pop() if len(found) == 1 else None
        return None if only is None else only * self.scale * self.among.size

    @property
    def replayable(self) -> bool:
        """Whether every pass can be run again, in every process."""
        return all(replayable for _, _, replayable in self.told)

    @property
    def autocast(self) -> torch.dtype | None:
        """The type that some pass computed in under autocast."""
        return next((each.autocast[1] for each in self.passes if each.autocast), None)

    @property
    def log_prob(self) -> float | None:
        """Sum of log p(label) over the batch, nats."""
        values = [log_prob for _, log_prob, _ in self.told if log_prob is not None]
        return sum(values) if len(values) == len(self.told) else None

    @property
    def loss(self) -> float | None:
        """Minus the log-probability over the normalizer."""
        return None if self.log_prob is None or self.normalizer is None else -self.log_prob / self.normalizer


@dataclass
class BatchWatch(Watcher):
    """Watches a model's training passes between `start` and `stop`.

    Args:
        components: of the model; under adapters, of the plain model that has their effective weights.
        model: whose forward the training calls; that of `components` if left out.
        effective: under adapters, what collects the gradients of effective weights.
        modules: the output linears of `model`, by site; those of `components` if left out.
        held: the parameters of the optimizer; None: all of the model's.
        discarded: called where a batch's gradients were dropped before an optimizer step took them.
        stopped: Int, positions of components whose own parameters are kept from their gradient.
        ablated: whether a set of components is ablated in the training passes.
    """

    components: Components
    model: nn.Module | None = None
    effective: EffectiveGradients | None = None
    modules: Mapping[Site, nn.Module] | None = None
    held: Collection[nn.Parameter] | None = None
    discarded: Callable[[], None] = lambda: None
    stopped: Tensor | None = None
    ablated: bool = False
    _passes: list[_Pass] = field(default_factory=list)
    _raw: Tensor | None = None  # raw gradient of the reference tensor, what of it lies here
    _embedding_use: Tensor | None = None
    _embedded: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # tokens and gradients, of one of several processes

    def start(self) -> None:
        parts = self.components.parts
        self._called = self.model or parts.model
        self._called_on = next(self._called.parameters()).device
        self.among = processes(self._called_on)
        self._sizes = TrainingSizes(self.components, self.modules)
        self._reference = self._reference_tensor()
        super().start()
        for watch in self._watches():
            watch.start()

    def stop(self) -> None:
        for watch in self._watches() if self._handles else ():
            watch.stop()
        super().stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look away while the recorder runs passes of its own."""
        with ExitStack() as stack:
            stack.enter_context(super().paused())
            for watch in self._watches():
                stack.enter_context(watch.paused())
            yield

    def expect(self, whole: bool) -> None:
        """Of the passes to come all will be asked for (`whole`), or no more than the loss and how it was clipped."""
        for watch in (self, *self._watches()):
            watch.idle = not whole

    @property
    def seen(self) -> bool:
        """Whether a training pass ran since the last step began."""
        return bool(self._passes)

    @property
    def pending(self) -> bool:
        """Whether a batch was differentiated that no step has consumed yet."""
        return any(each.used for each in self._passes)

    def take(self, scale: float = 1.0, consumed_scale: float = 1.0) -> Watched:
        """The batch behind the gradient that is about to be consumed; the next one starts empty.

        Args:
            scale, consumed_scale: as in `Watched`.
        """
        effective = self.effective.take() if self.effective else None
        if effective and self.among.several:
            effective = {name: self.among.sum(gradient) / self.among.size for name, gradient in effective.items()}
        used = [p for p in self._passes if p.used]
        clip = self._clip_factor(scale / consumed_scale)
        sizes = self._sizes.take().together(self.among)
        watched = Watched(used, clip, self._through_embedding(), sizes, effective, scale, consumed_scale, self.among)
        self._passes, self._raw, self._embedding_use, self._embedded = [], None, None, []
        return watched

    def gradients(self, watched: Watched) -> dict[str, Tensor]:
        """The gradients in `.grad`, as consumed, by use: those of a tied matrix parted. Uses without one are left out.

        Under adapters, of the effective weights that were watched, as if they had been clipped alike.
        """
        if watched.effective is not None:
            factor = (watched.clip_factor or 1.0) / watched.scale
            shared = {use.name: use.parameter.grad for use in self.components.uses if use.parameter.grad is not None}
            trained = {name: local(gradient) / watched.consumed_scale for name, gradient in shared.items()}
            return {**trained, **{name: gradient * factor for name, gradient in watched.effective.items()}}
        shared = self.components.parts.embedding.weight
        found = {}
        for use in self.components.uses:
            gradient = None if use.parameter.grad is None else local(use.parameter.grad)
            if gradient is not None and watched.embedding_use is not None and use.parameter is shared:
                embedding = watched.embedding_use * ((watched.clip_factor or 1.0) * watched.consumed_scale / watched.scale)
                gradient = gradient - embedding if use.output else embedding
            if gradient is not None:
                found[use.name] = gradient if watched.consumed_scale == 1 else gradient / watched.consumed_scale
        return found

    def causes(self, watched: Watched, gradients: Mapping[str, Tensor], first_order: Tensor) -> Tensor:
        """First-order causes from those gradients, clipping undone: Float64 [components].

        Of the summed log-probability of the batch where its normalizer is known, else of minus the loss.

        Args:
            watched: the batch.
            gradients: as consumed, see `gradients`.
            first_order: of the components from these, see `Components.first_order`.
        """
        scale = (watched.normalizer or 1.0) / (watched.clip_factor or 1.0)
        causes = -scale * first_order
        for use in self.components.uses:  # an output matrix without a gradient: not zero, but unknown
            if use.output and use.name not in gradients:
                unknown = np.isin(self.components.output_groups, use.owners.numpy())
                causes[torch.as_tensor(unknown)] = float("nan")
        if self.stopped is not None:  # active, and perhaps a cause, of which their gradient says nothing
            causes[self.stopped] = float("nan")
        return causes

    def again(self, watched: Watched) -> tuple[float, Tensor] | None:
        """Run the batch once more with the weights as they are now.

        Returns:
            The summed log-probability and the first-order causes of it; None where the loss is not such a sum, or the
            passes cannot be repeated: in passes of the recorder's own nothing is ablated.
        """
        if self.ablated or watched.normalizer is None or not watched.replayable:
            return None
        sharded = self.components.together.several
        uses = [use for use in self.components.uses if use.output]
        total, causes = 0.0, torch.zeros(len(self.components), dtype=torch.float64)
        devices = [self._called_on] if self._called_on.type == "cuda" else []
        with ExitStack() as stack:
            for block in (
                self.paused(),
                torch.random.fork_rng(devices=devices),
                torch.enable_grad(),
                not_checkpointing(self.components.parts.model),
                usable(self.components.parts.model),
                self.components.untied(),
                all_trainable(self.components),
            ):
                stack.enter_context(block)
            for each in watched.passes:
                _set_random(each.random, self._called_on)
                with torch.autocast(*each.autocast) if each.autocast else nullcontext():
                    log_prob = self._log_prob(each.inputs)
                if sharded:  # the mean over processes, where the sum is wanted
                    gradients = self.components.gradients(log_prob * self.among.size)
                else:
                    found = torch.autograd.grad(log_prob, [use.parameter for use in uses], materialize_grads=True)
                    gradients = {use.name: g for use, g in zip(uses, found, strict=True)}
                causes += self.components.first_order(gradients)
                total += log_prob.item()
        return self.among.sums(total)[0], causes if sharded else self.among.sum(causes)

    def _log_prob(self, inputs: Mapping[str, Any]) -> Tensor:
        parts = self.components.parts
        given = {key: value for key, value in inputs.items() if key not in _NOT_FOR_THE_BACKBONE}
        hidden = parts.model.base_model(**{**given, "use_cache": False}).last_hidden_state[:, :-1]
        labels = inputs["labels"][:, 1:]
        wanted = labels != IGNORED
        return parts.unembed(hidden[wanted]).log_softmax(-1).gather(-1, labels[wanted][:, None]).sum()

    def _hooks(self) -> Iterator[Any]:
        yield self._called.register_forward_pre_hook(self._before, with_kwargs=True)
        yield self._called.register_forward_hook(self._after)
        if self._reference is not None:
            yield self._reference.register_post_accumulate_grad_hook(self._keep_raw)
        if self.components.parts.tied and self.effective is None:
            yield self.components.parts.embedding.register_forward_hook(self._watch_embedding)

    def _watches(self) -> list[TrainingSizes | EffectiveGradients]:
        return [self._sizes, *([self.effective] if self.effective else [])]

    def _reference_tensor(self) -> nn.Parameter | None:
        """A small tensor near the output, whose gradient before and after clipping gives the factor."""
        parameter = self.components.parts.final_norm.get_parameter("weight")
        trained = [each for each in self._called.parameters() if each.requires_grad]
        if self.held is not None:  # what the optimizer does not hold is not clipped for it
            trained = [each for each in trained if each in self.held]
        return next((each for each in trained if each is parameter), trained[-1] if trained else None)

    def _clip_factor(self, scale: float) -> float | None:
        """Consumed / raw gradient of the reference tensor, the raw one divided by a scale."""
        consumed = None if self._reference is None or self._reference.grad is None else local(self._reference.grad)
        if self.among.several:
            return self._clip_factor_of_all(consumed, scale)
        if consumed is None or self._raw is None or not self._raw.norm() > 0:
            return None
        raw = self._raw if scale == 1 else self._raw / scale
        if torch.equal(consumed, raw):
            return 1.0
        factor = (consumed.norm() / raw.norm()).item()
        rounding = max(1e-4, 2 * torch.finfo(raw.dtype).eps)
        return factor if torch.allclose(consumed, raw * factor, rtol=rounding, atol=0) else None

    def _clip_factor_of_all(self, consumed: Tensor | None, scale: float) -> float | None:
        """The same where each process had a raw gradient of its own (DDP averages them) or holds a shard (FSDP has averaged).

        Averages are rounded as they are added up, so small elements may be further off than by a factor's rounding.
        """
        missing = consumed is None or self._raw is None
        if self.among.sums(missing)[0] or consumed is None or self._raw is None:
            return None
        averaged = self._raw if self.components.together.several else self.among.sum(self._raw) / self.among.size
        raw = averaged / scale
        squares = self.among.sums(consumed.double().square().sum().item(), raw.double().square().sum().item())
        if self.among.sums(not torch.equal(consumed, raw))[0] == 0 and squares[1] > 0:
            return 1.0
        factor = (squares[0] / squares[1]) ** 0.5 if squares[1] > 0 else float("nan")
        rounding = max(1e-4, 2 * torch.finfo(raw.dtype).eps)
        bound = rounding * consumed.abs() + 1e-6 * (squares[0] / max(1, consumed.numel())) ** 0.5
        off = not bool(((consumed - raw * factor).abs() <= bound).all())
        return None if self.among.sums(off)[0] else factor

    def _through_embedding(self) -> Tensor | None:
        """Gradient through a tied embedding: of the mean of the processes' losses, from all their tokens."""
        if not self.among.several or not self.components.parts.tied or self.effective is not None:
            return self._embedding_use
        width = self.components.parts.embedding.embedding_dim
        tokens = torch.cat([torch.zeros(0, dtype=torch.long, device=self._called_on), *(each for each, _ in self._embedded)])
        gradient = torch.cat([torch.zeros(0, width, device=self._called_on), *(each for _, each in self._embedded)])
        return self.components.embedding_gradient(self.among.rows(tokens), self.among.rows(gradient) / self.among.size)

    def _dropped(self) -> bool:
        """Whether the gradients of the batch so far are gone: none are left, or zeros where there was something."""
        if self._reference is None:
            return False
        gradient, raw = self._reference.grad, self._raw
        if self.among.several:  # without a synchronization FSDP keeps gradients elsewhere until the last micro-batch
            found = (0.0 if each is None else float(local(each).any()) for each in (raw, gradient))
            before, now = self.among.sums(*found)
            return (gradient is None and raw is not None) or (before > 0 and now == 0 and gradient is not None)
        return gradient is None or (raw is not None and bool(raw.any()) and not bool(gradient.any()))

    def _keep_raw(self, parameter: nn.Parameter) -> None:
        if not self._paused and parameter.grad is not None:
            self._raw = local(parameter.grad).clone()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._paused or not torch.is_grad_enabled():
            return
        if self.pending and self._dropped():
            self.take()  # the gradients of that batch were dropped: no step will consume it
            self.discarded()
        names = list(inspect.signature(type(self.components.parts.model).forward).parameters)[1:]
        random = [torch.get_rng_state()]
        if self._called_on.type == "cuda":
            random.append(torch.cuda.get_rng_state(self._called_on))
        device = self._called_on.type
        autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        current = _Pass({**dict(zip(names, args, strict=False)), **kwargs}, random, autocast)
        mask = current.inputs.get("attention_mask")
        self._sizes.begin(mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)
        self._passes.append(current)

    def _after(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        if self._paused or not torch.is_grad_enabled() or not self._passes:
            return
        current = self._passes[-1]
        log_probs, mask = getattr(output, "log_probs", None), getattr(output, "label_mask", None)
        loss, labels = getattr(output, "loss", None), current.inputs.get("labels")

        if log_probs is not None and mask is not None and log_probs.requires_grad:  # TRL's fused head
            current.log_prob = log_probs.detach()[mask].double().sum().item()

            def scored(gradient: Tensor) -> None:
                current.used = True
                values = gradient[mask]
                if len(values) and (values == values[0]).all() and -float("inf") < values[0] < 0:
                    current.normalizer = -1 / values[0].item()

            log_probs.register_hook(scored)
        elif loss is not None and labels is not None and loss.requires_grad:
            tokens = current.inputs.get("num_items_in_batch")
            tokens = float((labels[:, 1:] != IGNORED).sum() if tokens is None else tokens)
            current.log_prob = -loss.item() * tokens

            def summed(gradient: Tensor) -> None:
                current.used = True
                known = tokens and 0 < gradient.item() < float("inf")  # of a batch without labels the loss is no number
                current.normalizer = tokens / gradient.item() if known else None

            loss.register_hook(summed)
        logits = getattr(output, "logits", None)
        if logits is not None and logits.requires_grad:  # for a loss made elsewhere

            def elsewhere(_gradient: Tensor) -> None:
                current.used = True

            logits.register_hook(elsewhere)

    def _watch_embedding(self, _module: nn.Module, args: tuple, output: Tensor) -> None:
        if self._paused or self.idle or not output.requires_grad:
            return
        tokens = args[0].detach().flatten()

        def scatter(gradient: Tensor) -> None:
            if self.among.several:
                self._embedded.append((tokens, gradient.flatten(0, -2)))
                return
            self._embedding_use = self.components.embedding_gradient(tokens, gradient.flatten(0, -2), self._embedding_use)

        output.register_hook(scatter)


def _set_random(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)
