"""CRC-32, which zip files need and an interrupted run is checked with."""

from __future__ import annotations

import zlib

import numpy as np

from isomorph.kernels.extension import find_extension

#: Bytes that the extension folds at a time.
_UNIT = 64


def crc32(data: np.ndarray, value: int = 0) -> int:
    """`zlib.crc32` of a contiguous uint8 array, several times as fast where the extension and the processor can."""
    extension, whole = find_extension(), len(data) // _UNIT * _UNIT
    if extension is None or not whole:
        return zlib.crc32(data.data, value)
    folded = extension.fold_crc32(data.__array_interface__["data"][0], whole, value ^ 0xFFFFFFFF)
    # zlib's register begins at the complement of the value that it is given.
    return zlib.crc32(data[whole:].data, zlib.crc32(folded, 0xFFFFFFFF)) if folded else zlib.crc32(data.data, value)
