"""Dense products and attention of training against float64, and their gradients against jax's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isomorph.kernels import dense

pytestmark = pytest.mark.skipif(not dense.usable(), reason="the C++ extension is not built")

#: Unit roundoff of float32.
U = 2.0**-24

SHAPES = [(1, 1, 1), (13, 7, 5), (14, 32, 256), (15, 33, 257), (97, 131, 600), (256, 64, 2048), (0, 3, 4), (3, 4, 0)]


def factors(m: int, n: int, k: int, transpose_a: bool, transpose_b: bool) -> list[np.ndarray]:
    random = np.random.default_rng(m + n + k)
    shapes = (2, k, m) if transpose_a else (2, m, k), (2, n, k) if transpose_b else (2, k, n)
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def product(factors: Sequence[Any], transpose_a: bool, transpose_b: bool) -> Any:
    a, b = factors
    return (a.swapaxes(1, 2) if transpose_a else a) @ (b.swapaxes(1, 2) if transpose_b else b)


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_float64(shape: tuple[int, int, int], transpose_a: bool, transpose_b: bool) -> None:
    a, b = factors(*shape, transpose_a, transpose_b)
    found = np.asarray(jax.jit(dense.multiply, static_argnums=(2, 3))(a, b, transpose_a, transpose_b))
    wide = [x.astype(np.float64) for x in (a, b)]
    expected = product(wide, transpose_a, transpose_b)
    # A sum of K terms, each multiplied and added with one rounding, in parts that are added with one more.
    limit = (shape[2] + 2) * U * product([np.abs(x) for x in wide], transpose_a, transpose_b)
    assert found.shape == expected.shape and found.dtype == np.float32
    assert (np.abs(found - expected) <= limit).all()
    if expected.size and shape[2] > 1:  # a term that is left out is seen
        (wide[0].swapaxes(1, 2) if transpose_a else wide[0])[:, :, -1] = 0
        assert not (np.abs(found - product(wide, transpose_a, transpose_b)) <= limit).all()


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("transpose_a", [False, True])
def test_gradients_of_the_product(transpose_a: bool, transpose_b: bool) -> None:
    a, b = factors(33, 20, 65, transpose_a, transpose_b)
    weight = np.random.default_rng(0).standard_normal((2, 33, 20)).astype(np.float32)
    ours = jax.grad(lambda a, b: jnp.sum(dense.multiply(a, b, transpose_a, transpose_b) * weight), argnums=(0, 1))
    theirs = jax.grad(lambda a, b: jnp.sum(product((a, b), transpose_a, transpose_b) * weight), argnums=(0, 1))
    for found, expected in zip(ours(a, b), theirs(a, b), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2 * 67 * U * np.abs(expected).max() * 10)


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    """By definition: q [B, T, H, K], k and v [B, T, G, K]."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    back = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
    odds = jax.nn.softmax(jnp.where((back >= 0) & (back <= window), scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshk->bthk", odds, v)


def with_gradients(attend: Callable[..., jax.Array], arrays: Sequence[Any], window: int) -> tuple[jax.Array, ...]:
    """The attention of q, k and v, and their gradients for the result's: the four of `arrays`."""
    out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, window), *arrays[:3])
    return out, *backward(arrays[3])


ATTENTION = [  # batch, tokens, heads, kv_heads, size, window
    (2, 1, 1, 1, 64, 1),
    (1, 130, 4, 2, 64, 50),
    (2, 200, 3, 1, 16, 64),
    (1, 97, 2, 2, 72, 1000),
]


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_is_that_of_float64(case: tuple[int, ...]) -> None:
    batch, tokens, heads, kv_heads, size, window = case
    random = np.random.default_rng(1)
    shapes = [(batch, tokens, number, size) for number in (heads, kv_heads, kv_heads, heads)]
    arrays = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
    found = jax.jit(lambda *arrays: with_gradients(dense.attend, arrays, window))(*arrays)
    noisy = with_gradients(softmax_attention, arrays, window)
    wide = [x.astype(np.float64) for x in arrays]
    with jax.enable_x64(True):
        expected = with_gradients(softmax_attention, wide, window)
        other = with_gradients(softmax_attention, wide, max(window - 1, 0))
    for ours, jax_own, right, wrong in zip(found, noisy, expected, other, strict=True):
        exact = np.asarray(right)
        # Within a few times the error of float32 in jax's own operations, and of the order of roundings at least.
        limit = 4 * np.abs(jax_own - exact).max() + 8 * U * max(1, np.abs(exact).max())
        assert np.abs(ours - exact).max() <= limit
        if 1 < window < tokens:  # a window off by one is seen
            assert np.abs(np.asarray(wrong) - exact).max() > limit


def test_the_same_every_time() -> None:
    a, b = factors(300, 200, 700, True, False)
    run = jax.jit(dense.multiply, static_argnums=(2, 3))
    first = np.asarray(run(a, b, True, False))
    assert all((np.asarray(run(a, b, True, False)) == first).all() for _ in range(5))
