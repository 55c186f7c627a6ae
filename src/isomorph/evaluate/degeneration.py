"""Long greedy runs: does the text end, and where does it begin to repeat itself?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from isomorph.errors import InputError

if TYPE_CHECKING:
    from isomorph.evaluate.record import Record
    from isomorph.frameworks.model import Model

#: A loop is a stretch that repeats at least so often ...
LOOP_REPEATS = 3
#: ... and is at least so many tokens long, so that "ha ha ha" or a row of dashes in a table is not one.
LOOP_TOKENS = 24


@dataclass(frozen=True)
class Loop:
    """Tokens from `start` on repeat with `period`, for `tokens` tokens (the first occurrence counted)."""

    start: int
    period: int
    tokens: int


@dataclass(frozen=True)
class GreedyRun:
    """A greedy continuation: its tokens, why it ended (`stop` or `length`), its first loop."""

    token_ids: list[int]
    finish_reason: str
    loop: Loop | None
    distinct_4grams: float
    finite: bool = True


def first_loop(token_ids: Sequence[int], max_period: int = 128) -> Loop | None:
    """The loop that becomes apparent first: at least LOOP_REPEATS times the same stretch, LOOP_TOKENS tokens in all."""
    ids = np.asarray(token_ids)
    best: Loop | None = None
    for period in range(1, min(max_period, len(ids) // LOOP_REPEATS) + 1):
        repeats = ids[period:] == ids[:-period]
        needed = max((LOOP_REPEATS - 1) * period, LOOP_TOKENS - period)
        # Ends of the runs of `repeats`: where it is False, and one past the last.
        breaks = np.flatnonzero(np.concatenate(([True], ~repeats, [True])))
        lengths = np.diff(breaks) - 1
        long = np.flatnonzero(lengths >= needed)
        if long.size:
            found = Loop(int(breaks[long[0]]), period, int(lengths[long[0]] + period))
            # A loop of period p is also one of 2p; ascending periods and a strict comparison keep the shortest.
            if best is None or found.start < best.start:
                best = found
    return best


def greedy_run(
    model: Model,
    prompt: np.ndarray,
    max_tokens: int,
    stop: Collection[int] = (),
    advance: Callable[[], None] = lambda: None,
) -> GreedyRun:
    """Continue `prompt [T]` greedily for at most `max_tokens` tokens or to a token of `stop` (which is kept).

    Prefill and single steps through the model's decode state. A step with NaN or infinite logits ends the run.
    """
    prompt = np.asarray(prompt, dtype=np.int64)
    state = model.decode_state(1, max_length=len(prompt) + max_tokens)
    tokens: list[int] = []
    feed, reason, finite = prompt[None], "length", True
    while len(tokens) < max_tokens:
        logits = state.feed(feed, last_only=True)[0, -1]
        finite = bool(np.isfinite(logits).all())
        if not finite:
            break
        tokens.append(int(logits.argmax()))
        advance()
        if tokens[-1] in stop:
            reason = "stop"
            break
        feed = np.array([[tokens[-1]]], dtype=np.int64)
    grams = {tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)}
    distinct = len(grams) / max(1, len(tokens) - 3)
    return GreedyRun(tokens, reason, first_loop(tokens), distinct, finite)


def degeneration(
    model: Model, prompt: Any, max_tokens: int = 512, advance: Callable[[float], None] = lambda tokens: None
) -> Record:
    """Continue `prompt` (text, ids [T] or messages) greedily and look for loops.

    Results: `tokens`, `finish_reason` (stop or length), `first_loop` (start, period and tokens, or None),
    `distinct_4grams` (share of 4-grams that are different ones), `text` where there is a tokenizer, `token_ids`. The
    run is cut to the context. Raises InputError for a bad prompt.
    """
    from isomorph.evaluate.record import Record, described
    from isomorph.generate.prompts import read_prompts
    from isomorph.generate.stopping import stop_rules

    rows, batched = read_prompts(model, prompt)
    room = model.max_positions - len(rows[0])
    if batched or max_tokens < 1 or room < 1:
        found = "a batch" if batched else f"max_tokens={max_tokens} after {len(rows[0])} of {model.max_positions}"
        raise InputError(f"expected one prompt and room for at least one token; found {found}")
    run = greedy_run(model, rows[0], min(max_tokens, room), stop_rules(model).ids, lambda: advance(1))
    if not run.finite:
        raise InputError("expected finite logits; found NaN or infinity; run the model in float32 or check its weights")
    return Record(
        kind="degeneration",
        model=described(model),
        protocol={"name": "greedy", "max_tokens": min(max_tokens, room), "loop_tokens": LOOP_TOKENS},
        data={"prompt_tokens": len(rows[0]), "prompt_ids": rows[0]},
        results={
            "tokens": len(run.token_ids),
            "finish_reason": run.finish_reason,
            "first_loop": run.loop,
            "distinct_4grams": run.distinct_4grams,
            "text": model.tokenizer.decode(run.token_ids) if model.tokenizer is not None else None,
            "token_ids": run.token_ids,
        },
    )
