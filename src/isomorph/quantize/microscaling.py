"""The microscaling formats mxfp4, mxfp8 and nvfp4 as MLX stores them: small floats with one 8-bit scale a group.

mxfp4 and mxfp8 have power-of-two scales (E8M0: `2 ** (byte - 127)`) over groups of 32, nvfp4 has E4M3 scales over
groups of 16. Elements are E2M1 (four bits: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives) or E4M3 (eight bits).
Bit for bit `mx.quantize` and `mx.dequantize` on the CPU, which compute in the dtype of the weights, round the exponent
of the scale up and break ties between elements towards zero, with one exception: a group below 2 ** -127 of the
largest element keeps the smallest scale here, where mlx 0.32's byte wraps around and the weights become infinite.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

#: Magnitudes of E2M1 by code; bit 3 is the sign.
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)

_SIGNED_E2M1 = np.concatenate([E2M1, -E2M1])

#: Above each of these the next code is nearer.
_E2M1_BORDERS = (E2M1[1:] + E2M1[:-1]) / 2

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = np.float32(448)

E8M0_BIAS = 127


def encode(groups: np.ndarray, bits: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """float32 groups [G, group_size] of weights of `dtype` -> uint8 codes of that shape, uint8 scales [G].

    Four bits with groups of 32 are mxfp4, with groups of 16 nvfp4; eight bits are mxfp8.
    """
    starts = np.arange(0, groups.size, groups.shape[1])
    largest = np.maximum.reduceat(np.abs(groups).reshape(-1), starts)
    largest = _rounded(largest / (E2M1[-1] if bits == 4 else E4M3_MAX), dtype)
    if groups.shape[1] == 16:
        scales = np.minimum(largest, E4M3_MAX).astype(E4M3)
        steps, stored = scales.astype(np.float32), scales.view(np.uint8)
    else:
        # The smallest power of two that is not below; a group of zeros has 1.
        fractions, exponents = np.frexp(largest)
        exponents -= fractions == 0.5
        exponents = np.maximum(exponents, -E8M0_BIAS)
        steps, stored = np.ldexp(np.float32(1), exponents), (exponents + E8M0_BIAS).astype(np.uint8)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = _rounded(groups / steps[:, None], dtype)
    scaled = np.where(steps[:, None] == 0, np.float32(0), scaled)
    return (_to_e2m1(scaled) if bits == 4 else to_e4m3(scaled)), stored


def decode(codes: np.ndarray, scales: np.ndarray, bits: int, dtype: np.dtype) -> np.ndarray:
    """uint8 codes [G, group_size] and uint8 scales [G] -> values [G, group_size] of `dtype`."""
    if codes.shape[1] == 16:
        steps = scales.view(E4M3).astype(np.float32)
    else:
        with np.errstate(over="ignore"):
            steps = np.ldexp(np.float32(1), scales.astype(np.int32) - E8M0_BIAS)
    values = _SIGNED_E2M1[codes] if bits == 4 else codes.view(E4M3).astype(np.float32)
    with np.errstate(over="ignore"):
        return (values * _rounded(steps, dtype)[:, None]).astype(dtype)


def _to_e2m1(values: np.ndarray) -> np.ndarray:
    magnitudes = np.abs(values)
    codes = np.zeros(values.shape, np.uint8)
    for border in _E2M1_BORDERS:
        codes += magnitudes > border
    # There is no negative zero in what MLX writes.
    codes |= ((values < 0) & (codes > 0)).astype(np.uint8) << np.uint8(3)
    # Where an nvfp4 scale saturates, MLX takes the first element at the least distance, and float32 rounds distances.
    beyond = magnitudes > 2 * E2M1[-1]
    if beyond.any():
        codes[beyond] = np.argmin(np.abs(values[beyond][:, None] - _SIGNED_E2M1), axis=1)
    return codes


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """E4M3 codes, ties to even, saturating; by arithmetic on the bits, four times as fast as a cast."""
    magnitudes = np.minimum(np.abs(values), E4M3_MAX)
    bits = magnitudes.view(np.uint32)
    # Normal: three mantissa bits stay, exponents are counted from 7 instead of 127; a carry moves into the exponent.
    normal = bits - np.uint32((127 - 7 << 23) - 0x7FFFF)
    normal += (bits >> np.uint32(20)) & np.uint32(1)
    normal >>= np.uint32(20)
    # Subnormal: beside 2**14 float32 has just the steps of 2**-9, so the sum's last bits are the code.
    beside = np.float32(2.0**14)
    subnormal = (magnitudes + beside).view(np.uint32) - beside.view(np.uint32)
    codes = np.where(magnitudes < np.float32(2.0**-6), subnormal, normal).astype(np.uint8)
    codes |= np.signbit(values).astype(np.uint8) << np.uint8(7)
    return codes


def _rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 values rounded as MLX rounds each operation on arrays of `dtype`."""
    if dtype == np.float32:
        return values
    with np.errstate(over="ignore"):
        return values.astype(dtype).astype(np.float32)
