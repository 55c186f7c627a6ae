"""The codec in C++ against the one in numpy: every bit alike, on every instruction set that this machine has."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from isomorph.kernels.extension import find_extension
from isomorph.quantize import affine, arrays, native, portable
from isomorph.quantize.packed import Loss, Packed
from isomorph.quantize.settings import MODES, Settings
from quantize.test_arrays import AFFINE, DTYPES, KINDS, MICROSCALED, same_bits, weights

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ extension is not built")

CODECS = (native, portable)
BACKENDS = find_extension().backends() if native.available() else []


@pytest.fixture(params=BACKENDS)
def backend(request):
    before = find_extension().backend()
    assert find_extension().choose_backend(request.param)
    yield request.param
    find_extension().choose_backend(before)


def with_codec(codec, function, *arguments):
    """`function` of arrays.py with the codec named."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "_codec", lambda: codec)
        return function(*arguments)


def assert_alike(weight: np.ndarray, settings: Settings) -> None:
    """Parts, values in every dtype, and the measured loss are those of the numpy codec."""
    losses = Loss(), Loss()
    packed, expected = (
        with_codec(codec, arrays.quantize_array, weight, settings, loss) for codec, loss in zip(CODECS, losses)
    )
    assert packed.biases is None or same_bits(packed.biases, expected.biases)
    assert same_bits(packed.weight, expected.weight) and same_bits(packed.scales, expected.scales)
    # Sums of squares in float64, in another order. An infinite scale makes them NaN.
    assert math.isclose(*(loss.error for loss in losses), rel_tol=1e-12) or np.isnan(losses[1].error)
    assert math.isclose(*(loss.signal for loss in losses), rel_tol=1e-12)
    for dtype in map(np.dtype, DTYPES.values()):
        with np.errstate(all="ignore"):
            left, right = (with_codec(codec, arrays.dequantize_array, packed, settings, dtype) for codec in CODECS)
        assert same_bits(left, right), dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_alike_on_every_kind_of_weight(dtype, backend):
    for kind in KINDS:
        for settings in (*AFFINE, *MICROSCALED):
            assert_alike(weights(kind, dtype, rows=3, columns=384), settings)


@effort(deadline=None, max_examples=150)
@given(data=st.data())
def test_alike_on_any_bits(data):
    """Any finite weights, groups that are mostly zero, one value or outliers among them, in any number of groups."""
    settings = data.draw(st.sampled_from([*AFFINE, *MICROSCALED]))
    dtype = np.dtype(data.draw(st.sampled_from(list(DTYPES.values()))))
    groups = data.draw(st.integers(1, 40)) * 2
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    bits = random.integers(0, 1 << 8 * dtype.itemsize, (groups, settings.group_size), dtype=f"u{dtype.itemsize}")
    # Few exponents in a group, so that codes other than 0 and the last occur.
    spread = data.draw(st.sampled_from([0x7FFF, 0x00FF, 0x0003])) | 0x8000
    top = np.uint64(bits[:, :1]) & np.uint64(~spread & 0xFFFF) << np.uint64(8 * dtype.itemsize - 16)
    low = np.uint64((1 << 8 * dtype.itemsize - 16) - 1) | np.uint64(spread) << np.uint64(8 * dtype.itemsize - 16)
    values = (np.uint64(bits) & low | top).astype(bits.dtype).view(dtype)
    values = np.where(np.isfinite(values.astype(np.float32)), values, dtype.type(0))
    assert_alike(values.reshape(2, -1), settings)


@pytest.mark.parametrize("settings", [Settings(b, 64) for b in (2, 3, 4, 5, 6, 8)] + MICROSCALED, ids=str)
def test_any_packed_bits_decode_alike(settings, backend):
    """Codes, scales and biases that no quantizer writes, NaN and infinity included."""
    random = np.random.default_rng(settings.bits)
    words = random.integers(0, 1 << 32, (40, 4 * settings.group_size * settings.bits // 32), np.uint32)
    for dtype in map(np.dtype, DTYPES.values()):
        kind = f"u{dtype.itemsize}" if settings.affine else "u1"
        terms = [random.integers(0, np.iinfo(kind).max, (40, 4), kind, endpoint=True) for _ in range(2)]
        scales, biases = (term.view(dtype) if settings.affine else term for term in terms)
        packed = Packed(words, scales, biases if settings.affine else None)
        for wanted in map(np.dtype, DTYPES.values()):
            with np.errstate(all="ignore"):
                left, right = (with_codec(codec, arrays.dequantize_array, packed, settings, wanted) for codec in CODECS)
            assert same_bits(left, right), (dtype, wanted)


def test_many_blocks_on_many_threads(backend):
    """Several blocks of work and a rest that fills no tile; the loss is that of the first block alone."""
    weight = weights("scales", "bfloat16", rows=601, columns=1088)
    threads = find_extension().thread_count()
    try:
        for count in (1, 3):
            find_extension().set_thread_count(count)
            for settings in (Settings(3, 64), Settings.of(mode="nvfp4")):
                assert_alike(weight, settings)
    finally:
        find_extension().set_thread_count(threads)


def test_weights_at_any_address(backend):
    """Tensors of a file begin at any byte, and rows may lie apart."""
    values = weights("normal", "float32", rows=4, columns=128)
    raw = np.empty(values.nbytes + 1, np.uint8)
    raw[1:] = values.view(np.uint8).reshape(-1)
    crooked = raw[1:].view(np.float32).reshape(values.shape)
    spread = np.zeros((8, 128), np.float32)
    spread[::2] = values
    for settings in (Settings(6, 32), Settings.of(mode="mxfp8")):
        expected = with_codec(portable, arrays.quantize_array, values, settings)
        for other in (crooked, spread[::2]):
            found = with_codec(native, arrays.quantize_array, other, settings)
            assert all(map(same_bits, found[:2], expected[:2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found_anywhere(dtype, value, backend):
    for place in (0, 31, 64, 12 * 128 - 1):
        weight = weights("normal", dtype, rows=12, columns=128)
        weight.reshape(-1)[place] = value
        for mode in MODES:
            for codec in CODECS:
                with pytest.raises(ValueError, match="finite"):
                    with_codec(codec, arrays.quantize_array, weight, Settings.of(mode=mode))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quotients_next_to_a_half(bits, backend):
    """Where a quotient's last bit decides the code; scales from the smallest to those whose reciprocals are tiny."""
    random = np.random.default_rng(bits)
    scales = np.exp2(random.uniform(-20, 110, (2000, 1))).astype(np.float32)
    weight = random.integers(0, (1 << bits) - 1, (2000, 64)).astype(np.float32) * scales + scales / 2
    weight = np.nextafter(weight, weight * random.choice([0, 1, 2], weight.shape).astype(np.float32))
    weight[:, 0], weight[:, 1] = 0, ((1 << bits) - 1) * scales[:, 0]
    assert_alike(weight, Settings(bits, 64))


def test_the_shortcuts_of_compilers_are_caught():
    """The comparison sees a division made a product with the reciprocal, and a product fused with its sum."""
    weight = weights("coarse", "float32", rows=64)
    packed = with_codec(native, arrays.quantize_array, weight, Settings(4, 64))
    groups = weight.reshape(-1, 64)
    codes, scales, biases = affine.encode(groups, 4)
    hasty = np.rint((groups - biases[:, None]) * (np.float32(1) / scales)[:, None])
    assert not np.array_equal(np.minimum(hasty, 15), codes)
    values = with_codec(native, arrays.dequantize_array, packed, Settings(4, 64)).reshape(groups.shape)
    exact = codes * scales.astype(np.float64)[:, None] + biases.astype(np.float64)[:, None]
    assert np.array_equal(values, affine.decode(codes, scales, biases))
    assert not np.array_equal(values, exact.astype(np.float32))


def test_numpy_serves_where_the_extension_is_not_wanted(monkeypatch):
    monkeypatch.setenv("ISOMORPH_KERNELS", "none")
    find_extension.cache_clear()
    try:
        assert not native.available() and arrays._codec() is portable
    finally:
        find_extension.cache_clear()
