"""Perplexity: mean negative log likelihood of a text's tokens, with its standard error and bits per byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from isomorph.errors import InputError
from isomorph.evaluate.metrics import Summary, token_nll
from isomorph.evaluate.protocols import Protocol, Stream, protocol_named, stream_of
from isomorph.evaluate.record import Record, described

if TYPE_CHECKING:
    from isomorph.frameworks.model import Model

#: A normal distribution holds 95 % within so many standard errors.
INTERVAL = 1.959963984540054


def perplexity(
    model: Model,
    text: Any,
    protocol: str = "windowed",
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    advance: Callable[[float], None] = lambda tokens: None,
) -> Record:
    """Perplexity of `text` (a string, or ids [T]) under a protocol; `window`, `stride` and `limit` change its numbers.

    Results: `nll_nats_per_token` and its standard error (tokens taken as independent), `perplexity` with a 95 %
    interval, `bits_per_byte` (None for ids, whose bytes are unknown), `tokens_scored`. `advance` hears of tokens done.
    Raises InputError for bad input, or when a logit is not finite.
    """
    chosen = protocol_named(protocol, window, stride, limit, getattr(model.config, "sequence_len", None))
    stream = stream_of(chosen, model.tokenizer, text)
    losses: list[np.ndarray] = []
    scored_bytes = 0
    for part in chosen.windows(len(stream.ids), model.max_positions):
        targets = stream.targets(part)
        logits = model.logits(stream.fed(part)[None])[0]
        losses.append(token_nll(logits[targets - part.start - 1], stream.ids[targets]))
        scored_bytes += 0 if stream.widths is None else int(stream.widths[targets].sum())
        advance(part.end - part.score_from)
    if not sum(map(len, losses)):
        raise InputError(
            f"expected a text of at least one {chosen.name} window; found none to score; give a longer text"
        )
    loss = Summary.of(np.concatenate(losses))
    if not np.isfinite(loss.mean):
        raise InputError("expected finite logits; found NaN or infinity; run the model in float32 or check its weights")
    low, high = (np.exp(loss.mean + sign * INTERVAL * loss.standard_error) for sign in (-1, 1))
    return Record(
        kind="perplexity",
        model=described(model),
        protocol=protocol_used(chosen, model),
        data=data_used(stream),
        fingerprint=chosen.fingerprint(stream, model.max_positions),
        results={
            "nll_nats_per_token": loss.mean,
            "standard_error_nats_per_token": loss.standard_error,
            "perplexity": float(np.exp(loss.mean)),
            "perplexity_interval_95": [float(low), float(high)],
            "bits_per_byte": loss.mean * loss.tokens / np.log(2) / scored_bytes if scored_bytes else None,
            "tokens_scored": loss.tokens,
            "bytes_scored": scored_bytes or None,
        },
    )


def protocol_used(protocol: Protocol, model: Model) -> dict[str, Any]:
    """The protocol's numbers as they took effect on a model of limited context."""
    window = min(protocol.window, model.max_positions)
    return {**protocol.parameters(), "window": window, "stride": min(protocol.stride, window)}


def data_used(stream: Stream) -> dict[str, Any]:
    """Tokens, bytes and hash of the text; the id between its documents where the protocol puts one there."""
    size = None if stream.widths is None else int(stream.widths.sum())
    separator = {} if stream.separator is None else {"separator_id": stream.separator}
    return {"tokens": len(stream.ids), "bytes": size, "text_sha256": stream.text_sha256, **separator}
