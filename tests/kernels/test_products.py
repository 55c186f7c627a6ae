"""Products with packed weights against float64, for every backend this CPU has."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from isomorph.kernels import native, ops, reference  # noqa: F401  (ops defines the operators)
from isomorph.quantize.settings import MODES, Settings
from kernels.packed import TORCH, Case, activations, make, pack, relative_error

#: |y - y_fp64| <= BOUND * sum|x * w|. Terms are at most 3 |x * w| (codes are centred at the group's zero point, or the
#: weight is dequantized first), so this allows five float32 roundings of the worst case; observed: 3e-7.
BOUND = 1e-6

#: One int8 rounding a value: at most max|x| / 254 in its group; of normal values the largest is about 3 times the mean.
FAST_BOUND = 0.02

ALL_SETTINGS = [
    Settings(bits, size, mode) for mode, (_, _, widths, sizes) in MODES.items() for bits in widths for size in sizes
]
BACKENDS = native.extension().backends() if native.extension() else []

needs_extension = pytest.mark.skipif(not BACKENDS, reason="the C++ extension is not built (no compiler)")


@pytest.fixture(params=BACKENDS)
def backend(request):
    extension = native.extension()
    before = extension.backend()
    extension.choose_backend(request.param)
    yield request.param
    extension.choose_backend(before)


def product(case, x, fast=False):
    return torch.ops.isomorph.quantized_linear(x, *case.arguments, fast)


@needs_extension
@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
def test_exact_products_are_exact(backend, settings):
    rng = np.random.default_rng(settings.bits * 1000 + settings.group_size)
    for kind in ("normal", "outlier", "onesided", "zero", "arbitrary"):
        for x_dtype in TORCH:
            rows = int(rng.choice([1, 2, 3, 4, 5, 8, 11, 12, 19, 40]))
            shape = int(rng.integers(1, 90)), settings.group_size * int(rng.integers(1, 21))
            case = make(int(rng.integers(1 << 30)), shape, settings, str(rng.choice(list(TORCH))), kind)
            x = activations(rows, rows, shape[1], x_dtype)
            handle = native.packed_handle(*case.packed, settings)
            y = torch.full((rows, shape[0]), torch.nan)
            kinds = native.TYPES[x.dtype], native.TYPES[y.dtype]
            # Results in float32 whatever the activations are, so that their rounding does not hide the kernel's.
            native.extension().multiply(handle, x.data_ptr(), kinds[0], shape[1], rows, y.data_ptr(), kinds[1], False)
            assert relative_error(y, x, case.values) <= BOUND, (kind, x_dtype, rows, shape)
            broken = case.values.copy()
            broken[-1, -1] += 1e-3 * np.abs(broken[-1]).sum() + 1e-6
            assert relative_error(y, x, broken) > BOUND


FOUR_BITS = [Settings(4, 32), Settings(4, 64), Settings(4, 128), Settings.of(mode="mxfp4")]


def one_row(case, x):
    """x [1, K] times the weights in float32, so that no rounding of the result hides the kernel's."""
    handle, y = native.packed_handle(*case.packed, case.settings), torch.full((1, len(case.values)), torch.nan)
    kinds = native.TYPES[x.dtype], native.TYPES[y.dtype]
    native.extension().multiply(handle, x.data_ptr(), kinds[0], x.shape[1], 1, y.data_ptr(), kinds[1], False)
    return y


@needs_extension
@pytest.mark.parametrize("settings", FOUR_BITS, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_row_is_exact_whatever_its_range(backend, settings, dtype):
    rng = np.random.default_rng(settings.group_size)
    for groups in (1, 2, 5, 16, 21, 70):
        x = rng.standard_normal((1, groups * settings.group_size))
        kinds = {
            "normal": x,
            "products": x * rng.standard_normal(x.shape) / (1 + np.exp(-x)),
            "wide": x * np.exp(2.5 * rng.standard_normal(x.shape)),
            "sparse": x * (rng.random(x.shape) < 0.1),
            "positive": np.abs(x),
            "small": 1e-5 * x,
            "zero": 0 * x,
        }
        for name, values in kinds.items():
            given = torch.from_numpy(values).to(TORCH[dtype])
            for kind in ("normal", "outlier", "onesided", "arbitrary"):
                case = make(groups, (37, x.shape[1]), settings, dtype, kind)
                y = one_row(case, given)
                assert relative_error(y, given, case.values) <= BOUND, (name, kind, groups)
                if name == "normal":
                    broken = case.values.copy()
                    broken[-1, -1] += 1e-3 * np.abs(broken[-1]).sum() + 1e-6
                    assert relative_error(y, given, broken) > BOUND


@needs_extension
@pytest.mark.parametrize("settings", FOUR_BITS, ids=str)
@pytest.mark.parametrize("hidden", [1, 5])
def test_activations_beside_a_huge_one_count(backend, settings, hidden):
    """The huge one meets a weight of 0. One group is what is multiplied apart, five are more than that."""
    size, shape = settings.group_size, (37, 7 * settings.group_size)
    codes = np.random.default_rng(0).integers(0, 16, shape)
    codes[:, ::size] = 8 if settings.affine else 0
    groups = torch.ones(37, 7)
    parts = (groups / 16, -groups / 2) if settings.affine else (torch.full((37, 7), 127, dtype=torch.uint8), None)
    values = (codes - 8) / 16 if settings.affine else np.array(reference.E2M1)[codes]
    case = Case(pack(codes, 4), *parts, settings, values.astype(np.float64))
    x = activations(0, 1, shape[1], "bfloat16")
    x[0, : hidden * size : size] = 2.0**40
    y = one_row(case, x)
    assert relative_error(y, x, case.values) <= BOUND
    x[0, 1:size] = 0
    assert relative_error(y, x, case.values) > BOUND  # what was beside it is in the result


@needs_extension
@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
def test_fast_products_round_only_the_activations(backend, settings):
    # Without a tiled path of its own a backend multiplies many rows exactly.
    for rows in (1, 2, 7, 12, 25) if native.extension().has_wide() else (1, 2, 7, 12):
        case = make(rows, (70, settings.group_size * 17), settings)
        x = activations(rows, rows, case.values.shape[1], "bfloat16").float()
        error = relative_error(product(case, x, fast=True), x, case.values)
        assert error <= FAST_BOUND
        if settings.affine:
            assert error > 1e-5, "int8 activations must show"
            # The same rounding, then float64: what is left is float32 arithmetic.
            groups = x.numpy().reshape(rows, -1, settings.group_size)
            largest = np.abs(groups).max(-1, keepdims=True)
            codes = np.round(groups * (np.float32(127) / largest))
            rounded = torch.from_numpy((codes.astype(np.float64) * (largest / 127)).reshape(rows, -1))
            assert relative_error(product(case, x, fast=True), rounded, case.values) <= 10 * BOUND


@needs_extension
@pytest.mark.parametrize("settings", [Settings(4, 64), Settings(6, 32), Settings.of(mode="nvfp4")], ids=str)
def test_many_rows_in_several_tiles(settings):
    case = make(3, (600, settings.group_size * 5), settings)
    x = activations(3, 520, case.values.shape[1], "float32")
    assert relative_error(product(case, x), x, case.values) <= BOUND
    assert relative_error(product(case, x, fast=True), x, case.values) <= FAST_BOUND
    assert relative_error(product(case, x), x, np.roll(case.values, 64, axis=0)) > FAST_BOUND  # panels in wrong places


@needs_extension
def test_every_backend_is_there():
    assert BACKENDS[-1] == "portable"
    assert native.extension().choose_backend("none such") is False


@needs_extension
def test_strided_and_unaligned_operands(backend):
    settings = Settings(3, 32)
    case = make(5, (37, 96), settings)
    for offset in (0, 1, 3):
        wide = activations(1, 9, 110, "bfloat16")
        x = wide[::2, offset : offset + 96]
        moved = [torch.empty(part.nbytes + 64, dtype=torch.uint8)[offset * 2 :][: part.nbytes] for part in case.packed]
        for to, part in zip(moved, case.packed):
            to.copy_(part.contiguous().view(torch.uint8).reshape(-1))
        handle = native.extension().Packed(*(part.data_ptr() for part in moved), 0, 1, 3, 32, 37, 96, 1)
        y = torch.empty(len(x), 37)
        native.extension().multiply(handle, x.data_ptr(), 1, x.stride(0), len(x), y.data_ptr(), 0, False)
        assert relative_error(y, x, case.values) <= BOUND


@needs_extension
def test_nan_and_infinity_show(backend):
    case = make(1, (8, 128), Settings(4, 64))
    for fast in (False, True):
        for value in (torch.nan, torch.inf):
            x = torch.ones(1, 128)
            x[0, 70] = value
            assert not torch.isfinite(product(case, x, fast)).any()


@needs_extension
def test_nothing_to_multiply(backend):
    case = make(1, (8, 128), Settings(4, 64))
    assert product(case, torch.zeros(0, 128)).shape == (0, 8)
    assert product(case, torch.zeros(2, 0, 128)).shape == (2, 0, 8)


@needs_extension
@pytest.mark.parametrize("dtype", TORCH)
def test_bfloat16_weights(backend, dtype):
    for rows, n, k in ((1, 13, 256), (2, 5, 72), (5, 9, 1000), (16, 33, 64), (17, 3, 65)):
        weight = activations(0, n, k, "bfloat16")
        x = activations(1, rows, k, dtype)
        y = torch.ops.isomorph.bfloat16_linear(x.float() if dtype == "bfloat16" else x, weight)
        rounding = 2e-3 if dtype == "float16" else BOUND
        assert relative_error(y, x, weight.double().numpy()) <= rounding
        assert relative_error(y, x, weight.double().numpy() * 1.1) > rounding


@needs_extension
@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
def test_rows_dequantize_with_one_rounding(backend, settings):
    case = make(3, (29, settings.group_size * 3), settings)
    ids = torch.tensor([[28, 0, 7], [7, 7, 13]])
    for dtype in TORCH.values():
        rows = torch.ops.isomorph.dequantize_rows(*case.packed, ids, *case.arguments[3:], dtype)
        expected = torch.from_numpy(case.values.astype(np.float32))[ids].to(dtype)
        assert torch.equal(rows, expected)
        assert torch.equal(
            reference.dequantize(*case.packed, settings, dtype), torch.from_numpy(case.values).float().to(dtype)
        )
    with pytest.raises(IndexError):
        torch.ops.isomorph.dequantize_rows(*case.packed, ids + 1, *case.arguments[3:], torch.float32)


@needs_extension
@pytest.mark.parametrize("mode", MODES)
def test_only_chosen_experts_are_read(backend, mode):
    settings = Settings.of(mode=mode)
    case = make(8, (5, 24, 128), settings)
    x = activations(2, 6, 128, "float32")
    chosen = torch.tensor([[0, 3], [3, 4], [0, 4], [4, 3], [0, 3], [4, 0]])
    poisoned = case.scales.clone()
    poisoned[[1, 2]] = torch.nan if mode == "affine" else 255
    y = torch.ops.isomorph.quantized_experts_linear(
        x, case.weight, poisoned, case.biases, chosen, *case.arguments[3:], False
    )
    fallback = reference.experts_linear(x, *case.packed, chosen.reshape(-1), settings)
    for place, expert in enumerate(chosen.reshape(-1).tolist()):
        row = x[place // 2 : place // 2 + 1]
        assert relative_error(y[place : place + 1], row, case.values[expert]) <= BOUND
        assert relative_error(fallback[place : place + 1], row, case.values[expert]) <= BOUND
        assert relative_error(y[place : place + 1], row, case.values[(expert + 1) % 5]) > BOUND


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
def test_plain_torch_gives_the_same(settings):
    case = make(4, (40, settings.group_size * 4), settings)
    x = activations(3, 3, case.values.shape[1], "float32")
    assert relative_error(reference.linear(x, *case.packed, settings), x, case.values) <= BOUND


def test_without_the_extension_the_operators_still_work_and_say_so(monkeypatch, caplog):
    case = make(4, (40, 128), Settings(4, 64))
    x = activations(3, 3, 128, "float32")
    native.extension.cache_clear(), native.find_extension.cache_clear()
    monkeypatch.delattr("isomorph.kernels._native", raising=False)
    monkeypatch.setitem(sys.modules, "isomorph.kernels._native", None)
    try:
        for _ in range(2):
            assert relative_error(product(case, x), x, case.values) <= BOUND
        assert sum("not built" in record.message for record in caplog.records) == 1
    finally:
        native.extension.cache_clear(), native.find_extension.cache_clear()


def test_golden_outputs_of_mlx(shared):
    arrays = np.load(shared / "golden" / "mlx-quant" / "public.npz")
    seen = 0
    for name in {key.rpartition(".")[0] for key in arrays.files if key.endswith(".packed")}:
        mode, bits, size, dtype = name.split("-")
        if dtype != "float32":
            continue  # mlx's own product is off in narrower dtypes on a CPU
        settings = Settings(int(bits[1:]), int(size[1:]), mode)
        parts = [torch.from_numpy(arrays[f"{name}.{part}"]) for part in ("packed", "scales")]
        biases = torch.from_numpy(arrays[f"{name}.biases"]) if f"{name}.biases" in arrays else None
        x = torch.from_numpy(arrays["x"])
        y = torch.ops.isomorph.quantized_linear(
            x, parts[0].view(torch.int32), parts[1], biases, *ops_arguments(settings), False
        )
        values = arrays[f"{name}.dequantised"].astype(np.float64)
        # mlx rounds scale * code before it adds the bias: up to one float32 rounding of the largest weight.
        allowed = BOUND * np.abs(arrays["x"]).sum(-1, keepdims=True) * np.abs(values).max()
        assert (np.abs(y.numpy() - arrays["x"].astype(np.float64) @ values.T) <= allowed).all(), name
        seen += 1
    assert seen >= 20


def ops_arguments(settings: Settings) -> tuple:
    return settings.bits, settings.group_size, settings.mode


def test_gradients_flow_to_the_activations():
    case = make(1, (24, 64), Settings(4, 32))
    x = activations(0, 3, 64, "float32").requires_grad_()
    product(case, x).square().sum().backward()
    reference_x = x.detach().double().requires_grad_()
    (reference_x @ torch.from_numpy(case.values).T).square().sum().backward()
    assert torch.allclose(x.grad.double(), reference_x.grad, rtol=1e-4, atol=1e-4)


def test_malformed_operands_are_refused():
    case = make(1, (8, 128), Settings(4, 64))
    with pytest.raises(ValueError, match="agree"):
        native.packed_handle(case.weight[:, :-1].contiguous(), case.scales, case.biases, case.settings)
    with pytest.raises(ValueError, match="biases"):
        native.packed_handle(case.weight, case.scales, None, case.settings)
    with pytest.raises(ValueError, match="contiguous"):
        native.packed_handle(case.weight[:, ::2], case.scales, case.biases, case.settings)
