"""Decode state of an MLX model: mlx-lm's own prompt caches, one list entry a layer."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
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
    """mlx-lm caches of B rows: those of a single sequence while B is 1 and unpadded, else its batch caches."""

    def __init__(self, model: MLXModel, caches: list[Any], lengths: np.ndarray) -> None:
        """`lengths` int64 [B]: tokens held by each row; below zero while left padding is still to come."""
        self._model = model
        self._caches = caches
        self._lengths = lengths
        self._feeds = 0

    @classmethod
    def empty(cls, model: MLXModel, batch_size: int, left_padding: np.ndarray | None) -> MLXDecodeState:
        """A state without tokens. Raises InputError when mlx-lm has no batch form of this model's cache."""
        padding = np.zeros(batch_size, np.int64) if left_padding is None else left_padding
        state = cls(model, make_prompt_cache(model.module), -padding)
        if batch_size > 1 or padding.any():
            rows = [make_prompt_cache(model.module) for _ in range(batch_size)]
            state._caches = [merged(layer) for layer in zip(*rows)]
            if padding.any():
                for cache in state._caches:
                    if not isinstance(cache, (BatchKVCache, BatchRotatingKVCache)):
                        raise InputError(
                            f"expected prompts of equal length for {model.architecture}; found left padding, which "
                            f"mlx-lm's {type(cache).__name__} does not take; decode the rows one by one"
                        )
                    cache.prepare(left_padding=padding.tolist())
        return state

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
            lengths = np.array(json.loads(metadata["lengths"]), dtype=np.int64)
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"expected a decode state that save wrote; found {path}: {reason}") from None
        if metadata.get("model") != identity(model):
            raise InputError(
                f"expected a decode state of {identity(model)}; found one of {metadata.get('model')} in {path}; "
                "load the model that wrote it"
            )
        for cache in caches:
            if isinstance(cache, BatchRotatingKVCache):
                cache._lengths = None  # mlx-lm's own restoring forgets it, and the next update reads it
        return cls(model, caches, lengths)

    @property
    def batch_size(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> np.ndarray:
        return np.maximum(self._lengths, 0)

    def feed(self, ids: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        tokens = np.asarray(ids)
        if tokens.ndim != 2 or tokens.shape[0] != self.batch_size or tokens.shape[1] == 0:
            raise InputError(f"expected ids [{self.batch_size}, T] with T > 0; found shape {tokens.shape}")
        padding = np.arange(tokens.shape[1]) < -self._lengths[:, None]  # [B, T]
        tokens = self._model.checked_ids(np.where(padding, 0, tokens))
        longest = int(self._lengths.max()) + tokens.shape[1]
        if longest > self._model.max_positions:
            raise InputError(
                f"expected at most {self._model.max_positions} tokens (max_position_embeddings); found {longest}; "
                "shorten the prompt or generate fewer tokens"
            )
        with mx.stream(self._model.device):
            inputs = mx.array(tokens.astype(np.int32))
            done = 0
            while last_only and inputs.shape[1] - done > 1:
                # Logits that nobody reads are never computed: evaluating the caches leaves the head out.
                step = min(PREFILL_STEP, inputs.shape[1] - 1 - done)
                self._model.module(inputs[:, done : done + step], cache=self._caches)
                mx.eval([cache.state for cache in self._caches])
                done += step
            logits = self._model.to_numpy(self._model.module(inputs[:, done:], cache=self._caches))
        self._lengths = self._lengths + tokens.shape[1]
        self._feeds += 1
        if tokens.shape[1] > 1 or self._feeds % CLEAR_EVERY == 0:
            mx.clear_cache()
        return logits

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
        self._lengths = self._lengths[chosen]

    def extend(self, other: DecodeState) -> None:
        if not isinstance(other, MLXDecodeState) or other._model is not self._model:
            raise InputError("expected a decode state of the same model; found another one")
        if (self._lengths < 0).any() or (other._lengths < 0).any():
            raise InputError("expected states that have been fed; found one whose left padding is still to come")
        with mx.stream(self._model.device):
            self._to_batch()
            addition = [merged([cache]) for cache in other._caches] if not other._is_batch() else other._caches
            for cache, more in zip(self._caches, addition):
                cache.extend(more)
            mx.eval([cache.state for cache in self._caches])
        self._lengths = np.concatenate([self._lengths, other._lengths])

    def trim(self, tokens: int) -> None:
        if not 0 <= tokens <= self._lengths.min():
            raise InputError(f"expected to trim 0..{self.lengths.min()} tokens; found {tokens}")
        if not can_trim_prompt_cache(self._caches):
            raise InputError(
                f"expected a cache that can be trimmed; found that {self._model.architecture}'s has overwritten "
                "its oldest tokens; start again from the prompt"
            )
        trim_prompt_cache(self._caches, int(tokens))
        self._lengths = self._lengths - tokens

    def save(self, path: Path) -> None:
        path = Path(path)
        # mlx insists on the suffix; a file that bears the final name is complete.
        partial = path.with_name(f".{path.name}.{os.getpid()}.safetensors")
        metadata = {"model": identity(self._model), "lengths": json.dumps(self._lengths.tolist())}
        try:
            save_prompt_cache(str(partial), self._caches, metadata)
            partial.replace(path)
        except (OSError, RuntimeError, ValueError) as error:
            partial.unlink(missing_ok=True)
            raise InputError(f"expected to write a decode state to {path}; found: {error}") from None

    def _is_batch(self) -> bool:
        return all(hasattr(cache, "filter") for cache in self._caches)

    def _to_batch(self) -> None:
        if not self._is_batch():
            self._caches = [merged([cache]) for cache in self._caches]


def merged(caches: Sequence[Any]) -> Any:
    """The batch form of one layer's single-sequence caches. Raises InputError when mlx-lm has none."""
    if not hasattr(caches[0], "merge"):
        raise InputError(
            f"expected a model whose sequences can be batched; found mlx-lm's {type(caches[0]).__name__}; "
            "decode the rows one by one"
        )
    return caches[0].merge(list(caches))


def identity(model: MLXModel) -> str:
    """What two models must share for a state of one to fit the other."""
    return f"{model.architecture} of {model.num_layers} layers, vocabulary {model.vocab_size}, {model.dtype}"
