"""Run one model over the prompt and keep what it computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from isomorph.frameworks.model import Model


@dataclass(frozen=True)
class Capture:
    """Logits [R*W, V] and hidden states, L + 1 arrays [R*W, D], of a model that computes in `dtype`."""

    dtype: str
    logits: np.ndarray
    hidden: list[np.ndarray]


def capture(model: Model, rows: np.ndarray, advance: Callable[[], None] = lambda: None) -> Capture:
    """Full forward passes over `rows [R, W]`, one row at a time so that memory is bounded by one."""
    logits: list[np.ndarray] = []
    hidden: list[list[np.ndarray]] = []
    for row in rows:
        logits.append(model.logits(row[None])[0])
        hidden.append([state[0] for state in model.hidden_states(row[None])])
        advance()
    return Capture(model.dtype, np.concatenate(logits), [np.concatenate(states) for states in zip(*hidden)])
