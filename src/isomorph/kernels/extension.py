"""Finds the C++ extension, without importing any framework.

Environment: `ISOMORPH_KERNELS` = avx512 | avx512_bf16 | avx2 | neon | portable | none chooses the instruction set or
does without the extension (avx512_bf16 multiplies many rows in bfloat16, the default where that is faster, on AMD);
`ISOMORPH_NUM_THREADS` sets the threads.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib import import_module
from typing import Any

log = logging.getLogger(__name__)


@cache
def find_extension() -> Any:
    """The extension module, or None: said once when it was not built, or when `ISOMORPH_KERNELS=none`."""
    wanted = os.environ.get("ISOMORPH_KERNELS")
    if wanted == "none":
        return None
    try:
        _native = import_module("isomorph.kernels._native")
    except ImportError:
        log.warning(
            "isomorph's CPU kernels are not built, so quantizing and quantized products are many times slower; "
            "install a C++ compiler and reinstall isomorph"
        )
        return None
    if wanted and _native.backend() != wanted:
        log.warning("ISOMORPH_KERNELS=%s is not available here; using %s", wanted, _native.backend())
    return _native
