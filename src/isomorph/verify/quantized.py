"""Quantized candidates: telling a fault of the backend from a fault of the port."""

from __future__ import annotations

from isomorph.verify.certificate import PASS, WARN, Check, Level
from isomorph.verify.tolerance import MAX_NOISE_RATIO, NOISE_REASON


def on_mlx_cpu(framework: str) -> bool:
    """Whether `framework` is mlx, isomorph's or stock, and computes on a CPU."""
    if framework not in ("mlx", "mlx-lm"):
        return False
    import mlx.core as mx

    return mx.default_device().type == mx.DeviceType.cpu


def backend_check(level: Level) -> Check:
    """MLX's quantized products on a CPU accumulate in the activations' dtype: 3-8 % error in bfloat16.

    This is measured and said, but does not decide: the port is judged in float32, where the products are right.
    """
    ratio = level.noise_ratio
    faulty = ratio is None or not ratio <= MAX_NOISE_RATIO
    detail = (
        f"mlx's quantized matrix products on a CPU accumulate in {level.dtype}; a fault of that backend, not of the "
        "port, which is judged in float32; run it in float32 here"
    )
    name = f"backend: mlx on a CPU in {level.dtype}, noise ratio"
    return Check(name, WARN if faulty else PASS, ratio, MAX_NOISE_RATIO, NOISE_REASON, detail if faulty else "")
