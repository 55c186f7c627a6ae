"""Quantizing and dequantizing whole arrays, on every core, in blocks that bound temporary memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from isomorph.checkpoint.tensor import NUMPY_DTYPES
from isomorph.quantize import affine, microscaling
from isomorph.quantize.packing import pack, unpack
from isomorph.quantize.settings import Settings
from isomorph.quantize.threads import BLOCK_VALUES, for_blocks

#: The loss is measured on one block in so many; measuring all of them would take 39 % longer.
LOSS_STRIDE = 8


class Packed(NamedTuple):
    """A quantized array [..., K]: uint32 words [..., K * bits / 32], scales and biases [..., K / group_size].

    affine: scales and biases have the dtype of the weights. mxfp4, mxfp8, nvfp4: uint8 scales, no biases.
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None


@dataclass
class Loss:
    """Squared error and squared signal of quantized values, summed over the blocks that were measured."""

    blocks: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)
    runs: int = 0

    @property
    def relative_rms(self) -> float:
        """Root of the mean squared error over that of the mean squared weight; 0 when every weight is 0."""
        # Added up in the order of the data, so that the result does not depend on the threads.
        error = math.fsum(self.blocks[key][0] for key in sorted(self.blocks))
        signal = math.fsum(self.blocks[key][1] for key in sorted(self.blocks))
        return math.sqrt(error / signal) if signal else 0.0


def quantize_array(weight: np.ndarray, settings: Settings, loss: Loss | None = None) -> Packed:
    """Quantize float32, float16 or bfloat16 weights [..., K] bit for bit as `mx.quantize` does.

    K must be a multiple of the group size, and the values finite: ValueError otherwise. `loss`, where given, collects
    the error of a sample of the blocks.
    """
    size, bits = settings.group_size, settings.bits
    if not weight.ndim or not settings.fits(weight.shape[-1]):
        raise ValueError(f"rows of {weight.shape[-1:]} weights do not divide into groups of {size}")
    packed = _empty(weight.shape, str(weight.dtype), settings)
    values = np.ascontiguousarray(weight).reshape(-1)
    words, scales = packed.weight.reshape(-1), packed.scales.reshape(-1)
    biases = None if packed.biases is None else packed.biases.reshape(-1)
    run = 0 if loss is None else loss.runs
    if loss is not None:
        loss.runs += 1

    def work(block: slice) -> None:
        groups = values[block].astype(np.float32, copy=False).reshape(-1, size)
        if not np.isfinite(groups).all():
            raise ValueError("the weights are not all finite")
        place = slice(block.start // size, block.stop // size)
        if biases is not None:
            codes, exact_scales, exact_biases = affine.encode(groups, bits)
            scales[place], biases[place] = exact_scales, exact_biases
        else:
            codes, scales[place] = microscaling.encode(groups, bits, weight.dtype)
        words[block.start * bits // 32 : block.stop * bits // 32] = pack(codes.reshape(-1), bits)
        if loss is not None and block.start // BLOCK_VALUES % LOSS_STRIDE == 0:
            local = None if biases is None else biases[place]
            error = _decode(codes, scales[place], local, settings, np.dtype(np.float32))
            error -= groups
            loss.blocks[run, block.start] = _sum_of_squares(error), _sum_of_squares(groups)

    for_blocks(work, values.size, BLOCK_VALUES)
    return packed


def dequantize_array(packed: Packed, settings: Settings, dtype: np.dtype | None = None) -> np.ndarray:
    """The weights [..., K] of `packed`, bit for bit as `mx.dequantize` gives them.

    affine: in the dtype of the scales, unless `dtype` asks for another one, in which the arithmetic is then done.
    Other modes have no dtype of their own; the default is bfloat16, as in MLX.
    """
    size, bits = settings.group_size, settings.bits
    if dtype is None:
        dtype = packed.scales.dtype if settings.affine else NUMPY_DTYPES["bfloat16"]
    words, scales = np.ascontiguousarray(packed.weight).reshape(-1), packed.scales.reshape(-1)
    biases = None if packed.biases is None else packed.biases.reshape(-1)
    values = np.empty((*packed.scales.shape[:-1], packed.scales.shape[-1] * size), dtype)
    flat = values.reshape(-1)

    def work(block: slice) -> None:
        place = slice(block.start // size, block.stop // size)
        codes = unpack(words[block.start * bits // 32 : block.stop * bits // 32], bits).reshape(-1, size)
        local = None if biases is None else biases[place]
        flat[block] = _decode(codes, scales[place], local, settings, dtype).reshape(-1)

    for_blocks(work, flat.size, BLOCK_VALUES)
    return values


def _sum_of_squares(groups: np.ndarray) -> float:
    # Not a dot product: that would be BLAS's threads inside ours.
    return float(np.einsum("ij,ij->i", groups, groups).sum(dtype=np.float64))


def _empty(shape: tuple[int, ...], dtype: str, settings: Settings) -> Packed:
    parts = {name: np.empty(size, NUMPY_DTYPES[kind]) for name, (size, kind) in settings.parts(shape, dtype).items()}
    return Packed(parts["weight"], parts["scales"], parts.get("biases"))


def _decode(
    codes: np.ndarray, scales: np.ndarray, biases: np.ndarray | None, settings: Settings, dtype: np.dtype
) -> np.ndarray:
    if biases is None:
        return microscaling.decode(codes, scales, settings.bits, dtype)
    return affine.decode(codes, scales.astype(dtype, copy=False), biases.astype(dtype, copy=False))
