"""Weights that a model sees rounded to MXFP4 while it is trained, so that storing them that way changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp

from isomorph.quantize.microscaling import E2M1
from isomorph.quantize.settings import Settings

MXFP4 = Settings(4, 32, "mxfp4")


def straight_through(pattern: str | None) -> Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """What turns parameters into those that the model computes with: the ones whose name matches are rounded.

    Gradients pass as if nothing had been rounded, https://arxiv.org/abs/1308.3432.
    """

    stop = jax.lax.stop_gradient

    def seen(parameters: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            name: stop(rounded(value)) + (value - stop(value)) if _matches(name, pattern) else value
            for name, value in parameters.items()
        }

    return seen


def rounded(kernel: jax.Array) -> jax.Array:
    """`kernel` [..., in, out] with each 32 consecutive inputs of an output on one MXFP4 grid, in its dtype.

    The scale is the least power of two that reaches the largest weight, and ties go to zero, as MLX has it.
    """
    *rows, inputs, outputs = kernel.shape
    groups = kernel.astype(jnp.float32).reshape(*rows, inputs // MXFP4.group_size, MXFP4.group_size, outputs)
    largest = jnp.abs(groups).max(axis=-2, keepdims=True) / E2M1[-1]
    fractions, exponents = jnp.frexp(largest)
    scales = jnp.ldexp(jnp.ones_like(largest), exponents - (fractions == 0.5))
    magnitudes = jnp.abs(groups) / scales
    borders = (E2M1[1:] + E2M1[:-1]) / 2
    codes = sum((magnitudes > border).astype(jnp.int32) for border in borders)
    return (jnp.sign(groups) * jnp.asarray(E2M1)[codes] * scales).reshape(kernel.shape).astype(kernel.dtype)


def _matches(name: str, pattern: str | None) -> bool:
    return pattern is not None and fnmatchcase(name, pattern)
