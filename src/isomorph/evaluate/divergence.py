"""Divergence: how far a candidate's next-token distribution is from a reference's, token by token of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from isomorph.errors import InputError
from isomorph.evaluate.metrics import Summary, kl_divergence, token_nll, top_k_overlap
from isomorph.evaluate.perplexity import data_used, protocol_used
from isomorph.evaluate.protocols import protocol_named, stream_of
from isomorph.evaluate.record import Record, described

if TYPE_CHECKING:
    from isomorph.frameworks.model import Model


def divergence(
    reference: Model,
    model: Model,
    text: Any,
    protocol: str = "windowed",
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    advance: Callable[[float], None] = lambda tokens: None,
) -> Record:
    """KL(P_reference || Q_model) and agreement at every scored token of `text`, which the reference's tokenizer reads.

    Results: `kl_nats_per_token` (mean), its standard error, p99 and maximum; `top1_agreement` and `top10_agreement`;
    `nll_difference_nats_per_token` (model minus reference, paired by token) with its standard error. Raises InputError.
    """
    if reference.vocab_size != model.vocab_size:
        raise InputError(
            f"expected two models of one vocabulary; found {reference.vocab_size} and {model.vocab_size} tokens; "
            "compare models that share a tokenizer"
        )
    chosen = protocol_named(protocol, window, stride, limit, getattr(reference.config, "sequence_len", None))
    stream = stream_of(chosen, reference.tokenizer or model.tokenizer, text)
    context = min(reference.max_positions, model.max_positions)
    columns: list[np.ndarray] = []
    for part in chosen.windows(len(stream.ids), context):
        targets, fed = stream.targets(part), stream.fed(part)[None]
        theirs, ours = (side.logits(fed)[0][targets - part.start - 1] for side in (reference, model))
        difference = token_nll(ours, stream.ids[targets]) - token_nll(theirs, stream.ids[targets])
        same = (theirs.argmax(-1) == ours.argmax(-1)).astype(np.float64)
        columns.append(np.stack([kl_divergence(theirs, ours), difference, same, top_k_overlap(theirs, ours, 10)]))
        advance(part.end - part.score_from)
    if not sum(column.shape[1] for column in columns):
        raise InputError(
            f"expected a text of at least one {chosen.name} window; found none to score; give a longer text"
        )
    kl, difference, top1, top10 = np.concatenate(columns, axis=1)
    summary, paired = Summary.of(kl), Summary.of(difference)
    if not np.isfinite(summary.mean):
        raise InputError("expected finite logits; found NaN or infinity; run the models in float32 or check weights")
    return Record(
        kind="divergence",
        model=described(model),
        reference=described(reference),
        protocol=protocol_used(chosen, model if model.max_positions == context else reference),
        data=data_used(stream),
        fingerprint=chosen.fingerprint(stream, context),
        results={
            "kl_nats_per_token": summary.mean,
            "kl": asdict(summary),
            "top1_agreement": float(top1.mean()),
            "top10_agreement": float(top10.mean()),
            "nll_difference_nats_per_token": paired.mean,
            "nll_difference_standard_error": paired.standard_error,
            "tokens_scored": summary.tokens,
        },
    )
