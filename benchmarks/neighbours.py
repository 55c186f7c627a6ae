"""What others on this machine took of its processors while something was measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

#: Of a processor, what others may take in a round that counts; how often a round is tried.
DISTURBED, TRIES = 0.1, 4


def others(children: Iterable[subprocess.Popen[str]] = ()) -> float:
    """Processor seconds, stolen ones included, that went neither to this process nor to its children; 0 off Linux.

    Since the machine's start, but for an unknown constant: take differences. `children` are those that still run.
    """
    if not Path("/proc/stat").is_file():
        return 0.0
    user, nice, system, _, _, _, _, steal, *_ = map(int, Path("/proc/stat").read_text().split(None, 11)[1:11])
    stats = [Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split() for child in children]
    running = sum(int(stat[11]) + int(stat[12]) for stat in stats)
    return (user + nice + system + steal - running) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def undisturbed(measure: Callable[[], T]) -> T:
    """The result of `measure` from a call during which others left the machine alone."""
    for _ in range(TRIES):
        before, start = others(), time.perf_counter()
        result = measure()
        if others() - before < DISTURBED * (time.perf_counter() - start):
            return result
    sys.exit("expected a quiet machine; found others at work in every round; run it again")
