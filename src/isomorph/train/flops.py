"""What a model's training costs and what a device can give, in floating-point operations."""

from __future__ import annotations

import math
import time
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from isomorph.frameworks.nnx_parameters import merge
from isomorph.train.loss import summed_loss
from isomorph.train.settings import Settings

#: The backward pass does each product of the forward pass twice: once a factor.
PASSES = 3


def model_flops_per_token(graph: nnx.GraphDef, parameters: dict[str, jax.Array], settings: Settings) -> float:
    """Floating-point operations of a training step's matrix products, a token; what remat repeats does not count."""
    shape = (1, settings.sequence_length)
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in parameters.items()}
    ids = jax.ShapeDtypeStruct((1, settings.sequence_length + 1), np.int32)
    forward = jax.make_jaxpr(lambda parameters, ids, counted: summed_loss(merge(graph, parameters), ids, counted))
    counted = jax.ShapeDtypeStruct(shape, np.bool_)
    return PASSES * product_flops(forward(shapes, ids, counted).jaxpr) / settings.sequence_length


def product_flops(jaxpr: Jaxpr) -> int:
    """Two for each multiplication and addition of the matrix products in a program, repeated ones as often as run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            factor, product = (variable.aval.shape for variable in (equation.invars[0], equation.outvars[0]))  # type: ignore[attr-defined]
            total += 2 * math.prod(product) * math.prod(factor[axis] for axis in contracted)
        total += equation.params.get("length", 1) * sum(map(product_flops, _programs(equation.params)))
    return total


def _programs(parameters: dict[str, Any]) -> list[Jaxpr]:
    """The programs inside an operation: a loop's body, a call's."""
    found = [value.jaxpr if isinstance(value, ClosedJaxpr) else value for value in parameters.values()]
    return [value for value in found if isinstance(value, Jaxpr)]


@lru_cache
def measured_peak_flops(dtype: str, size: int = 1024) -> float:
    """Operations a second of one device at its best product of square matrices among a few."""
    left = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(left, left).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(left, left).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
