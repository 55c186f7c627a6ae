"""MLX's formats written down a second time, one group and one weight at a time, to compare the fast code with.

Every operation is one float32 operation, as in the C++ that `mx.quantize` runs on a CPU.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

F = np.float32
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def affine_group(group: np.ndarray, bits: int, round=np.rint) -> tuple[list[int], np.float32, np.float32]:
    """Codes, scale and bias of one group. `round` is a parameter so that a test can break it."""
    levels = F(2**bits - 1)
    with np.errstate(all="ignore"):
        low, high = F(min(map(float, group))), F(max(map(float, group)))
        scale = max(F((high - low) / levels), F(1e-7))
        if not abs(low) > abs(high):
            scale = -scale
        edge = low if abs(low) > abs(high) else high
        steps, bias = np.rint(F(edge / scale)), F(0)
        if steps != 0:
            scale, bias = F(edge / steps), edge
        codes = []
        for weight in group:
            position = round(F(F(F(weight) - bias) / scale))
            codes.append(0 if math.isnan(position) else int(min(max(position, F(0)), levels)))
    return codes, scale, bias


def affine(weight: np.ndarray, bits: int, group_size: int, **broken) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed words, scales and biases of a matrix [rows, K], as `mx.quantize` returns them."""
    words, scales, biases = [], [], []
    for row in weight:
        found = [affine_group(group, bits, **broken) for group in row.reshape(-1, group_size)]
        words.append(pack([code for codes, _, _ in found for code in codes], bits))
        scales.append([scale for _, scale, _ in found])
        biases.append([bias for _, _, bias in found])
    with np.errstate(over="ignore"):
        return np.stack(words), np.array(scales, F).astype(weight.dtype), np.array(biases, F).astype(weight.dtype)


def pack(codes: list[int], bits: int) -> np.ndarray:
    """A little-endian stream of bits, as uint32."""
    stream = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    return np.array([int(stream[start : start + 32][::-1], 2) for start in range(0, len(stream), 32)], np.uint32)


def unpack(words: np.ndarray, bits: int) -> list[int]:
    stream = "".join(format(int(word), "032b")[::-1] for word in words)
    return [int(stream[start : start + bits][::-1], 2) for start in range(0, len(stream), bits)]


def microscaled_group(group: np.ndarray, bits: int) -> tuple[list[int], int]:
    """Codes and stored scale of one group of 32 (mxfp4, mxfp8) or 16 (nvfp4), computed in the group's dtype."""
    dtype = group.dtype.type
    largest = float(dtype(max(abs(float(weight)) for weight in group) / F(6 if bits == 4 else 448)))
    if len(group) == 16:
        stored = e4m3(largest)
        step = float(np.uint8(stored).view(ml_dtypes.float8_e4m3fn))
    else:
        exponent = -127
        while largest and 2.0**exponent < largest:
            exponent += 1
        exponent = exponent if largest else 0
        step, stored = 2.0**exponent, exponent + 127
    codes = []
    for weight in group:
        scaled = dtype(F(weight) / F(step)) if step else dtype(0)
        if bits == 8:
            codes.append(e4m3(float(scaled)))
        else:
            distances = [abs(F(scaled) - F(value)) for value in E2M1]
            codes.append(distances.index(min(distances)))
    return codes, stored


def e4m3(value: float) -> int:
    """The nearest E4M3 code, ties to the even one, the largest beyond the range."""
    sign = 0x80 if math.copysign(1, value) < 0 else 0
    magnitudes = [float(np.uint8(code).view(ml_dtypes.float8_e4m3fn)) for code in range(0x7F)]
    distances = [abs(min(abs(value), magnitudes[-1]) - magnitude) for magnitude in magnitudes]
    nearest = min(distances)
    return sign | next(code for code in sorted(range(0x7F), key=lambda code: code & 1) if distances[code] == nearest)
