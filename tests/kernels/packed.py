"""Packed weights made in numpy, with the float64 values they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch

from isomorph.kernels import reference
from isomorph.quantize.settings import Settings

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
E2M1 = np.array(reference.E2M1)


@dataclass
class Case:
    weight: torch.Tensor  # int32 [..., N, K * bits / 32]
    scales: torch.Tensor
    biases: torch.Tensor | None
    settings: Settings
    values: np.ndarray  # float64 [..., N, K]

    @property
    def packed(self) -> tuple:
        return self.weight, self.scales, self.biases

    @property
    def arguments(self) -> tuple:
        return *self.packed, self.settings.bits, self.settings.group_size, self.settings.mode


def pack(codes: np.ndarray, bits: int) -> torch.Tensor:
    """By definition of the format: a little-endian stream of bits a row."""
    stream = ((codes[..., None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(*codes.shape[:-1], -1)
    return torch.from_numpy(np.packbits(stream, axis=-1, bitorder="little").view(np.int32))


def make(
    seed: int, shape: tuple[int, ...], settings: Settings, scale_dtype: str = "bfloat16", kind: str = "normal"
) -> Case:
    """Random packed weights; `kind`: normal, outlier (one large weight a group), onesided, zero or arbitrary.

    `arbitrary` draws codes, scales and biases independently: nothing relates them, as in a damaged or foreign file.
    """
    rng = np.random.default_rng(seed)
    size, bits = settings.group_size, settings.bits
    groups = (*shape[:-1], shape[-1] // size)
    codes = rng.integers(0, 1 << bits, (*groups, size))
    if settings.mode != "affine":
        if settings.mode == "nvfp4":
            scales = rng.integers(0x20, 0x50, groups).astype(np.uint8)
            scale = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        else:
            scales = rng.integers(110, 130, groups).astype(np.uint8)
            scale = np.ldexp(1.0, scales.astype(int) - 127)
        if settings.mode == "mxfp8":
            codes[codes % 128 == 127] = 0  # NaN
            elements = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        else:
            elements = E2M1[codes]
        values = (elements * scale[..., None]).reshape(shape)
        return Case(pack(codes.reshape(shape), bits), torch.from_numpy(scales), None, settings, values)
    top = (1 << bits) - 1
    weights = rng.standard_normal((*groups, size)) * 0.05
    if kind == "outlier":
        weights *= 0.001
        weights[..., 3] = 5
    elif kind == "onesided":
        weights = np.abs(weights) + 0.1
    elif kind == "zero":
        weights[:] = 0
    low, high = weights.min(-1), weights.max(-1)
    scale = np.maximum((high - low) / top, 1e-7) * np.where(np.abs(low) > np.abs(high), 1, -1)
    edge = np.where(scale > 0, low, high)
    steps = np.round(edge / scale)
    scale = np.where(steps != 0, edge / np.where(steps == 0, 1, steps), scale)
    bias = np.where(steps != 0, edge, 0)
    if kind == "arbitrary":
        scale, bias = rng.standard_normal(groups), rng.standard_normal(groups) * rng.choice([0.01, 1, 100], groups)
    stored = [torch.from_numpy(part.astype(np.float32)).to(TORCH[scale_dtype]) for part in (scale, bias)]
    exact_scale, exact_bias = (part.double().numpy()[..., None] for part in stored)
    if kind != "arbitrary":
        codes = np.clip(np.round((weights - exact_bias) / exact_scale), 0, top).astype(np.int64)
    values = (exact_scale * codes + exact_bias).reshape(shape)
    return Case(pack(codes.reshape(shape), bits), *stored, settings, values)


def activations(seed: int, rows: int, columns: int, dtype: str) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return torch.from_numpy(values).to(TORCH[dtype])


def relative_error(y: torch.Tensor, x: torch.Tensor, values: np.ndarray) -> float:
    """max |y - y_fp64| / sum |x * w|; inf where y is not finite."""
    exact = x.double().numpy()
    error = np.abs(y.double().numpy() - exact @ values.T)
    # An all-zero row has no scale of its own: its result must then be exactly zero.
    relative = error / np.maximum(np.abs(exact) @ np.abs(values).T, 1e-300)
    return float(np.where(np.isfinite(y.double().numpy()), relative, np.inf).max())
