"""From one row of logits to the next token: the usual filters, in numpy, so that every framework draws alike.

Order, as in Transformers: repetition penalty, temperature, top-k, top-p, min-p; each filter sees the distribution that
the one before it left, renormalised. Temperature 0 takes the most likely token after the penalty.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isomorph.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults are greedy decoding; `top_k` 0, `top_p` 1 and `min_p` 0 keep everything."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        def check(name: str, fits: bool, expected: str) -> None:
            if not fits:
                raise InputError(f"expected {name} {expected}; found {getattr(self, name)!r}")

        check("temperature", _is_number(self.temperature) and self.temperature >= 0, "at least 0 (0 is greedy)")
        check("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1")
        check("top_k", is_integer(self.top_k) and self.top_k >= 0, "a whole number of tokens, 0 for no limit")
        check("min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, "between 0 and 1")
        penalty = self.repetition_penalty
        check("repetition_penalty", _is_number(penalty) and penalty > 0, "above 0 (1 is none)")
        check("seed", self.seed is None or (is_integer(self.seed) and self.seed >= 0), "a whole number from 0")

    def probabilities(self, logits: np.ndarray, seen: np.ndarray | None = None) -> np.ndarray:
        """The distribution that is drawn from: logits [V] -> float64 [V], summing to 1; `seen` bool [V].

        Temperature 0 gives all the mass to the most likely token, the first of equals.
        """
        scores = self.penalized(logits, seen)
        if self.temperature == 0:
            return np.eye(1, len(scores), int(scores.argmax()))[0]
        # Subtracting first keeps a tiny temperature from overflowing.
        scores = (scores - scores.max()) / self.temperature
        if 0 < self.top_k < len(scores):
            threshold = np.partition(scores, -self.top_k)[-self.top_k]
            scores[scores < threshold] = -np.inf
        weights = np.exp(scores)
        weights /= weights.sum()
        if self.top_p < 1:
            order = np.argsort(-weights, kind="stable")
            before = np.cumsum(weights[order]) - weights[order]
            weights[order[before >= self.top_p]] = 0
            weights /= weights.sum()
        if self.min_p > 0:
            weights[weights < self.min_p * weights.max()] = 0
        return weights / weights.sum()

    def penalized(self, logits: np.ndarray, seen: np.ndarray | None) -> np.ndarray:
        """Logits in float64, those of `seen` tokens pushed down: divided when positive, multiplied when negative."""
        scores = logits.astype(np.float64)
        if self.repetition_penalty != 1 and seen is not None:
            old = scores[seen]
            scores[seen] = np.where(old > 0, old / self.repetition_penalty, old * self.repetition_penalty)
        return scores


class Sampler:
    """Draws the tokens of one row, which began with the ids `prompt`.

    `copy` tells apart rows of one batch that have the same prompt. With a seed, what is drawn depends on the seed, the
    prompt and `copy` alone: a row of a batch gives the tokens it gives alone.
    """

    def __init__(self, sampling: Sampling, prompt: np.ndarray, vocab_size: int, copy: int = 0) -> None:
        self.sampling = sampling
        fingerprint = zlib.crc32(np.ascontiguousarray(prompt, dtype="<i8").tobytes())
        self._random = np.random.default_rng(None if sampling.seed is None else [sampling.seed, fingerprint, copy])
        self._seen: np.ndarray | None = None
        if sampling.repetition_penalty != 1:
            self._seen = np.zeros(vocab_size, dtype=bool)
            self._seen[prompt] = True

    def __call__(self, logits: np.ndarray) -> int:
        """Logits [V] -> the next token. Raises InputError when the logits are not numbers."""
        if np.isnan(logits).any():
            raise InputError(
                "expected finite logits; the model returned NaN; load it with dtype='float32', or check its weights"
            )
        if self.sampling.temperature == 0:
            token = int(self.sampling.penalized(logits, self._seen).argmax())
        else:
            # In vocabulary order, not by size: nearly equal logits that swap in another framework change nothing.
            ladder = np.cumsum(self.sampling.probabilities(logits, self._seen))
            token = int(np.searchsorted(ladder, self._random.random() * ladder[-1], side="right"))
        if self._seen is not None:
            self._seen[token] = True
        return token


def samplers(sampling: Sampling, prompts: Sequence[np.ndarray], vocab_size: int) -> list[Sampler]:
    """One sampler for each prompt of a batch."""
    counts: dict[bytes, int] = {}
    made = []
    for prompt in prompts:
        key = prompt.tobytes()
        made.append(Sampler(sampling, prompt, vocab_size, counts.get(key, 0)))
        counts[key] = counts.get(key, 0) + 1
    return made


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float, np.integer, np.floating))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def is_integer(value: Any) -> bool:
    """Whether `value` is a whole number, and not a truth value."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
