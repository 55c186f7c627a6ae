"""Mixtures of experts: do both models send each token to the same experts, and how near was the choice?

A router's choice is discrete. Where the last chosen and the first rejected expert are closer than rounding, two right
models may choose differently, and everything after that differs; where they are not, it is a fault.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isomorph.verify.capture import Capture
from isomorph.verify.certificate import FAIL, PASS, SKIP, Check
from isomorph.verify.tolerance import MAX_NOISE_RATIO, RULE_REASON, allowed_logit_difference


@dataclass(frozen=True)
class Routing:
    """One layer's router over N tokens, candidate against its judge.

    `agreement` is the share of tokens sent to the same experts. `margin` is the judge's router logit of the last chosen
    expert less that of the first rejected one: its minimum and median. `widest_flip` is the largest margin of a token
    that was sent elsewhere, 0 where none was; `allowed` is the margin that rounding may overcome.
    """

    layer: int
    agreement: float
    smallest_margin: float
    median_margin: float
    max_abs: float
    widest_flip: float
    allowed: float


def compare_routing(candidate: Capture, judge: Capture, exact: Capture | None) -> list[Routing]:
    """Every layer with experts; none where a framework does not tell its routers. Raises ValueError when they differ.

    Two logits move towards each other by at most the error of each. That is what the numeric rule allows, or, where the
    judge also ran one precision up (`exact`) and errs by more itself, its own largest error times MAX_NOISE_RATIO.
    """
    if not candidate.routing or not judge.routing:
        return []
    shapes = [[logits.shape for logits in run.routing] for run in (candidate, judge)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"expected routers of shapes {shapes[1]}, found {shapes[0]}")
    found = []
    for layer, (ours, theirs) in enumerate(zip(candidate.routing, judge.routing)):
        margin = margins(theirs, judge.experts_per_token)
        same = (chosen(ours, judge.experts_per_token) == chosen(theirs, judge.experts_per_token)).all(axis=1)
        error = allowed_logit_difference(theirs, candidate.dtype)
        if exact is not None and exact.routing:
            error = max(error, MAX_NOISE_RATIO * float(np.abs(theirs - exact.routing[layer]).max()))
        found.append(
            Routing(
                layer,
                agreement=float(same.mean()),
                smallest_margin=float(margin.min()),
                median_margin=float(np.median(margin)),
                max_abs=float(np.abs(ours.astype(np.float64) - theirs).max()),
                widest_flip=float(margin[~same].max(initial=0.0)),
                allowed=2 * error,
            )
        )
    return found


def chosen(logits: np.ndarray, experts: int) -> np.ndarray:
    """The experts of the largest logits [N, E], as booleans [N, E]."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    mask = np.zeros(logits.shape, bool)
    np.put_along_axis(mask, order[:, :experts], True, axis=-1)
    return mask


def margins(logits: np.ndarray, experts: int) -> np.ndarray:
    """How much less the first rejected expert has than the last chosen one, [N]; infinite where none is rejected."""
    if experts >= logits.shape[-1]:
        return np.full(len(logits), np.inf)
    ordered = -np.sort(-logits.astype(np.float64), axis=-1)
    return ordered[:, experts - 1] - ordered[:, experts]


def routing_check(routing: list[Routing], dtype: str) -> Check:
    """Passes when every token that goes elsewhere had a margin within rounding; not a number never does."""
    if not routing:
        return Check(f"routing, {dtype}", SKIP, detail="a framework does not tell what its routers say")
    worst = max(routing, key=lambda layer: layer.widest_flip / layer.allowed)
    passed = all(layer.widest_flip <= layer.allowed and np.isfinite(layer.max_abs) for layer in routing)
    agreement = float(np.mean([layer.agreement for layer in routing]))
    first = next((layer.layer for layer in routing if not layer.widest_flip <= layer.allowed), None)
    where = "" if first is None else f"; first beyond it: layer {first}"
    smallest = min(layer.smallest_margin for layer in routing)
    return Check(
        f"routing, {dtype}: margin of tokens sent to other experts",
        PASS if passed else FAIL,
        worst.widest_flip,
        worst.allowed,
        f"two router logits, each off by its noise: {RULE_REASON}, or the reference's own error",
        f"agreement {agreement:.4%}, smallest margin {smallest:.2g}{where}",
    )
