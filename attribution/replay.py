"""Run a batch once, and copies of it on from any layer, with parts of them edited.

Knows layers, batches and what has to be computed; knows nothing about why an activation is edited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attribution.capture import Edit, Site, edited, only_at, rewritten, sites, tapped
from attribution.models import Anatomy, ExpertsOut
from attribution.samples import Batch


class _Reached(Exception):
    """A pass came as far as it was wanted to."""

    def __init__(self, value: Tensor):
        self.value = value


_CLOSE = 1e-5  # of a closed form to what the modules themselves put out, relative to the largest


@contextmanager
def answering(values: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Inside the block these modules give back what is known already, and do not run; their hooks do."""
    before = {module: vars(module).get("forward") for module in values}

    def answer(value: Any) -> Any:
        return lambda *_args, **_kwargs: value

    try:
        for module, value in values.items():
            vars(module)["forward"] = answer(value)
        yield
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


class Readers:
    """Linears that read one norm of a stream, in closed form when a multiple of one vector is added at every position.

    A norm is taken for gain x (x, less its mean if it centres) / sigma(x) + bias, sigma(x)^2 being the variance or the mean
    square, plus epsilon. Then (linear(norm(x)) - linear(norm(0))) sigma(x) is linear in x. Centring and epsilon are found
    by probing, so that no name of an attribute is relied on; whether all that holds, `hold` tells.

    Args:
        norm: of the last dimension.
        linears: that read it.
        hidden: the stream as it is, Float [sample, position, width].
    """

    def __init__(self, norm: nn.Module, linears: list[nn.Module], hidden: Tensor):
        self.norm, self._hidden = norm, hidden
        self._probe = probe = torch.zeros_like(hidden[0, :1])
        even = probe.shape[-1] // 2 * 2
        probe[..., :even:2], probe[..., 1:even:2] = 1, -1  # of mean zero
        bias = norm(torch.zeros_like(probe))
        large, small = ((norm(scale * probe) - bias).norm() for scale in (64, 1e-3))
        self._epsilon = 1e-6 * probe.square().mean() * ((large / small).square() - 1)
        self._centred = bool((norm(torch.ones_like(probe)) - bias).norm() < 0.1 * large)
        normed, sigma = norm(hidden), self._sigma(hidden)
        self._offsets = {linear: linear(bias) for linear in linears}
        self._intact = {linear: (linear(normed) - offset) * sigma for linear, offset in self._offsets.items()}

    def __call__(self, moved: Tensor, change: Tensor, written: Tensor) -> dict[nn.Module, Tensor]:
        """What every linear puts out, [copy, sample, position, feature].

        Args:
            moved: the stream plus change x written, [copy, sample, position, width].
            change: Float [copy, sample, position].
            written: Float [copy, width].
        """
        scale, normed, sigma, found = self._sigma(moved).reciprocal(), self.norm(written), self._sigma(written), {}
        for linear, offset in self._offsets.items():
            each = (linear(normed) - offset) * sigma
            value = torch.addcmul(self._intact[linear], change[..., None], each[:, None, None])
            found[linear] = torch.addcmul(offset, value, scale)
        return found

    def hold(self) -> bool:
        """Whether the closed form is what the modules put out, on the stream moved by a vector as large as it is."""
        written = self._probe * self._hidden.square().mean().sqrt()
        moved = (self._hidden + written)[None]
        normed, found = self.norm(moved), self(moved, torch.ones_like(moved[..., 0]), written)
        apart = [(out - linear(normed)).abs().max() / out.abs().max() for linear, out in found.items()]
        return bool(torch.stack(apart).max() <= _CLOSE)

    def _sigma(self, stream: Tensor) -> Tensor:
        stream = stream - stream.mean(-1, keepdim=True) if self._centred else stream
        return (stream.square().mean(-1, keepdim=True) + self._epsilon).sqrt()


class Replay:
    """One pass kept layer by layer, from any of which copies of the batch can be run on again.

    A component's ablation changes nothing before its layer, so only the layers after it are run, for many ablations in
    one batch; positions after the last scored one are not run at all, and in the last layer only keys and values are needed
    elsewhere than at scored positions. Of the first layer that runs, modules whose outcome is known are answered for. No
    gradients.

    Attributes:
        scored: Bool [sample, position], up to the last scored position; all that follows has as many positions.
        activations: Float [sample, position, feature] per site.
        hidden: inputs of every layer, and of the final norm: [sample, position, width], depth + 1 of them.
        logits: of the pass, at scored positions.
    """

    @torch.no_grad()
    def __init__(self, parts: Anatomy, batch: Batch):
        self.parts, self.batch = parts, batch
        needed = int(batch.scored.any(0).nonzero().max()) + 1
        self.scored = batch.scored[:, :needed]
        self.hidden: list[Tensor] = []
        self._calls: list[tuple[tuple, dict[str, Any]]] = []
        self._norms: dict[int, dict[nn.Module, list[nn.Module]]] = {layer: {} for layer in range(parts.depth)}
        self._branches: dict[nn.Module, tuple[nn.Module, int | None]] = {}
        self._last: list[nn.Module] = []
        self._readers: dict[int, list[Readers]] = {}
        with self._watching(), tapped(parts, sites(parts)) as self.activations:
            hidden = parts.model.base_model(input_ids=batch.ids[:, :needed], use_cache=False).last_hidden_state
            self.logits = parts.unembed(hidden[self.scored.to(hidden.device)]).to(batch.ids.device)

    @torch.no_grad()
    def run(
        self,
        hidden: Tensor,
        first: int,
        edits: Mapping[nn.Module, Edit] | None = None,
        known: Mapping[nn.Module, Any] | None = None,
    ) -> Tensor:
        """Run copies of the batch from the input of layer `first` to the logits.

        Args:
            hidden: Float [copies * sample, position, width], copy after copy.
            first: the first layer to run; the model's depth to run none.
            edits: as `edited` takes them.
            known: what modules of the first layer put out, which do not run; from `reading` and `writing`.

        Returns:
            Float [copies, token, vocabulary] at scored positions.
        """
        copies = len(hidden) // len(self.batch)
        scored = self.scored.repeat(copies, 1)
        with edited(edits or {}), answering(known or {}):
            for number in range(first, self.parts.depth):
                last = self._read_by_logits_alone(edits or {}, known or {}) if number == self.parts.depth - 1 else ()
                with only_at(last, scored):
                    hidden = self._layer(number, hidden)
        return self.read(hidden[scored.to(hidden.device)].unflatten(0, (copies, -1)))

    @torch.no_grad()
    def reading(self, layer: int, moved: Tensor, change: Tensor, written: Tensor) -> dict[nn.Module, Tensor]:
        """What linears put out that read a norm of a layer's input, when that is moved along one vector in every copy.

        Nothing of those for which `Readers` do not hold: they run. Arguments as of a call of `Readers`.
        """
        if layer not in self._readers:
            narrow = {module for part in self._last for module in part.modules()}  # runs at scored positions, which is less
            wide = {norm: [each for each in linears if each not in narrow] for norm, linears in self._norms[layer].items()}
            found = [Readers(norm, linears, self.hidden[layer]) for norm, linears in wide.items() if linears]
            self._readers = {layer: [each for each in found if each.hold()]}  # of one layer at a time: they hold tensors
        outs = [each(moved, change, written) for each in self._readers[layer]]
        return {linear: out.flatten(0, 1) for each in outs for linear, out in each.items()}

    @torch.no_grad()
    def writing(self, site: Site, change: Tensor) -> dict[nn.Module, Any]:
        """What the part of a layer with this site's linear puts out, when `change` is added to what the linear does.

        Nothing where the part was seen to put out something else than the linear: it runs.

        Args:
            site: heads or neurons of a layer.
            change: Float [copy, sample, position, width].
        """
        linear = site.module(self.parts)
        if linear not in self._branches:
            return {}
        branch, beside = self._branches[linear]
        out = (linear(self.activations[site]) + change).flatten(0, 1)
        return {branch: out if beside is None else (out, *[None] * beside)}

    @torch.no_grad()
    def read(self, hidden: Tensor) -> Tensor:
        """Logits [copies, token, vocabulary] from inputs of the final norm at scored positions, [copies, token, width]."""
        return self.parts.unembed(self.parts.final_norm(hidden)).to(self.batch.ids.device)

    @torch.no_grad()
    def heads_with(self, layer: int, edits: Mapping[nn.Module, Edit], copies: int) -> Tensor:
        """What the heads of a layer put out, [copies * sample, position, feature], when outputs inside it are edited.

        Args:
            layer: run from its input in the pass, and no further than to the attention's output linear.
            edits: of outputs, as `rewritten` takes them.
            copies: of the batch.
        """

        def stop(_module: nn.Module, args: tuple) -> None:
            raise _Reached(args[0])

        handle = self.parts.attention_out[layer].register_forward_pre_hook(stop)
        try:
            with rewritten(edits):
                self._layer(layer, self.hidden[layer].repeat(copies, 1, 1))
        except _Reached as reached:
            return reached.value
        finally:
            handle.remove()
        raise AssertionError("a layer ran without its attention's output linear")

    def _layer(self, number: int, hidden: Tensor) -> Tensor:
        copies = len(hidden) // len(self.batch)
        args, kwargs = self._calls[number]
        args, kwargs = [self._tiled(a, copies) for a in args], {k: self._tiled(v, copies) for k, v in kwargs.items()}
        out = self.parts.layers[number](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _read_by_logits_alone(self, edits: Mapping[nn.Module, Edit], known: Mapping[nn.Module, Any]) -> list[nn.Module]:
        """Modules of the last layer whose output matters at scored positions alone, and of whose parts none is edited."""
        parts, layer = self.parts, self.parts.depth - 1
        queries = [parts.projection(layer, each) for each in parts.row.projections if each.parts == ("q",)]
        out = parts.mlp_out[layer]
        later = () if isinstance(out, ExpertsOut) and out.watched else self._last  # whoever looks there looks at all positions
        return [
            module
            for module in (*queries, parts.attention_out[layer], *later)
            if not any(part in known or (part in edits and part is not module) for part in module.modules())
        ]

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Keep what layers are called with, and see in what order their parts run and which hands its input or output on."""
        parts = self.parts
        normed: dict[nn.Module, Any] = {}  # parts of the layer that runs which read its input, and what they put out
        outs: dict[nn.Module, Tensor] = {}  # of its linears that write

        def called(_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            normed.clear()
            outs.clear()
            kwargs = dict(kwargs)
            self.hidden.append(args[0] if args else kwargs.pop("hidden_states"))
            self._calls.append((args[1:], kwargs))

        def read(linear: nn.Module, args: tuple) -> None:
            for norm, out in normed.items():
                if args[0] is out:
                    self._norms[len(self.hidden) - 1].setdefault(norm, []).append(linear)

        def wrote(linear: nn.Module, _args: tuple, out: Tensor) -> None:
            outs[linear] = out

        def ran(part: nn.Module, args: tuple, out: Any) -> None:
            inside = [linear for linear in outs if any(linear is each for each in part.modules())]
            first, beside = (out[0], len(out) - 1) if isinstance(out, tuple) else (out, None)
            self._branches |= {each: (part, beside) for each in inside if torch.equal(outs[each], first)}
            if args and args[0] is self.hidden[-1]:
                normed[part] = out
            last = parts.attention_out[-1]
            # Phi has one dropout for both branches.
            if last in outs and last not in inside and beside is None and part not in self._last:
                self._last.append(part)

        handles = [layer.register_forward_pre_hook(called, with_kwargs=True) for layer in parts.layers]
        handles.append(parts.final_norm.register_forward_pre_hook(lambda _module, args: self.hidden.append(args[0])))
        for number, layer in enumerate(parts.layers):
            readers = [parts.projection(number, each) for each in parts.row.projections]
            handles += [linear.register_forward_pre_hook(read) for linear in readers]
            writers = (parts.attention_out[number], parts.mlp_out[number])
            handles += [linear.register_forward_hook(wrote) for linear in writers]
            handles += [part.register_forward_hook(ran) for part in layer.children()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _tiled(self, value: Any, copies: int) -> Any:
        """Repeat what has one entry per sample (masks, positions, rotations); leave the rest to broadcasting."""
        if isinstance(value, tuple):
            return tuple(self._tiled(item, copies) for item in value)
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(self.batch) > 1:
            return value.repeat(copies, *[1] * (value.ndim - 1))
        return value
