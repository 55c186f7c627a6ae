"""The products in JAX: jittable, differentiable in x, on every device; and Flax NNX modules over packed weights.

Two implementations. In jax.numpy the weights are unpacked inside the jitted product: any device, sharded over a mesh
or not. On a CPU the C++ extension takes over through XLA's foreign functions, which hand it the buffers themselves:
XLA writes the unpacked matrix to memory before it multiplies, the extension never does (docs/run-quantized.md has both
measured). A custom call is one opaque operation to XLA, so sharded models use jax.numpy everywhere.

Weights are uint32 [N, K * bits / 32], scales and biases [N, K / group_size]; experts have a leading axis E.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache, partial
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isomorph.kernels.extension import find_extension
from isomorph.quantize.settings import Settings

log = logging.getLogger(__name__)

#: Weight, scales and biases.
Packed = tuple[jax.Array, jax.Array, jax.Array | None]

#: As the extension numbers them.
MODES = {"affine": 0, "mxfp4": 1, "mxfp8": 2, "nvfp4": 3}
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)

#: What csrc/xla.cpp exports; those of dense arrays are called by kernels/dense.py.
HANDLERS = ("multiply_all", "multiply_experts", "dequantize", "multiply_dense", "attend", "attend_backward")

#: Values of the 4-bit floats with 2 exponent bits.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

#: Rows from which decoding the weights once for XLA's own product beats streaming them.
WIDE_ROWS = 16

#: Results of one expert that are multiplied together when there are many.
EXPERT_TILE = 64


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def quantized_linear(
    x: jax.Array,
    weight: jax.Array,
    scales: jax.Array,
    biases: jax.Array | None,
    bits: int = 4,
    group_size: int = 64,
    mode: str = "affine",
    extension: bool = True,
) -> jax.Array:
    """`x [..., K] @ w.T -> [..., N]` in x's dtype: codes times activations as given, fp32 accumulation.

    Without `extension` always in jax.numpy. Differentiable in x alone. Raises ValueError for parts that do not agree.
    """
    settings = _checked(x, weight, scales, biases, bits, group_size, mode)
    rows = x.reshape(-1, x.shape[-1])
    shape = jax.ShapeDtypeStruct((rows.shape[0], weight.shape[0]), x.dtype)
    if _streams(rows, settings):
        y = _choose("multiply_all", settings, extension, shape, _multiply, rows, weight, scales, biases)
    else:
        y = _product(rows, _values((weight, scales, biases), settings, extension))
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _linear_forward(x, weight, scales, biases, bits, group_size, mode, extension):
    y = quantized_linear(x, weight, scales, biases, bits, group_size, mode, extension)
    return y, (weight, scales, biases)


def _linear_backward(bits, group_size, mode, extension, packed, gradient):
    values = _values(packed, Settings(bits, group_size, mode), extension)
    return _product(gradient.reshape(-1, gradient.shape[-1]), values.T).reshape(*gradient.shape[:-1], -1), *[None] * 3


quantized_linear.defvjp(_linear_forward, _linear_backward)


def quantized_experts_linear(
    x: jax.Array,
    weight: jax.Array,
    scales: jax.Array,
    biases: jax.Array | None,
    experts: jax.Array,
    bits: int = 4,
    group_size: int = 64,
    mode: str = "affine",
    extension: bool = True,
) -> jax.Array:
    """Row i of the result, [R, N], is row i * M // R of `x [M, K]` times expert `experts[i]`, for experts [R].

    Only experts that are named are read.
    """
    settings = _checked(x, weight, scales, biases, bits, group_size, mode)
    shape = jax.ShapeDtypeStruct((experts.shape[0], weight.shape[1]), x.dtype)
    arguments = x, weight, scales, biases, experts.astype(jnp.int32)
    return _choose("multiply_experts", settings, extension, shape, _multiply_experts, *arguments)


def dequantize_rows(
    weight: jax.Array,
    scales: jax.Array,
    biases: jax.Array | None,
    indices: jax.Array,
    bits: int = 4,
    group_size: int = 64,
    mode: str = "affine",
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Rows `indices` [...] of the weights, rounded once to `dtype`: [..., K]; NaN for a row that is not there."""
    settings = Settings(bits, group_size, mode)
    rows = dequantize(weight[indices], scales[indices], None if biases is None else biases[indices], settings)
    known = (indices >= 0) & (indices < weight.shape[0])
    return jnp.where(known[..., None], rows, jnp.nan).astype(dtype)


def dequantize(weight: jax.Array, scales: jax.Array, biases: jax.Array | None, settings: Settings) -> jax.Array:
    """The weights, float32 [..., K], rounded once."""
    codes = _unpack(weight, settings.bits)
    groups = codes.reshape(*codes.shape[:-1], -1, settings.group_size)
    if biases is not None:
        elements, scale = groups.astype(jnp.float32), scales.astype(jnp.float32)[..., None]
        bias = biases.astype(jnp.float32)[..., None]
        if scales.dtype == jnp.float32:
            # A code times 12 of the scale's 24 bits is exact in float32; the sum must not lose the other half.
            high = (scale.view(jnp.uint32) & np.uint32(0xFFFFF000)).view(jnp.float32)
            values = elements * high + bias + elements * (scale - high)
        else:
            values = elements * scale + bias
    elif settings.mode == "mxfp8":
        values = _e4m3(groups) * _e8m0(scales)[..., None]
    else:
        values = jnp.asarray(E2M1)[groups] * (_e4m3 if settings.mode == "nvfp4" else _e8m0)(scales)[..., None]
    return values.reshape(codes.shape)


def _unpack(weight: jax.Array, bits: int) -> jax.Array:
    """Codes uint32 [..., K]. A unit is the shortest run of codes that fills whole words."""
    unit_words, unit_codes = bits // gcd(bits, 32), 32 // gcd(bits, 32)
    words = weight.reshape(*weight.shape[:-1], -1, unit_words)
    start = np.arange(unit_codes) * bits
    codes = jnp.zeros((*words.shape[:-1], unit_codes), jnp.uint32)
    for index in range(unit_words):
        # Where a code begins in this word, or, when negative, how many of its bits the word before holds.
        shift = start - 32 * index
        word = words[..., index, None]
        here, before = (shift >= 0) & (shift < 32), (shift < 0) & (shift > -bits)
        codes |= jnp.where(here, word >> np.where(here, shift, 0).astype(np.uint32), 0)
        if before.any():
            codes |= jnp.where(before, word << np.where(before, -shift, 0).astype(np.uint32), 0)
    return (codes & ((1 << bits) - 1)).reshape(*weight.shape[:-1], -1)


def _e4m3(bytes_: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bytes_.astype(jnp.uint8), jnp.float8_e4m3fn).astype(jnp.float32)


def _e8m0(bytes_: jax.Array) -> jax.Array:
    """2 ** (byte - 127), and 255 is NaN."""
    bits = jnp.where(bytes_ == 0, np.uint32(0x00400000), bytes_.astype(jnp.uint32) << 23)
    return jnp.where(bytes_ == 255, jnp.nan, jax.lax.bitcast_convert_type(bits, jnp.float32))


def _product(x: jax.Array, values: jax.Array) -> jax.Array:
    """`x [M, K] @ values [N, K].T` in x's dtype, computed in float32 on devices that have shortcuts too."""
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x.astype(jnp.float32), values, contract, precision="highest").astype(x.dtype)


def _multiply(x, weight, scales, biases, settings):
    return _product(x, dequantize(weight, scales, biases, settings))


def _values(packed: Packed, settings: Settings, extension: bool) -> jax.Array:
    """The weights, float32 [N, K]."""
    weight, scales, _ = packed
    shape = jax.ShapeDtypeStruct((weight.shape[0], scales.shape[1] * settings.group_size), jnp.float32)
    return _choose("dequantize", settings, extension, shape, dequantize, *packed)


def _multiply_experts(x, weight, scales, biases, experts, settings):
    """Results expert by expert, in tiles that share one, so that a step dequantizes one matrix for all its rows."""
    results, count = experts.shape[0], weight.shape[0]
    tile = 1 if results <= count else EXPERT_TILE
    order = jnp.argsort(experts, stable=True)
    sizes = jnp.bincount(experts, length=count)
    ends, tiles_ends = jnp.cumsum(sizes), jnp.cumsum(-(-sizes // tile))
    repeats = results // x.shape[0]

    def step(y, index):
        expert = jnp.minimum(jnp.searchsorted(tiles_ends, index, side="right"), count - 1)
        tiles_before = tiles_ends[expert] + -sizes[expert] // tile
        places = ends[expert] - sizes[expert] + (index - tiles_before) * tile + jnp.arange(tile)
        # Past the expert's results a place is none: nothing is written there.
        chosen = jnp.where(places < ends[expert], order.at[places].get(mode="clip"), results)
        local = None if biases is None else biases[expert]
        part = _multiply(x.at[chosen // repeats].get(mode="clip"), weight[expert], scales[expert], local, settings)
        return y.at[chosen].set(part, mode="drop"), None

    tiles = results if tile == 1 else results // tile + count
    return jax.lax.scan(step, jnp.zeros((results, weight.shape[1]), x.dtype), jnp.arange(tiles))[0]


def _checked(x, weight, scales, biases, bits, group_size, mode) -> Settings:
    settings = Settings(bits, group_size, mode)
    words = scales.shape[-1] * group_size * bits // 32
    parts_agree = weight.shape == (*scales.shape[:-1], words) and weight.dtype == jnp.uint32
    if not parts_agree or settings.affine != (biases is not None and biases.shape == scales.shape):
        raise ValueError(f"expected packed parts that agree; found {weight.shape} and {scales.shape}")
    if x.shape[-1] != scales.shape[-1] * group_size:
        raise ValueError(f"expected x with {scales.shape[-1] * group_size} columns; found {x.shape[-1]}")
    return settings


def _streams(x: jax.Array, settings: Settings) -> bool:
    """Whether the extension multiplies the rows of x itself; otherwise it unpacks the weights for XLA's product."""
    if x.shape[0] < WIDE_ROWS:
        return True
    tiled = settings.mode in ("affine", "mxfp4") and x.dtype == jnp.bfloat16
    return tiled and registered() and find_extension().has_wide()


@cache
def registered() -> bool:
    """Whether the extension's handlers are known to XLA. False without the extension, or for another XLA interface."""
    extension = find_extension()
    if extension is None:
        return False
    library = ctypes.CDLL(extension.__file__)
    try:
        for name in HANDLERS:
            handler = jax.ffi.pycapsule(getattr(library, f"isomorph_xla_{name}"))
            jax.ffi.register_ffi_target(f"isomorph_{name}", handler, platform="cpu")
    except Exception as error:
        log.warning("XLA does not take isomorph's CPU kernels (%s), so JAX runs without them, many times slower", error)
        return False
    return True


def _choose(name, settings, extension, shape, portable, *arrays) -> jax.Array:
    """The extension's handler `name` where the program is compiled for a CPU, otherwise `portable`."""
    portable = partial(portable, settings=settings)
    floats = [array for array in (shape, arrays[0]) if jnp.issubdtype(array.dtype, jnp.floating)]
    if not extension or any(array.dtype not in FLOATS for array in floats) or not registered():
        return portable(*arrays)
    call = jax.ffi.ffi_call(f"isomorph_{name}", shape, vmap_method="sequential")
    mode = MODES[settings.mode]
    attributes = {"bits": settings.bits, "group_size": settings.group_size, "mode": mode}
    numbers = {key: np.int64(value) for key, value in attributes.items()}

    def native(*arrays):
        return call(*[array for array in arrays if array is not None], **numbers)

    return jax.lax.platform_dependent(*arrays, cpu=native, default=portable)
