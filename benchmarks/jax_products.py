"""One packed product in JAX on this CPU: through the C++ extension, in jax.numpy, and what a Python callback costs.

    python benchmarks/jax_products.py [--rows 11008] [--columns 4096] [--bits 4] [--repetitions 9]

Milliseconds, medians, for 1, 8 and 512 rows of bfloat16 activations. The callback does nothing but
take its arguments: its time is that of handing over the weights. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from isomorph.kernels.extension import find_extension
from isomorph.kernels.jax import quantized_linear
from isomorph.quantize.arrays import quantize_array
from isomorph.quantize.settings import Settings


def milliseconds(call: Callable[[], jax.Array], repetitions: int) -> float:
    """Median time; one call after another, as XLA's threads, which spin for a while, would slow a neighbour."""
    times = []
    for _ in range(repetitions + 2):
        start = time.perf_counter()
        call().block_until_ready()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()

    settings = Settings(options.bits, 64)
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((options.rows, options.columns), np.float32).astype(jnp.bfloat16)
    packed = [jnp.asarray(part) for part in quantize_array(weights, settings)]
    size = sum(part.nbytes for part in packed)
    product = jax.jit(quantized_linear, static_argnums=(4, 5, 6, 7))

    def take(*arrays: jax.Array) -> np.ndarray:
        return np.zeros(1, np.float32) + sum(np.asarray(array).size for array in arrays)

    @jax.jit
    def callback(*arrays: jax.Array) -> jax.Array:
        return jax.pure_callback(take, jax.ShapeDtypeStruct((1,), jnp.float32), *arrays)

    record: dict[str, dict[str, float]] = {}
    for rows in (1, 8, 512):
        x = jnp.asarray(rng.standard_normal((rows, options.columns)), jnp.bfloat16)
        calls = {
            "extension": lambda x=x: product(x, *packed, settings.bits, 64, "affine", True),
            "jax_numpy": lambda x=x: product(x, *packed, settings.bits, 64, "affine", False),
            "callback": lambda x=x: callback(x, *packed),
        }
        record[f"{rows}_rows_milliseconds"] = {name: milliseconds(calls[name], options.repetitions) for name in calls}
    extension = find_extension()
    if extension is not None:
        read = max(extension.read_bandwidth(packed[0].unsafe_buffer_pointer(), packed[0].nbytes) for _ in range(5))
        one = size / record["1_rows_milliseconds"]["extension"] / 1e6
        record["gigabytes_per_second"] = {"extension": one, "read": read}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
