"""The tensors a config promises: names, shapes and dtypes of a checkpoint that is not there, for plans and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from isomorph.architectures.base import Architecture
from isomorph.checkpoint import mxfp4
from isomorph.checkpoint.mlx_quantized import parse_quantization
from isomorph.checkpoint.source import Checkpoint
from isomorph.checkpoint.tensor import FLOATING, Tensor
from isomorph.errors import InputError
from isomorph.port.mapping import shapes_in
from isomorph.port.table import Layout
from isomorph.quantize.settings import Settings


def declared(checkpoint: Checkpoint, architecture: Architecture, config: Any) -> Checkpoint:
    """`checkpoint`, which holds no weights, with the tensors its config promises; reading one raises InputError."""
    layout = architecture.layouts[architecture.detect(checkpoint)]
    # The published MXFP4 files say nothing of what is not in that format: it is bfloat16.
    dtype = declared_dtype(checkpoint.config or {}) or ("bfloat16" if layout.never_floats else "float32")
    values = dict(checkpoint.config or {})
    if layout.never_floats:
        values["quantization"] = mxfp4.MXFP4.to_dict()
    quantization = parse_quantization(values["quantization"]) if "quantization" in values else None
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes_in(layout, architecture.parameters(config)).items():
        settings = _settings(name, shape, layout, quantization)
        parts = {"": (shape, dtype)} if settings is None else settings.parts(shape, dtype)
        for part, (size, kind) in parts.items():
            own = f"{name.removesuffix('weight')}{part}" if part else name
            tensors[own] = promised(own, size, kind, checkpoint)
    return replace(checkpoint, tensors=tensors, config=values)


def _settings(
    name: str,
    shape: tuple[int, ...],
    layout: Layout,
    quantization: tuple[Settings, dict[str, Settings | None]] | None,
) -> Settings | None:
    """How the tensor called `name` is packed; None when it is not."""
    if layout.never_floats:
        return None if layout.stores_floats(name) else mxfp4.MXFP4
    if quantization is None or not name.endswith(".weight") or len(shape) < 2:
        return None
    default, own = quantization
    settings = own.get(name.removesuffix(".weight"), default)
    return settings if settings is not None and settings.fits(shape[-1]) else None


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
