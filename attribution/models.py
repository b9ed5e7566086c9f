"""Open a causal language model, and resolve its row of `architectures` to modules; fail fast where the row is wrong.

Knows how a model is built; knows nothing about samples, training or attribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from attribution.architectures import ARCHITECTURES, Architecture, Projection
from attribution.errors import ConfigError, ModelError

EMBEDDED = Path(__file__).parent / "worlds" / "data"
IDENTITY_TOLERANCE = 1e-5  # relative, float32; lower precisions are checked in float32 on a copy of the activations
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


class Loaded(NamedTuple):
    """What `load` returns; unpacks as `model, tokenizer`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Anatomy:
    """The modules of one model that matter here, and their sizes. Built by `anatomy`, never by hand."""

    model: PreTrainedModel
    row: Architecture
    layers: tuple[nn.Module, ...]
    attention_out: tuple[nn.Module, ...]
    mlp_out: tuple[nn.Module, ...]
    final_norm: nn.Module
    embedding: nn.Embedding
    unembedding: nn.Linear
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    vocabulary: int

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def tied(self) -> bool:
        """Whether the unembedding reads the embedding's matrix."""
        return self.unembedding.weight is self.embedding.weight

    def branch(self, layer: int, which: str) -> nn.Module:
        """The module whose output is added to the residual stream. `which`: "attention" or "mlp"."""
        post_norm = getattr(self.row, f"{which}_post_norm")
        return _child(self.layers[layer], post_norm) if post_norm else getattr(self, f"{which}_out")[layer]

    def projection(self, layer: int, projection: Projection) -> nn.Module:
        return _child(self.layers[layer], projection.module)

    def unembed(self, normed: Tensor) -> Tensor:
        """Logits from outputs of the final norm, soft-capped where the model caps them; in float32 or wider.

        Metrics subtract numbers of like size, which half precision would round away.
        """
        logits = self.unembedding(normed)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits


def load(name: str, *, dtype: str = "float32", device: str = "cpu", allow_pickle: bool = False) -> Loaded:
    """Open a causal language model and its tokenizer, checked and in eval mode.

    Args:
        name: an embedded model (`embedded()` lists them), a local folder, or a hub id.
        dtype: torch dtype name of the weights.
        device: torch device.
        allow_pickle: also accept weights stored as pickles, which can run code when opened.

    Raises:
        ModelError: nothing there, weights not in safetensors, unknown architecture, not a causal LM, or the model
            does not behave as its row in `architectures` says.
        ConfigError: no such dtype, or no such device here.
    """
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"unknown dtype {dtype!r}; expected a torch dtype such as float32 or bfloat16")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used: {_first_line(error)}; expected cpu, or cuda where there is one"
        ) from None
    try:
        source = locate(name)
    except (OSError, RuntimeError) as error:  # a name too long for the file system, a home that is not there
        raise ModelError(f"model {name!r} cannot be looked for: {_first_line(error)}; name a folder or a hub id") from None
    config = _config(name, source)
    if isinstance(source, Path):
        _check_weights(source, allow_pickle)
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, info = opened
    except Exception as error:  # a damaged file makes safetensors, tokenizers and transformers raise almost anything
        raise ModelError(f"model {name!r} cannot be opened: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"model {name!r} lacks weights of a causal language model (missing: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}); name a folder saved from a …ForCausalLM model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"the tokenizer of model {name!r} cannot be opened; save one beside the weights with save_pretrained"
        ) from error
    model.to(device).eval()
    check(model)
    return Loaded(model, tokenizer)


def embedded() -> list[str]:
    """Names of the models shipped with the package; a world's first model also answers to the world's bare name."""
    return sorted(f"{path.parent.parent.name}/{path.parent.name}" for path in EMBEDDED.glob("*/*/config.json"))


def anatomy(model: nn.Module) -> Anatomy:
    """Resolve a model (or a trainer's wrapper around it) to its parts.

    Raises:
        ModelError: unknown architecture, no unembedding, or sizes that contradict the row.
    """
    base = _unwrap(model)
    row = _row(base.config.model_type)
    unembedding: Any = base.get_output_embeddings()
    if unembedding is None:
        raise ModelError(
            f"{type(base).__name__} has no unembedding, so that it is no causal language model; open one with attribution.load"
        )
    layers = tuple(_child(base, row.layers).children())
    if not layers:
        raise ModelError(f"{type(base).__name__} has no layers at {row.layers!r}; attribution needs at least one")
    config = base.config
    attention_out = tuple(_child(layer, row.attention_out) for layer in layers)
    mlp_out = tuple(_child(layer, row.mlp_out) for layer in layers)
    heads = config.num_attention_heads
    width = _in_features(attention_out, row.attention_out, base, row)
    features = _in_features(mlp_out, row.mlp_out, base, row)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if width != heads * head_dim:
        raise ModelError(f"{row.attention_out} reads {width} features, expected {heads} heads x {head_dim}; the row is wrong")
    return Anatomy(
        model=base,
        row=row,
        layers=layers,
        attention_out=attention_out,
        mlp_out=mlp_out,
        final_norm=_child(base, row.final_norm),
        embedding=base.get_input_embeddings(),
        unembedding=unembedding,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        neurons=features,
        vocabulary=unembedding.weight.shape[0],
    )


@torch.no_grad()
def check(model: nn.Module) -> dict[str, float]:
    """Refute the model's row in `architectures` if it can be refuted.

    Runs eight tokens and requires: residual stream = embedding + what every branch wrote; each branch = sum of its
    heads or neurons (+ bias); logits = unembedding of the final norm; zeroing a head or neuron changes the logits (of the
    first layer, in the first one that does: some may be pruned).

    Returns:
        Relative error of each identity.

    Raises:
        ModelError: an identity fails.
    """
    parts = anatomy(model)
    device = next(parts.model.parameters()).device
    tokens = torch.arange(8, device=device).remainder(parts.vocabulary).view(1, 8)
    was_training = [module for module in parts.model.modules() if module.training]
    parts.model.eval()
    try:
        errors, logits = _identities(parts, tokens)
        tolerance = IDENTITY_TOLERANCE if parts.unembedding.weight.dtype == torch.float32 else 0.05
        for identity, error in errors.items():
            if not error <= tolerance:
                raise ModelError(
                    f"{parts.model.config.model_type}: {identity} is off by {error:.1e} (allowed {tolerance:.0e}); "
                    "its row in attribution/architectures.py does not describe this model"
                )
        first = (("head", parts.attention_out[0], parts.heads), ("neuron", parts.mlp_out[0], parts.neurons))
        for which, module, units in first:
            if all(torch.equal(_with_zeroed(parts, module, unit, units, tokens), logits) for unit in range(units)):
                raise ModelError(
                    f"{parts.model.config.model_type}: zeroing a {which} leaves the logits unchanged; the row is wrong"
                )
    finally:
        for module in was_training:
            module.training = True
    return errors


def _identities(parts: Anatomy, tokens: Tensor) -> tuple[dict[str, float], Tensor]:
    seen: dict[str, Tensor] = {}
    handles = []

    def keep(name: str, module: nn.Module, inputs: bool) -> None:
        def hook(_module: nn.Module, args: tuple, output: Any) -> None:
            value = args[0] if inputs else (output[0] if isinstance(output, tuple) else output)
            seen[name] = value.detach().float()

        handles.append(module.register_forward_hook(hook))

    try:
        handles.append(
            parts.layers[0].register_forward_pre_hook(
                lambda _module, args, kwargs: seen.__setitem__("start", (args[0] if args else kwargs["hidden_states"]).float()),
                with_kwargs=True,
            )
        )
        for layer in range(parts.depth):
            for which, out in (("attention", parts.attention_out[layer]), ("mlp", parts.mlp_out[layer])):
                keep(f"{which} {layer} in", out, True)
                keep(f"{which} {layer} out", out, False)
                keep(f"{which} {layer} branch", parts.branch(layer, which), False)
        keep("end", parts.final_norm, True)
        keep("normed", parts.final_norm, False)
        logits = parts.model(input_ids=tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()

    branches = [f"{which} {layer}" for layer in range(parts.depth) for which in ("attention", "mlp")]
    for name in (*(f"{branch} {end}" for branch in branches for end in ("out", "branch")), "end", "normed"):
        if name not in seen or seen[name].shape != seen["start"].shape:
            raise ModelError(
                f"{parts.model.config.model_type}: {name!r} has not the shape of the residual stream; its row in "
                "attribution/architectures.py does not describe this model"
            )
    residual = seen["start"] + sum(seen[f"{branch} branch"] for branch in branches)
    errors = {"the residual stream (embedding + branches)": _relative(residual, seen["end"])}
    for which, modules, units in (("attention", parts.attention_out, parts.heads), ("mlp", parts.mlp_out, parts.neurons)):
        worst = 0.0
        for layer, module in enumerate(modules):
            weight = output_weights(module, parts.row).float()  # [out, in]
            pieces = seen[f"{which} {layer} in"].unflatten(-1, (units, -1))
            total = torch.einsum("btud,oud->bto", pieces, weight.unflatten(-1, (units, -1)))
            if getattr(module, "bias", None) is not None:
                total = total + module.bias.float()
            worst = max(worst, _relative(total, seen[f"{which} {layer} out"]))
        errors[f"the sum of {'heads' if which == 'attention' else 'neurons'}"] = worst
    unembedded = seen["normed"] @ parts.unembedding.weight.float().T
    if getattr(parts.unembedding, "bias", None) is not None:
        unembedded = unembedded + parts.unembedding.bias.float()
    cap = getattr(parts.model.config, "final_logit_softcapping", None)
    if cap:
        unembedded = cap * torch.tanh(unembedded / cap)
    errors["the logits (unembedding of the final norm)"] = _relative(unembedded, logits.float())
    return errors, logits


def output_weights(module: nn.Module, row: Architecture) -> Tensor:
    """Weights of an attention-out or MLP-out linear as [residual width, inputs], a view."""
    weight = module.get_parameter("weight")
    return weight.T if row.transposed else weight


def _with_zeroed(parts: Anatomy, module: nn.Module, unit: int, units: int, tokens: Tensor) -> Tensor:
    def zero(_module: nn.Module, args: tuple) -> tuple:
        value = args[0].clone()
        value.unflatten(-1, (units, -1))[..., unit, :] = 0
        return (value, *args[1:])

    handle = module.register_forward_pre_hook(zero)
    try:
        return parts.model(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()


def locate(name: str) -> Path | str:
    """Folder of an embedded or local model, or the hub id unchanged."""
    inside = EMBEDDED / name
    if not Path(name).is_absolute() and ".." not in Path(name).parts:
        if (inside / "config.json").is_file():
            return inside
        first = sorted(inside.glob("*/config.json"))
        if first:
            return first[0].parent
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} holds no config.json; name a folder written by save_pretrained")
        return folder
    looks_local = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith("/")
    if looks_local or folder.exists():
        raise ModelError(f"no model folder at {name}; embedded models: {', '.join(embedded())}")
    return name


def _config(name: str, source: Path | str):
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # an invalid value raises types of transformers' own
        raise ModelError(
            f"model {name!r} cannot be opened: {_first_line(error)}; expected an embedded model "
            f"({', '.join(embedded())}), a folder or a hub id"
        ) from error
    declared = config.architectures or []
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if causal is None or (declared and causal not in declared):
        what = ", ".join(declared) or config.model_type
        raise ModelError(
            f"model {name!r} is not a causal language model ({what}); name one whose class is …ForCausalLM or …LMHeadModel"
        )
    _row(config.model_type)
    return config


def _row(model_type: str) -> Architecture:
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"unknown architecture {model_type!r}; known: {known}; add a row to attribution/architectures.py")
    return ARCHITECTURES[model_type]


def _check_weights(folder: Path, allow_pickle: bool) -> None:
    if list(folder.glob("*.safetensors")):
        return
    pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
    if not pickles:
        raise ModelError(f"{folder} holds no weights; expected model.safetensors")
    if not allow_pickle:
        raise ModelError(
            f"{folder} holds weights only as pickle ({pickles[0]}), which can run code when opened; convert it with "
            "save_pretrained to safetensors, or pass allow_pickle=True (--allow-pickle) if you trust it"
        )


def _unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside data-parallel wrappers."""
    if hasattr(model, "peft_config"):
        raise ModelError("components of a model with adapters are not resolved; merge the adapters, or use the base model")
    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "module", None)
        if inner is None:
            raise ModelError(
                f"{type(model).__name__} is not a transformers causal language model; open one with attribution.load"
            )
        model = inner
    return model


def _child(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise ModelError(
            f"{type(module).__name__} has no part {path!r}; its row in attribution/architectures.py is wrong"
        ) from None


def _in_features(modules: tuple[nn.Module, ...], path: str, base: PreTrainedModel, row: Architecture) -> int:
    """Input features of linears that write to the residual stream, the same in every layer."""
    width = base.config.hidden_size
    shapes = {tuple(output_weights(module, row).shape) if hasattr(module, "weight") else () for module in modules}
    if len(shapes) > 1 or len(shape := shapes.pop()) != 2 or shape[0] != width:
        raise ModelError(
            f"{path} of {type(base).__name__} is not one linear per layer that writes to a residual stream of width {width}; "
            f"the row {base.config.model_type!r} in attribution/architectures.py is wrong"
        )
    return shape[1]


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
