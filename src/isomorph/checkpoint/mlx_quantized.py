"""MLX-quantized checkpoints: which tensors belong together, whether they fit, and their values as floats.

A quantized module `path` is stored as `path.weight` (packed words), `path.scales` and, in affine mode,
`path.biases`. config.json's `quantization` gives the settings of all modules, and of single ones by path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isomorph.checkpoint.source import Checkpoint
from isomorph.checkpoint.tensor import BLOCK_BYTES, FLOATING, NUMPY_DTYPES, Tensor
from isomorph.errors import InputError
from isomorph.quantize.arrays import Packed, dequantize_array
from isomorph.quantize.settings import MODES, Settings

#: The same entry twice: MLX reads the first, the Hub the second.
CONFIG_KEYS = ("quantization", "quantization_config")

REPAIR = "quantize it again"


@dataclass(frozen=True)
class QuantizedModule:
    """One quantized matrix, checked: its settings, its parts, and `shape`, that of the weights it stands for."""

    path: str
    settings: Settings
    weight: Tensor
    scales: Tensor
    biases: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scales.shape[:-1], self.scales.shape[-1] * self.settings.group_size)

    def parts(self) -> list[Tensor]:
        """What is stored, as it is. Scales and biases that are not finite raise InputError when they are read."""
        companions = {"scales": self.scales, "biases": self.biases}
        return [self.weight, *(self._checked(part, tensor) for part, tensor in companions.items() if tensor)]

    def _checked(self, part: str, tensor: Tensor) -> Tensor:
        def read() -> np.ndarray:
            values = tensor.read()
            self._check_finite(part, values)
            return values

        return Tensor(tensor.name, tensor.shape, tensor.dtype, read)

    def dequantized(self, dtype: str | None = None) -> Tensor:
        """The weights as a lazy float tensor named `path.weight`, in `dtype` or as MLX gives them."""
        if self.settings.affine and self.scales.dtype == "float32" and dtype in ("bfloat16", "float16"):
            # Scales of 32 bits are there because products of 16 would be off: the sum is rounded, once.
            return self.dequantized().cast(dtype)
        dtype = dtype or (self.scales.dtype if self.settings.affine else "bfloat16")
        return Tensor(
            f"{self.path}.weight",
            self.shape,
            dtype,
            read=lambda: dequantize_array(self.read(), self.settings, NUMPY_DTYPES[dtype]),
            stream=lambda: (dequantize_array(part, self.settings, NUMPY_DTYPES[dtype]) for part in self.blocks()),
        )

    def read(self) -> Packed:
        """The packed parts. Raises InputError for scales or biases that are not finite."""
        return Packed(self.weight.read(), *self._companions())

    def blocks(self) -> Iterator[Packed]:
        """The packed parts as runs of rows that stand for about a block of floats."""
        scales, biases = self._companions()
        size = max(1, BLOCK_BYTES // (2 * math.prod(self.shape[1:])))
        done = 0
        for words in self.weight.blocks():
            for start in range(0, len(words), size):
                part = words[start : start + size]
                rows = slice(done, done + len(part))
                yield Packed(part, scales[rows], None if biases is None else biases[rows])
                done = rows.stop

    def _companions(self) -> tuple[np.ndarray, np.ndarray | None]:
        scales, biases = self.scales.read(), None if self.biases is None else self.biases.read()
        self._check_finite("scales", scales)
        if biases is not None:
            self._check_finite("biases", biases)
        return scales, biases

    def _check_finite(self, part: str, values: np.ndarray) -> None:
        if values.dtype == np.uint8:
            # E8M0 has one NaN, E4M3 one of either sign.
            bad = (values & np.uint8(0x7F)) == 0x7F if self.settings.mode == "nvfp4" else values == 0xFF
            broken = bool(bad.any())
        else:
            broken = not np.isfinite(values.astype(np.float32)).all()
        if broken:
            raise InputError(f"expected finite {part}; found NaN or infinity in {self.path}.{part}; {REPAIR}")


def is_quantized(tensors: Mapping[str, Tensor]) -> bool:
    """Whether some tensor has the form of a quantized module's."""
    return any(name.endswith(".scales") and f"{name[:-7]}.weight" in tensors for name in tensors)


def quantized_modules(
    tensors: Mapping[str, Tensor], quantization: Mapping[str, Any] | None, columns: Mapping[str, int] | None = None
) -> dict[str, QuantizedModule]:
    """The quantized modules of `tensors` by path, all checked. Raises InputError with the first fault and their number.

    `quantization` is config.json's entry. A module that it does not name has its defaults, unless shapes rule that
    out: then the settings are inferred, from the width `columns[path]` where it is known. Defaults that no such module
    has are a mistake.
    """
    default, own = parse_quantization(quantization) if quantization is not None else (None, {})
    modules: dict[str, QuantizedModule] = {}
    faults: list[str] = []
    for name, tensor in tensors.items():
        if name.endswith(".scales"):
            path = name.removesuffix(".scales")
            if default is None:
                faults.append(f"expected 'quantization' in config.json beside {name!r}; found none; add it")
                continue
            if path in own and own[path] is None:
                faults.append(f"expected {path!r} as plain weights, as config.json says; found {name!r}; correct it")
                continue
            try:
                modules[path] = _module(path, tensors, own.get(path), default, (columns or {}).get(path))
            except InputError as error:
                faults.append(str(error))
        elif name.endswith(".weight") and tensor.dtype == "uint32" and f"{name[:-7]}.scales" not in tensors:
            faults.append(f"expected {name[:-7]}.scales beside the packed words of {name!r}; found none; {REPAIR}")
    for path, settings in own.items():
        if settings is not None and path not in modules and f"{path}.weight" in tensors and not faults:
            faults.append(f"expected {path!r} quantized, as config.json says; found plain weights; {REPAIR}")
    others = [module for path, module in modules.items() if path not in own]
    if others and all(module.settings != default for module in others):
        path, found = others[0].path, others[0].settings
        faults.append(f"expected {default}, as config.json says; found {path!r} with {found}; correct config.json")
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise InputError(faults[0] + more)
    return modules


def dequantized(
    tensors: Mapping[str, Tensor],
    quantization: Mapping[str, Any] | None,
    dtype: str | None = None,
    columns: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """`tensors` with every quantized module replaced by one lazy float tensor, in place of its packed words.

    The floats have the scales' dtype (bfloat16 for mxfp4, mxfp8 and nvfp4) and are those of `mx.dequantize`; with
    `dtype` the arithmetic is done in that dtype, so that float32 adds no rounding to what the folder says.
    Raises InputError for a malformed folder; values that are not finite are found when they are read.
    """
    modules = quantized_modules(tensors, quantization, columns)
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        if path not in modules or part not in ("weight", "scales", "biases"):
            result[name] = tensor
        elif part == "weight":
            result[name] = modules[path].dequantized(dtype)
    return result


def unquantized(checkpoint: Checkpoint, dtype: str | None = None) -> Checkpoint:
    """`checkpoint` with `dequantized` tensors and without `quantization` in its config; itself when it has neither."""
    if checkpoint.quantization is None and not is_quantized(checkpoint.tensors):
        return checkpoint
    config = {key: value for key, value in (checkpoint.config or {}).items() if key not in CONFIG_KEYS}
    return replace(checkpoint, config=config, tensors=dequantized(checkpoint.tensors, checkpoint.quantization, dtype))


def parse_quantization(quantization: Mapping[str, Any]) -> tuple[Settings, dict[str, Settings | None]]:
    """config.json's `quantization` as (defaults, settings a module path; None where a module is kept as it is)."""
    if not isinstance(quantization, Mapping):
        raise InputError(f"expected an object as 'quantization' in config.json; found {quantization!r}; correct it")
    general = {key: value for key, value in quantization.items() if key in ("bits", "group_size", "mode")}
    if general.get("bits") is None or general.get("group_size") is None:
        raise InputError(
            f"expected bits and group_size under 'quantization' in config.json; found {general or 'neither'}; add them"
        )
    default = _settings(general, "quantization")
    own: dict[str, Settings | None] = {}
    for path, value in quantization.items():
        if isinstance(value, Mapping):
            own[path] = _settings(value, path)
        elif value is False:
            own[path] = None
        elif value is True:
            own[path] = default
    return default, own


def _settings(values: Mapping[str, Any], where: str) -> Settings:
    try:
        return Settings.from_config(values)
    except InputError as error:
        raise InputError(f"config.json, quantization of {where!r}: {error}; correct it") from None


def _module(
    path: str, tensors: Mapping[str, Tensor], own: Settings | None, default: Settings, columns: int | None
) -> QuantizedModule:
    weight, scales, biases = (tensors.get(f"{path}.{part}") for part in ("weight", "scales", "biases"))
    assert scales is not None
    if weight is None:
        raise InputError(f"expected {path}.weight beside {scales.name!r}; found none; {REPAIR}")
    if f"{path}.global_scale" in tensors:
        raise InputError(f"expected no global scale; found {path}.global_scale, which is not supported; {REPAIR}")
    if weight.dtype != "uint32":
        raise InputError(f"expected packed uint32 words beside {scales.name!r}; found {weight.dtype}; {REPAIR}")
    if len(scales.shape) < 2 or weight.shape[:-1] != scales.shape[:-1] or 0 in (*weight.shape, *scales.shape):
        raise InputError(
            f"expected {weight.name} and its scales with the same rows; "
            f"found {list(weight.shape)} and {list(scales.shape)}; {REPAIR}"
        )
    settings = own or _fitting(path, weight, scales, default, columns)
    words, groups = weight.shape[-1], scales.shape[-1]
    width = groups * settings.group_size
    if words * 32 != width * settings.bits or columns not in (None, width):
        raise InputError(
            f"expected {path} with {settings.bits} bits in groups of {settings.group_size}"
            f"{'' if columns is None else f' and {columns} columns'}; found {words} words and {groups} scales a row; "
            "correct 'quantization' in config.json, or quantize it again"
        )
    _check_kinds(path, settings, scales, biases)
    return QuantizedModule(path, settings, weight, scales, biases)


def _check_kinds(path: str, settings: Settings, scales: Tensor, biases: Tensor | None) -> None:
    kinds = FLOATING[1:] if settings.affine else ("uint8",)
    if scales.dtype not in kinds:
        raise InputError(f"expected {path}.scales as {' or '.join(kinds)}; found {scales.dtype}; {REPAIR}")
    if settings.affine and biases is None:
        raise InputError(f"expected {path}.biases beside its scales; found none; {REPAIR}")
    if biases is not None and not settings.affine:
        raise InputError(f"expected no biases in mode {settings.mode}; found {path}.biases; {REPAIR}")
    if biases is not None and (biases.shape, biases.dtype) != (scales.shape, scales.dtype):
        raise InputError(
            f"expected {path}.biases like its scales, {scales.dtype} {list(scales.shape)}; "
            f"found {biases.dtype} {list(biases.shape)}; {REPAIR}"
        )


def _fitting(path: str, weight: Tensor, scales: Tensor, default: Settings, columns: int | None) -> Settings:
    """Settings of a module that config.json does not name: the defaults, or the only ones its shapes allow."""
    bits_a_group, rest = divmod(weight.shape[-1] * 32, scales.shape[-1])
    possible = [
        Settings(bits, size, mode)
        for mode, (_, _, all_bits, sizes) in MODES.items()
        for bits in all_bits
        for size in sizes
        if bits * size == bits_a_group and not rest and (mode == "affine") == (scales.dtype != "uint8")
        if columns in (None, scales.shape[-1] * size)
    ]
    if default in possible:
        return default
    if len(possible) == 1:
        return possible[0]
    found = f"{weight.shape[-1]} words and {scales.shape[-1]} scales a row"
    raise InputError(
        f"expected {path} with {default.bits} bits in groups of {default.group_size}, as config.json says; "
        f"found {found}; add its own settings under 'quantization' in config.json, or quantize it again"
    )
