"""Greedy decoding of both models, token for token, and what a long run looks like."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from isomorph.evaluate.degeneration import Loop, first_loop
from isomorph.evaluate.metrics import top_margin
from isomorph.verify.certificate import FAIL, PASS, WARN, Check

if TYPE_CHECKING:
    from isomorph.frameworks.model import Model

#: Tokens of the prompt that a greedy run continues, and how far it goes.
PROMPT_TOKENS = 64
RUN_TOKENS = 256


@dataclass(frozen=True)
class GreedyTokens:
    """A greedy run that does not stop at an end of text, with the margin of the most likely token at every step."""

    token_ids: list[int]
    margins: list[float]
    finite: bool


@dataclass(frozen=True)
class RunShape:
    """What a reader would see of a run: tokens before the first stop token, whether it came, the first loop."""

    tokens: int
    ended: bool
    loop: Loop | None


def greedy_tokens(model: Model, prompt: np.ndarray, count: int, max_length: int | None = None) -> GreedyTokens:
    """`count` greedy tokens after `prompt [T]`, prefill and single steps through the decode state.

    `max_length` is the room of the decode state, at least T + count.
    """
    state = model.decode_state(1, max_length=max_length or len(prompt) + count)
    ids: list[int] = []
    margins: list[float] = []
    feed = np.asarray(prompt, dtype=np.int64)[None]
    for _ in range(count):
        logits = state.feed(feed)[0, -1]
        if not np.isfinite(logits).all():
            return GreedyTokens(ids, margins, False)
        ids.append(int(logits.argmax()))
        margins.append(float(top_margin(logits)))
        feed = np.array([[ids[-1]]], dtype=np.int64)
    return GreedyTokens(ids, margins, True)


def greedy_check(reference: GreedyTokens, candidate: GreedyTokens, dtype: str, noise: float) -> Check:
    """Token for token: exact in float32, else a first difference only where the margin is below `noise`.

    `noise` is the largest error of a logit of the reference in this dtype.
    """
    name = f"greedy tokens, {dtype}"
    if not candidate.token_ids or not reference.token_ids:
        return Check(name, FAIL, 0, detail="no token was generated")
    differs = [a != b for a, b in zip(reference.token_ids, candidate.token_ids)]
    total = len(reference.token_ids)
    if True not in differs and len(candidate.token_ids) == total:
        return Check(name, PASS, f"{total} of {total} equal", limit_reason="token for token")
    first = differs.index(True) if True in differs else len(candidate.token_ids)
    margin = reference.margins[first]
    rule = "token for token in float32" if dtype == "float32" else "a margin below the noise of a logit may flip"
    near_tie = dtype != "float32" and True in differs and margin < noise
    detail = f"first difference at token {first}, where the margin is {margin:.3g}"
    return Check(name, PASS if near_tie else FAIL, f"{first} of {total} equal", f"margin {noise:.3g}", rule, detail)


def run_shape(token_ids: list[int], stop: Collection[int]) -> RunShape:
    """Length up to the first of the `stop` ids, and the first loop before it."""
    end = next((i for i, token in enumerate(token_ids) if token in stop), None)
    shown = token_ids[:end] if end is not None else token_ids
    return RunShape(len(shown), end is not None, first_loop(shown))


def long_run_check(reference: RunShape, candidate: RunShape) -> Check:
    """Warns when the candidate loops and the reference does not, or loops in half the tokens."""
    worse = candidate.loop is not None and (reference.loop is None or candidate.loop.start < reference.loop.start // 2)
    return Check(
        "long greedy run",
        WARN if worse else PASS,
        _describe(candidate),
        _describe(reference),
        "what the reference's run looks like",
    )


def _describe(run: RunShape) -> str:
    loop = f"loops from token {run.loop.start} (period {run.loop.period})" if run.loop else "no loop"
    return f"{run.tokens} tokens, {'ends' if run.ended else 'no end'}, {loop}"
