"""AdamW on a warm-up-cosine schedule."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import optax


def warmup_cosine(peak: float, steps: int, warmup_steps: int, final_fraction: float) -> optax.Schedule:
    """Learning rate of a step: linear from 0 to `peak`, then half a cosine down to `final_fraction * peak`."""
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup_steps, max(steps, warmup_steps + 1), final_fraction * peak
    )


def adamw(
    schedule: optax.Schedule, beta1: float, beta2: float, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """AdamW after clipping the gradients' global norm. Only matrices decay: a gain has no reason to go to zero."""

    def matrices(parameters: Mapping[str, jax.Array]) -> dict[str, bool]:
        return {name: value.ndim >= 2 for name, value in parameters.items()}

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, b1=beta1, b2=beta2, weight_decay=weight_decay, mask=matrices),
    )
