"""The loss of a language model over the targets that count."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def summed_loss(model: Any, ids: jax.Array, counted: jax.Array) -> jax.Array:
    """Cross-entropy in nats, float32, of predicting ids[:, 1:] from ids[:, :-1], summed where `counted` [B, T].

    A model that has a `summed_loss(ids, targets)` of its own, which need not hold all logits, is asked for it; there a
    target that does not count is -1.
    """
    inputs, targets = ids[:, :-1], ids[:, 1:]
    if hasattr(model, "summed_loss"):
        return model.summed_loss(inputs, jnp.where(counted, targets, -1))
    logits = model(inputs).astype(jnp.float32)  # [B, T, V]
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets), where=counted)
