"""MLX-quantized folders of our own architectures in Flax: which of a model's modules stay packed, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from isomorph import port
from isomorph.architectures.base import Architecture
from isomorph.checkpoint import Checkpoint
from isomorph.checkpoint.mlx_quantized import QuantizedModule
from isomorph.kernels.flax import PackedModule, QuantizedEmbed, QuantizedExpertLinear, QuantizedLinear


def packed_modules(architecture: Architecture, checkpoint: Checkpoint, config: Any) -> dict[str, QuantizedModule]:
    """The quantized modules of the folder by the name of the parameter they replace in the Flax model.

    Those are the matrices of `nnx.Linear` and `nnx.Embed`, the stacked ones of experts, and a head that is a bare
    matrix: a model's file lets a module stand there. Other quantized weights are dequantized. Raises InputError.
    """
    if checkpoint.quantization is None:
        return {}
    reading = port.read(checkpoint, architecture, config=config, dequantize=False)
    packed = {}
    for name, row in port.expand(architecture.layouts[architecture.native["flax"]], reading.shapes).items():
        # A folded gain is in the head's weights; by itself it then reads as 1.
        entry = reading.module(row.canonical[0])
        replaceable = name.endswith((".kernel", ".embedding")) or architecture.role(name) == "head"
        if entry is not None and replaceable:
            packed[name] = entry
    return packed


def place(model: nnx.Module, packed: Mapping[str, QuantizedModule], dtype: Any) -> nnx.Module:
    """`model` with modules over packed words, still zeros, where the parameters named were."""
    for name, entry in packed.items():
        owner, leaf = parent(model, module_path(name))
        old = getattr(owner, leaf)
        matrix = old if name == module_path(name) else getattr(old, name.rpartition(".")[2])
        *outer, rows, columns = matrix.get_metadata().get("out_sharding") or (None,) * len(entry.shape)
        if name.endswith(".kernel"):  # [in, out]
            rows, columns = columns, rows
        kind: type[PackedModule] = QuantizedExpertLinear if len(entry.shape) == 3 else QuantizedLinear
        if isinstance(old, nnx.Embed):
            kind = QuantizedEmbed
        module = kind(
            entry.shape,
            entry.settings,
            scale_dtype=entry.scales.dtype,
            dtype=dtype,
            split=(*outer, rows, columns),
        )
        if isinstance(module, (QuantizedLinear, QuantizedExpertLinear)) and matrix is not old:
            module.bias = old.bias
        setattr(owner, leaf, module)
    return model


def module_path(name: str) -> str:
    """The module that a parameter belongs to; a bare head's name is its own."""
    return name.removesuffix(".kernel").removesuffix(".embedding")


def parts(name: str, entry: QuantizedModule) -> Iterator[tuple[str, np.ndarray]]:
    """The packed parameters that take the place of `name`. Raises InputError for scales that are not finite."""
    packed = entry.read()
    for part in entry.settings.parts(entry.shape, entry.scales.dtype):
        yield f"{module_path(name)}.{part}", getattr(packed, part)


def without_extension(model: nnx.Module) -> nnx.Module:
    """`model`, every product in jax.numpy, which XLA can split over a mesh."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, PackedModule):
            module.extension = False
    return model


def parent(model: nnx.Module, path: str) -> tuple[Any, str]:
    """The object that holds the module at a dotted path, and the attribute it has there."""
    *owners, leaf = path.split(".")
    owner: Any = model
    for part in owners:
        owner = owner[int(part)] if isinstance(owner, nnx.List) else getattr(owner, part)
    return owner, leaf
