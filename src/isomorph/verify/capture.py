"""Run one model over the prompt and keep what it computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from isomorph.frameworks.model import Model


@dataclass(frozen=True)
class Capture:
    """Logits [R*W, V] and hidden states, L + 1 arrays [R*W, D], of a model that computes in `dtype`.

    `routing` holds the router logits [R*W, E] of each layer with experts, of which a token takes `experts_per_token`.
    """

    dtype: str
    logits: np.ndarray
    hidden: list[np.ndarray]
    routing: list[np.ndarray] = field(default_factory=list)
    experts_per_token: int = 0


def capture(model: Model, rows: np.ndarray, advance: Callable[[], None] = lambda: None) -> Capture:
    """Full forward passes over `rows [R, W]`, one row at a time so that memory is bounded by one."""
    logits: list[np.ndarray] = []
    hidden: list[list[np.ndarray]] = []
    routing: list[list[np.ndarray]] = []
    for row in rows:
        logits.append(model.logits(row[None])[0])
        hidden.append([state[0] for state in model.hidden_states(row[None])])
        routing.append([router[0] for router in model.router_logits(row[None])])
        advance()
    hidden_states, routers = ([np.concatenate(parts) for parts in zip(*lists)] for lists in (hidden, routing))
    return Capture(model.dtype, np.concatenate(logits), hidden_states, routers, model.experts_per_token)
