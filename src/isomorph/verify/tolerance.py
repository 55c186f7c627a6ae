"""Limits, each with the reason it has that value. Nothing in `verify` compares with a number from elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np

#: Half the distance from 1 to the next number, per dtype: the largest relative error of one rounding.
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

#: The precision that counts as exact when rounding noise of a dtype is measured.
ONE_UP = {"float32": "float64", "float16": "float32", "bfloat16": "float32"}

#: Two independent runs in one dtype differ by sqrt(2) of either one's error; twice the reference's own error is what
#: arithmetic with one bit less would give. A port may lose up to that bit (another order of summation, another exp).
MAX_NOISE_RATIO = 2.0
#: What a hand-made MLX port of Talkie reported over all positions, near ties included.
CLEAR_TOP1, CLEAR_REASON = 0.989, "the published port's report over 94 tokens (ml-explore/mlx-lm #1231)"
NOISE_REASON = "at most one bit worse than the reference's own rounding in this dtype"
RULE_REASON = "2e-5 * max(1, max|logit| / 10), the rounding noise of float32 forward passes"


def allowed_logit_difference(reference: Any, dtype: str = "float32") -> float:
    """The most two independent runs may differ: 2e-5 * max(1, max|reference| / 10) in float32.

    Other dtypes scale it by their unit roundoff. `reference` are logits of any shape; not a number gives not a number.
    """
    largest = float(np.max(np.abs(np.asarray(reference, dtype=np.float64))))
    return 2e-5 * float(np.maximum(1.0, largest / 10)) * UNIT_ROUNDOFF[dtype] / UNIT_ROUNDOFF["float32"]


def least_noise(values: Any, dtype: str, summed: int = 0) -> float:
    """RMS error that `values` computed in `dtype` may have whatever the implementation; a noise floor is no lower.

    Storing them: u * rms / sqrt(3), errors uniform within half a spacing. Before that, sums of `summed` terms taken one
    after another in float32: K errors of that kind, each of a partial sum, which add up to u * sqrt(K / 6) of the
    result. A reference that sums in a tree does better, which obliges nobody.
    """
    size = float(np.sqrt(np.mean(np.square(np.asarray(values, dtype=np.float64)))))
    return size * (UNIT_ROUNDOFF[dtype] ** 2 / 3 + UNIT_ROUNDOFF["float32"] ** 2 * summed / 6) ** 0.5
