"""How fast weights are quantized: `quantize_array` and `mx.quantize` side by side, interleaved, in one process.

    python benchmarks/quantize.py [--rows 11008] [--columns 4096] [--repetitions 7] [--dtype bfloat16]

Prints the median GB/s of input and the ratio; the last line is one JSON document. Results are checked to be equal.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import ml_dtypes
import mlx.core as mx
import numpy as np

from isomorph.quantize.arrays import quantize_array
from isomorph.quantize.settings import Settings
from isomorph.quantize.threads import core_count

CASES = [Settings(bits, 64) for bits in (2, 3, 4, 5, 6, 8)] + [Settings.of(mode=m) for m in ("mxfp4", "mxfp8", "nvfp4")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    options = parser.parse_args()

    weight = np.random.default_rng(0).standard_normal((options.rows, options.columns), np.float32) * 0.02
    weight = weight.astype(ml_dtypes.bfloat16 if options.dtype == "bfloat16" else options.dtype)
    bfloat16 = options.dtype == "bfloat16"
    theirs = mx.array(weight.view(np.uint16)).view(mx.bfloat16) if bfloat16 else mx.array(weight)
    rows = []
    for settings in CASES:
        seconds: dict[str, list[float]] = {"isomorph": [], "mlx": []}
        for _ in range(options.repetitions):
            start = time.perf_counter()
            own = quantize_array(weight, settings)
            seconds["isomorph"].append(time.perf_counter() - start)
            start = time.perf_counter()
            other = mx.quantize(theirs, settings.group_size, settings.bits, mode=settings.mode)
            mx.eval(other)
            seconds["mlx"].append(time.perf_counter() - start)
        assert np.array_equal(own.weight, np.array(other[0])), settings
        speeds = {name: weight.nbytes / statistics.median(times) / 1e9 for name, times in seconds.items()}
        ratio = statistics.median(b / a for a, b in zip(seconds["isomorph"], seconds["mlx"]))
        rows.append({**settings.to_dict(), "gigabytes_per_second": speeds, "ratio": ratio})
        name = f"{settings.mode} {settings.bits}-bit, groups of {settings.group_size}"
        print(f"{name:32} isomorph {speeds['isomorph']:6.2f} GB/s   mlx {speeds['mlx']:6.2f} GB/s   {ratio:5.2f}x")
    machine = {"cores": core_count(), "processor": platform.processor() or platform.machine(), "mlx": mx.__version__}
    print(json.dumps({"shape": list(weight.shape), "dtype": options.dtype, "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
