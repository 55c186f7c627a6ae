"""How fast products with packed weights read them, next to the memory's own speed and torch's bfloat16 linear.

    python benchmarks/kernels.py [--rows 11008] [--columns 4096] [--seconds 1] [--batch 1 8 512] [--only 4/64 mxfp4/32]

Weights rotate through copies that no cache holds; bandwidth is read between products, in the same seconds. Medians;
the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle

import torch

from isomorph.kernels import native
from isomorph.quantize.settings import Settings

CASES = [Settings(bits, 64) for bits in (2, 3, 4, 5, 6, 8)]
CASES += [Settings.of(mode=mode) for mode in ("mxfp4", "mxfp8", "nvfp4")]
COPIES_BYTES = 1 << 30  # more than the largest caches hold


def packed(settings: Settings, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Random codes; scales as of weights around one."""
    weight = torch.randint(-(2**31), 2**31 - 1, (rows, columns * settings.bits // 32), dtype=torch.int32)
    shape = rows, columns // settings.group_size
    if not settings.affine:
        return weight, torch.full(shape, 0x38 if settings.mode == "nvfp4" else 127, dtype=torch.uint8), None
    scales = (torch.rand(shape) * 0.01 + 0.001).to(torch.bfloat16)
    return weight, scales, -scales * 2 ** (settings.bits - 1)


def timed(products: Iterator[Callable[[], object]], seconds: float, probe: torch.Tensor) -> tuple[float, float]:
    """Median seconds of a product and median bytes a second of memory, interleaved."""
    times: list[float] = []
    bandwidths: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        bandwidths.append(native.extension().read_bandwidth(probe.data_ptr(), probe.nbytes) * 1e9)
        for _ in range(4):
            product = next(products)
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
    return statistics.median(times), statistics.median(bandwidths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 512])
    parser.add_argument("--only", nargs="+", help="bits/group or mode/group, and bfloat16")
    options = parser.parse_args()
    if native.extension() is None:
        sys.exit("expected the C++ extension; found none: install a C++ compiler and reinstall isomorph")
    rows, columns = options.rows, options.columns
    probe = torch.ones(1 << 26, dtype=torch.int64)
    records = []

    def measure(name: str, numerics: str, batch: int, weight_bytes: int, products: list[Callable[[], object]]) -> None:
        seconds, bandwidth = timed(cycle(products), options.seconds, probe)
        record = {
            "weights": name,
            "numerics": numerics,
            "batch": batch,
            "microseconds": seconds * 1e6,
            "gigabytes_per_second": weight_bytes / seconds / 1e9,
            "read_bandwidth_fraction": weight_bytes / seconds / bandwidth,
            "gflops": 2 * batch * rows * columns / seconds / 1e9,
        }
        records.append(record)
        print(
            f"{name:9} {numerics:6} {batch:4} rows {record['microseconds']:9.0f} us "
            f"{record['gigabytes_per_second']:6.1f} GB/s {record['read_bandwidth_fraction']:6.0%} of the memory's "
            f"{record['gflops']:6.0f} GFLOP/s"
        )

    for settings in CASES:
        name = f"{settings.bits if settings.affine else settings.mode}/{settings.group_size}"
        if options.only and name not in options.only:
            continue
        parts = packed(settings, rows, columns)
        size = sum(part.nbytes for part in parts if part is not None)
        copies = [parts] + [tuple(p if p is None else p.clone() for p in parts) for _ in range(COPIES_BYTES // size)]
        handles = [native.packed_handle(*copy, settings) for copy in copies]
        for batch in options.batch:
            x = torch.randn(batch, columns).to(torch.bfloat16)
            for fast in (False, True):
                products = [lambda h=h, x=x, f=fast: native.multiply(h, x, rows, f) for h in handles]
                measure(name, "fast" if fast else "exact", batch, size, products)
    if not options.only or "bfloat16" in options.only:
        weights = [
            torch.randn(rows, columns).to(torch.bfloat16) for _ in range(max(2, COPIES_BYTES // (rows * columns * 2)))
        ]
        for batch in options.batch:
            x = torch.randn(batch, columns).to(torch.bfloat16)
            ours = [lambda w=w, x=x: native.multiply_bfloat16(w, x) for w in weights]
            theirs = [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights]
            size = weights[0].nbytes
            if batch <= native.WIDE_ROWS:
                measure("bfloat16", "exact", batch, size, ours)
            measure("bfloat16", "torch", batch, size, theirs)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "kernels": native.extension().backend(),
        "threads": native.extension().thread_count(),
        "torch": torch.__version__,
    }
    print(json.dumps({"shape": [rows, columns], "machine": machine, "records": records}))


if __name__ == "__main__":
    main()
