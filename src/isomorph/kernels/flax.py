"""Flax NNX modules over packed weights, in the place of `nnx.Linear` and `nnx.Embed`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from isomorph.kernels.jax import dequantize_rows, quantized_experts_linear, quantized_linear
from isomorph.quantize.settings import Settings


class Packed(nnx.Variable):
    """Packed words, scales or biases: constants, which no optimizer of `nnx.Param` sees."""


class PackedModule(nnx.Module):
    """`weight` uint32 [N, K * bits / 32], `scales` and, in affine mode, `biases` [N, K / group_size]; zeros at first.

    `shape` is [N, K], with an axis before them for experts, and `split` the mesh axes of each, as a model's file
    annotates them. `dtype` computes; `extension` says whether a CPU may use the C++ extension, which a sharded model
    cannot.
    """

    weight: Packed
    scales: Packed
    biases: Packed

    def __init__(
        self,
        shape: tuple[int, ...],
        settings: Settings,
        *,
        scale_dtype: str = "bfloat16",
        dtype: Any = jnp.float32,
        split: tuple[Any, ...] = (None, None),
        extension: bool = True,
    ) -> None:
        self.settings = settings
        self.dtype = dtype
        self.extension = extension
        for name, (size, kind) in settings.parts(shape, scale_dtype).items():
            setattr(self, name, Packed(jnp.zeros(size, kind), out_sharding=split, eager_sharding=False))

    def packed(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        biases = self.biases[...] if self.settings.affine else None
        return self.weight[...], self.scales[...], biases

    def format(self) -> tuple[int, int, str]:
        return self.settings.bits, self.settings.group_size, self.settings.mode

    def multiply(self, x: jax.Array) -> jax.Array:
        """`x [..., K] @ w.T -> [..., N]`."""
        return quantized_linear(x.astype(self.dtype), *self.packed(), *self.format(), self.extension)


class QuantizedLinear(PackedModule):
    """`x [..., K] -> x @ w.T + bias [..., N]`."""

    bias: nnx.Param | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class QuantizedExpertLinear(PackedModule):
    """Row i of `x [M, K]` times the matrix [N, K] of expert `experts[i]`, plus its bias: [M, N]."""

    bias: nnx.Param | None = None

    def __call__(self, x: jax.Array, experts: jax.Array) -> jax.Array:
        y = quantized_experts_linear(x.astype(self.dtype), *self.packed(), experts, *self.format(), self.extension)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)[experts]


class QuantizedEmbed(PackedModule):
    """`ids [...] -> rows [..., K]`; `attend` is the tied head."""

    def __call__(self, ids: jax.Array) -> jax.Array:
        return dequantize_rows(*self.packed(), ids, *self.format(), dtype=self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """`x [..., K] -> logits [..., N]`."""
        return self.multiply(x)
