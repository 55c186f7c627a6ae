"""Grids that weights lie on already: found, stored without losing a bit, never mistaken."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from isomorph.checkpoint.source import open_checkpoint
from isomorph.checkpoint.tensor import from_array
from isomorph.quantize.arrays import Packed, dequantize_array, quantize_array
from isomorph.quantize.grid import (
    GRIDS,
    INTEGERS,
    MXFP4,
    MXFP8,
    NVFP4,
    grid_of,
    grid_of_packed,
    holds,
    on_grid,
    regridded,
)
from isomorph.quantize.settings import Settings
from tiny_gpt_oss import unpacked

BFLOAT16, FLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
RANDOM = np.random.default_rng(11)
WEIGHTS = RANDOM.normal(0, 0.1, (12, 256)).astype(np.float32)


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def rounded(grid: Settings, dtype: np.dtype) -> np.ndarray:
    """Weights that some other tool rounded onto `grid` and stored as `dtype`."""
    if grid not in INTEGERS:
        return dequantize_array(quantize_array(WEIGHTS.astype(dtype), grid), grid, dtype)
    groups = (12, 256 // grid.group_size)
    codes, zeros = RANDOM.integers(0, 16, (*groups, grid.group_size)), RANDOM.integers(0, 16, (*groups, 1))
    # Their files have 16-bit scales, whatever the weights were dequantized to.
    scales = RANDOM.uniform(0.001, 0.02, (*groups, 1)).astype(np.float16 if dtype == FLOAT32 else dtype).astype(dtype)
    return ((codes - zeros).astype(dtype) * scales).reshape(12, 256)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_grid_is_found_and_kept(grid: Settings, dtype: np.dtype) -> None:
    """To the bit; one weight an ulp off, the control, is on no grid."""
    weights = rounded(grid, dtype)
    assert grid_of(from_array("w", weights)) == grid
    packed = on_grid(weights, grid)
    assert packed is not None
    assert np.array_equal(dequantize_array(packed, grid, FLOAT32).astype(dtype), weights)
    off = weights.copy()
    bits(off)[11, 200 - np.argmax(off[11, 200::-1] != 0)] += 1
    assert on_grid(off, grid) is None and grid_of(from_array("w", off)) is None


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=str)
def test_trained_weights_lie_on_none(dtype: np.dtype) -> None:
    assert grid_of(from_array("w", WEIGHTS.astype(dtype))) is None
    assert grid_of(from_array("w", np.full((2, 64), np.nan, dtype))) is None
    assert grid_of(from_array("w", np.zeros((2, 64), dtype))) is None
    assert grid_of(from_array("w", WEIGHTS.astype(dtype)[:, :40])) is None  # no whole groups


def test_zeros_keep_their_sign_in_mxfp4() -> None:
    words = RANDOM.integers(0, 2**32, (3, 8), dtype=np.uint64).astype(np.uint32)
    packed = Packed(words, np.full((3, 2), 120, np.uint8), None)
    weights = dequantize_array(packed, MXFP4)
    assert (bits(weights) == 0x8000).any()
    again = on_grid(weights, MXFP4)
    assert again is not None and np.array_equal(bits(dequantize_array(again, MXFP4)), bits(weights))


def test_a_grid_within_another() -> None:
    """The cheapest of the grids that fit is named: what mxfp4 holds, mxfp8 holds too."""
    weights = rounded(MXFP4, BFLOAT16)
    assert on_grid(weights, MXFP8) is not None and grid_of(from_array("w", weights)) == MXFP4
    assert on_grid(rounded(MXFP8, BFLOAT16), MXFP4) is None and on_grid(rounded(NVFP4, BFLOAT16), MXFP4) is None


@pytest.mark.parametrize("width", [5, 6, 8])
def test_mxfp4_as_affine_and_back(width: int) -> None:
    """In bfloat16 scales and biases; the codes come back but for -0, which affine arithmetic does not have."""
    packed = quantize_array(WEIGHTS, MXFP4)
    target = Settings(width, 32)
    assert holds(MXFP4, target)
    assert_identity(packed, target)
    with_zeros = packed._replace(weight=packed.weight | np.uint32(8))
    assert_identity(with_zeros, target)


def assert_identity(packed: Packed, target: Settings) -> None:
    """mxfp4 -> affine -> mxfp4: the same weights, scales, and codes but for the sign of zero."""
    affine = regridded(packed, MXFP4, target)
    assert affine is not None and affine.biases is not None
    stored = Packed(affine.weight, affine.scales.astype(BFLOAT16), affine.biases.astype(BFLOAT16))
    assert np.array_equal(stored.scales, affine.scales) and np.array_equal(stored.biases, affine.biases)
    for dtype in (BFLOAT16, FLOAT32):
        left, right = dequantize_array(packed, MXFP4, dtype), dequantize_array(stored, target, dtype)
        assert np.array_equal(left.astype(np.float32), right.astype(np.float32))
    assert grid_of_packed(target, [stored]) == MXFP4
    back = regridded(stored, target, MXFP4)
    assert back is not None and np.array_equal(back.scales, packed.scales)
    codes, returned = (dequantize_array(one, MXFP4, FLOAT32) for one in (packed, back))
    differ = bits(codes) != bits(returned)
    assert (codes[differ] == 0).all()


def test_an_mlx_reader_sees_the_same_weights() -> None:
    mx = pytest.importorskip("mlx.core")
    packed = quantize_array(WEIGHTS, MXFP4)
    affine = regridded(packed, MXFP4, Settings(5, 32))
    assert affine is not None
    scales, biases = (mx.array(part).astype(mx.bfloat16) for part in affine[1:])
    found = mx.dequantize(mx.array(affine.weight), scales, biases, group_size=32, bits=5)
    expected = mx.dequantize(mx.array(packed.weight), mx.array(packed.scales), mode="mxfp4", group_size=32, bits=4)
    assert mx.array_equal(found, expected)
    # The negative control: mx.quantize of the same weights is not exact at the same size.
    lossy = mx.dequantize(*mx.quantize(expected, group_size=32, bits=5), group_size=32, bits=5)
    assert not mx.array_equal(lossy, expected)


def test_affine_codes_move_into_wider_ones() -> None:
    settings, wider = Settings(4, 64), Settings(6, 64)
    packed = quantize_array(WEIGHTS, settings)
    moved = regridded(packed, settings, wider)
    assert moved is not None
    assert np.array_equal(dequantize_array(moved, wider), dequantize_array(packed, settings))
    finer = regridded(packed, settings, Settings(8, 32))
    assert finer is not None
    assert np.array_equal(dequantize_array(finer, Settings(8, 32)), dequantize_array(packed, settings))
    assert regridded(packed, settings, Settings(3, 64)) is None and not holds(settings, Settings(8, 128))
    # The same scales and biases as mxfp4 would have, over codes that it does not have.
    exact = regridded(quantize_array(WEIGHTS, MXFP4), MXFP4, Settings(5, 32))
    assert exact is not None
    assert regridded(exact._replace(weight=exact.weight ^ np.uint32(1)), Settings(5, 32), MXFP4) is None


def test_scales_beyond_affine_arithmetic_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot match"):
        regridded(Packed(np.zeros((1, 4), np.uint32), np.full((1, 1), 253, np.uint8), None), MXFP4, Settings(5, 32))


def test_every_golden_tensor_comes_back(shared) -> None:
    """The published blocks and scales of `golden/gpt-oss`: values to the bit, codes but for the sign of zero."""
    folder = shared / "golden" / "gpt-oss" / "public" / "mxfp4"
    tensors = {name: tensor.read() for name, tensor in open_checkpoint(folder).tensors.items()}
    packed = {name: value for name, value in tensors.items() if value.dtype == np.uint32}
    assert len(packed) == 8
    for name, words in packed.items():
        scales = tensors[name.replace(".weight", ".scales")]
        assert_identity(Packed(words, scales, None), Settings(5, 32))
        blocks = np.ascontiguousarray(words).view(np.uint8).reshape(*scales.shape, 16)
        weights = unpacked(blocks, scales)
        assert np.array_equal(dequantize_array(Packed(words, scales, None), MXFP4, FLOAT32), weights)
