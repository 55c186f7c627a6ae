"""Checkpoints that other tools quantized, seen as what MLX stores, by the `quant_method` of config.json.

    awq                  AutoAWQ's `gemm` files                                  affine 4-bit
    gptq                 GPTQ files, formats 1 and 2, no act-order               affine 2, 3, 4 or 8-bit
    fp8                  E4M3 with a scale a block (DeepSeek, Qwen)              mxfp8, or floats
    compressed-tensors   integers (packed, or int8), fp8, mxfp4 and nvfp4        affine 4 or 8-bit, mxfp8 ..., or floats

No weight is read: words, scales and biases are computed when something asks for them. What tells whether a form exists
is: fp8 scales, GPTQ's order of groups, shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from isomorph.checkpoint import integers, small_floats
from isomorph.checkpoint.tensor import FLOATING, Tensor
from isomorph.errors import InputError
from isomorph.quantize.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Module:
    """The stored parts of one matrix by their names behind `path`, and what config.json says of all."""

    path: str
    parts: Mapping[str, Tensor]
    entry: Mapping[str, Any]
    dtype: str

    def part(self, name: str) -> Tensor:
        """The part called `name`. Raises InputError when there is none, or nothing in it."""
        if name not in self.parts or not self.parts[name].size:
            raise InputError(f"expected {self.path}.{name}; found {'an empty one' if name in self.parts else 'none'}")
        return self.parts[name]

    def matrix(self, name: str) -> Tensor:
        """The part called `name`, of two dimensions. Raises InputError when it has others."""
        tensor = self.part(name)
        if len(tensor.shape) != 2:
            raise InputError(f"expected {tensor.name} as a matrix; found {list(tensor.shape)}; start from the original")
        return tensor


@dataclass(frozen=True)
class Packing:
    """One format: `marker` is a part that only packed matrices have, `parts` all that belong to one.

    `read` gives what MLX stores in their place; `unknown` says of a config.json entry why it is not this format.
    """

    marker: str
    parts: tuple[str, ...]
    read: Callable[[Module], small_floats.Parts]
    unknown: Callable[[Mapping[str, Any]], str | None] = lambda entry: None


def mlx_view(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], dict[str, Any] | None, str | None]:
    """`tensors` with each packed matrix as MLX has it, the config that says so, and which format they came from.

    All as it was, and None, where config.json names none of PACKINGS. Raises InputError for files of such a format that
    cannot be read exactly.
    """
    entry = (config or {}).get("quantization_config")
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    packing = PACKINGS.get(str(method))
    if config is None or packing is None or not isinstance(entry, dict):
        return dict(tensors), None if config is None else dict(config), None
    if reason := packing.unknown(entry):
        raise InputError(f"expected {method} weights that isomorph reads; found {reason}; start from the original")
    stated = str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")
    dtype = stated if stated in FLOATING else "bfloat16"
    paths = {path for name in tensors for path, _, part in [name.rpartition(".")] if part == packing.marker}
    view: dict[str, Tensor] = {}
    own: dict[str, Settings] = {}
    done: set[str] = set()
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        if path not in paths or part not in packing.parts:
            view[name] = tensor
        elif path not in done:
            done.add(path)
            parts = {key: tensors[f"{path}.{key}"] for key in packing.parts if f"{path}.{key}" in tensors}
            found, settings = packing.read(Module(path, parts, entry, dtype))
            view |= {made.name: made for made in found}
            own |= {} if settings is None else {path: settings}
    if floats := len(done) - len(own):
        logger.warning("%d %s matrices have scales that no format of MLX's holds: read as %s", floats, method, dtype)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if own:
        common, *_ = own.values()
        different = {path: settings.to_dict() for path, settings in own.items() if settings != common}
        plain["quantization"] = {**common.to_dict(), **different}
    return view, plain, str(method)


def _awq(module: Module) -> small_floats.Parts:
    return integers.awq(module.path, *map(module.matrix, ("qweight", "qzeros", "scales"))).parts()


def _gptq(module: Module) -> small_floats.Parts:
    qweight, qzeros, scales = map(module.matrix, ("qweight", "qzeros", "scales"))
    # Format 1 stores zero points less one.
    first = 0 if module.entry.get("checkpoint_format") == "gptq_v2" else 1
    return integers.gptq(module.path, qweight, qzeros, scales, module.parts.get("g_idx"), first).parts()


def _fp8(module: Module) -> small_floats.Parts:
    weight, scale = module.matrix("weight"), module.part("weight_scale_inv")
    return _float8(module, weight, scale, module.entry.get("weight_block_size"))


def _float8(module: Module, weight: Tensor, scale: Tensor, block: Any) -> small_floats.Parts:
    if weight.dtype != "float8_e4m3fn":
        raise InputError(f"expected {weight.name} as float8_e4m3fn; found {weight.dtype}; start from the original")
    sides = block if isinstance(block, list) and all(type(side) is int and side > 0 for side in block) else ()
    return small_floats.float8(module.path, weight, scale, sides, module.dtype)


def _compressed(module: Module) -> small_floats.Parts:
    scale, parts = module.part("weight_scale"), module.parts
    if "weight_g_idx" in parts:
        raise InputError(
            f"expected groups of consecutive columns; found act-order in {module.path}.weight_g_idx, which no affine "
            "format can hold; take a checkpoint made without it"
        )
    packed = module.matrix("weight_packed" if "weight_packed" in parts else "weight")
    if packed.dtype == "uint8":
        overall = parts.get("weight_global_scale")
        return small_floats.float4(module.path, packed, scale, overall, module.dtype)
    if packed.dtype == "float8_e4m3fn":
        return _float8(module, packed, scale, None)
    columns = packed.shape[1]
    if packed.dtype == "int32":
        shape = module.part("weight_shape")
        integers.check(shape, (2,), "int64", "int32")
        columns = max(1, int(shape.read()[1]))
    return integers.packed_integers(module.path, packed, scale, parts.get("weight_zero_point"), columns).parts()


def _other_awq(entry: Mapping[str, Any]) -> str | None:
    version, bits = str(entry.get("version") or "gemm").lower(), entry.get("bits") or 4
    return None if version == "gemm" and bits == 4 else f"version {version} of {bits} bits, not gemm of 4"


def _other_gptq(entry: Mapping[str, Any]) -> str | None:
    form = entry.get("checkpoint_format") or "gptq"
    if entry.get("is_marlin_format"):
        form = "marlin"
    return None if form in ("gptq", "gptq_v2") else f"checkpoint_format {form}, not gptq or gptq_v2"


def _other_compressed(entry: Mapping[str, Any]) -> str | None:
    if entry.get("transform_config"):
        return "rotations (transform_config)"
    sparsity = entry.get("sparsity_config") or {"format": "dense"}
    dense = isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense"
    return None if dense else f"sparse weights ({sparsity})"


#: Scales of activations are among the parts, and left out: only weights are stored.
PACKINGS = {
    "awq": Packing("qweight", ("qweight", "qzeros", "scales"), _awq, _other_awq),
    "gptq": Packing("qweight", ("qweight", "qzeros", "scales", "g_idx"), _gptq, _other_gptq),
    "fp8": Packing("weight_scale_inv", ("weight", "weight_scale_inv", "input_scale", "activation_scale"), _fp8),
    "compressed-tensors": Packing(
        "weight_scale",
        (
            *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape"),
            *("weight_g_idx", "input_scale", "input_zero_point", "input_global_scale"),
        ),
        _compressed,
        _other_compressed,
    ),
}
