"""The codec of whole arrays in C++ (kernels/csrc/quantize*), bit for bit that of `portable`."""

from __future__ import annotations

from typing import Any

import numpy as np

from isomorph.kernels.extension import find_extension
from isomorph.quantize.packed import LOSS_STRIDE, Packed
from isomorph.quantize.settings import Settings
from isomorph.quantize.threads import BLOCK_VALUES

#: As csrc/format.h numbers them.
_MODES = {"affine": 0, "mxfp4": 1, "mxfp8": 2, "nvfp4": 3}
_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


def available() -> bool:
    """Whether the extension was built and is wanted."""
    return find_extension() is not None


def encode(values: np.ndarray, settings: Settings, packed: Packed, squares: np.ndarray | None) -> bool:
    """See `portable.encode`."""
    return find_extension().encode(
        _address(values),
        _TYPES[str(values.dtype)],
        values.size // settings.group_size,
        *_settings(settings),
        *map(_address, packed),
        BLOCK_VALUES // settings.group_size,
        LOSS_STRIDE,
        _address(squares),
    )


def decode(packed: Packed, settings: Settings, values: np.ndarray) -> None:
    """See `portable.decode`."""
    find_extension().decode(
        *map(_address, packed),
        _TYPES[str(packed.scales.dtype)] if settings.affine else 0,
        values.size // settings.group_size,
        *_settings(settings),
        _address(values),
        _TYPES[str(values.dtype)],
    )


def _settings(settings: Settings) -> tuple[int, int, int]:
    return _MODES[settings.mode], settings.bits, settings.group_size


def _address(array: np.ndarray | None) -> Any:
    return 0 if array is None else array.__array_interface__["data"][0]
