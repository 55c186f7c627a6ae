"""Weights that lie on a quantization grid already, and how to store them without losing a bit.

A tensor that was published in 16 bits may have been dequantized from a few; rounding it onto another grid adds error to
error. Every function here is exact or says no: codes and scales it returns give back the very weights.

    mxfp4        2**e * {0, .5, 1, 1.5, 2, 3, 4, 6}, groups of 32     4.25 bits a weight
    nvfp4        an E4M3 scale instead, groups of 16                  4.5
    affine 5/32  holds the mxfp4 grid: scale 2**e / 2, bias -6 * 2**e, code 2 * value + 12;   6 bits in bfloat16

Zeros have no sign in the affine format: -0 comes back as 0 there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from isomorph.quantize.microscaling import E2M1, E4M3, E8M0_BIAS
from isomorph.quantize.packing import pack, unpack
from isomorph.quantize.settings import Settings

MXFP4, NVFP4 = Settings(4, 32, "mxfp4"), Settings(4, 16, "nvfp4")
AFFINE_5 = Settings(5, 32, "affine")

#: Twice the magnitude of each E2M1 code: whole numbers.
_DOUBLED = (2 * E2M1).astype(np.int16)
#: Twice a magnitude -> its E2M1 code; 255 where there is none.
_CODE_OF = np.full(13, 255, np.uint8)
_CODE_OF[_DOUBLED] = np.arange(8, dtype=np.uint8)
#: What doubled and signed E2M1 values are counted from, so that none is negative.
_OFFSET = int(_DOUBLED[-1])


class Groups(NamedTuple):
    """Codes [G, group_size] uint8 and scales [G] uint8 of a microscaling format."""

    codes: np.ndarray
    scales: np.ndarray


def mxfp4_groups(groups: np.ndarray) -> Groups | None:
    """float32 groups [G, 32] that lie on the mxfp4 grid, as codes and scales; None when one weight does not.

    Of the exponents that fit, the least is taken: its grid holds the others'.
    """
    largest = np.abs(groups).max(axis=1)
    if not np.isfinite(largest).all():
        return None
    # 4 or 6 times the scale: what the largest weight of a group is at its least exponent.
    exponents = np.frexp(largest)[1] - 3
    exponents[largest == 0] = 0
    scales = exponents + E8M0_BIAS
    if (scales < 0).any() or (scales > 254).any():
        return None
    codes = _codes(groups, np.ldexp(np.float32(1), exponents))
    return None if codes is None else Groups(codes, scales.astype(np.uint8))


def nvfp4_groups(groups: np.ndarray) -> Groups | None:
    """float32 groups [G, 16] that lie on the nvfp4 grid without a global scale; None when one weight does not."""
    largest = np.abs(groups).max(axis=1)
    if not np.isfinite(largest).all():
        return None
    codes = np.zeros(groups.shape, np.uint8)
    scales = np.zeros(len(groups), np.uint8)
    open_groups = np.flatnonzero(largest)
    scales[largest == 0] = np.float32(1).astype(E4M3).view(np.uint8)
    codes[largest == 0] = np.signbit(groups[largest == 0]).astype(np.uint8) << np.uint8(3)
    for magnitude in E2M1[:0:-1]:  # the largest weight's own, 6 first
        steps = largest[open_groups] / magnitude
        with np.errstate(over="ignore"):
            stored = steps.astype(E4M3)
        fits = np.flatnonzero(stored.astype(np.float32) == steps)
        tried = open_groups[fits]
        found, good = _codes_by_group(groups[tried], steps[fits])
        codes[tried[good]], scales[tried[good]] = found[good], stored[fits][good].view(np.uint8)
        open_groups = np.setdiff1d(open_groups, tried[good], assume_unique=True)
        if not open_groups.size:
            return Groups(codes, scales)
    return None


def affine_from_mxfp4(words: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mxfp4 words [..., K / 8] and scales [..., K / 32] -> affine 5-bit words, float32 scales and biases, groups of 32.

    The affine weights are equal to the mxfp4 ones, with scales and biases that bfloat16 holds exactly. Raises
    ValueError for NaN, and for a scale of 2**125 or more, where the product before the bias is added overflows.
    """
    if (scales >= 125 + E8M0_BIAS).any():
        raise ValueError("an mxfp4 scale that affine arithmetic cannot match")
    codes = unpack(words, 4)
    doubled = _DOUBLED[codes & 7]
    values = np.where(codes & 8, _OFFSET - doubled, _OFFSET + doubled).astype(np.uint8)
    steps = np.ldexp(np.float32(0.5), scales.astype(np.int32) - E8M0_BIAS)
    return pack(values, 5), steps, -_OFFSET * steps


def mxfp4_from_affine(
    words: np.ndarray, scales: np.ndarray, biases: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """The inverse: affine 5-bit words, groups of 32, that hold mxfp4 weights -> mxfp4 words and scales, else None."""
    steps, ends = scales.astype(np.float32), biases.astype(np.float32)
    fractions, exponents = np.frexp(steps)
    stored = exponents + E8M0_BIAS  # step = 2**(exponent - 1) and scale = 2 * step
    if not ((fractions == 0.5) & (ends == -_OFFSET * steps) & (stored >= 0) & (stored <= 254)).all():
        return None
    values = unpack(words, 5).astype(np.int16) - _OFFSET
    magnitudes = np.abs(values)
    if magnitudes.max(initial=0) > _OFFSET or (_CODE_OF[magnitudes] == 255).any():
        return None
    return pack(_CODE_OF[magnitudes] | (values < 0).astype(np.uint8) << np.uint8(3), 4), stored.astype(np.uint8)


#: Formats from the cheapest on, each with what tells whether groups lie on its grid.
GRIDS: dict[Settings, Callable[[np.ndarray], Groups | None]] = {MXFP4: mxfp4_groups, NVFP4: nvfp4_groups}


def _codes(groups: np.ndarray, steps: np.ndarray) -> np.ndarray | None:
    codes, good = _codes_by_group(groups, steps)
    return codes if good.all() else None


def _codes_by_group(groups: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E2M1 codes of `groups / steps`, and which groups they are exact for."""
    doubled = np.abs(groups) / (steps[:, None] / 2)
    whole = np.minimum(doubled, _OFFSET).astype(np.uint8)
    codes = _CODE_OF[whole]
    # The product, not the quotient, has to be exact: it is what a reader computes.
    good = ((codes != 255) & (E2M1[codes & 7] * steps[:, None] == np.abs(groups))).all(axis=1)
    return (codes & 7) | np.signbit(groups).astype(np.uint8) << np.uint8(3), good
