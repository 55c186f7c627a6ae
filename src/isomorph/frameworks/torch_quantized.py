"""MLX-quantized folders in torch: packed weights stay packed, memory-mapped, and are multiplied as they lie.

Any architecture of Transformers loads that mlx-lm stores module by module: linear layers, embeddings and experts are
replaced by modules over the packed tensors, everything else is filled as usual.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from isomorph.checkpoint import Checkpoint, Tensor
from isomorph.checkpoint.mlx_quantized import QuantizedModule, quantized_modules
from isomorph.errors import InputError, did_you_mean
from isomorph.frameworks.torch_experts import EXPERTS, place_experts
from isomorph.frameworks.torch_tensors import check_shape, dtype_name, packed_parts, put, torch_view
from isomorph.kernels.modules import QuantizedEmbedding, QuantizedLinear
from isomorph.port.stock import CHANGED
from isomorph.quantize.experts import as_mlx_lm_holds_them

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
    if model_type in CHANGED and checkpoint.packing is None:
        raise InputError(
            f"expected weights that mean in Transformers what they mean in mlx-lm; found {model_type!r}, whose mlx-lm "
            "changes as it converts them; use framework mlx"
        )
    # Other quantizers store each expert alone.
    tensors = as_mlx_lm_holds_them(checkpoint.tensors, values) if checkpoint.packing else checkpoint.tensors
    packed = quantized_modules(tensors, checkpoint.quantization)
    target = getattr(torch, dtype or _stored_dtype(checkpoint))
    try:
        config = CONFIG_MAPPING[model_type].from_dict(values)
        # Memory of weights that are replaced is reserved but never touched.
        with no_init_weights():
            module = AutoModelForCausalLM.from_config(config, dtype=target)
    except Exception as error:  # over impossible values Transformers raises nearly everything there is
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"expected a {model_type} config that Transformers takes in {checkpoint.path}; found: {reason}; "
            "correct config.json"
        ) from error
    fill(module, tensors, packed, target, fast)
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
        own = names.own(f"{path}.experts.gate_up_proj")
        filled = place_experts(module, own.rpartition(".")[0], parts, tensors, packed, fast) if own else set()
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
    `model` and, in gpt_neox, its list of layers `h` and has the head among them.
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
        outside = apply_renamings(name.removeprefix("model."), self._renamings)
        based = re.sub(r"^model\.", self._base, renamed)
        layered = based.replace(f"{self._base}h.", f"{self._base}layers.")
        return next((found for found in (name, renamed, based, layered, outside) if found in self._known), None)


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
    if isinstance(owner, nn.Conv1d) and value.shape != place.shape:
        value = value.mT  # MLX's kernels are [out, width, in]
    if value.numel() == place.numel() == 1:
        value = value.reshape(place.shape)
    check_shape(name, value.shape, place.shape)
    put(owner, leaf, value.to(place.dtype, copy=True))


def place(module: nn.Module, path: str, entry: QuantizedModule, dtype: torch.dtype, fast: bool) -> None:
    """Put the packed weights of `entry` where `module` has a linear layer or an embedding. Raises InputError."""
    old: Any = module.get_submodule(path)
    shape = tuple(old.weight.shape)
    transposed = type(old).__name__ == "Conv1D"  # GPT-2 stores [K, N]
    check_shape(path, entry.shape, shape[::-1] if transposed else shape)
    if isinstance(old, nn.Embedding):
        scale = getattr(old, "embed_scale", None)
        factor = 1.0 if scale is None else float(scale)
        module.set_submodule(path, QuantizedEmbedding(*packed_parts(entry), dtype=dtype, scale=factor, fast=fast))
    elif isinstance(old, nn.Linear) or transposed:
        bias = None if getattr(old, "bias", None) is None else old.bias.detach()
        module.set_submodule(path, QuantizedLinear(*packed_parts(entry), bias=bias, fast=fast))
    else:  # a router or the like that multiplies by itself
        put(old, "weight", torch_view(entry.dequantized(dtype_name(dtype)).read()).to(dtype))


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
