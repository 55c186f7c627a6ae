"""What training spends its time on, over dense float32, in the C++ extension instead of XLA on a CPU (docs/train.md).

XLA's products are slower there where a factor is transposed, and its attention writes all scores to memory and reads
them again. A custom call is one opaque operation to XLA: these are for one device, not for a mesh of several.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from isomorph.kernels.jax import registered


def usable() -> bool:
    """Whether programs are compiled for a CPU, and the extension is there and known to XLA."""
    return jax.default_backend() == "cpu" and registered()


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def multiply(a: jax.Array, b: jax.Array, transpose_a: bool = False, transpose_b: bool = False) -> jax.Array:
    """`a [..., M, K] @ b [..., K, N] -> [..., M, N]`, each with its last two axes exchanged first where that is said.

    float32, the leading axes of both alike. Differentiable.
    """
    shape = (*a.shape[:-2], a.shape[-1 if transpose_a else -2], b.shape[-2 if transpose_b else -1])
    call = jax.ffi.ffi_call("isomorph_multiply_dense", jax.ShapeDtypeStruct(shape, jnp.float32))
    return call(a, b, transpose_a=np.int64(transpose_a), transpose_b=np.int64(transpose_b))


def _multiply_forward(a, b, transpose_a, transpose_b):
    return multiply(a, b, transpose_a, transpose_b), (a, b)


def _multiply_backward(transpose_a, transpose_b, factors, gradient):
    a, b = factors
    d_a = multiply(b, gradient, transpose_b, True) if transpose_a else multiply(gradient, b, False, not transpose_b)
    d_b = multiply(gradient, a, True, transpose_a) if transpose_b else multiply(a, gradient, not transpose_a)
    return d_a, d_b


multiply.defvjp(_multiply_forward, _multiply_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    """Softmax attention over each token's own key and the `window` before it: q [B, T, H, K] -> [B, T, H, K].

    float32; k and v [B, T, G, K], each head of which serves H / G of q's. No maximum is subtracted: |q| * |k| must
    stay below 88 * sqrt(K). Differentiable.
    """
    return _attend_forward(q, k, v, window)[0]


def _attend_forward(q, k, v, window):
    totals = (q.shape[0], q.shape[2], q.shape[1])
    shapes = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(totals, jnp.float32)
    out, inverse_totals = jax.ffi.ffi_call("isomorph_attend", shapes)(q, k, v, window=np.int64(window))
    return out, (q, k, v, out, inverse_totals)


def _attend_backward(window, known, gradient):
    shapes = tuple(jax.ShapeDtypeStruct(array.shape, jnp.float32) for array in known[:3])
    return jax.ffi.ffi_call("isomorph_attend_backward", shapes)(*known, gradient, window=np.int64(window))


attend.defvjp(_attend_forward, _attend_backward)
