"""What is measured on logits: the only definition of each number in the package. All arithmetic is in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

#: Float64 copies of logits are made for so many values at a time: 64 MB each.
CHUNK_VALUES = 8_000_000


@dataclass(frozen=True)
class Summary:
    """Per-token values: mean, its standard error (tokens taken as independent), 99th percentile, maximum, count."""

    mean: float
    standard_error: float
    p99: float
    max: float
    tokens: int

    @classmethod
    def of(cls, values: np.ndarray) -> Summary:
        """Summarize `values [N]`; an empty or non-finite array gives NaN everywhere, so that no limit admits it."""
        values = np.asarray(values, dtype=np.float64).ravel()
        if values.size == 0 or not np.isfinite(values).all():
            return cls(float("nan"), float("nan"), float("nan"), float("nan"), int(values.size))
        error = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else 0.0
        return cls(
            float(values.mean()), float(error), float(np.percentile(values, 99)), float(values.max()), int(values.size)
        )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities of `logits [..., V]`, float64."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def token_nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log likelihood in nats, float64 [N], of `targets [N]` under `logits [N, V]`."""
    parts = [
        -np.take_along_axis(log_softmax(logits[rows]), np.asarray(targets[rows])[:, None], axis=-1)[:, 0]
        for rows in _chunks(*logits.shape)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def kl_divergence(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL(P_reference || Q_candidate) in nats per token, float64 [N]: the sum over the vocabulary of `logits [N, V]`.

    Rounding leaves values around 1e-16 that may be negative; they are kept, so that a mean is not biased upwards.
    """
    parts = []
    for rows in _chunks(*reference.shape):
        log_p, log_q = log_softmax(reference[rows]), log_softmax(candidate[rows])
        p = np.exp(log_p)
        # A token the reference rules out (logit -inf) contributes nothing, whatever the candidate says of it.
        with np.errstate(invalid="ignore"):
            parts.append(np.where(p > 0, p * (log_p - log_q), 0.0).sum(axis=-1))
    return np.concatenate(parts) if parts else np.zeros(0)


def top_margin(logits: np.ndarray) -> np.ndarray:
    """Largest minus second largest logit, float64 [...], of `logits [..., V]`."""
    two = np.partition(np.asarray(logits, dtype=np.float64), -2, axis=-1)[..., -2:]
    return two[..., 1] - two[..., 0]


def top_k_overlap(reference: np.ndarray, candidate: np.ndarray, k: int) -> np.ndarray:
    """Share of the reference's `k` most likely tokens that are among the candidate's, float64 [N]."""
    k = min(k, reference.shape[-1])
    if k == reference.shape[-1]:
        return np.ones(reference.shape[0])
    ours = np.argpartition(-reference, k - 1, axis=-1)[:, :k]
    theirs = np.argpartition(-candidate, k - 1, axis=-1)[:, :k]
    return (ours[:, :, None] == theirs[:, None, :]).any(axis=-1).mean(axis=-1)


def rms(values: np.ndarray) -> float:
    """Root mean square of all values, accumulated in float64."""
    flat = np.asarray(values).ravel()
    return float(np.sqrt(np.mean(np.square(flat, dtype=np.float64)))) if flat.size else float("nan")


@dataclass(frozen=True)
class LogitComparison:
    """Logits of a candidate against a reference's at the same positions."""

    max_abs: float
    mean_abs: float
    median_abs: float
    rms: float
    reference_max_abs_logit: float
    top1_agreement: float
    top10_agreement: float
    kl: Summary
    tokens: int

    @property
    def kl_nats_per_token(self) -> float:
        """Mean of KL(P_reference || Q_candidate)."""
        return self.kl.mean


def compare_logits(reference: np.ndarray, candidate: np.ndarray) -> LogitComparison:
    """Compare `[N, V]` with `[N, V]`. Non-finite logits make every figure NaN, so that no limit admits them.

    Raises ValueError when nothing is compared or the shapes differ.
    """
    if reference.shape != candidate.shape or reference.ndim != 2 or reference.size == 0:
        raise ValueError(f"expected two equal non-empty shapes [N, V], found {reference.shape} and {candidate.shape}")
    tokens = int(reference.shape[0])
    if not (np.isfinite(reference).all() and np.isfinite(candidate).all()):
        nan = float("nan")
        return LogitComparison(nan, nan, nan, nan, nan, nan, nan, Summary(nan, nan, nan, nan, tokens), tokens)
    difference = np.abs(reference - candidate)
    return LogitComparison(
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean(dtype=np.float64)),
        median_abs=float(np.median(difference)),
        rms=rms(difference),
        reference_max_abs_logit=float(np.abs(reference).max()),
        top1_agreement=float((reference.argmax(-1) == candidate.argmax(-1)).mean()),
        top10_agreement=float(top_k_overlap(reference, candidate, 10).mean()),
        kl=Summary.of(kl_divergence(reference, candidate)),
        tokens=tokens,
    )


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, CHUNK_VALUES // vocabulary)
    return (slice(start, start + step) for start in range(0, tokens, step))
