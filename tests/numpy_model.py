"""A causal toy model in numpy with faults to order, so that the checks themselves are tested without a framework.

Its state is a running mean of embeddings; hidden states and logits are float32 arithmetic, or rounded to bfloat16.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from isomorph.frameworks.model import DecodeState, Model


class NumpyModel(Model):
    """`fault` is one of: None, "noise", "nan", "late", "cache", "mask", "hidden"."""

    framework = "numpy"
    architecture = "toy"
    max_positions = 128
    num_layers = 2
    config = None

    def __init__(self, fault: str | None = None, dtype: str = "float32", vocab_size: int = 50, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.fault, self.dtype, self.vocab_size = fault, dtype, vocab_size
        self.embedding = random.normal(size=(vocab_size, 16))
        self.mixing = random.normal(size=(2, 16, 16)) / 4
        self.head = random.normal(size=(16, vocab_size))

    def _rounded(self, values: np.ndarray) -> np.ndarray:
        if self.dtype == "float64":
            return values
        return values.astype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.float32).astype(np.float64)

    def _hidden(self, ids: np.ndarray, mask: np.ndarray | None) -> list[np.ndarray]:
        mask = np.ones(ids.shape, bool) if mask is None or self.fault == "mask" else mask
        x = self._rounded(self.embedding[ids] * mask[..., None])
        states = [x]
        for index, matrix in enumerate(self.mixing):
            seen = np.maximum(mask.cumsum(axis=1), 1)[..., None]
            x = self._rounded(np.tanh(self._rounded(x.cumsum(axis=1) / seen @ matrix)) + x) * mask[..., None]
            states.append(x + 1e-2 if self.fault == "hidden" and index == 1 else x)
        return states

    def _logits(self, ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
        logits = self._rounded(self._hidden(ids, attention_mask)[-1] @ self.head)
        if self.fault == "noise":
            logits = logits + np.random.default_rng(1).normal(0, 1e-3, logits.shape)
        if self.fault == "nan":
            logits[0, logits.shape[1] // 2, 0] = np.nan
        if self.fault == "late":
            logits[:, 100:] += np.random.default_rng(2).normal(0, 1e-3, logits[:, 100:].shape)
        return logits if self.dtype == "float64" else logits.astype(np.float32)

    def _hidden_states(self, ids: np.ndarray) -> list[np.ndarray]:
        return self._hidden(ids, None)

    def _decode_state(self, batch_size: int, left_padding: np.ndarray | None, max_length: int | None) -> DecodeState:
        return NumpyState(self, batch_size, left_padding)

    def load_decode_state(self, path: Path) -> DecodeState:
        raise NotImplementedError


class NumpyState(DecodeState):
    """Keeps the ids and computes everything anew at each step."""

    def __init__(self, model: NumpyModel, batch_size: int, left_padding: np.ndarray | None) -> None:
        self.model = model
        self.ids = np.zeros((batch_size, 0), np.int64)
        self.padding = np.zeros(batch_size, np.int64) if left_padding is None else left_padding

    @property
    def batch_size(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        return self.ids.shape[1] - self.padding

    def feed(self, ids: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        self.ids = np.concatenate([self.ids, ids], axis=1)
        mask = np.arange(self.ids.shape[1]) >= self.padding[:, None]
        seen = self.ids.copy()
        if self.model.fault == "cache" and ids.shape[1] < self.ids.shape[1]:
            seen[:, 0] = (seen[:, 0] + 1) % self.model.vocab_size
        logits = self.model._logits(seen, mask)[:, -ids.shape[1] :]
        return logits[:, -1:] if last_only else logits

    def reorder(self, rows: object) -> None:
        raise NotImplementedError

    def extend(self, other: object) -> None:
        raise NotImplementedError

    def trim(self, tokens: int) -> None:
        raise NotImplementedError

    def save(self, path: Path) -> None:
        raise NotImplementedError
