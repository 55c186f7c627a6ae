"""Small floats with a scale a block, as fp8 and nvfp4 checkpoints store them: MLX's codes where it has the scales.

MLX's mxfp8 has a power of two for 32 columns, nvfp4 an E4M3 scale for 16. Scales of any other value have no exact form
there (and no affine one: the steps between small floats differ), so such weights are floats in the model's dtype, which
is also what Transformers makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from isomorph.checkpoint.integers import check
from isomorph.checkpoint.tensor import BLOCK_BYTES, FLOATING, NUMPY_DTYPES, Tensor
from isomorph.errors import InputError
from isomorph.quantize.microscaling import E2M1, E8M0_BIAS
from isomorph.quantize.packing import unpack
from isomorph.quantize.settings import Settings

MXFP4, MXFP8, NVFP4 = Settings(4, 32, "mxfp4"), Settings(8, 32, "mxfp8"), Settings(4, 16, "nvfp4")

_SIGNED_E2M1 = np.concatenate([E2M1, -E2M1])

Parts = tuple[list[Tensor], Settings | None]


def float8(path: str, codes: Tensor, scale: Tensor, stated: Sequence[int], dtype: str) -> Parts:
    """`codes` float8_e4m3fn [N, K] times `scale`, one a block: [R, C], [N, 1] or a scalar. `stated` is a block's size.

    Reads the scales, which are few. Raises InputError for scales that do not divide the matrix.
    """
    outputs, columns = codes.shape
    check(scale, scale.shape[:2], *FLOATING, "uint8", "float8_e8m0fnu")
    steps = np.atleast_2d(_values(scale)) if scale.size > 1 else _values(scale).reshape(1, 1)
    high, wide = (_side(codes, 0, len(steps), stated), _side(codes, 1, steps.shape[1], stated))
    fractions, exponents = np.frexp(steps)
    stored = exponents - 1 + E8M0_BIAS
    if (fractions == 0.5).all() and 0 <= stored.min() <= stored.max() <= 254 and wide % 32 == columns % 32 == 0:
        every = np.repeat(stored.astype(np.uint8), wide // 32, axis=1)[:, : columns // 32]
        return [
            _words(f"{path}.weight", codes, MXFP8),
            _rows(f"{path}.scales", (outputs, columns // 32), "uint8", every, high),
        ], MXFP8

    def block(start: int, values: np.ndarray) -> np.ndarray:
        rows = steps[np.arange(start, start + len(values)) // high]
        every = np.repeat(rows, wide, axis=1)[:, :columns]
        return (values.astype(np.float32) * every).astype(NUMPY_DTYPES[dtype])

    return [_computed(f"{path}.weight", codes, columns, dtype, block)], None


def float4(path: str, codes: Tensor, scale: Tensor, overall: Tensor | None, dtype: str) -> Parts:
    """`codes` uint8 [N, K / 2], low nibble first, times `scale` [N, G]: bytes of E8M0 in mxfp4, E4M3 in nvfp4.

    In nvfp4 the scales are meant divided by the one number `overall`, for which MLX's files have no place unless it
    is 1.
    """
    outputs, columns = codes.shape[0], 2 * codes.shape[1]
    settings = MXFP4 if scale.dtype in ("uint8", "float8_e8m0fnu") else NVFP4
    check(scale, (outputs, columns // settings.group_size), "uint8", "float8_e8m0fnu", "float8_e4m3fn")
    if overall is not None:
        check(overall, (1,), "float32")
    divisor = np.float32(1) if overall is None else overall.read().astype(np.float32).reshape(())
    if divisor == 1:
        stored = Tensor(f"{path}.scales", scale.shape, "uint8", lambda: scale.read().view(np.uint8))
        return [_words(f"{path}.weight", codes, settings), stored], settings

    def block(start: int, values: np.ndarray) -> np.ndarray:
        steps = scale.read()[start : start + len(values)].astype(np.float32) / divisor
        magnitudes = _SIGNED_E2M1[unpack(values.view(np.uint32), settings.bits)]
        return (magnitudes * np.repeat(steps, settings.group_size, axis=1)).astype(NUMPY_DTYPES[dtype])

    return [_computed(f"{path}.weight", codes, columns, dtype, block)], None


def _values(scale: Tensor) -> np.ndarray:
    """Scales as float32; bytes are E8M0."""
    value = scale.read()
    values = np.ldexp(np.float32(1), value.astype(np.int32) - E8M0_BIAS) if value.dtype == np.uint8 else value
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"expected finite scales; found NaN or infinity in {scale.name}; download it again")
    return values


def _side(codes: Tensor, axis: int, count: int, stated: Sequence[int]) -> int:
    """Rows or columns that share a scale, of which there are `count`: as stated, or equal parts."""
    length = codes.shape[axis]
    if len(stated) == 2 and -(-length // stated[axis]) == count:
        return stated[axis]
    if length % count:
        raise InputError(
            f"expected scales whose blocks divide {codes.name} {list(codes.shape)}; found {count} for {length}; "
            "correct weight_block_size in config.json, or start from the original"
        )
    return length // count


def _words(name: str, codes: Tensor, settings: Settings) -> Tensor:
    """Bytes of codes as MLX's words: four at a time, as they lie."""
    shape = (codes.shape[0], math.prod(codes.shape[1:]) // 4)
    return Tensor(name, shape, "uint32", lambda: np.ascontiguousarray(codes.read()).view(np.uint32).reshape(shape))


def _rows(name: str, shape: tuple[int, int], dtype: str, values: np.ndarray, times: int) -> Tensor:
    """Each row of `values` so many times."""
    return Tensor(name, shape, dtype, lambda: np.repeat(values, times, axis=0)[: shape[0]])


def _computed(
    name: str, codes: Tensor, columns: int, dtype: str, block: Callable[[int, np.ndarray], np.ndarray]
) -> Tensor:
    """Floats [N, K] that `block(first row, codes)` makes of some rows."""

    def stream() -> Iterator[np.ndarray]:
        value = codes.read()
        rows = max(1, BLOCK_BYTES // (4 * columns))
        for start in range(0, len(value), rows):
            yield block(start, value[start : start + rows])

    return Tensor(name, (codes.shape[0], columns), dtype, lambda: np.concatenate(list(stream())), stream)
