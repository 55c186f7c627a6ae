"""The noise floor: an error is measured in units of the error that the reference's own rounding makes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isomorph.evaluate.metrics import rms
from isomorph.verify.tolerance import MAX_NOISE_RATIO, least_noise


@dataclass(frozen=True)
class Noise:
    """RMS errors over all positions and over the worst one, for `[N, D]` values, and their ratios to the floor."""

    error: float
    floor: float
    worst_error: float
    worst_floor: float

    @property
    def ratio(self) -> float:
        """The ratio over all positions, or half of that of the worst ones, where one wrong position cannot hide.

        Half, because a maximum is a single draw from a long tail: right runs differ more there (decision 6).
        """
        return max(_ratio(self.error, self.floor), _ratio(self.worst_error, self.worst_floor) / 2)

    @property
    def too_large(self) -> bool:
        """Beyond MAX_NOISE_RATIO; not a number always is."""
        return not self.ratio <= MAX_NOISE_RATIO


def measure_noise(
    candidate: np.ndarray, reference: np.ndarray, exact: np.ndarray, dtype: str, summed: int = 0
) -> Noise:
    """Errors of `candidate` and `reference`, both computed in `dtype`, against `exact`; all `[N, D]`.

    The floor is the reference's error, but not below `least_noise`, whose largest of N positions is sqrt(2 ln N) times
    its RMS (errors taken as normal).
    """
    exact = np.asarray(exact, dtype=np.float64)
    ours, theirs = _by_position(candidate - exact), _by_position(reference - exact)
    least = least_noise(exact, dtype, summed)
    tail = max(1.0, 2 * np.log(len(exact))) ** 0.5
    return Noise(rms(ours), max(rms(theirs), least), float(ours.max()), max(float(theirs.max()), least * tail))


def _by_position(error: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(error), axis=-1))


def _ratio(error: float, floor: float) -> float:
    # Values that are all zero have no rounding noise: an error of zero is then right and any other infinitely wrong.
    if floor == 0:
        return 0.0 if error == 0 else float("inf")
    return error / floor if np.isfinite(error) else float("nan")
