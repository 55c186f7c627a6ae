"""Whether the Triton kernels are right and fast on this GPU: every format against float64, GB/s beside torch's copy.

    python benchmarks/gpu.py

The last line is one JSON document; the exit code is 1 when a product is not exact and 2 without a CUDA device. Nobody
has run it yet: the kernels are checked in Triton's interpreter and compiled for sm_90, on machines without a GPU.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from itertools import cycle

import torch

from isomorph.kernels import ops, reference  # noqa: F401  (ops defines the operators)
from isomorph.quantize.settings import MODES, Settings

#: |y - y_fp64| <= BOUND * sum|x * w|, and one rounding of the result.
BOUND = 1e-6
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}

#: Rows and columns of the products that are timed: larger than the cache of any GPU once there are four of them.
SHAPE = 16384, 8192
TIMED = Settings(4, 64), Settings(6, 64), Settings(8, 64), Settings(4, 32, "mxfp4")

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def packed(shape: tuple[int, ...], settings: Settings) -> Packed:
    """Random packed weights on the GPU: any word is some weight."""
    words = shape[-1] * settings.bits // 32
    weight = torch.randint(-(1 << 31), 1 << 31, (*shape[:-1], words), dtype=torch.int32, device="cuda")
    groups = (*shape[:-1], shape[-1] // settings.group_size)
    if not settings.affine:
        if settings.mode == "mxfp8":
            weight &= -0x40404041  # no NaN among the bytes
        return weight, torch.randint(100, 120, groups, dtype=torch.uint8, device="cuda"), None
    return weight, *(torch.randn(groups, device="cuda").to(torch.bfloat16) for _ in range(2))


def worst_error(settings: Settings) -> float:
    """Largest error of products, of experts and of rows, as a multiple of what is allowed."""
    arguments = settings.bits, settings.group_size, settings.mode
    shape = 333, settings.group_size * 37
    parts = packed(shape, settings)
    values = reference.dequantize(*parts, settings).double()
    worst = 0.0
    for dtype in ROUNDING:
        for rows in (1, 2, 17, 300):
            x = torch.randn(rows, shape[1], device="cuda").to(dtype)
            y = torch.ops.isomorph.quantized_linear(x, *parts, *arguments, False)
            worst = max(worst, error(y, x, values))
        ids = torch.tensor([0, 332, 7], device="cuda")
        rows_ = torch.ops.isomorph.dequantize_rows(*parts, ids, *arguments, dtype)
        worst = max(worst, 0.0 if torch.equal(rows_, reference.dequantize(*parts, settings, dtype)[ids]) else 1e9)
    experts = packed((6, 65, shape[1]), settings)
    values = reference.dequantize(*experts, settings).double()
    for tokens in (2, 100):
        x = torch.randn(tokens, shape[1], device="cuda").to(torch.bfloat16)
        chosen = torch.randint(0, 6, (tokens, 2), device="cuda")
        y = torch.ops.isomorph.quantized_experts_linear(x, *experts, chosen, *arguments, False)
        for place, expert in enumerate(chosen.reshape(-1).tolist()):
            worst = max(worst, error(y[place : place + 1], x[place // 2 : place // 2 + 1], values[expert]))
    return worst


def error(y: torch.Tensor, x: torch.Tensor, values: torch.Tensor) -> float:
    exact = x.double() @ values.T
    allowed = BOUND * (x.double().abs() @ values.abs().T) + ROUNDING[y.dtype] * exact.abs()
    ratio = (y.double() - exact).abs() / allowed
    return float(ratio.max()) if bool(ratio.isfinite().all()) else float("inf")


def seconds(call: Callable[[], object]) -> float:
    """Median time of a call on the device."""
    for _ in range(10):
        call()
    times = []
    for _ in range(50):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def timed(settings: Settings) -> dict[str, float]:
    """GB/s of one row and TFLOP/s of 512, from four copies in turn so that no cache holds the weights."""
    arguments = settings.bits, settings.group_size, settings.mode, False
    copies = cycle([packed(SHAPE, settings) for _ in range(4)])
    size = sum(part.nbytes for part in next(copies) if part is not None)
    x = torch.randn(512, SHAPE[1], device="cuda", dtype=torch.bfloat16)
    decode = seconds(lambda: torch.ops.isomorph.quantized_linear(x[:1], *next(copies), *arguments))
    prefill = seconds(lambda: torch.ops.isomorph.quantized_linear(x, *next(copies), *arguments))
    return {"gigabytes_per_second": size / decode / 1e9, "teraflops": flops(len(x)) / prefill / 1e12}


def flops(rows: int) -> int:
    return 2 * rows * SHAPE[0] * SHAPE[1]


def name(settings: Settings) -> str:
    return f"{settings.mode}-{settings.bits}-{settings.group_size}"


def main() -> int:
    if not torch.cuda.is_available():
        print("expected a CUDA device; found none; run this where there is a GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    formats = [Settings(b, size, mode) for mode, (_, _, bits, sizes) in MODES.items() for b in bits for size in sizes]
    errors = {}
    for settings in formats:
        errors[name(settings)] = worst_error(settings)
        print(f"{name(settings)}: error / allowed {errors[name(settings)]:.2f}", file=sys.stderr)
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    weight = torch.randn(*SHAPE, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(512, SHAPE[1], device="cuda", dtype=torch.bfloat16)
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "exact": all(value <= 1 for value in errors.values()),
        "errors_over_allowed": errors,
        "copy_gigabytes_per_second": 2 * source.nbytes / seconds(source.clone) / 1e9,
        "torch_bfloat16_teraflops": flops(512) / seconds(lambda: x @ weight.T) / 1e12,
        "products": {name(settings): timed(settings) for settings in TIMED},
    }
    print(json.dumps(record))
    return 0 if record["exact"] else 1


if __name__ == "__main__":
    sys.exit(main())
