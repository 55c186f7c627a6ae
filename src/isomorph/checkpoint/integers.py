"""Integer codes as AWQ, GPTQ and compressed-tensors store them, seen as MLX's affine format: the very same weights.

A weight is `(code - zero) * scale` there and `scale * code + bias` here, with `bias = -zero * scale`. A scale of 16
bits has at most 11 significant ones and a code at most 8, so products, biases and sums are whole multiples, below
2**19, of the scale's last place: float32 holds each of them. 16 bits would not: scales and biases become float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from isomorph.checkpoint.tensor import BLOCK_BYTES, FLOATING, Tensor
from isomorph.errors import InputError
from isomorph.quantize.packing import unpack
from isomorph.quantize.settings import MODES, Settings

#: Where AWQ's `gemm` files have the codes of consecutive outputs in a word: nibble i holds output ORDER[i] (AutoAWQ).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

#: Dtypes of words that hold several codes.
WORDS = ("int32", "uint32")

#: Whole arrays [N, ...] are made from a stored one by functions that take some of its outputs.
Rows = Callable[[slice], np.ndarray]


@dataclass(frozen=True)
class Codes:
    """One matrix [N, K]: `words` gives MLX's uint32 words [n, K * bits / 32] of some rows; `scales` [N, G] are 16-bit
    values, `zeros` [N, G] whole numbers of the codes' range, or one for all."""

    path: str
    bits: int
    shape: tuple[int, int]
    groups: int
    words: Rows
    scales: Callable[[], np.ndarray]
    zeros: Callable[[], np.ndarray | int]

    def parts(self) -> tuple[list[Tensor], Settings]:
        """`path.weight`, `path.scales` and `path.biases`, lazy, and their settings. Raises InputError."""
        settings = self._settings()
        return [
            self._lazy(part, shape, dtype) for part, (shape, dtype) in settings.parts(self.shape, "float32").items()
        ], settings

    def _settings(self) -> Settings:
        """The largest groups of MLX's that divide the stored ones, whose scales are then repeated."""
        own, rest = divmod(self.shape[1], self.groups)
        for size in sorted(MODES["affine"][3], reverse=True):
            if not rest and own % size == 0:
                return Settings(self.bits, size)
        raise InputError(
            f"expected groups that 32 divides; found {self.groups} over the {self.shape[1]} columns of {self.path}, "
            "which MLX's affine format does not have; start from the unquantized model"
        )

    def _lazy(self, part: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        name = f"{self.path}.{part}"
        if part != "weight":
            companion = lambda: np.repeat(self._companion(part), shape[1] // self.groups, axis=1)
            return Tensor(name, shape, dtype, companion)
        rows = max(32, BLOCK_BYTES // self.shape[1] // 32 * 32)

        def stream() -> Iterator[np.ndarray]:
            return (self.words(slice(start, start + rows)) for start in range(0, shape[0], rows))

        return Tensor(name, shape, dtype, lambda: self.words(slice(None)), stream)

    def _companion(self, part: str) -> np.ndarray:
        """Scales or biases [N, G], float32."""
        scales = self.scales().astype(np.float64)
        most = scales * ((1 << self.bits) - 1)
        if not np.isfinite(scales).all() or (most.astype(np.float32) != most).any():
            raise InputError(
                f"expected finite scales of 16 bits; found others in {self.path}, whose products float32 would round; "
                "start from the unquantized model"
            )
        return (scales if part == "scales" else -scales * self.zeros()).astype(np.float32)


def awq(path: str, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Codes:
    """AutoAWQ's `gemm` form: int32 `qweight` [K, N / 8], `qzeros` [G, N / 8], `scales` [G, N]."""
    (columns, width), (groups, outputs) = qweight.shape, scales.shape
    check(qweight, (columns, outputs // 8), *WORDS)
    check(qzeros, (groups, outputs // 8), *WORDS)

    def words(rows: slice) -> np.ndarray:
        some = slice((rows.start or 0) // 8, width if rows.stop is None else rows.stop // 8)
        nibbles = np.ascontiguousarray(_in_order(qweight.read()[:, some]).T)
        return (nibbles[:, ::2] | nibbles[:, 1::2] << np.uint8(4)).view(np.uint32)

    zeros = lambda: _in_order(qzeros.read()).T
    return Codes(path, 4, (outputs, columns), groups, words, lambda: scales.read().T, zeros)


def _in_order(words: np.ndarray) -> np.ndarray:
    """Codes uint8 [R, N] of AWQ's words [R, N / 8]."""
    nibbles = unpack(words, 4).reshape(*words.shape, 8)
    return nibbles[..., np.argsort(AWQ_ORDER)].reshape(len(words), -1)


def gptq(path: str, qweight: Tensor, qzeros: Tensor, scales: Tensor, order: Tensor | None, first: int) -> Codes:
    """AutoGPTQ's form: int32 `qweight` [K * bits / 32, N], `qzeros` [G, N * bits / 32] less `first`, `scales` [G, N].

    Down its columns `qweight` is MLX's stream of bits. `order` [K] is each input's group. Raises InputError for
    act-order: groups that are not consecutive columns have no affine form.
    """
    (height, outputs), (groups, width) = qweight.shape, qzeros.shape
    bits = width * 32 // outputs
    if bits not in (2, 3, 4, 8):
        raise InputError(f"expected codes of 2, 3, 4 or 8 bits; found {bits} in {path}; start from the original")
    columns = height * 32 // bits
    check(qweight, (columns * bits // 32, outputs), *WORDS)
    check(qzeros, (groups, outputs * bits // 32), *WORDS)
    check(scales, (groups, outputs), *FLOATING)
    if order is not None:
        check(order, (columns,), "int32", "int64")
    if order is not None and (order.read() != np.arange(columns) // -(-columns // groups)).any():
        raise InputError(
            f"expected groups of consecutive columns; found act-order (desc_act) in {order.name}, which no affine "
            "format can hold; take a checkpoint made without it"
        )

    def zeros() -> np.ndarray:
        stored = unpack(qzeros.read(), bits)
        if first and (stored == (1 << bits) - 1).any():
            # One more would be beyond the code's range: such a file was packed with a borrow from its neighbour.
            raise InputError(
                f"expected zero points below {(1 << bits) - 1}; found that one in {qzeros.name}, where GPTQ's first "
                "format is ambiguous; save it again as gptq_v2"
            )
        return stored.T + np.uint8(first)

    words = lambda rows: np.ascontiguousarray(qweight.read()[:, rows].T).view(np.uint32)
    return Codes(path, bits, (outputs, columns), groups, words, lambda: scales.read().T, zeros)


def packed_integers(path: str, packed: Tensor, scales: Tensor, zeros: Tensor | None, columns: int) -> Codes:
    """compressed-tensors: int32 words [N, K * bits / 32], MLX's own but for the zero, or int8 codes [N, K].

    `zeros`, packed down the rows or int8 [N, G], count from the middle of the codes' range; so do the codes in int8.
    """
    outputs = packed.shape[0]
    groups = scales.shape[1] if len(scales.shape) > 1 else 1
    check(scales, scales.shape if scales.size == 1 else (outputs, groups), *FLOATING)
    bits = 8 if packed.dtype == "int8" else packed.shape[1] * 32 // columns
    if bits not in (4, 8):
        raise InputError(f"expected codes of 4 or 8 bits; found {bits} in {path}; start from the original")
    check(packed, (outputs, columns * bits // 32 if packed.dtype == "int32" else columns), "int32", "int8")
    if zeros is not None:
        check(zeros, (outputs if zeros.dtype == "int8" else outputs * bits // 32, groups), "int8", "int32")
    middle = 1 << bits - 1

    def words(rows: slice) -> np.ndarray:
        stored = np.ascontiguousarray(packed.read()[rows])
        return stored.view(np.uint32) if packed.dtype == "int32" else (stored.view(np.uint8) ^ middle).view(np.uint32)

    def every() -> np.ndarray | int:
        if zeros is None:
            return middle
        stored = zeros.read()
        if zeros.dtype == "int8":
            return stored.astype(np.int16) + middle
        return unpack(np.ascontiguousarray(stored.T), bits)[:, :outputs].T

    every_scale = lambda: np.broadcast_to(scales.read().reshape(-1, groups), (outputs, groups))
    return Codes(path, bits, (outputs, columns), groups, words, every_scale, every)


def check(tensor: Tensor, shape: tuple[int, ...], *dtypes: str) -> None:
    """Raises InputError unless `tensor` has that shape and one of `dtypes`."""
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise InputError(
            f"expected {tensor.name} as {' or '.join(dtypes)} {list(shape)}; found {tensor.dtype} "
            f"{list(tensor.shape)}; download it again"
        )
