"""The products as Triton kernels for CUDA, over MLX's packed words as they lie.

Checked in Triton's CPU interpreter and compiled for sm_90 by the tests; never run on a GPU. `benchmarks/gpu.py` is the
check for whoever has one. Activations float32, bfloat16 or float16; every sum is in float32. `fast` numerics are the
same as `exact` here: a GPU has no use for rounding activations to int8.

A row of codes is cut into units, the shortest runs of codes that fill whole words: 8 codes in one word at 4 bits,
16 in three at 6, 32 in five at 5. A tile of words is loaded once and spread over a third axis, the codes of a unit.

Shapes: M rows of x, N rows of weights, K columns, G groups a row, E experts, R results (M times the experts a row has).
"""

from __future__ import annotations

from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl

from isomorph.quantize.settings import Settings

#: Interpreted kernels compute in numpy, which has no bfloat16: there they multiply in, and return, float32.
INTERPRETED = triton.knobs.runtime.interpret

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

#: Weight rows and columns that one program of the one-row kernel holds at a time: 64 values a thread.
ROWS, COLUMNS = 8, 1024

#: Programs wanted for each multiprocessor, to keep enough loads in flight; and the fewest columns worth a program.
PROGRAMS, SPLIT_COLUMNS = 4, 1024


@triton.jit
def _codes(words, offsets, inside, BITS: tl.constexpr, UNIT_WORDS: tl.constexpr, UNIT_CODES: tl.constexpr):
    """Codes of the units that start at words `offsets` [A, B] -> int [A, B, UNIT_CODES]; 0 where not `inside`."""
    start = (tl.arange(0, UNIT_CODES) * BITS)[None, None, :]
    codes = tl.zeros((1, 1, 1), tl.uint32)
    for i in tl.static_range(UNIT_WORDS):
        word = tl.load(words + offsets + i, mask=inside, other=0).to(tl.uint32, bitcast=True)[:, :, None]
        # Where a code begins in this word, or, when negative, how many of its bits the word before holds.
        shift = start - 32 * i
        here = (shift >= 0) & (shift < 32)
        before = (shift < 0) & (shift > -BITS)
        codes |= tl.where(here, word >> tl.where(here, shift, 0).to(tl.uint32), 0)
        codes |= tl.where(before, word << tl.where(before, -shift, 0).to(tl.uint32), 0)
    return (codes & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _e4m3(byte):
    """OCP 8-bit floats with 4 exponent bits, as int -> float32; all ones is NaN."""
    magnitude = byte & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(byte >= 0x80, -value, value)


@triton.jit
def _elements(codes, MODE: tl.constexpr):
    """What codes stand for before they are scaled, float32."""
    if MODE == "affine":
        value = codes.to(tl.float32)
    elif MODE == "mxfp8":
        value = _e4m3(codes)
    else:  # OCP 4-bit floats with 2 exponent bits
        magnitude = codes & 7
        normal = ((magnitude << 22) + (126 << 23)).to(tl.float32, bitcast=True)
        value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
        value = tl.where(codes >= 8, -value, value)
    return value


@triton.jit
def _scales(scales, offsets, inside, MODE: tl.constexpr):
    """Scales, float32; where not `inside` any finite value, as all codes are 0 there."""
    raw = tl.load(scales + offsets, mask=inside, other=0)
    if MODE == "affine":
        value = raw.to(tl.float32)
    elif MODE == "nvfp4":
        value = _e4m3(raw.to(tl.int32))
    else:  # 2 ** (byte - 127), and 255 is NaN
        byte = raw.to(tl.int32)
        value = tl.where(byte == 0, 0x00400000, byte << 23).to(tl.float32, bitcast=True)
        value = tl.where(byte == 255, float("nan"), value)
    return value


@triton.jit
def _biases(biases, offsets, inside, MODE: tl.constexpr):
    if MODE == "affine":
        value = tl.load(biases + offsets, mask=inside, other=0).to(tl.float32)
    else:
        value = tl.zeros(offsets.shape, tl.float32)
    return value


@triton.jit
def _scaled(elements, scale, bias, MODE: tl.constexpr, WIDE_SCALES: tl.constexpr):
    """`scale * element + bias`, rounded as if once: a code times 12 of a scale's 24 bits is exact in float32."""
    if MODE != "affine":
        value = elements * scale
    elif WIDE_SCALES:
        high = (scale.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        value = elements * high + bias + elements * (scale - high)
    else:
        value = elements * scale + bias
    return value


@triton.jit
def _one_row(
    x, x_stride, words, scales, biases, experts, repeats, y, N, K, groups_a_split,
    MODE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, UNIT_WORDS: tl.constexpr, UNIT_CODES: tl.constexpr,
    WIDE_SCALES: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """y [splits, R, N]: program (n, r, s) has ROWS weights rows of result r, over the groups of split s."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    result = tl.program_id(1)
    split = tl.program_id(2)
    groups = K // GROUP
    if experts is not None:
        expert = tl.load(experts + result).to(tl.int64)
        words += expert * N * (K // UNIT_CODES * UNIT_WORDS)
        scales += expert * N * groups
        if MODE == "affine":
            biases += expert * N * groups
    x += (result // repeats).to(tl.int64) * x_stride
    stop = tl.minimum((split + 1) * groups_a_split, groups) * (GROUP // UNIT_CODES)
    sums = tl.zeros((ROWS, UNITS), tl.float32)
    for first in range(split * groups_a_split * (GROUP // UNIT_CODES), stop, UNITS):
        unit = first + tl.arange(0, UNITS)[None, :]
        inside = (n < N) & (unit < stop)
        offsets = (n * (K // UNIT_CODES) + unit) * UNIT_WORDS
        elements = _elements(_codes(words, offsets, inside, BITS, UNIT_WORDS, UNIT_CODES), MODE)
        group = n * groups + unit * UNIT_CODES // GROUP
        scale, bias = _scales(scales, group, inside, MODE), _biases(biases, group, inside, MODE)
        values = _scaled(elements, scale[:, :, None], bias[:, :, None], MODE, WIDE_SCALES)
        columns = unit[:, :, None] * UNIT_CODES + tl.arange(0, UNIT_CODES)[None, None, :]
        activations = tl.load(x + columns, mask=(unit < stop)[:, :, None], other=0).to(tl.float32)
        sums += tl.sum(values * activations, 2)
    place = (split * tl.num_programs(1) + result).to(tl.int64) * N + n
    tl.store(y + place, tl.sum(sums, 1)[:, None].to(y.dtype.element_ty), mask=n < N)


@triton.jit
def _many_rows(
    x, x_stride, words, scales, biases, order, tiles, repeats, y, M, N, K, groups_a_split,
    MODE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, UNIT_WORDS: tl.constexpr, UNIT_CODES: tl.constexpr,
    WIDE_SCALES: tl.constexpr, FACTOR: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """y [splits, M, N]: program (m, n, s) has a tile of results over the groups of split s, one `tl.dot` a group.

    With experts, `order` [M] lists the results expert by expert and `tiles` [tiles, 3] has the expert, the first and
    the last place in `order` of each tile; a tile without places does nothing.
    """
    place = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    split = tl.program_id(2)
    groups = K // GROUP
    if order is not None:
        tile = tiles + tl.program_id(0) * 3
        expert = tl.load(tile).to(tl.int64)
        words += expert * N * (K // UNIT_CODES * UNIT_WORDS)
        scales += expert * N * groups
        if MODE == "affine":
            biases += expert * N * groups
        place = tl.load(tile + 1).to(tl.int32) + tl.arange(0, TILE_M)
        here = place < tl.load(tile + 2).to(tl.int32)
        m = tl.load(order + place, mask=here, other=0).to(tl.int32)
    else:
        here = place < M
        m = place
    x += (m // repeats).to(tl.int64)[:, None] * x_stride
    sums = tl.zeros((TILE_M, TILE_N), tl.float32)
    for group in range(split * groups_a_split, tl.minimum((split + 1) * groups_a_split, groups)):
        columns = group * GROUP + tl.arange(0, GROUP)[None, :]
        activations = tl.load(x + columns, mask=here[:, None], other=0)
        unit = group * (GROUP // UNIT_CODES) + tl.arange(0, GROUP // UNIT_CODES)[None, :]
        offsets = (n[:, None] * (K // UNIT_CODES) + unit) * UNIT_WORDS
        inside = (n[:, None] < N) & (unit >= 0)
        codes = _codes(words, offsets, inside, BITS, UNIT_WORDS, UNIT_CODES)
        elements = tl.reshape(_elements(codes, MODE), (TILE_N, GROUP))
        scale = _scales(scales, n * groups + group, n < N, MODE)
        bias = _biases(biases, n * groups + group, n < N, MODE)
        if x.dtype.element_ty == tl.float32:
            values = _scaled(elements, scale[:, None], bias[:, None], MODE, WIDE_SCALES)
            sums = tl.dot(activations, tl.trans(values), sums, input_precision="ieee")
        elif MODE != "affine":
            sums += tl.dot(activations.to(FACTOR), tl.trans(elements.to(FACTOR)), input_precision="ieee") * scale
        else:
            # Codes counted from the one nearest to zero: 9 bits with the sign, exact in bfloat16 as in float16, and
            # what is left of the bias does not cancel what they add up to.
            zero = tl.floor(0.5 - bias / tl.where(scale == 0, 1.0, scale))
            zero = tl.minimum(tl.maximum(zero, 0.0), (1 << BITS) - 1.0)
            rest = _scaled(zero, scale, bias, MODE, WIDE_SCALES)
            centred = (elements - zero[:, None]).to(FACTOR)
            sums += tl.dot(activations.to(FACTOR), tl.trans(centred), input_precision="ieee") * scale
            sums += tl.sum(activations.to(tl.float32), 1)[:, None] * rest
    row = (split.to(tl.int64) * M + m)[:, None] * N + n
    tl.store(y + row, sums.to(y.dtype.element_ty), mask=here[:, None] & (n < N))


@triton.jit
def _dequantize(
    words, scales, biases, indices, y, N, K,
    MODE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, UNIT_WORDS: tl.constexpr, UNIT_CODES: tl.constexpr,
    WIDE_SCALES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """y [R, K]: program (r, u) has UNITS units of row `indices[r]`; a row that is not there becomes NaN."""
    row = tl.load(indices + tl.program_id(0)).to(tl.int64)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)[None, :]
    known = (row >= 0) & (row < N)
    inside = (unit < K // UNIT_CODES) & known
    codes = _codes(words, (row * (K // UNIT_CODES) + unit) * UNIT_WORDS, inside, BITS, UNIT_WORDS, UNIT_CODES)
    group = row * (K // GROUP) + unit * UNIT_CODES // GROUP
    scale, bias = _scales(scales, group, inside, MODE), _biases(biases, group, inside, MODE)
    values = _scaled(_elements(codes, MODE), scale[:, :, None], bias[:, :, None], MODE, WIDE_SCALES)
    columns = unit[:, :, None] * UNIT_CODES + tl.arange(0, UNIT_CODES)[None, None, :]
    place = tl.program_id(0).to(tl.int64) * K + columns
    values = tl.where(known, values, float("nan")).to(y.dtype.element_ty)
    tl.store(y + place, values, mask=(unit < K // UNIT_CODES)[:, :, None])


def linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor | None, settings: Settings
) -> torch.Tensor:
    """`x [M, K] @ w.T -> [M, N]` in x's dtype; float32, bfloat16 or float16."""
    if x.shape[0] == 1:
        return _product(x, weight, scales, biases, settings, rows=1)
    return _product(x, weight, scales, biases, settings, rows=x.shape[0], tile=_tile(x.shape[0]))


def experts_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    biases: torch.Tensor | None,
    experts: torch.Tensor,
    settings: Settings,
) -> torch.Tensor:
    """Row i of the result, [R, N], is row i * M // R of `x [M, K]` times expert `experts[i]` of weights [E, N, ...]."""
    results, count = experts.shape[0], weight.shape[0]
    if results <= count:  # then most experts are named once
        return _product(x, weight, scales, biases, settings, rows=results, experts=experts)
    tile = _tile(results // count)
    return _product(
        x, weight, scales, biases, settings, rows=results, tile=tile, tiles=expert_tiles(experts, count, tile[0])
    )


def dequantize_rows(
    weight: torch.Tensor,
    scales: torch.Tensor,
    biases: torch.Tensor | None,
    indices: torch.Tensor,
    settings: Settings,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows `indices` [R] of the weights, rounded once to `dtype`: [R, K]; NaN for a row that is not there."""
    weight, scales, biases = _checked(weight, scales, biases, settings)
    columns = scales.shape[-1] * settings.group_size
    y = weight.new_empty((indices.shape[0], columns), dtype=torch.float32 if INTERPRETED else dtype)
    units = min(COLUMNS, triton.next_power_of_2(columns)) // _unit(settings)[1]
    grid = indices.shape[0], triton.cdiv(columns, units * _unit(settings)[1])
    if y.numel():
        with _on(y):
            _dequantize[grid](
                weight, scales, biases, indices.contiguous(), y, weight.shape[0], columns,
                **_format(settings, scales), UNITS=units,
            )  # fmt: skip
    return y.to(dtype)


def expert_tiles(experts: torch.Tensor, count: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Results sorted by expert, [R], and tiles of at most `tile` of them that share one: expert, start, stop [T, 3].

    T depends on shapes alone, so nothing waits for the device: a few tiles at the end may be empty.
    """
    order = experts.argsort(stable=True)
    sizes = torch.zeros(count, dtype=torch.int64, device=experts.device)
    sizes.scatter_add_(0, experts, torch.ones_like(experts))
    ends = sizes.cumsum(0)
    tiles_ends = ((sizes + tile - 1) // tile).cumsum(0)
    index = torch.arange(experts.shape[0] // tile + count, device=experts.device)
    expert = torch.searchsorted(tiles_ends, index, right=True)
    used, expert = expert < count, expert.clamp(max=count - 1)
    tiles_before = tiles_ends[expert] - (sizes[expert] + tile - 1) // tile
    start = ends[expert] - sizes[expert] + (index - tiles_before) * tile
    stop = torch.minimum(start + tile, ends[expert])
    return order, torch.stack([expert, start, torch.where(used, stop, start)], 1)


def _product(x, weight, scales, biases, settings, *, rows, experts=None, tile=None, tiles=None) -> torch.Tensor:
    """Launch `_one_row`, or with a `tile` (TILE_M, TILE_N) `_many_rows`; sums of several splits are added after."""
    weight, scales, biases = _checked(weight, scales, biases, settings)
    outputs, columns = weight.shape[-2], x.shape[1]
    if columns != scales.shape[-1] * settings.group_size:
        raise ValueError(f"expected x with {scales.shape[-1] * settings.group_size} columns; found {columns}")
    y = x.new_empty((rows, outputs))
    if not y.numel() or not columns:
        return y.zero_()
    repeats = max(1, rows // x.shape[0])
    if tile is None:
        grid: tuple[int, ...] = triton.cdiv(outputs, ROWS), rows
    else:
        row_tiles = triton.cdiv(rows, tile[0]) if tiles is None else tiles[1].shape[0]
        grid = row_tiles, triton.cdiv(outputs, tile[1])
    groups_a_split, splits = _splits(grid, columns, settings, x.device)
    whole = splits == 1 and not INTERPRETED
    parts = y if whole else y.new_empty((splits, rows, outputs), dtype=torch.float32)
    packed = x, x.stride(0), weight, scales, biases
    format_ = _format(settings, scales)
    with _on(x):
        if tile is None:
            units = min(COLUMNS, triton.next_power_of_2(columns)) // _unit(settings)[1]
            _one_row[*grid, splits](
                *packed, experts, repeats, parts, outputs, columns, groups_a_split, **format_, ROWS=ROWS, UNITS=units
            )
        else:
            factor = tl.float32 if INTERPRETED else TYPES[x.dtype]
            _many_rows[*grid, splits](
                *packed, *(tiles or (None, None)), repeats, parts, rows, outputs, columns, groups_a_split,
                **format_, FACTOR=factor, TILE_M=tile[0], TILE_N=tile[1], num_warps=8 if tile[0] > 64 else 4,
            )  # fmt: skip
    return y if whole else parts.sum(0).to(x.dtype)


def _tile(rows: int) -> tuple[int, int]:
    """Results a program: few rows leave more programs along the weights, which are what takes time to read."""
    if rows <= 64:
        return max(16, triton.next_power_of_2(rows)), 32
    return 128, 128


def _splits(grid: tuple[int, ...], columns: int, settings: Settings, device: torch.device) -> tuple[int, int]:
    """Groups a split and splits, for as many programs as the device wants."""
    wanted = min(PROGRAMS * _multiprocessors(device) // (grid[0] * grid[1]), columns // SPLIT_COLUMNS)
    groups = columns // settings.group_size
    groups_a_split = triton.cdiv(groups, max(1, wanted))
    return groups_a_split, triton.cdiv(groups, groups_a_split)


def _unit(settings: Settings) -> tuple[int, int]:
    """Words and codes of a unit."""
    common = gcd(settings.bits, 32)
    return settings.bits // common, 32 // common


def _format(settings: Settings, scales: torch.Tensor) -> dict[str, object]:
    words, codes = _unit(settings)
    return {
        "MODE": settings.mode,
        "BITS": settings.bits,
        "GROUP": settings.group_size,
        "UNIT_WORDS": words,
        "UNIT_CODES": codes,
        "WIDE_SCALES": scales.dtype == torch.float32,
    }


def _checked(weight, scales, biases, settings):
    """The parts, contiguous. Raises ValueError where a kernel would read past them."""
    words = scales.shape[-1] * settings.group_size * settings.bits // 32
    if weight.shape != (*scales.shape[:-1], words) or (settings.affine and getattr(biases, "shape", 0) != scales.shape):
        raise ValueError(f"expected packed parts that agree; found {list(weight.shape)} and {list(scales.shape)}")
    return weight.view(torch.int32).contiguous(), scales.contiguous(), None if biases is None else biases.contiguous()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _on(x: torch.Tensor) -> torch.cuda.device:
    """Triton launches on the current device: make it x's."""
    return torch.cuda.device_of(x)
