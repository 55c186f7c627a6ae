"""Talkie in Flax in float16, whose attention XLA cannot sum in float32 on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import isomorph
from tiny import tiny_config, write_checkpoint


def test_errs_no_more_than_torch(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "half", tiny_config(dtype="float16", torch_dtype="float16"))
    ids = np.arange(40)[None] * 7 % 90
    exact = isomorph.load(folder, dtype="float32").logits(ids)
    ours, theirs, coarse = (
        np.sqrt(np.mean((isomorph.load(folder, framework, dtype=dtype).logits(ids) - exact) ** 2))
        for framework, dtype in (("flax", "float16"), ("torch", "float16"), ("torch", "bfloat16"))
    )
    assert ours <= 2 * theirs
    # Control: arithmetic with three bits less is told apart.
    assert coarse > 2 * theirs
