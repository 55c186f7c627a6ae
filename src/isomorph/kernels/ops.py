"""The products as torch operators: `torch.ops.isomorph.*`, for torch.compile, autograd and every device.

CPU tensors go to the C++ extension, those of a GPU to Triton's kernels, anything else to plain torch. Packed words may
be int32 or uint32 [N, K * bits / 32]; scales and biases [N, K / group_size].
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch

from isomorph.kernels import native, reference
from isomorph.quantize.settings import Settings

log = logging.getLogger(__name__)

_LIBRARY = torch.library.Library("isomorph", "DEF")
_PACKED = "Tensor weight, Tensor scales, Tensor? biases"
_SETTINGS = "int bits, int group_size, str mode, bool fast"
_LIBRARY.define(f"quantized_linear(Tensor x, {_PACKED}, {_SETTINGS}) -> Tensor")
_LIBRARY.define(f"quantized_experts_linear(Tensor x, {_PACKED}, Tensor experts, {_SETTINGS}) -> Tensor")
_LIBRARY.define(
    f"dequantize_rows({_PACKED}, Tensor indices, int bits, int group_size, str mode, ScalarType dtype) -> Tensor"
)
_LIBRARY.define("bfloat16_linear(Tensor x, Tensor weight) -> Tensor")


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K] whose last dimension is contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _linear_cpu(x, weight, scales, biases, bits, group_size, mode, fast):
    settings, rows = Settings(bits, group_size, mode), _flat(x)
    if native.extension() is None or x.dtype not in native.TYPES:
        y = reference.linear(rows, weight, scales, biases, settings)
    else:
        handle = native.packed_handle(weight, scales, biases, settings)
        y = linear_with_handle(handle, rows, weight.shape[0], settings, fast)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def linear_with_handle(handle, x: torch.Tensor, outputs: int, settings: Settings, fast: bool) -> torch.Tensor:
    """`x [M, K]` times the weights behind a handle of the extension: [M, outputs] in x's dtype."""
    if native.streams(x.shape[0], x.dtype, settings, fast):
        return native.multiply(handle, x, outputs, fast)
    # float32 weights keep the product exact to float32's rounding whatever the activations are.
    values = native.dequantize(handle, None, outputs, x.shape[1], torch.float32)
    return (x.float() @ values.T).to(x.dtype)


@cache
def _triton() -> Any:
    """Triton's kernels, or None (said once) without Triton."""
    try:
        from isomorph.kernels import triton
    except ImportError as error:
        log.warning("Triton is missing (%s), so quantized products run through plain torch; pip install triton", error)
        return None
    return triton


def _linear_cuda(x, weight, scales, biases, bits, group_size, mode, fast):
    kernels = _triton()
    if kernels is None or x.dtype not in kernels.TYPES:
        return _linear_any(x, weight, scales, biases, bits, group_size, mode, fast)
    y = kernels.linear(_flat(x), weight, scales, biases, Settings(bits, group_size, mode))
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _linear_any(x, weight, scales, biases, bits, group_size, mode, fast):
    y = reference.linear(_flat(x), weight, scales, biases, Settings(bits, group_size, mode))
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _experts_cpu(x, weight, scales, biases, experts, bits, group_size, mode, fast):
    settings, rows, chosen = Settings(bits, group_size, mode), _flat(x), experts.reshape(-1).long().contiguous()
    if native.extension() is None or x.dtype not in native.TYPES:
        return reference.experts_linear(rows, weight, scales, biases, chosen, settings)
    handle = native.packed_handle(weight, scales, biases, settings)
    return native.multiply_experts(handle, rows, chosen, weight.shape[1], fast)


def _experts_cuda(x, weight, scales, biases, experts, bits, group_size, mode, fast):
    kernels = _triton()
    if kernels is None or x.dtype not in kernels.TYPES:
        return _experts_any(x, weight, scales, biases, experts, bits, group_size, mode, fast)
    settings, chosen = Settings(bits, group_size, mode), experts.reshape(-1).long()
    return kernels.experts_linear(_flat(x), weight, scales, biases, chosen, settings)


def _experts_any(x, weight, scales, biases, experts, bits, group_size, mode, fast):
    settings = Settings(bits, group_size, mode)
    return reference.experts_linear(_flat(x), weight, scales, biases, experts.reshape(-1), settings)


def _rows_cpu(weight, scales, biases, indices, bits, group_size, mode, dtype):
    if native.extension() is None or dtype not in native.TYPES:
        return _rows_any(weight, scales, biases, indices, bits, group_size, mode, dtype)
    settings = Settings(bits, group_size, mode)
    handle = native.packed_handle(weight, scales, biases, settings)
    columns = scales.shape[1] * group_size
    values = native.dequantize(handle, indices.reshape(-1).long().contiguous(), weight.shape[0], columns, dtype)
    return values.reshape(*indices.shape, columns)


def _rows_cuda(weight, scales, biases, indices, bits, group_size, mode, dtype):
    kernels = _triton()
    if kernels is None or dtype not in kernels.TYPES:
        return _rows_any(weight, scales, biases, indices, bits, group_size, mode, dtype)
    settings = Settings(bits, group_size, mode)
    values = kernels.dequantize_rows(weight, scales, biases, indices.reshape(-1), settings, dtype)
    return values.reshape(*indices.shape, values.shape[1])


def _rows_any(weight, scales, biases, indices, bits, group_size, mode, dtype):
    local = None if biases is None else biases[indices]
    return reference.dequantize(weight[indices], scales[indices], local, Settings(bits, group_size, mode), dtype)


def _bfloat16_cpu(x, weight):
    rows = _flat(x)
    usable = weight.is_contiguous() and x.dtype in native.TYPES and rows.shape[0] <= native.WIDE_ROWS
    if not usable or native.extension() is None:
        return torch.nn.functional.linear(x, weight.to(x.dtype))
    return native.multiply_bfloat16(weight, rows).reshape(*x.shape[:-1], weight.shape[0])


_IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "quantized_linear": {"CPU": _linear_cpu, "CUDA": _linear_cuda, "CompositeExplicitAutograd": _linear_any},
    "quantized_experts_linear": {"CPU": _experts_cpu, "CUDA": _experts_cuda, "CompositeExplicitAutograd": _experts_any},
    "dequantize_rows": {"CPU": _rows_cpu, "CUDA": _rows_cuda, "CompositeExplicitAutograd": _rows_any},
    "bfloat16_linear": {
        "CPU": _bfloat16_cpu,
        "CompositeExplicitAutograd": lambda x, weight: torch.nn.functional.linear(x, weight.to(x.dtype)),
    },
}
for _name, _implementations in _IMPLEMENTATIONS.items():
    for _key, _implementation in _implementations.items():
        _LIBRARY.impl(_name, _implementation, _key)


@torch.library.register_fake("isomorph::quantized_linear")
def _(x, weight, scales, biases, bits, group_size, mode, fast):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("isomorph::quantized_experts_linear")
def _(x, weight, scales, biases, experts, bits, group_size, mode, fast):
    return x.new_empty((experts.numel(), weight.shape[1]))


@torch.library.register_fake("isomorph::dequantize_rows")
def _(weight, scales, biases, indices, bits, group_size, mode, dtype):
    return scales.new_empty((*indices.shape, scales.shape[1] * group_size), dtype=dtype)


@torch.library.register_fake("isomorph::bfloat16_linear")
def _(x, weight):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save_for_backward(ctx, inputs, output):
    _, weight, scales, biases, ctx.bits, ctx.group_size, ctx.mode, _ = inputs
    ctx.save_for_backward(weight, scales, *([] if biases is None else [biases]))


def _linear_backward(ctx, gradient):
    """With respect to x alone: packed weights are constants (adapters train through them)."""
    weight, scales, *rest = ctx.saved_tensors
    settings = Settings(ctx.bits, ctx.group_size, ctx.mode)
    values = reference.dequantize(weight, scales, rest[0] if rest else None, settings)
    return (gradient.float() @ values).to(gradient.dtype), None, None, None, None, None, None, None


torch.library.register_autograd("isomorph::quantized_linear", _linear_backward, setup_context=_save_for_backward)
