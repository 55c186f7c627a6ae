"""What a quantized array consists of, and what was measured while it was made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

#: The loss is measured on one block in so many.
LOSS_STRIDE = 8


class Packed(NamedTuple):
    """A quantized array [..., K]: uint32 words [..., K * bits / 32], scales and biases [..., K / group_size].

    affine: scales and biases have the dtype of the weights. mxfp4, mxfp8, nvfp4: uint8 scales, no biases.
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None


@dataclass
class Loss:
    """Squared error and squared signal of quantized values, summed over the blocks that were measured."""

    error: float = 0.0
    signal: float = 0.0

    def add(self, squares: np.ndarray) -> None:
        """Add pairs [S, 2] of error and signal, in the order of the data: the sum does not depend on the threads."""
        self.error += math.fsum(squares[:, 0])
        self.signal += math.fsum(squares[:, 1])

    @property
    def relative_rms(self) -> float:
        """Root of the mean squared error over that of the mean squared weight; 0 when every weight is 0."""
        return math.sqrt(self.error / self.signal) if self.signal else 0.0
