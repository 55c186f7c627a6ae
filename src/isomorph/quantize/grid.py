"""Weights that lie on a quantization grid already, and how to store them without losing a bit.

A tensor that was published in 16 bits may have been dequantized from a few; rounding it onto another grid adds error to
error. Every function here is exact or says no: what it returns gives back the very weights. Grids that are recognized
in floats, from the cheapest on, in bits a weight:

    mxfp4        2**e * {0, .5, 1, 1.5, 2, 3, 4, 6}, groups of 32                        4.25
    nvfp4        an E4M3 scale instead, groups of 16                                     4.5
    integers     scale * (-15 .. 15), 16 of them in a row (AWQ, GPTQ); affine 4-bit      4.5, 5 or 6
                 with float32 scales, in groups of 128, 64 or 32
    mxfp8        2**e * E4M3, groups of 32 (fp8 blocks whose scales are powers of two)   8.25

The mxfp4 grid also fits affine groups of 32 with 5 bits or more: scale 2**e / 2, bias -6 * 2**e, code 2 * value + 12,
which bfloat16 holds exactly. The affine format has no negative zero: -0 comes back as 0 there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from isomorph.checkpoint.tensor import Tensor
from isomorph.quantize import affine
from isomorph.quantize.arrays import dequantize_array, quantize_array
from isomorph.quantize.microscaling import E2M1, E4M3, E8M0_BIAS
from isomorph.quantize.packed import Packed
from isomorph.quantize.packing import pack, unpack
from isomorph.quantize.settings import Settings

MXFP4, NVFP4, MXFP8 = Settings(4, 32, "mxfp4"), Settings(4, 16, "nvfp4"), Settings(8, 32, "mxfp8")
INTEGERS = tuple(Settings(4, size) for size in (128, 64, 32))

#: Grids that floats are tried for, from the cheapest on.
GRIDS = (MXFP4, NVFP4, *INTEGERS, MXFP8)

#: Weights of a block that are tried first: what lies on no grid is known after so many.
SAMPLE = 1024

#: Twice the magnitude of each E2M1 code: whole numbers.
_DOUBLED = (2 * E2M1).astype(np.int16)
#: Twice a magnitude -> its E2M1 code; 255 where there is none.
_CODE_OF = np.full(13, 255, np.uint8)
_CODE_OF[_DOUBLED] = np.arange(8, dtype=np.uint8)
#: What doubled and signed E2M1 values are counted from, so that none is negative.
_OFFSET = int(_DOUBLED[-1])
#: Affine code of each E2M1 code, sign included, and back: 255 where there is none.
_AFFINE_OF = np.concatenate([_OFFSET + _DOUBLED, _OFFSET - _DOUBLED]).astype(np.uint8)
_E2M1_OF = np.full(256, 255, np.uint8)
_E2M1_OF[_AFFINE_OF[::-1]] = np.arange(16, dtype=np.uint8)[::-1]  # of the two zeros the positive one, set last
#: The affine codes of the two E2M1 codes in each byte, as one number.
_PAIRS = np.stack([np.tile(_AFFINE_OF, 16), np.repeat(_AFFINE_OF, 16)], axis=1).view("<u2").reshape(-1)
#: Bits that the codes 0 .. 2 * _OFFSET take.
_DOUBLED_BITS = 5
#: Codes of four bits.
_LEVELS = 15


def holds(grid: Settings, target: Settings) -> bool:
    """Whether every matrix stored as `grid` can be stored as `target` with the same weights."""
    if grid == target:
        return True
    if grid == MXFP4:
        return target.affine and target.group_size == grid.group_size and target.bits >= _DOUBLED_BITS
    finer = grid.group_size % target.group_size == 0
    return grid.affine and target.affine and finer and target.bits >= grid.bits


def grid_of(tensor: Tensor) -> Settings | None:
    """The cheapest grid that every weight of the float `tensor` [..., K] lies on, None when there is none.

    What lies on none is known after a few rows. Zeros lie on all of them, and on whatever they are rounded to: on none.
    """
    found = next((grid for grid in _possible(tensor) if _all_on(tensor, grid)), None)
    return found if found is not None and any(block.any() for block in tensor.blocks()) else None


def _possible(tensor: Tensor) -> Sequence[Settings]:
    """GRIDS but for those that the first weights rule out at once: all that have 16 values a group of 32 or more."""
    fitting = [grid for grid in GRIDS if grid.fits(tensor.shape[-1])]
    first = next(tensor.blocks()).reshape(-1)[:SAMPLE]
    if MXFP4 not in fitting or len(first) < SAMPLE:
        return fitting
    groups = first.astype(np.float32).reshape(-1, MXFP4.group_size)
    few = np.isfinite(groups).all() and not _too_many(groups, _LEVELS + 1)
    return fitting if few else [grid for grid in fitting if grid in (NVFP4, MXFP8)]


def _all_on(tensor: Tensor, grid: Settings) -> bool:
    for block in tensor.blocks():
        rows = block.reshape(-1, block.shape[-1])
        sample = max(1, SAMPLE // rows.shape[1])
        if any(on_grid(part, grid) is None for part in (rows[:sample], rows[sample:]) if len(part)):
            return False
    return True


def grid_of_packed(settings: Settings, blocks: Iterable[Packed]) -> Settings:
    """The cheapest grid of a packed matrix: its own, but for affine `blocks` that hold mxfp4 weights."""
    if settings == MXFP4 or not holds(MXFP4, settings):
        return settings
    return MXFP4 if all(regridded(block, settings, MXFP4) is not None for block in blocks) else settings


def on_grid(weights: np.ndarray, grid: Settings) -> Packed | None:
    """Float weights [..., K] stored as `grid`, one of GRIDS, without any error; None when that cannot be."""
    if grid in INTEGERS:
        return _integers(weights, grid)
    if grid == NVFP4:
        return _nvfp4(weights)
    packed, zeros = _same(weights, grid), negative_zeros(weights)
    if packed is None or grid == MXFP8 or not zeros.any():
        return packed
    # MLX writes no negative zero; this keeps them.
    return packed._replace(weight=packed.weight | pack(zeros.astype(np.uint8) << np.uint8(3), grid.bits))


def regridded(packed: Packed, settings: Settings, target: Settings) -> Packed | None:
    """The weights `packed` as `settings` say, as `target`, without any error; None when that cannot be."""
    if settings == target:
        return packed
    if settings == MXFP4 and holds(settings, target):
        return Packed(*affine_from_mxfp4(packed.weight, packed.scales, target.bits))
    if target == MXFP4 and holds(target, settings):
        found = mxfp4_from_affine(packed, settings.bits)
        return None if found is None else Packed(*found, None)
    if holds(settings, target):
        assert packed.biases is not None
        times = settings.group_size // target.group_size
        scales, biases = (np.repeat(part, times, axis=-1) for part in (packed.scales, packed.biases))
        return Packed(pack(unpack(packed.weight, settings.bits), target.bits), scales, biases)
    return None


def affine_from_mxfp4(
    words: np.ndarray, scales: np.ndarray, bits: int = _DOUBLED_BITS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mxfp4 words [..., K / 8] and scales [..., K / 32] -> affine words of `bits`, float32 scales and biases.

    The affine weights are equal to the mxfp4 ones, with scales and biases that bfloat16 holds exactly. Raises
    ValueError for NaN, and for a scale of 2**125 or more, where the product before the bias is added overflows.
    """
    if (scales >= 125 + E8M0_BIAS).any():
        raise ValueError("an mxfp4 scale that affine arithmetic cannot match")
    values = _PAIRS[np.ascontiguousarray(words).view(np.uint8)].view(np.uint8)
    steps = np.ldexp(np.float32(0.5), scales.astype(np.int32) - E8M0_BIAS)
    return pack(values, bits), steps, -_OFFSET * steps


def mxfp4_from_affine(packed: Packed, bits: int = _DOUBLED_BITS) -> tuple[np.ndarray, np.ndarray] | None:
    """The inverse: affine words of `bits`, groups of 32, that hold mxfp4 weights -> mxfp4 words, scales; else None."""
    assert packed.biases is not None
    steps, ends = packed.scales.astype(np.float32), packed.biases.astype(np.float32)
    fractions, exponents = np.frexp(steps)
    stored = exponents + E8M0_BIAS  # step = 2**(exponent - 1) and scale = 2 * step
    if not ((fractions == 0.5) & (ends == -_OFFSET * steps) & (stored >= 0) & (stored <= 254)).all():
        return None
    codes = _E2M1_OF[unpack(packed.weight, bits)]
    return None if (codes == 255).any() else (pack(codes, MXFP4.bits), stored.astype(np.uint8))


def _nvfp4(weights: np.ndarray) -> Packed | None:
    """Weights of the nvfp4 grid without a global scale."""
    groups = np.ascontiguousarray(weights).astype(np.float32, copy=False).reshape(-1, NVFP4.group_size)
    largest = np.abs(groups).max(axis=1)
    if not np.isfinite(largest).all() or _too_many(np.abs(groups), len(E2M1)):
        return None
    codes = np.zeros(groups.shape, np.uint8)
    scales = np.zeros(len(groups), np.uint8)
    open_groups = np.flatnonzero(largest)
    scales[largest == 0] = np.float32(1).astype(E4M3).view(np.uint8)
    codes[largest == 0] = np.signbit(groups[largest == 0]).astype(np.uint8) << np.uint8(3)
    for magnitude in E2M1[:0:-1]:  # the largest weight's own, 6 first
        if not open_groups.size:
            break
        with np.errstate(over="ignore"):
            steps = largest[open_groups] / magnitude
            stored = steps.astype(E4M3)
        fits = np.flatnonzero(stored.astype(np.float32) == steps)
        tried = open_groups[fits]
        found, good = _codes_by_group(groups[tried], steps[fits])
        codes[tried[good]], scales[tried[good]] = found[good], stored[fits][good].view(np.uint8)
        open_groups = np.setdiff1d(open_groups, tried[good], assume_unique=True)
    if open_groups.size:
        return None
    return Packed(pack(codes.reshape(weights.shape), NVFP4.bits), scales.reshape(*weights.shape[:-1], -1), None)


def _integers(weights: np.ndarray, grid: Settings) -> Packed | None:
    """Weights that are a scale of their dtype times whole numbers, 16 in a row at most, rounded to that dtype."""
    groups = np.ascontiguousarray(weights).astype(np.float32, copy=False).reshape(-1, grid.group_size)
    largest = np.abs(groups).max(axis=1)
    if not np.isfinite(largest).all() or _too_many(groups, _LEVELS + 1):
        return None
    codes = np.zeros(groups.shape, np.uint8)
    scales, biases = np.ones(len(groups), np.float32), np.zeros(len(groups), np.float32)
    open_groups = np.flatnonzero(largest)
    for numerator, ulps in ((k, ulps) for k in range(_LEVELS, 0, -1) for ulps in (0, -1, 1)):
        if not open_groups.size:
            break
        values = groups[open_groups]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            steps = _moved((largest[open_groups] / np.float32(numerator)).astype(weights.dtype), ulps)
            whole = np.rint(values / steps[:, None])
            least = whole.min(axis=1)
            found = np.clip(whole - least[:, None], 0, _LEVELS).astype(np.uint8)
            ends = least * steps
            back = affine.decode(found, steps, ends).astype(weights.dtype).astype(np.float32)
        good = np.isfinite(steps) & (back == values).all(axis=1)
        done = open_groups[good]
        codes[done], scales[done], biases[done] = found[good], steps[good], ends[good]
        open_groups = open_groups[~good]
    if open_groups.size:
        return None
    rows = (*weights.shape[:-1], -1)
    return Packed(pack(codes.reshape(weights.shape), grid.bits), scales.reshape(rows), biases.reshape(rows))


def _too_many(groups: np.ndarray, codes: int) -> bool:
    """Whether a group has more values than there are codes: it nearly always has, where weights lie on no grid."""
    return bool((np.count_nonzero(np.diff(np.sort(groups, axis=1), axis=1), axis=1) >= codes).any())


def _moved(values: np.ndarray, ulps: int) -> np.ndarray:
    """Positive floats moved by so many units in the last place of their dtype, as float32."""
    bits = _bits(values)
    return (bits + np.array(ulps).astype(bits.dtype)).view(values.dtype).astype(np.float32)


def _same(weights: np.ndarray, grid: Settings) -> Packed | None:
    """Weights rounded onto a grid with power-of-two scales, when nothing was lost."""
    if weights.dtype == np.float16:
        weights = weights.astype(np.float32)  # whose range holds every such grid, as that of bfloat16 does
    weights = np.ascontiguousarray(weights)
    try:
        packed = quantize_array(weights, grid)
    except ValueError:
        return None
    back = dequantize_array(packed, grid, weights.dtype)
    # Bits are compared: far faster than bfloat16 values.
    differ = _bits(back) != _bits(weights)
    return None if differ.any() and (differ & ~negative_zeros(weights)).any() else packed


def negative_zeros(weights: np.ndarray) -> np.ndarray:
    """Where float weights are -0, bool."""
    bits = _bits(weights)
    return bits == bits.dtype.type(1 << (8 * weights.itemsize - 1))


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")


def _codes_by_group(groups: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E2M1 codes of `groups / steps`, and which groups they are exact for."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        doubled = np.abs(groups) / (steps[:, None] / 2)
    whole = np.fmin(doubled, _OFFSET).astype(np.uint8)
    codes = _CODE_OF[whole]
    # The product, not the quotient, has to be exact: it is what a reader computes.
    good = ((codes != 255) & (E2M1[codes & 7] * steps[:, None] == np.abs(groups))).all(axis=1)
    return (codes & 7) | np.signbit(groups).astype(np.uint8) << np.uint8(3), good
