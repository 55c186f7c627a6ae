"""Memory for training on a CPU: XLA takes its working memory anew each step, and pays for every page of it."""

from __future__ import annotations

import os
import sys

#: glibc asks the kernel for huge pages (2 MB): a step of benchmarks/train.py has 700 page faults, not 78,000.
TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def restart() -> None:
    """Start this very command again, once, with `TUNABLES`, which glibc reads only at the start; else do nothing."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **TUNABLES})
