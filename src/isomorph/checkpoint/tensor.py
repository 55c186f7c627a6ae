"""A lazily read tensor: its name, shape and dtype are known, its values are fetched on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

#: dtype name -> numpy dtype; names are those of torch, MLX and JAX.
NUMPY_DTYPES: dict[str, np.dtype] = {
    **{f"{kind}{bits}": np.dtype(f"{kind}{bits}") for bits in (8, 16, 32, 64) for kind in ("uint", "int")},
    **{name: np.dtype(name) for name in ("bool", "float16", "float32", "float64", "complex64")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
}

#: Dtypes that hold weights proper; the rest are codes, counters and masks.
FLOATING = ("float64", "float32", "bfloat16", "float16")

#: Bytes of one block of a streamed tensor: large enough for the disk, small beside any model.
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Tensor:
    """A named tensor of a checkpoint.

    `read()` returns the whole value as a numpy array (bfloat16 as `ml_dtypes.bfloat16`), memory-mapped where the
    storage allows: treat it as read-only. `stream()`, where given, yields the same value as consecutive runs of rows,
    so that a derived tensor never exists whole. `dtype` is a name such as `bfloat16`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    stream: Callable[[], Iterator[np.ndarray]] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the value."""
        return self.size * NUMPY_DTYPES[self.dtype].itemsize

    def blocks(self) -> Iterator[np.ndarray]:
        """The value as runs of rows (axis 0) of about `BLOCK_BYTES`; a scalar comes as one block."""
        if self.stream is not None:
            yield from self.stream()
            return
        value = self.read()
        if value.ndim == 0 or value.nbytes <= BLOCK_BYTES:
            yield value
            return
        rows = max(1, BLOCK_BYTES * len(value) // value.nbytes)
        for start in range(0, len(value), rows):
            yield value[start : start + rows]

    def renamed(self, name: str) -> Tensor:
        """The same tensor under another name."""
        return replace(self, name=name)

    def mapped(self, function: Callable[[np.ndarray], np.ndarray], dtype: str | None = None) -> Tensor:
        """The tensor with an elementwise `function` applied lazily, block by block when streamed."""
        return Tensor(
            self.name,
            self.shape,
            dtype or self.dtype,
            read=lambda: function(self.read()),
            stream=lambda: (function(block) for block in self.blocks()),
        )

    def cast(self, dtype: str) -> Tensor:
        """The tensor in another dtype, rounded to nearest even; itself when it already has that dtype."""
        if dtype == self.dtype:
            return self
        target = NUMPY_DTYPES[dtype]

        def convert(value: np.ndarray) -> np.ndarray:
            # Values beyond the range of float16 become infinite, as in every framework.
            with np.errstate(over="ignore", invalid="ignore"):
                return value.astype(target)

        return self.mapped(convert, dtype)


def from_array(name: str, value: np.ndarray) -> Tensor:
    """A tensor that is already in memory."""
    return Tensor(name, tuple(value.shape), str(value.dtype), lambda: value)
