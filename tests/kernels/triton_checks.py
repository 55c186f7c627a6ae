"""Run by test_triton.py in a process of its own: Triton's interpreter must be chosen before Triton is imported."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isomorph.kernels import ops, reference
from isomorph.kernels import triton as kernels
from isomorph.quantize.settings import MODES, Settings
from kernels.packed import TORCH, Case, activations, make, relative_error

#: |y - y_fp64| <= BOUND * sum|x * w| and the rounding of y to its dtype: five float32 roundings of the worst case, in
#: which the terms are 3 |x * w|, as codes are counted from the one nearest to zero.
BOUND = 1e-6
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}

ALL_SETTINGS = [
    Settings(bits, size, mode) for mode, (_, _, widths, sizes) in MODES.items() for bits in widths for size in sizes
]


def exact(y: torch.Tensor, x: torch.Tensor, values: np.ndarray) -> bool:
    x_fp64 = x.double().numpy()
    y_fp64 = x_fp64 @ values.T
    allowed = BOUND * (np.abs(x_fp64) @ np.abs(values).T) + ROUNDING[y.dtype] * np.abs(y_fp64)
    if y.dtype == torch.float16:
        allowed += 2**-25  # half of its smallest number
    return y.dtype == x.dtype and bool((np.abs(y.double().numpy() - y_fp64) <= allowed).all())


def wrong(values: np.ndarray) -> np.ndarray:
    """The last row of weights off by 2 % of its largest."""
    values = values.copy()
    values[-1] += 0.02 * np.abs(values[-1]).max() + 1e-6
    return values


def test_kernels_are_interpreted():
    assert kernels.INTERPRETED


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
def test_products(settings):
    rng = np.random.default_rng(settings.bits * 1000 + settings.group_size)
    kinds = iter(rng.permutation(["normal", "outlier", "onesided", "zero", "arbitrary"] * 2))
    for rows in (1, 5, 17):
        for dtype in TORCH:
            shape = int(rng.integers(1, 45)), settings.group_size * int(rng.integers(1, 6))
            case = make(int(rng.integers(1 << 30)), shape, settings, str(rng.choice(list(TORCH))), str(next(kinds)))
            x = activations(rows, rows, shape[1], dtype)
            y = kernels.linear(x, *case.packed, settings)
            assert exact(y, x, case.values), (dtype, rows, shape)
            assert not exact(y, x, wrong(case.values))


@pytest.mark.parametrize("rows", [1, 3])
def test_columns_split_between_programs(rows):
    settings = Settings(4, 128)
    case = make(7, (5, 4096 + 128), settings)
    x = activations(0, rows, 4096 + 128, "float32")
    y = kernels.linear(x, *case.packed, settings)
    assert kernels._splits((1, rows), 4096 + 128, settings, x.device)[1] > 1
    assert relative_error(y, x, case.values) <= BOUND
    # A split's sums left out would show.
    assert relative_error(y, torch.cat([x[:, :-128], 0 * x[:, -128:]], 1), case.values) > BOUND


def test_large_tiles():
    settings = Settings(6, 32)
    case = make(3, (130, 64), settings)
    x = activations(1, 70, 64, "bfloat16")
    y = kernels.linear(x, *case.packed, settings)
    assert exact(y, x, case.values)
    assert not exact(y, x, wrong(case.values))


@pytest.mark.parametrize("mode", MODES)
def test_rows_dequantize_with_one_rounding(mode):
    settings = Settings.of(mode=mode)
    ids = torch.tensor([28, 0, 7, 7])
    for scale_dtype in TORCH:
        case = make(3, (29, settings.group_size * 3), settings, scale_dtype)
        for dtype in TORCH.values():
            rows = kernels.dequantize_rows(*case.packed, ids, settings, dtype)
            assert torch.equal(rows, reference.dequantize(*case.packed, settings, dtype)[ids])
    rows = kernels.dequantize_rows(*case.packed, torch.tensor([-1, 29, 0]), settings, torch.float32)
    assert rows[:2].isnan().all()
    assert rows[2].isfinite().all()


def poisoned(case: Case, experts: list[int]) -> torch.Tensor:
    scales = case.scales.clone()
    scales[experts] = torch.nan if case.settings.affine else 255
    return scales


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 2, 24])
def test_only_chosen_experts_are_read(mode, tokens):
    settings = Settings.of(mode=mode)
    case = make(8, (5, 24, 128), settings)
    x = activations(2, tokens, 128, "bfloat16")
    chosen = torch.tensor([[0, 3], [3, 4], [0, 4], [4, 3]]).repeat(6, 1)[:tokens].reshape(-1)
    y = kernels.experts_linear(x, case.weight, poisoned(case, [1, 2]), case.biases, chosen, settings)
    for place, expert in enumerate(chosen.tolist()):
        row = x[place // 2 : place // 2 + 1]
        assert exact(y[place : place + 1], row, case.values[expert])
        assert not exact(y[place : place + 1], row, case.values[(expert + 1) % 5])


@pytest.mark.parametrize("tile", [4, 16])
def test_expert_tiles_hold_each_result_once(tile):
    experts = torch.from_numpy(np.random.default_rng(0).integers(0, 7, 50))
    experts[experts == 5] = 2
    order, tiles = kernels.expert_tiles(experts, 8, tile)
    held = [place for expert, start, stop in tiles.tolist() for place in range(start, stop)]
    assert sorted(held) == list(range(50))
    for expert, start, stop in tiles.tolist():
        assert stop - start <= tile
        assert (experts[order[start:stop]] == expert).all()


def test_not_a_number_shows():
    case = make(1, (8, 128), Settings(4, 64))
    for rows in (1, 4):
        for value in (torch.nan, torch.inf):
            x = torch.ones(rows, 128)
            x[0, 70] = value
            y = kernels.linear(x, *case.packed, case.settings)
            assert not torch.isfinite(y[0]).any()
            assert torch.isfinite(y[1:]).all()


def test_nothing_to_multiply_and_parts_that_do_not_agree():
    case = make(1, (8, 128), Settings(4, 64))
    assert kernels.linear(torch.zeros(0, 128), *case.packed, case.settings).shape == (0, 8)
    with pytest.raises(ValueError, match="agree"):
        kernels.linear(torch.zeros(1, 128), case.weight[:, :-1], case.scales, case.biases, case.settings)
    with pytest.raises(ValueError, match="128 columns"):
        kernels.linear(torch.zeros(1, 64), *case.packed, case.settings)


def test_operators_on_cuda_are_these_kernels():
    case = make(1, (8, 128), Settings(4, 64))
    x = activations(0, 6, 128, "float32").view(2, 3, 128).transpose(0, 1)
    y = ops._linear_cuda(x, *case.arguments, False)
    assert torch.equal(y, kernels.linear(x.reshape(6, 128), *case.packed, case.settings).view(3, 2, 8))
    wide = ops._linear_cuda(x.double(), *case.arguments, False)  # no kernel: plain torch
    assert wide.dtype == torch.float64
    ids = torch.tensor([[7, 0]])
    assert ops._rows_cuda(*case.packed, ids, *case.arguments[3:], torch.float32).shape == (1, 2, 128)
    experts = make(8, (5, 24, 128), Settings(4, 64))
    chosen = torch.tensor([[0, 3], [3, 4], [0, 4]])
    assert ops._experts_cuda(x[:, 0], *experts.packed, chosen, *experts.arguments[3:], False).shape == (6, 24)
    names = "quantized_linear", "quantized_experts_linear", "dequantize_rows"
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f"isomorph::{name}", "CUDA") for name in names)
