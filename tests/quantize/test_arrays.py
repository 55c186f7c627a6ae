"""Quantized arrays: bit for bit MLX's, on its own outputs, on random weights of every kind, and on edge groups."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

from isomorph.errors import InputError
from isomorph.quantize.arrays import Loss, Packed, dequantize_array, quantize_array
from isomorph.quantize.microscaling import to_e4m3
from isomorph.quantize.packing import BITS, pack, unpack
from isomorph.quantize.settings import MODES, Settings
from quantize import reference

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
AFFINE = [Settings(bits, size) for bits in BITS for size in (32, 64, 128)]
MICROSCALED = [Settings.of(mode=mode) for mode in MODES if mode != "affine"]
KINDS = ["normal", "scales", "huge", "tiny", "coarse", "one_signed", "constant", "zero", "powers", "offset", "bits"]


def weights(kind: str, dtype: str, rows: int = 12, columns: int = 256, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng([seed, KINDS.index(kind)])
    if kind == "bits":
        # Any pattern of bits that is a finite number, subnormal ones included.
        width = np.dtype(DTYPES[dtype]).itemsize
        values = random.integers(0, 1 << 8 * width, (rows, columns), dtype=f"u{width}").view(DTYPES[dtype])
        return np.where(np.isfinite(values.astype(np.float32)), values, values.dtype.type(1))
    values = random.standard_normal((rows, columns))
    spread = random.uniform(size=(rows, 1))
    values = {
        "normal": values * 0.05,
        "scales": values * 10 ** (18 * spread - 12),
        "huge": values * 10 ** (30 + 8 * spread),
        "tiny": values * 10 ** (5 * spread - 10),
        "coarse": np.round(values * 4) / 8,
        "one_signed": np.abs(values) * np.sign(spread - 0.5),
        "constant": np.repeat(values[:, :1] * 10 ** (40 * spread - 10), columns, axis=1),
        "zero": values * 0,
        "powers": np.ldexp(np.sign(values), random.integers(-20, 10, values.shape)),
        "offset": values + 2000 * (spread - 0.5),
    }[kind]
    with np.errstate(over="ignore"):
        values = values.astype(DTYPES[dtype])
    return np.where(np.isfinite(values.astype(np.float32)), values, values.dtype.type(1))


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Equal in dtype, shape and every bit, NaN included (whatever its payload)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.dtype.kind in "fV":
        nan = np.isnan(left.astype(np.float32))
        if not np.array_equal(nan, np.isnan(right.astype(np.float32))):
            return False
        left, right = np.where(nan, left.dtype.type(0), left), np.where(nan, left.dtype.type(0), right)
    return left.tobytes() == right.tobytes()


def to_mlx(array: np.ndarray):
    import mlx.core as mx

    bfloat16 = array.dtype == ml_dtypes.bfloat16
    return mx.array(array.view(np.uint16)).view(mx.bfloat16) if bfloat16 else mx.array(array)


def from_mlx(array) -> np.ndarray:
    import mlx.core as mx

    bfloat16 = array.dtype == mx.bfloat16
    return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16) if bfloat16 else np.array(array)


def golden(shared):
    """(settings, weights, expected parts, expected values) of each recorded case."""
    cases = np.load(shared / "golden" / "mlx-quant" / "public.npz")
    for name in cases.files:
        match = re.fullmatch(r"(\w+)-b(\d)-g(\d+)-(\w+)\.packed", name)
        if match is None:
            continue
        mode, bits, size, dtype = match[1], int(match[2]), int(match[3]), match[4]
        case = name.removesuffix("packed")
        parts = [cases[name], cases[f"{case}scales"]]
        if mode == "affine":
            parts = [parts[0], *(cases[f"{case}{part}"].astype(DTYPES[dtype]) for part in ("scales", "biases"))]
        yield Settings(bits, size, mode), cases[f"w_{dtype}"].astype(DTYPES[dtype]), parts, cases[f"{case}dequantised"]


def test_golden(shared):
    count = 0
    for settings, weight, parts, values in golden(shared):
        packed = quantize_array(weight, settings)
        found = [part for part in packed if part is not None]
        assert len(found) == len(parts) and all(map(same_bits, found, parts)), settings
        restored = dequantize_array(packed, settings, weight.dtype)
        assert np.array_equal(restored.astype(np.float32), values.astype(np.float32)), settings
        count += 1
    assert count >= 26


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_mlx(kind, dtype):
    mx = pytest.importorskip("mlx.core")
    weight = weights(kind, dtype)
    for settings in (*AFFINE, *MICROSCALED):
        own = quantize_array(weight, settings)
        theirs = mx.quantize(to_mlx(weight), settings.group_size, settings.bits, mode=settings.mode)
        assert all(map(same_bits, own, map(from_mlx, theirs))), settings
        with np.errstate(all="ignore"):
            values = dequantize_array(own, settings, weight.dtype)
        options = {} if settings.affine else {"dtype": to_mlx(weight).dtype}
        expected = mx.dequantize(
            *theirs, group_size=settings.group_size, bits=settings.bits, mode=settings.mode, **options
        )
        assert same_bits(values, from_mlx(expected)), settings


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_plain_reference(kind, dtype):
    weight = weights(kind, dtype, rows=2, columns=128)
    for settings in AFFINE[::2]:
        expected = reference.affine(weight, settings.bits, settings.group_size)
        assert all(map(same_bits, quantize_array(weight, settings), expected)), settings
    for settings in MICROSCALED:
        own = quantize_array(weight, settings)
        assert own.biases is None
        groups = weight.reshape(-1, settings.group_size)
        codes, scales = zip(*(reference.microscaled_group(group, settings.bits) for group in groups))
        assert own.scales.reshape(-1).tolist() == list(scales), settings
        assert unpack(own.weight, settings.bits).reshape(groups.shape).tolist() == list(codes), settings


def half_away(value: np.float32) -> np.float32:
    return np.float32(np.copysign(np.floor(abs(value) + np.float32(0.5)), value))


def test_a_wrong_rounding_is_caught():
    weight = weights("coarse", "float32", rows=4)
    right, wrong = reference.affine(weight, 4, 64), reference.affine(weight, 4, 64, round=half_away)
    assert all(map(same_bits, quantize_array(weight, Settings(4, 64)), right))
    assert not same_bits(right[0], wrong[0])


def test_swapped_nibbles_are_caught(shared):
    settings, weight, parts, values = next(case for case in golden(shared) if case[0] == Settings(4, 64))
    words = parts[0].view(np.uint8)
    swapped = ((words >> 4) | (words << 4)).view(np.uint32)
    assert not same_bits(swapped, quantize_array(weight, settings).weight)
    assert not np.array_equal(dequantize_array(Packed(swapped, *parts[1:]), settings), values)


@pytest.mark.parametrize("bits", BITS)
def test_packing(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 96), dtype=np.uint8)
    words = pack(codes, bits)
    assert words.tolist() == [reference.pack(row.tolist(), bits).tolist() for row in codes]
    assert np.array_equal(unpack(words, bits), codes)
    assert reference.unpack(words[1], bits) == codes[1].tolist()


def test_codes_stay_in_range_where_the_snapped_bias_overshoots():
    """A wide search for groups whose far end would get code 2**bits; 8-bit codes would wrap around to 0."""
    random = np.random.default_rng(5)
    for bits in BITS:
        groups = random.uniform(-1, 1, (20_000, 32)).astype(np.float32) * 10 ** random.uniform(-3, 3, (20_000, 1))
        groups = groups.astype(np.float32)
        packed = quantize_array(groups, Settings(bits, 32))
        error = np.abs(dequantize_array(packed, Settings(bits, 32)) - groups)
        # The far end may be cut by one step at most; everything else is rounded to half a step.
        assert (error <= 1.01 * np.abs(packed.scales)).all()


def test_many_blocks_and_leading_axes():
    """More than one block of work, with an expert axis: the same as quantizing each expert alone."""
    weight = weights("normal", "bfloat16", rows=3 * 400, columns=512).reshape(3, 400, 512)
    whole = quantize_array(weight, Settings(3, 64))
    assert whole.weight.shape == (3, 400, 48) and whole.scales.shape == (3, 400, 8)
    for expert in range(3):
        assert all(map(same_bits, quantize_array(weight[expert], Settings(3, 64)), (part[expert] for part in whole)))
    assert same_bits(
        dequantize_array(whole, Settings(3, 64))[1], dequantize_array(Packed(*(p[1] for p in whole)), Settings(3, 64))
    )


def test_wider_arithmetic():
    weight = weights("normal", "bfloat16")
    packed = quantize_array(weight, Settings(4, 64))
    values = dequantize_array(packed, Settings(4, 64), np.dtype(np.float32))
    codes = unpack(packed.weight, 4).reshape(12, 4, 64).astype(np.float32)
    expected = codes * packed.scales.astype(np.float32)[..., None] + packed.biases.astype(np.float32)[..., None]
    assert values.dtype == np.float32 and np.array_equal(values, expected.reshape(12, 256))
    assert not np.array_equal(values, dequantize_array(packed, Settings(4, 64)).astype(np.float32))


def test_e4m3_is_the_nearest():
    random = np.random.default_rng(1)
    values = np.concatenate(
        [random.standard_normal(5000) * 10 ** random.uniform(-6, 3, 5000), [0.0, -0.0, 448, 464, -1e9]]
    )
    values = values.astype(np.float32)
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    borders = (every[:126] + every[1:127]) / 2
    values = np.concatenate([values, every[:127], -every[:127], borders, -borders])
    expected = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(to_e4m3(values), expected)


def test_loss():
    weight = weights("normal", "float32", rows=2000, columns=512)
    loss = Loss()
    packed = quantize_array(weight, Settings(4, 64), loss)
    error = dequantize_array(packed, Settings(4, 64)).astype(np.float64) - weight
    exact = np.sqrt((error**2).mean() / (weight.astype(np.float64) ** 2).mean())
    assert loss.relative_rms == pytest.approx(exact, rel=0.02)
    zero = Loss()
    quantize_array(np.zeros((4, 64), np.float32), Settings(4, 64), zero)
    assert zero.relative_rms == 0.0


def test_scales_too_small_for_e8m0_stay_finite():
    weight = np.full((1, 32), 1e-39, np.float32)
    for mode in ("mxfp4", "mxfp8"):
        settings = Settings.of(mode=mode)
        packed = quantize_array(weight, settings)
        assert packed.scales.item() == 0
        assert np.abs(dequantize_array(packed, settings, np.dtype(np.float32))).max() <= 2.0**-125


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value):
    weight = weights("normal", "float32")
    weight[3, 7] = value
    with pytest.raises(ValueError, match="finite"):
        quantize_array(weight, Settings(4, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 7}, "expected bits of 2, 3, 4, 5, 6, 8 for mode affine; found 7"),
        ({"bits": 4, "group_size": 48}, "expected group_size of 32, 64, 128"),
        ({"mode": "mxfp5"}, "did you mean 'mxfp"),
        ({"mode": "mxfp4", "bits": 8, "group_size": 32}, "expected bits of 4 for mode mxfp4"),
        ({"bits": True}, "found True"),
    ],
)
def test_impossible_settings(arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Settings(**arguments)
