"""Models that several processes hold and train together: what of a tensor lies here, sums over all, and whole layers on call.

Two ways are known: every process holds every parameter and gradients are averaged (DDP), or every parameter is a DTensor cut
along its first dimension over all processes (FSDP2, `fully_shard`). Sums over parameters are then local, and one vector
as long as the list of groups travels. Each process makes the same calls in the same order, and process 0 writes.

A model whose layers accelerate keeps elsewhere (`device_map`) is one process's; of it, this file brings single weights here.

Knows torch.distributed and where tensors lie; knows nothing about components or what is recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attribution.errors import AttributionError, ModelError, RecordError

_FSDP, _DTENSOR = "torch.distributed.fsdp", "torch.distributed.tensor"  # not imported for a model that needs neither
_in_use: WeakSet[nn.Module] = WeakSet()  # models whose parameters outside layers are whole for the length of a block


@dataclass(frozen=True)
class Processes:
    """Processes that hold one model together.

    Attributes:
        size: how many.
        rank: which of them this is.
        group: of torch.distributed; None where there is one process.
        device: of tensors that travel.
    """

    size: int = 1
    rank: int = 0
    group: Any = None
    device: str | torch.device = "cpu"

    @property
    def several(self) -> bool:
        return self.group is not None

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes, where the tensor is; all give one of the same shape. Of one process, the tensor itself."""
        if not self.several:
            return tensor
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def sums(self, *numbers: float) -> list[float]:
        """Sum of each of these numbers over processes, in float64."""
        return self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist() if self.several else list(numbers)

    def each(self, *numbers: float) -> list[list[float]]:
        """These numbers as every process gives them, by process."""
        if not self.several:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.group)
        return torch.stack(found).tolist()

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of every process, one after the other; processes may give different numbers of them."""
        if not self.several:
            return tensor
        counts = [int(count) for (count,) in self.each(len(tensor))]
        own = torch.zeros(max(counts), *tensor.shape[1:], dtype=tensor.dtype, device=self.device)
        own[: len(tensor)] = tensor
        found = [torch.empty_like(own) for _ in counts]
        dist.all_gather(found, own, group=self.group)
        return torch.cat([each[:count] for each, count in zip(found, counts, strict=True)]).to(tensor.device)

    def agree(self, error: AttributionError | None) -> None:
        """Raise, in all processes, what one of them could not do, so that none waits for it."""
        told: list[Any] = [None] * self.size
        if self.several:
            own = None if error is None else (type(error), str(error))
            on_gpu = torch.device(self.device).type == "cuda"  # through which objects travel over NCCL
            with torch.cuda.device(self.device) if on_gpu else nullcontext():
                dist.all_gather_object(told, own, group=self.group)
        if error is not None:
            raise error
        for kind, sentence in filter(None, told):
            raise kind(sentence)


ALONE = Processes()


def processes(device: torch.device) -> Processes:
    """All processes of torch.distributed, where it runs and there are several. `device`: of the model."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return ALONE
    return Processes(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, device)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process, detached and in the same memory: the shard of a DTensor, else all of it."""
    if not _of(_DTENSOR, "DTensor", tensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


def copy_all(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """Copy tensors into as many others, on a GPU by few kernels for all."""
    if into:
        torch._foreach_copy_(into, values)  # pyright: ignore[reportPrivateImportUsage]


def shards(parameters: Sequence[nn.Parameter]) -> Processes:
    """The processes over which these parameters are cut along their first dimension; `ALONE` where they are whole.

    Raises:
        ModelError: parameters that are cut otherwise.
    """
    cut: list[Any] = [parameter for parameter in parameters if _of(_DTENSOR, "DTensor", parameter)]
    if not cut:
        return ALONE
    mesh, told = cut[0].device_mesh, "shard the whole model with fully_shard over all processes, FSDP2's default"
    if len(cut) < len(parameters):
        raise ModelError(
            f"{len(cut)} of {len(parameters)} parameters are sharded and the others are not, whose gradients each process has "
            f"for itself; {told}"
        )
    for parameter in cut:
        places = parameter.placements
        plain = len(places) == 1 and type(places[0]).__name__ == "Shard" and places[0].dim == 0
        if not plain or parameter.device_mesh != mesh or mesh.size() != dist.get_world_size():
            raise ModelError(
                f"a parameter lies as {tuple(places)} on a mesh of shape {tuple(parameter.device_mesh.shape)} in "
                f"{dist.get_world_size()} processes: tensor, pipeline and hybrid parallel models are not read; {told}"
            )
        if parameter.device.type != mesh.device_type:
            raise ModelError(
                f"shards lie on {parameter.device.type} and passes run on {mesh.device_type}; shard without offloading"
            )
    rank = mesh.get_local_rank()
    device = torch.device(mesh.device_type) if mesh.device_type == "cpu" else local(cut[0]).device
    return Processes(mesh.size(), rank, mesh.get_group(), device)


def rows_here(parameter: Tensor, among: Processes) -> slice:
    """Which rows of a parameter cut over these processes lie here."""
    whole, chunk = parameter.shape[0], -(-parameter.shape[0] // among.size)
    start = min(whole, among.rank * chunk)
    held = slice(start, start + len(local(parameter)))
    if held.stop != min(whole, start + chunk):
        raise ModelError(
            f"process {among.rank} holds {len(local(parameter))} of {whole} rows, not the {chunk} that FSDP2 gives it"
        )
    return held


def settle(model: nn.Module) -> None:
    """Forget gathered copies of sharded parameters, so that the next pass reads the shards as they are now."""
    for module in _sharded(model):
        module.reshard()
    if model in _in_use:
        _gather(model)


@contextmanager
def usable(model: nn.Module) -> Iterator[None]:
    """Let parts of a sharded model be called one by one inside the block; of any other model this does nothing.

    Layers gather themselves when they are called, as in training; what stands outside of layers (embedding, last norm,
    unembedding) is whole throughout, as FSDP keeps it from the forward pass to the backward one.
    """
    if model in _in_use or not _sharded(model):
        yield
        return
    _in_use.add(model)
    try:
        settle(model)
        yield
    finally:
        _in_use.discard(model)
        settle(model)


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its input: with its first weights, or where these are brought to."""
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    hook = getattr(embedding, "_hf_hook", None)
    if (there := getattr(hook, "execution_device", None)) is not None:
        return torch.device(there)
    return next(model.parameters()).device


def check_whole(model: nn.Module, what: str) -> None:
    """Raise ModelError where not all of a model's weights lie in this process's memory; `what` needs them there."""
    settle(model)
    parameters = list(model.parameters())
    sharded = any(_of(_DTENSOR, "DTensor", parameter) for parameter in parameters)
    if sharded or any(parameter.is_meta for parameter in parameters):
        where = "the model's weights are sharded over processes" if sharded else "some of the model's weights are offloaded"
        raise ModelError(f"{where}; open it where all of them fit in the memory of one process, which {what} needs")


def check_callable(model: nn.Module) -> None:
    """Raise ModelError where weights are offloaded and nothing brings them into memory for their module's pass."""
    for module in model.modules():
        if any(each.is_meta for each in module.parameters(recurse=False)) and not hasattr(module, "_hf_hook"):
            raise ModelError("some of the model's weights are offloaded; open it where all of them fit, or with a device_map")


@contextmanager
def present(model: nn.Module, *modules: nn.Module) -> Iterator[None]:
    """Have these modules' own weights here and whole inside the block: gathered where sharded, loaded where offloaded."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_present(model, module))
        yield


@contextmanager
def _present(model: nn.Module, module: nn.Module) -> Iterator[None]:
    own = list(module.parameters(recurse=False))
    if any(parameter.is_meta for parameter in own):
        from accelerate.utils import align_module_device

        with align_module_device(module):
            yield
    elif any(_of(_DTENSOR, "DTensor", parameter) for parameter in own):
        holder = [each for each in _sharded(model) if any(part is module for part in each.modules())][-1]
        holder.unshard()
        try:
            yield
        finally:
            holder.reshard()
    else:
        yield


def gradients(model: nn.Module, scalar: Tensor, parameters: Sequence[nn.Parameter], others: Sequence[Tensor]) -> list[Tensor]:
    """Gradients through FSDP's own backward pass, which averages over processes and leaves to each its shard.

    The pass runs in `usable`. `.grad` of every parameter is left as it was.

    Args:
        model: that is sharded.
        scalar: to differentiate, computed in every process.
        parameters: sharded ones; their gradients come as the shards that lie here, zero where there is none.
        others: tensors of the pass that require gradients; of theirs nothing is averaged.
    """
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    for tensor in others:
        tensor.retain_grad()
    try:
        scalar.backward()
        found = [torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
        settle(model)
    beside = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in others]
    return [*found, *beside]


def check_trainable(model: nn.Module) -> None:
    """Refuse a model that processes hold, or devices, in a way in which its training cannot be recorded truthfully.

    Raises:
        RecordError: FSDP version 1, frozen shards, gradients that are not averaged, a model dispatched over devices.
        ModelError: parameters cut otherwise than FSDP2 does by default.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise RecordError("FSDP version 1 flattens parameters, so that no component can be told; use FSDP2 (fsdp_version: 2)")
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places) > 1 or "disk" in places:
        raise RecordError(
            f"the model is dispatched over {', '.join(sorted(places))} by its device_map, which is for passes without "
            "training; to train what does not fit one device, shard it with FSDP2 (accelerate launch)"
        )
    settle(model)
    parameters = list(model.parameters())
    if not shards(parameters).several:
        return
    if frozen := sum(not parameter.requires_grad for parameter in parameters):
        raise RecordError(
            f"{frozen} of {len(parameters)} parameters of a sharded model are frozen, as under LoRA, and FSDP forms no "
            "gradient of them; train all of them, or train in one process or under DDP"
        )
    for module in _sharded(model):
        for group in getattr(module._get_fsdp_state(), "_fsdp_param_groups", ()):
            if getattr(group, "gradient_divide_factor", None) is not None:
                raise RecordError(
                    f"FSDP divides gradients by {group.gradient_divide_factor} and not by the number of processes, so that "
                    "they are of no mean loss; leave its factor alone"
                )


def rounded_to(model: nn.Module) -> torch.dtype | None:
    """The type that FSDP rounds gathered weights to for every pass, where its mixed precision policy names one."""
    policies = (getattr(module._get_fsdp_state(), "_mp_policy", None) for module in _sharded(model))
    return next((policy.param_dtype for policy in policies if policy is not None and policy.param_dtype), None)


def same_everywhere(among: Processes, number: float, what: str) -> None:
    """Raise RecordError unless every process has the same number, as it does where it holds the same model."""
    found = [each for (each,) in among.each(number)]
    if len({str(each) for each in found}) > 1:  # two that are not a number are the same
        raise RecordError(
            f"{what} of {among.size} processes differ ({', '.join(f'{each:.6g}' for each in found)}), so that they do not "
            "train one model together; wrap it in DistributedDataParallel or shard it with fully_shard, or record each "
            "training in a launch of its own"
        )


def _sharded(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 gathers one at a time, outer before inner."""
    if _FSDP not in sys.modules or not dist.is_initialized():  # some library has only imported it
        return []
    return [module for module in model.modules() if _of(_FSDP, "FSDPModule", module)]


def _gather(model: nn.Module) -> None:
    """Make whole what stands outside of layers."""
    found = _sharded(model)
    _begin(found[0])
    layers = {part for each in model.modules() if isinstance(each, nn.ModuleList) for part in each.modules()}
    for module in found:
        if module not in layers:
            module.unshard()


def _begin(root: Any) -> None:
    """Let FSDP see its root first, as it must before it sees a layer: a pass through it in which nothing is computed."""
    name = "_pass_of_nothing"
    setattr(root, name, lambda nothing: nothing)
    sys.modules[_FSDP].register_fsdp_forward_method(root, name)
    try:
        getattr(root, name)(None)  # on a GPU FSDP brings what is given there, and fails where nothing is
    finally:
        delattr(root, name)


def _of(module: str, kind: str, thing: object) -> bool:
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(thing, getattr(loaded, kind, ()))
