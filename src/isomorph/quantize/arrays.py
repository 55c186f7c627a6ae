"""Quantizing and dequantizing whole arrays, bit for bit as MLX does: in C++, or in numpy where that was not built."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from isomorph.checkpoint.tensor import NUMPY_DTYPES
from isomorph.quantize import native, portable
from isomorph.quantize.packed import LOSS_STRIDE, Loss, Packed
from isomorph.quantize.settings import Settings
from isomorph.quantize.threads import BLOCK_VALUES


def quantize_array(weight: np.ndarray, settings: Settings, loss: Loss | None = None) -> Packed:
    """Quantize float32, float16 or bfloat16 weights [..., K] bit for bit as `mx.quantize` does.

    K must be a multiple of the group size, and the values finite: ValueError otherwise. `loss`, where given, collects
    the error of a sample of the blocks.
    """
    if not weight.ndim or not settings.fits(weight.shape[-1]):
        raise ValueError(f"rows of {weight.shape[-1:]} weights do not divide into groups of {settings.group_size}")
    parts = {
        name: np.empty(shape, NUMPY_DTYPES[dtype])
        for name, (shape, dtype) in settings.parts(weight.shape, str(weight.dtype)).items()
    }
    packed = Packed(parts["weight"], parts["scales"], parts.get("biases"))
    values = np.ascontiguousarray(weight).reshape(-1)
    squares = None if loss is None else np.zeros((-(-values.size // (BLOCK_VALUES * LOSS_STRIDE)), 2))
    if not _codec().encode(values, settings, packed, squares):
        raise ValueError("the weights are not all finite")
    if loss is not None and squares is not None:
        loss.add(squares)
    return packed


def dequantize_array(packed: Packed, settings: Settings, dtype: np.dtype | None = None) -> np.ndarray:
    """The weights [..., K] of `packed`, bit for bit as `mx.dequantize` gives them.

    affine: in the dtype of the scales, unless `dtype` (float32, float16 or bfloat16) asks for another one, in which the
    arithmetic is then done. Other modes have no dtype of their own; the default is bfloat16, as in MLX.
    """
    if dtype is None:
        dtype = packed.scales.dtype if settings.affine else NUMPY_DTYPES["bfloat16"]
    values = np.empty((*packed.scales.shape[:-1], packed.scales.shape[-1] * settings.group_size), dtype)
    weight, scales = np.ascontiguousarray(packed.weight), np.ascontiguousarray(packed.scales)
    biases = None if packed.biases is None else np.ascontiguousarray(packed.biases)
    _codec().decode(Packed(weight, scales, biases), settings, values.reshape(-1))
    return values


def _codec() -> ModuleType:
    return native if native.available() else portable
