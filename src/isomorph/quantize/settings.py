"""How one matrix is quantized: mode, bits and group size, and what follows from them for shapes and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isomorph.errors import InputError, did_you_mean
from isomorph.quantize.packing import BITS

#: mode -> (default bits, default group size, possible bits, possible group sizes); those of MLX.
MODES: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...]]] = {
    "affine": (4, 64, BITS, (32, 64, 128)),
    "mxfp4": (4, 32, (4,), (32,)),
    "mxfp8": (8, 32, (8,), (32,)),
    "nvfp4": (4, 16, (4,), (16,)),
}

#: Bytes of one stored scale or bias by dtype.
_FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Settings:
    """`bits` a weight, in groups of `group_size` consecutive columns, stored as `mode` says. Raises InputError."""

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(
                f"expected a mode of {', '.join(MODES)}; found {self.mode!r}{did_you_mean(str(self.mode), MODES)}"
            )
        _, _, bits, sizes = MODES[self.mode]
        for what, value, allowed in (("bits", self.bits, bits), ("group_size", self.group_size, sizes)):
            if type(value) is not int or value not in allowed:
                one_of = ", ".join(map(str, allowed))
                raise InputError(f"expected {what} of {one_of} for mode {self.mode}; found {value!r}")

    @classmethod
    def of(cls, bits: int | None = None, group_size: int | None = None, mode: str = "affine") -> Settings:
        """Settings with what is None taken from the mode's defaults."""
        default_bits, default_size, _, _ = MODES.get(mode, (4, 64, (), ()))
        return cls(default_bits if bits is None else bits, default_size if group_size is None else group_size, mode)

    @property
    def affine(self) -> bool:
        return self.mode == "affine"

    def fits(self, columns: int) -> bool:
        """Whether rows of `columns` weights can be quantized: whole groups and whole 32-bit words."""
        return columns > 0 and columns % self.group_size == 0 and columns * self.bits % 32 == 0

    def parts(self, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """What a matrix of `shape` and `dtype` is stored as: `weight`, `scales`, `biases` -> (shape, dtype)."""
        *rows, columns = shape
        words, groups = (*rows, columns * self.bits // 32), (*rows, columns // self.group_size)
        if not self.affine:
            return {"weight": (words, "uint32"), "scales": (groups, "uint8")}
        return {"weight": (words, "uint32"), "scales": (groups, dtype), "biases": (groups, dtype)}

    def nbytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of all parts of a matrix of `shape` and `dtype`."""
        sizes = {"uint32": 4, "uint8": 1, **_FLOAT_BYTES}
        return sum(math.prod(part) * sizes[kind] for part, kind in self.parts(shape, dtype).values())

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.mode} in groups of {self.group_size}"

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> Settings:
        """Parse an entry of config.json; what it leaves out is what mlx-lm takes: affine, and the mode's defaults."""
        return cls.of(*_known(entry))

    def changed(self, values: Mapping[str, Any]) -> Settings:
        """These settings with some replaced; affine, where the mode does not have the bits or group size asked for."""
        bits, group_size, mode = _known({"mode": None, **values})
        if mode is None:
            fits = bits in (None, *MODES[self.mode][2]) and group_size in (None, *MODES[self.mode][3])
            mode = self.mode if fits else "affine"
        if mode != self.mode:
            return Settings.of(bits, group_size, mode)
        size = self.group_size if group_size is None else group_size
        return Settings(self.bits if bits is None else bits, size, mode)


def _known(values: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    if unknown := sorted(set(values) - {"bits", "group_size", "mode"}):
        raise InputError(f"expected bits, group_size and mode as quantization settings; found {unknown[0]!r}")
    return values.get("bits"), values.get("group_size"), values.get("mode", "affine")
