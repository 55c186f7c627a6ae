"""MLX-quantized folders in torch: packed weights stay packed, memory-mapped, and are multiplied as they lie.

Any architecture of Transformers loads that mlx-lm stores module by module: linear layers, embeddings and experts are
replaced by modules over the packed tensors, everything else is filled as usual.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from isomorph.checkpoint import Checkpoint, Tensor
from isomorph.checkpoint.mlx_quantized import QuantizedModule, quantized_modules
from isomorph.errors import InputError, did_you_mean
from isomorph.kernels.modules import QuantizedEmbedding, QuantizedExpertLinear, QuantizedExperts, QuantizedLinear
from isomorph.quantize.settings import Settings

#: Experts as mlx-lm stacks them, [E, N, K]: `X.switch_mlp.gate_proj`, in gpt-oss `X.experts.gate_proj`.
EXPERTS = re.compile(r"^(.*)\.(?:switch_mlp|experts)\.(gate|up|down)_proj$")

#: Tables that older exports carry along and the models compute themselves.
DROPPED = re.compile(r"\.(rotary_emb\.inv_freq|attention\.(masked_bias|bias)|attn\.(masked_bias|bias))$")


def quantized_model(checkpoint: Checkpoint, dtype: str | None, fast: bool) -> tuple[nn.Module, Any]:
    """The folder's model on the CPU, in `dtype` (default: the scales' dtype), and its config. Raises InputError."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    values = {k: v for k, v in (checkpoint.config or {}).items() if k not in ("quantization", "quantization_config")}
    model_type = str(values.get("model_type"))
    if model_type not in CONFIG_MAPPING_NAMES:
        raise InputError(
            f"expected a model_type that isomorph or Transformers knows; found {model_type!r}"
            f"{did_you_mean(str(model_type), CONFIG_MAPPING_NAMES)}; use framework mlx"
        )
    packed = quantized_modules(checkpoint.tensors, checkpoint.quantization)
    target = getattr(torch, dtype or _stored_dtype(checkpoint))
    try:
        config = CONFIG_MAPPING[model_type].from_dict(values)
        # Memory of weights that are replaced is reserved but never touched.
        with no_init_weights():
            module = AutoModelForCausalLM.from_config(config, dtype=target)
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"expected a {model_type} config that Transformers takes in {checkpoint.path}; found: {reason[0]}; "
            "correct config.json"
        ) from error
    fill(module, checkpoint.tensors, packed, target, fast)
    return module, config


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    packed: Mapping[str, QuantizedModule],
    dtype: torch.dtype,
    fast: bool,
) -> None:
    """Give every parameter of `module` its tensor, packed ones as modules over the packed words. Raises InputError."""
    names = Names(module)
    missing = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    unknown: list[str] = []
    experts: dict[str, dict[str, str]] = {}
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition(".")
        if DROPPED.search(name) or (owner in packed and part in ("scales", "biases")):
            continue
        if expert := EXPERTS.match(owner):
            experts.setdefault(expert[1], {})[expert[2]] = owner
            continue
        own = names.own(name)
        if own is None:
            unknown.append(name)
            continue
        if owner in packed and part == "weight":
            place(module, own.rpartition(".")[0], packed[owner], dtype, fast)
        else:
            _assign(module, own, torch_view(tensor.read()))
        missing.discard(own)
    for path, parts in experts.items():
        filled = _place_experts(module, names.own(f"{path}.experts.gate_up_proj"), parts, tensors, packed, fast)
        if not filled:
            unknown.extend(f"{owner}.weight" for owner in parts.values())
        missing -= filled
    tie(module, missing)
    if missing or unknown:
        lost = [f"{name!r} missing" for name in sorted(missing)] + [f"{name!r} unknown" for name in sorted(unknown)]
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(
            f"expected the parameters of {type(module).__name__}; found {lost[0]}{more}; "
            "use framework mlx, or convert --dequantize"
        )


class Names:
    """mlx-lm's names of a model's parameters as the model's own.

    Most are equal; older checkpoints' are renamed as Transformers itself renames them; mlx-lm calls every base model
    `model` and, in gpt_neox, its list of layers `h`.
    """

    def __init__(self, module: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        self._known = frozenset(module.state_dict())
        self._base = f"{module.base_model_prefix}."
        self._renamings = [part for part in get_model_conversion_mapping(module) if isinstance(part, WeightRenaming)]

    def own(self, name: str) -> str | None:
        """The parameter or buffer that `name` means, or None."""
        from transformers.core_model_loading import apply_renamings

        renamed = apply_renamings(name, self._renamings)
        based = re.sub(r"^model\.", self._base, renamed)
        layered = based.replace(f"{self._base}h.", f"{self._base}layers.")
        return next((found for found in (name, renamed, based, layered) if found in self._known), None)


def torch_view(value: np.ndarray) -> torch.Tensor:
    """A tensor over the array's own memory, mapped where it is; treat it as read-only."""
    bits = {"bfloat16": np.int16, "uint32": np.int32}.get(value.dtype.name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        tensor = torch.from_numpy(
            np.ascontiguousarray(value) if bits is None else np.ascontiguousarray(value).view(bits)
        )
    return tensor.view(torch.bfloat16) if value.dtype.name == "bfloat16" else tensor


def packed_parts(entry: QuantizedModule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Settings]:
    """`weight, scales, biases, settings` of a module, over the file's memory; scales checked to be finite."""
    weight, scales = torch_view(entry.weight.read()), torch_view(entry.scales.read())
    biases = None if entry.biases is None else torch_view(entry.biases.read())
    for name, part in (("scales", scales), ("biases", biases)):
        if part is None:
            continue
        # In bytes, E8M0 has one NaN and E4M3 one of either sign.
        byte_nan = (part & 0x7F == 0x7F) if entry.settings.mode == "nvfp4" else part == 0xFF
        if (byte_nan if part.dtype == torch.uint8 else ~torch.isfinite(part)).any():
            raise InputError(f"expected finite {name}; found NaN or infinity in {entry.path}.{name}; quantize it again")
    return weight, scales, biases, entry.settings


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of most of the floating tensors, which in affine folders are the scales."""
    names = [
        tensor.dtype for tensor in checkpoint.tensors.values() if tensor.dtype in ("float32", "bfloat16", "float16")
    ]
    return max(set(names), key=names.count) if names else "bfloat16"


def _assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(path)
    if isinstance(owner, QuantizedLinear) and leaf == "bias":
        owner.bias = value.to(owner.bias.dtype)  # type: ignore[union-attr]
        return
    place = getattr(owner, leaf)
    _check_shape(name, value.shape, place.shape)
    place.data = value.to(place.dtype, copy=True)


def _check_shape(name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(found) != tuple(wanted):
        raise InputError(
            f"expected {name} of shape {list(wanted)}; found {list(found)}; correct the weights or config.json"
        )


def place(module: nn.Module, path: str, entry: QuantizedModule, dtype: torch.dtype, fast: bool) -> None:
    """Put the packed weights of `entry` where `module` has a linear layer or an embedding. Raises InputError."""
    old: Any = module.get_submodule(path)
    shape = tuple(old.weight.shape)
    transposed = type(old).__name__ == "Conv1D"  # GPT-2 stores [K, N]
    _check_shape(path, entry.shape, shape[::-1] if transposed else shape)
    if isinstance(old, nn.Embedding):
        scale = getattr(old, "embed_scale", None)
        factor = 1.0 if scale is None else float(scale)
        module.set_submodule(path, QuantizedEmbedding(*packed_parts(entry), dtype=dtype, scale=factor, fast=fast))
    elif isinstance(old, nn.Linear) or transposed:
        bias = None if getattr(old, "bias", None) is None else old.bias.detach()
        module.set_submodule(path, QuantizedLinear(*packed_parts(entry), bias=bias, fast=fast))
    else:  # a router or the like that multiplies by itself
        old.weight.data = torch_view(entry.dequantized(_name(dtype)).read()).to(dtype)


def _place_experts(
    module: nn.Module,
    gate_up: str | None,
    parts: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    packed: Mapping[str, QuantizedModule],
    fast: bool,
) -> set[str]:
    """Fill the experts of one block, packed where all three matrices are; the names filled, none if not understood."""
    if gate_up is None or set(parts) != {"gate", "up", "down"}:
        return set()
    place = gate_up.rpartition(".")[0]
    old: Any = module.get_submodule(place)
    if not getattr(old, "has_gate", False) or getattr(old, "has_post_expert_norm", False):
        return set()
    names = {f"{place}.{name}" for name, _ in old.named_parameters()}
    down_shape = tuple((old.down_proj.transpose(1, 2) if old.is_transposed else old.down_proj).shape)
    shapes = dict.fromkeys(("gate", "up"), (down_shape[0], down_shape[2], down_shape[1])) | {"down": down_shape}
    if not all(owner in packed for owner in parts.values()):
        if old.has_bias or old.is_transposed or not old.is_concatenated:
            return set()
        dtype = old.down_proj.dtype
        values = {}
        for part, owner in parts.items():
            tensor = packed[owner].dequantized(_name(dtype)) if owner in packed else tensors[f"{owner}.weight"]
            _check_shape(owner, tensor.shape, shapes[part])
            values[part] = torch_view(tensor.read()).to(dtype)
        old.gate_up_proj.data = torch.cat([values["gate"], values["up"]], 1)
        old.down_proj.data = values["down"]
        return names
    made = {}
    for part, owner in parts.items():
        _check_shape(owner, packed[owner].shape, shapes[part])
        bias = torch_view(tensors[f"{owner}.bias"].read()) if old.has_bias else None
        made[part] = QuantizedExpertLinear(*packed_parts(packed[owner]), bias=bias, fast=fast)
    module.set_submodule(place, QuantizedExperts(made["gate"], made["up"], made["down"], gating(old)))
    return names


def gating(experts: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """How `experts`, a module of Transformers, makes one hidden vector of those of gate and up."""
    apply = type(experts)._apply_gate
    if apply.__name__ == "_default_apply_gate":
        activation = experts.act_fn
        return lambda gate, up: activation(gate) * up
    # The module's own function, over the attributes it reads but not the weights.
    bare = copy.copy(experts)
    bare._parameters = {}
    if experts.is_concatenated:
        return lambda gate, up: apply(bare, torch.cat([gate, up], -1))
    return lambda gate, up: apply(bare, torch.stack([gate, up], -1).flatten(-2))


def tie(module: Any, missing: set[str]) -> None:
    """A head without weights of its own takes the embedding's."""
    heads = {name for name, part in module.named_modules() if part is module.get_output_embeddings()}
    if not heads or not any(f"{head}.weight" in missing for head in heads):
        return
    if not module.config.get_text_config().tie_word_embeddings:
        return
    embedding = module.get_input_embeddings()
    if isinstance(embedding, QuantizedEmbedding):
        module.set_output_embeddings(embedding.as_linear())
    else:
        module.tie_weights()
    missing -= {f"{head}.weight" for head in heads}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
