"""Decode state of an MLX model: mlx-lm's own prompt caches, one list entry a layer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from isomorph.errors import InputError
from isomorph.frameworks.model import DecodeState

if TYPE_CHECKING:
    from isomorph.frameworks.mlx import MLXModel

#: Tokens of a prompt that run in one go when only the last logits are wanted; mlx-lm's own default.
PREFILL_STEP = 2048

#: Feeds between two returns of freed buffers to the system, as mlx-lm's generation does.
CLEAR_EVERY = 256


class MLXDecodeState(DecodeState):
    """mlx-lm caches of B rows: those of a single sequence while B is 1 and unpadded, else its batch caches.

    `tokens` are those that each row holds, `padding` [B] counts the leading ids of the next feed that are none. A
    window that has wrapped cannot go back: what stays after `trim` is then read again.
    """

    def __init__(self, model: MLXModel, caches: list[Any], tokens: list[np.ndarray], padding: np.ndarray) -> None:
        self._model = model
        self._caches = caches
        self._tokens = tokens
        self._padding = padding
        self._feeds = 0

    @classmethod
    def empty(cls, model: MLXModel, batch_size: int, left_padding: np.ndarray | None) -> MLXDecodeState:
        """A state without tokens. Raises InputError when mlx-lm has no batch form of this model's cache."""
        padding = np.zeros(batch_size, np.int64) if left_padding is None else left_padding
        rows = [make_prompt_cache(model.module) for _ in range(batch_size)]
        caches = joined(rows) if batch_size > 1 or padding.any() else rows[0]
        if padding.any():
            for cache in leaves(caches):
                if not isinstance(cache, (BatchKVCache, BatchRotatingKVCache)):
                    raise InputError(
                        f"expected prompts of equal length for {model.architecture}; found left padding, which "
                        f"mlx-lm's {type(cache).__name__} does not take; decode the rows one by one"
                    )
                cache.prepare(left_padding=padding.tolist())
        return cls(model, caches, [np.zeros(0, np.int64) for _ in range(batch_size)], padding)

    @classmethod
    def load(cls, model: MLXModel, path: Path) -> MLXDecodeState:
        """Read what `save` wrote. Raises InputError for another file or another model's state."""
        try:
            with TemporaryDirectory() as folder:
                # mlx tells the format by the suffix, and ours is whatever the caller named the file.
                link = Path(folder, "state.safetensors")
                link.symlink_to(path.resolve(strict=True))
                caches, metadata = load_prompt_cache(str(link), return_metadata=True)
                mx.eval([cache.state for cache in caches])
            tokens = [np.array(row, np.int64) for row in json.loads(metadata["tokens"])]
            padding = np.array(json.loads(metadata["padding"]), np.int64)
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"expected a decode state that save wrote; found {path}: {reason}") from None
        if metadata.get("model") != identity(model):
            raise InputError(
                f"expected a decode state of {identity(model)}; found one of {metadata.get('model')} in {path}; "
                "load the model that wrote it"
            )
        for cache in leaves(caches):
            if isinstance(cache, BatchRotatingKVCache):
                cache._lengths = None  # mlx-lm's own restoring forgets it, and the next update reads it
        return cls(model, caches, tokens, padding)

    @property
    def batch_size(self) -> int:
        return len(self._tokens)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self._tokens], np.int64)

    def feed(self, ids: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        tokens = np.asarray(ids)
        if tokens.ndim != 2 or tokens.shape[0] != self.batch_size or tokens.shape[1] == 0:
            raise InputError(f"expected ids [{self.batch_size}, T] with T > 0; found shape {tokens.shape}")
        filler = np.arange(tokens.shape[1]) < self._padding[:, None]  # [B, T]
        tokens = self._model.checked_ids(np.where(filler, 0, tokens))
        longest = int((self.lengths + (~filler).sum(axis=1)).max())
        if longest > self._model.max_positions:
            raise InputError(
                f"expected at most {self._model.max_positions} tokens (max_position_embeddings); found {longest}; "
                "shorten the prompt or generate fewer tokens"
            )
        unread = tokens.shape[1] - 1 if last_only else 0
        with mx.stream(self._model.device):
            self._prefill(self._caches, tokens[:, :unread])
            logits = self._model.to_numpy(self._model.module(mlx_ids(tokens[:, unread:]), cache=self._caches))
        self._tokens = [np.append(row, new[skip:]) for row, new, skip in zip(self._tokens, tokens, self._padding)]
        self._padding = np.maximum(self._padding - tokens.shape[1], 0)
        self._feeds += 1
        if tokens.shape[1] > 1 or self._feeds % CLEAR_EVERY == 0:
            mx.clear_cache()
        return logits

    def _prefill(self, caches: list[Any], tokens: np.ndarray) -> None:
        """Let `caches` take in `tokens` [B, T]; logits are never computed, since evaluating caches leaves them out."""
        for start in range(0, tokens.shape[1], PREFILL_STEP):
            self._model.module(mlx_ids(tokens[:, start : start + PREFILL_STEP]), cache=caches)
            mx.eval([cache.state for cache in caches])

    def reorder(self, rows: Sequence[int]) -> None:
        chosen = [int(row) for row in rows]
        if not chosen or not all(0 <= row < self.batch_size for row in chosen):
            raise InputError(f"expected rows in 0..{self.batch_size - 1}; found {chosen}")
        if chosen == list(range(self.batch_size)):
            return
        with mx.stream(self._model.device):
            self._to_batch()
            for cache in self._caches:
                cache.filter(chosen)
            mx.eval([cache.state for cache in self._caches])
        self._tokens, self._padding = [self._tokens[row] for row in chosen], self._padding[chosen]

    def extend(self, other: DecodeState) -> None:
        if not isinstance(other, MLXDecodeState) or other._model is not self._model:
            raise InputError("expected a decode state of the same model; found another one")
        if self._padding.any() or other._padding.any():
            raise InputError("expected states that have been fed; found one whose left padding is still to come")
        with mx.stream(self._model.device):
            self._to_batch()
            for cache, more in zip(self._caches, other._caches if other._is_batch() else joined([other._caches])):
                cache.extend(more)
            mx.eval([cache.state for cache in self._caches])
        self._tokens, self._padding = self._tokens + other._tokens, np.append(self._padding, other._padding)

    def trim(self, tokens: int) -> None:
        lengths = self.lengths - tokens
        if tokens < 0 or lengths.min() < 0:
            raise InputError(f"expected to trim 0..{self.lengths.min()} tokens; found {tokens}")
        if tokens == 0:
            return
        self._tokens = [row[:length] for row, length in zip(self._tokens, lengths)]
        if can_trim_prompt_cache(self._caches):
            trim_prompt_cache(self._caches, int(tokens))
            return
        rows = [make_prompt_cache(self._model.module) for _ in self._tokens]
        with mx.stream(self._model.device):
            for caches, row in zip(rows, self._tokens):
                self._prefill(caches, row[None])
            self._caches = joined(rows) if self._is_batch() else rows[0]

    def save(self, path: Path) -> None:
        path = Path(path)
        # mlx insists on the suffix; a file that bears the final name is complete.
        partial = path.with_name(f".{path.name}.{os.getpid()}.safetensors")
        metadata = {
            "model": identity(self._model),
            "tokens": json.dumps([row.tolist() for row in self._tokens]),
            "padding": json.dumps(self._padding.tolist()),
        }
        try:
            save_prompt_cache(str(partial), self._caches, metadata)
            partial.replace(path)
        except (OSError, RuntimeError, ValueError) as error:
            partial.unlink(missing_ok=True)
            raise InputError(f"expected to write a decode state to {path}; found: {error}") from None

    def _is_batch(self) -> bool:
        return all(hasattr(cache, "filter") for cache in leaves(self._caches))

    def _to_batch(self) -> None:
        if not self._is_batch():
            self._caches = joined([self._caches])


def mlx_ids(tokens: np.ndarray) -> mx.array:
    return mx.array(tokens.astype(np.int32))


def leaves(caches: Sequence[Any]) -> Iterator[Any]:
    """The caches themselves, where a layer has a list of them."""
    for cache in caches:
        yield from leaves(cache.caches) if isinstance(cache, CacheList) else (cache,)


def joined(rows: Sequence[list[Any]]) -> list[Any]:
    """The batch form of the caches of single sequences. Raises InputError when mlx-lm has none."""
    for cache in leaves(rows[0]):
        if not hasattr(cache, "merge"):
            raise InputError(
                f"expected a model whose sequences can be batched; found mlx-lm's {type(cache).__name__}; "
                "decode the rows one by one"
            )
    return [layer[0].merge(list(layer)) for layer in zip(*rows)]


def identity(model: MLXModel) -> str:
    """What two models must share for a state of one to fit the other."""
    return f"{model.architecture} of {model.num_layers} layers, vocabulary {model.vocab_size}, {model.dtype}"
