"""The tensors a config promises: names, shapes and dtypes of a checkpoint that is not there, for plans and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from isomorph.architectures.base import Architecture
from isomorph.checkpoint.source import Checkpoint
from isomorph.checkpoint.tensor import FLOATING, Tensor
from isomorph.errors import InputError
from isomorph.port.mapping import shapes_in

#: MLX's modes whose groups carry a bias besides their scale, and the dtype of scales in the others.
AFFINE = "affine"
SCALE_DTYPE = "uint8"


def declared(checkpoint: Checkpoint, architecture: Architecture, config: Any) -> Checkpoint:
    """`checkpoint`, which holds no weights, with the tensors its config promises; reading one raises InputError."""
    layout = architecture.layouts[architecture.detect(checkpoint)]
    shapes = shapes_in(layout, architecture.parameters(config))
    dtype = declared_dtype(checkpoint.config or {}) or "float32"
    tensors = {name: promised(name, shape, dtype, checkpoint) for name, shape in shapes.items()}
    if checkpoint.quantization is not None:
        tensors = {
            part.name: part
            for tensor in tensors.values()
            for part in _quantized(tensor, checkpoint.quantization, checkpoint)
        }
    return replace(checkpoint, tensors=tensors)


def declared_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype a config.json states, under either of its names; None when it states none that is known."""
    stated = config.get("dtype", config.get("torch_dtype"))
    name = str(stated).removeprefix("torch.")
    return name if name in FLOATING else None


def promised(name: str, shape: tuple[int, ...], dtype: str, checkpoint: Checkpoint) -> Tensor:
    """A tensor known only from the config."""

    def read() -> Any:
        raise InputError(f"expected weights in {checkpoint.path}; found only a config; download or convert the weights")

    return Tensor(name, shape, dtype, read)


def _quantized(tensor: Tensor, quantization: Mapping[str, Any], checkpoint: Checkpoint) -> list[Tensor]:
    """`tensor` itself, or what MLX stores for it: packed codes, scales and, in affine mode, biases."""
    module = tensor.name.removesuffix(".weight")
    own = quantization.get(module, quantization)
    if module == tensor.name or len(tensor.shape) != 2 or not isinstance(own, Mapping):
        return [tensor]
    rows, columns = tensor.shape
    group_size = own.get("group_size", quantization.get("group_size", 64))
    bits = own.get("bits", quantization.get("bits", 4))
    mode = own.get("mode", quantization.get("mode", AFFINE))
    if columns % group_size:
        return [tensor]
    groups = (rows, columns // group_size)
    parts = [promised(tensor.name, (rows, columns * bits // 32), "uint32", checkpoint)]
    parts.append(promised(f"{module}.scales", groups, tensor.dtype if mode == AFFINE else SCALE_DTYPE, checkpoint))
    if mode == AFFINE:
        parts.append(promised(f"{module}.biases", groups, tensor.dtype, checkpoint))
    return parts
