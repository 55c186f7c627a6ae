"""Codes of 2, 3, 4, 5, 6 or 8 bits as MLX packs them: a little-endian stream of bits per row, stored as uint32.

3-, 5- and 6-bit codes therefore cross the borders of words. Eight codes of `bits` bits are `bits` bytes: they are
squeezed together, or spread, inside one 64-bit integer in three steps of pairs.
"""

from __future__ import annotations

import numpy as np

BITS = (2, 3, 4, 5, 6, 8)

#: Lane widths whose neighbours are joined by the three steps, from single codes in bytes to eight in 64 bits.
_LANES = (8, 16, 32)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [..., K] as uint32 words [..., K * bits / 32]; K must be a multiple of 32."""
    if bits == 8:
        return np.ascontiguousarray(codes).view(np.uint32)
    eights = np.ascontiguousarray(codes).view(np.uint64).copy()
    for lane in _LANES:
        low = _low_fields(lane, bits)
        shift = lane - bits * lane // 8
        upper = eights >> np.uint64(shift)
        upper &= low << np.uint64(bits * lane // 8)
        eights &= low
        eights |= upper
    # The lower `bits` bytes of each 64-bit integer, moved in the widest units that divide them.
    unit = np.dtype(f"u{bits & -bits}")
    wide = eights.view(unit).reshape(-1, 8 // unit.itemsize)
    narrow = np.empty((len(wide), bits // unit.itemsize), unit)
    for column in range(narrow.shape[1]):
        narrow[:, column] = wide[:, column]
    return narrow.reshape(*codes.shape[:-1], -1).view(np.uint32)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The uint8 codes [..., K] in uint32 words [..., K * bits / 32]."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw
    unit = np.dtype(f"u{bits & -bits}")
    narrow = raw.view(unit).reshape(-1, bits // unit.itemsize)
    wide = np.zeros((len(narrow), 8 // unit.itemsize), unit)
    for column in range(narrow.shape[1]):
        wide[:, column] = narrow[:, column]
    eights = wide.reshape(-1).view(np.uint64)
    for lane in reversed(_LANES):
        low = _low_fields(lane, bits)
        upper = eights << np.uint64(lane - bits * lane // 8)
        upper &= low << np.uint64(lane)
        eights &= low
        eights |= upper
    return eights.view(np.uint8).reshape(*raw.shape[:-1], -1)


def _low_fields(lane: int, bits: int) -> np.uint64:
    """Ones where the even lanes of `lane` bits hold their codes."""
    field = (1 << bits * lane // 8) - 1
    return np.uint64(sum(field << start for start in range(0, 64, 2 * lane)))
