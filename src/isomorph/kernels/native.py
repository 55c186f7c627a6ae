"""The C++ extension with torch's threads, and calls that pass tensors as pointers; environment: `extension.py`."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

from isomorph.kernels.extension import find_extension
from isomorph.quantize.settings import Settings

MODES = {"affine": 0, "mxfp4": 1, "mxfp8": 2, "nvfp4": 3}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

#: Rows from which decoding the weights once into a GEMM beats streaming them through the few-row kernels again.
WIDE_ROWS = 16


@cache
def extension() -> Any:
    """The extension module, or None, as `find_extension` says, with as many threads as torch has."""
    _native = find_extension()
    if _native is None:
        return None
    if "ISOMORPH_NUM_THREADS" not in os.environ:
        _native.set_thread_count(torch.get_num_threads())
    # Two pools of spinning threads on the same cores would fight; torch's libgomp team serves both.
    _native.borrow_openmp()
    return _native


def packed_handle(weight: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor | None, settings: Settings) -> Any:
    """What the extension needs to know of packed weights [N, K * bits / 32] or [E, N, K * bits / 32].

    It holds pointers, not tensors: keep them alive. They must be contiguous and on the CPU.
    """
    for part in (weight, scales, biases):
        if part is not None and not (part.is_contiguous() and part.device.type == "cpu"):
            raise ValueError("expected contiguous packed weights on the CPU")
    if settings.affine and (biases is None or biases.shape != scales.shape or biases.dtype != scales.dtype):
        raise ValueError("expected biases like the scales")
    experts = weight.shape[0] if weight.ndim == 3 else 1
    rows, columns = weight.shape[-2], scales.shape[-1] * settings.group_size
    if (
        weight.element_size() * 8 * weight.shape[-1] != columns * settings.bits
        or scales.shape[:-1] != weight.shape[:-1]
    ):
        raise ValueError(
            f"expected packed weights and scales that agree; found {list(weight.shape)} and {list(scales.shape)}"
        )
    if not settings.affine and scales.dtype != torch.uint8:
        raise ValueError(f"expected uint8 scales in mode {settings.mode}; found {scales.dtype}")
    return extension().Packed(
        weight.data_ptr(),
        scales.data_ptr(),
        0 if biases is None else biases.data_ptr(),
        MODES[settings.mode],
        TYPES[scales.dtype] if settings.affine else 0,
        settings.bits,
        settings.group_size,
        rows,
        columns,
        experts,
    )


def streams(rows: int, dtype: torch.dtype, settings: Settings, fast: bool) -> bool:
    """Whether the extension itself is the best path for `rows` activations; otherwise dequantize and use a GEMM."""
    if rows < WIDE_ROWS:
        return True
    tiled = extension().has_wide() and settings.mode in ("affine", "mxfp4")
    return tiled and (fast or dtype == torch.bfloat16)


def multiply(handle: Any, x: torch.Tensor, rows: int, fast: bool) -> torch.Tensor:
    """`x [M, K] @ w.T -> [M, rows]`, same dtype; the last dimension of x must be contiguous."""
    y = torch.empty((x.shape[0], rows), dtype=x.dtype)
    kind = TYPES[x.dtype]
    extension().multiply(handle, x.data_ptr(), kind, x.stride(0), x.shape[0], y.data_ptr(), kind, fast)
    return y


def multiply_experts(handle: Any, x: torch.Tensor, experts: torch.Tensor, rows: int, fast: bool) -> torch.Tensor:
    """Row i of the result, [R, rows], is row i * M // R of `x [M, K]` times expert `experts[i]`, i < R."""
    y = torch.empty((experts.shape[0], rows), dtype=x.dtype)
    kind, repeats = TYPES[x.dtype], experts.shape[0] // max(1, x.shape[0])
    extension().multiply_experts(
        handle, x.data_ptr(), kind, x.stride(0), repeats, experts.data_ptr(), len(experts), y.data_ptr(), kind, fast
    )
    return y


def multiply_bfloat16(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`x [M, K] @ weight.T` for contiguous bfloat16 `weight [N, K]`, fp32 accumulation -> [M, N] in x's dtype."""
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    kind = TYPES[x.dtype]
    extension().multiply_bfloat16(
        weight.data_ptr(), *weight.shape, x.data_ptr(), kind, x.stride(0), x.shape[0], y.data_ptr(), kind
    )
    return y


def dequantize(handle: Any, indices: torch.Tensor | None, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows `indices` (int64; all `rows` when None) of the weights, rounded once to `dtype`: [rows, columns]."""
    count = rows if indices is None else indices.shape[0]
    out = torch.empty((count, columns), dtype=dtype)
    pointer = 0 if indices is None else indices.data_ptr()
    if count:
        extension().dequantize(handle, pointer, count, out.data_ptr(), TYPES[dtype])
    return out
