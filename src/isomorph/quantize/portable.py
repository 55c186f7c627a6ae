"""The codec of whole arrays in numpy, in blocks that fit the cache, on every core: where there is no extension."""

from __future__ import annotations

import numpy as np

from isomorph.quantize import affine, microscaling
from isomorph.quantize.packed import LOSS_STRIDE, Packed
from isomorph.quantize.packing import pack, unpack
from isomorph.quantize.settings import Settings
from isomorph.quantize.threads import BLOCK_VALUES, for_blocks


def encode(values: np.ndarray, settings: Settings, packed: Packed, squares: np.ndarray | None) -> bool:
    """Fill the contiguous arrays of `packed` from `values` [N]; False when a value is not finite.

    `squares` float64 [S, 2], where given, gets the squared error and the squared weight of every LOSS_STRIDE-th block.
    """
    size, bits = settings.group_size, settings.bits
    words, scales = packed.weight.reshape(-1), packed.scales.reshape(-1)
    biases = None if packed.biases is None else packed.biases.reshape(-1)
    finite = [True]

    def work(block: slice) -> None:
        groups = values[block].astype(np.float32, copy=False).reshape(-1, size)
        if not np.isfinite(groups).all():
            finite[0] = False
            return
        place = slice(block.start // size, block.stop // size)
        if biases is not None:
            codes, exact_scales, exact_biases = affine.encode(groups, bits)
            # Beyond float16 a scale becomes infinite, as in MLX.
            with np.errstate(over="ignore"):
                scales[place], biases[place] = exact_scales, exact_biases
        else:
            codes, scales[place] = microscaling.encode(groups, bits, values.dtype)
        words[block.start * bits // 32 : block.stop * bits // 32] = pack(codes.reshape(-1), bits)
        number, skipped = divmod(block.start // BLOCK_VALUES, LOSS_STRIDE)
        if squares is not None and not skipped:
            local = None if biases is None else biases[place]
            error = _decoded(codes, scales[place], local, settings, np.dtype(np.float32)) - groups
            squares[number] = [np.square(part, dtype=np.float64).sum() for part in (error, groups)]

    for_blocks(work, values.size, BLOCK_VALUES)
    return finite[0]


def decode(packed: Packed, settings: Settings, values: np.ndarray) -> None:
    """Fill `values` [N], float32, float16 or bfloat16, from contiguous `packed`, computing in its dtype."""
    size, bits = settings.group_size, settings.bits
    words, scales = packed.weight.reshape(-1), packed.scales.reshape(-1)
    biases = None if packed.biases is None else packed.biases.reshape(-1)

    def work(block: slice) -> None:
        place = slice(block.start // size, block.stop // size)
        codes = unpack(words[block.start * bits // 32 : block.stop * bits // 32], bits).reshape(-1, size)
        local = None if biases is None else biases[place]
        values[block] = _decoded(codes, scales[place], local, settings, values.dtype).reshape(-1)

    for_blocks(work, values.size, BLOCK_VALUES)


def _decoded(
    codes: np.ndarray, scales: np.ndarray, biases: np.ndarray | None, settings: Settings, dtype: np.dtype
) -> np.ndarray:
    if biases is None:
        return microscaling.decode(codes, scales, settings.bits, dtype)
    return affine.decode(codes, scales.astype(dtype, copy=False), biases.astype(dtype, copy=False))
