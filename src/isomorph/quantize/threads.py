"""Work on long arrays in blocks that fit the cache, on every core this process may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

#: Values of one block: 1 MB in float32, which with its temporaries stays in the cache.
BLOCK_VALUES = 1 << 18


def core_count() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def for_blocks(work: Callable[[slice], None], length: int, step: int) -> None:
    """Call `work(slice)` for consecutive slices of `step` that cover `length`, on all cores.

    numpy lets other threads run during its loops, so threads are enough. The first exception is raised.
    """
    starts = range(0, length, step)
    workers = min(core_count(), len(starts))

    def share(first: int) -> None:
        for start in starts[first::workers]:
            work(slice(start, min(start + step, length)))

    if workers <= 1:
        share(0) if starts else None
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(share, range(workers)):
            pass
