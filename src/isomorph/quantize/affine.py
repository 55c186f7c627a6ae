"""MLX's affine format: each group of consecutive weights as integer codes, one scale and one bias.

`w ~ scale * code + bias` with codes 0 .. 2**bits - 1. The bias is the end of the group's range that is larger in
magnitude, snapped so that zero is exactly representable; scales are negative when that end is the maximum.
The results are bit for bit those of `mx.quantize` and `mx.dequantize` on the CPU: every step is one rounded float32
operation, in the same order; only the finished scale and bias are rounded to the weights' dtype.
"""

from __future__ import annotations

import numpy as np

#: Smallest scale, before the bias is snapped (mx.quantize).
MIN_SCALE = np.float32(1e-7)

GROUP_SIZES = (32, 64, 128)


def encode(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 groups [G, group_size] -> uint8 codes of that shape, float32 scales [G], float32 biases [G].

    The values must be finite. A group whose range overflows float32 gets an infinite scale, as in MLX.
    """
    levels = np.float32((1 << bits) - 1)
    starts = np.arange(0, groups.size, groups.shape[1])
    low = np.minimum.reduceat(groups.reshape(-1), starts)
    high = np.maximum.reduceat(groups.reshape(-1), starts)
    # A constant group near the end of float32 divides 0 by 0: its code is 0 and its bias the value itself.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        from_low = np.abs(low) > np.abs(high)
        scales = np.maximum((high - low) / levels, MIN_SCALE)
        scales = np.where(from_low, scales, -scales)
        edges = np.where(from_low, low, high)
        steps = np.rint(edges / scales)
        at_zero = steps == 0
        scales = np.where(at_zero, scales, edges / steps)
        biases = np.where(at_zero, np.float32(0), edges)

        position = groups - biases[:, None]
        position /= scales[:, None]
        # Halves go to the even code.
        codes = np.rint(position, out=position).astype(np.int16)
    # Snapping the bias can push the far end beyond the last code, by one.
    codes -= codes > np.int16(levels)
    return codes.astype(np.uint8), scales, biases


def decode(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """uint8 codes [G, group_size], scales and biases [G] of one dtype -> values [G, group_size] in that dtype.

    As mx.dequantize: the product is rounded to the dtype, then the sum.
    """
    values = codes.astype(np.float32)
    # An infinite scale gives infinities and NaN, quietly, as in MLX; who reads a checkpoint checks its scales.
    with np.errstate(over="ignore", invalid="ignore"):
        values *= scales.astype(np.float32)[:, None]
        values = values.astype(scales.dtype, copy=False).astype(np.float32, copy=False)
        values += biases.astype(np.float32)[:, None]
        return values.astype(scales.dtype, copy=False)
