"""What every framework offers: logits, hidden states, a decode state. Everything else is built on these."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isomorph.errors import InputError

if TYPE_CHECKING:
    from isomorph.generate import Generation

Ids = np.ndarray | Sequence[int] | Sequence[Sequence[int]]


class DecodeState(ABC):
    """What decoding remembers of B sequences: the KV cache and anything else an architecture carries along.

    Prefill, a chunk, a re-feed and a single step are all `feed`. `left_padding [B]`, given at creation, says how many
    leading ids of each row of the *first* feed are padding; they are never attended to and take no position.
    """

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """B, the number of rows."""

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Real tokens held by each row, int64 [B]; padding is not counted."""

    @abstractmethod
    def feed(self, ids: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        """Append `ids [B, T]` and return logits, float32 [B, T, V], or [B, 1, V] of the last one when `last_only`.

        Logits at padding positions are unspecified.
        """

    @abstractmethod
    def reorder(self, rows: Sequence[int]) -> None:
        """Row r becomes what row `rows[r]` was: beam search; fewer rows filter, repeated ones duplicate."""

    @abstractmethod
    def extend(self, other: DecodeState) -> None:
        """Append the rows of another state of the same model."""

    @abstractmethod
    def trim(self, tokens: int) -> None:
        """Forget the last `tokens` of every row. Raises InputError when a row holds fewer."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the state to `path`; `Model.load_decode_state` reads it back bit for bit."""


class Model(ABC):
    """One language model in one framework.

    `config` is the architecture's frozen dataclass (the library's own config object for architectures that are not
    ours), `tokenizer` Transformers-style or None, `dtype` the name of the compute dtype, `vocab_size` the number of
    logits, `max_positions` the longest sequence it takes.
    """

    framework: str
    architecture: str
    config: Any
    tokenizer: Any = None
    source: Path | None = None
    dtype: str
    vocab_size: int
    max_positions: int
    num_layers: int

    @abstractmethod
    def _logits(self, ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
        """`ids` int64 [B, T], `attention_mask` bool [B, T] -> float32 [B, T, V]."""

    @abstractmethod
    def _hidden_states(self, ids: np.ndarray) -> list[np.ndarray]:
        """`ids` int64 [B, T] -> L + 1 arrays, float32 [B, T, D]."""

    def _router_logits(self, ids: np.ndarray) -> list[np.ndarray]:
        """`ids` int64 [B, T] -> float32 [B, T, E] for each layer with experts; empty where routers cannot be read."""
        return []

    @abstractmethod
    def _decode_state(self, batch_size: int, left_padding: np.ndarray | None, max_length: int | None) -> DecodeState:
        """A fresh state; arguments are validated."""

    @abstractmethod
    def load_decode_state(self, path: Path) -> DecodeState:
        """Read what `DecodeState.save` wrote."""

    def logits(self, ids: Ids, attention_mask: Any = None) -> np.ndarray:
        """Full forward pass: `ids` [B, T] or [T] (a batch of one) -> float32 [B, T, V].

        `attention_mask` [B, T] marks real tokens with 1; padding may stand at either side. Raises InputError for ids
        outside the vocabulary, an empty prompt or one longer than `max_positions`.
        """
        ids = self.checked_ids(ids)
        mask = None if attention_mask is None else np.asarray(attention_mask)
        if mask is not None:
            if mask.shape != ids.shape:
                raise InputError(f"expected an attention mask of shape {ids.shape}, found {mask.shape}")
            mask = mask.astype(bool)
            if not mask.any(axis=1).all():
                raise InputError(
                    "expected at least one real token in every row of the attention mask, found a row of padding"
                )
            mask = None if mask.all() else mask
        return self._logits(ids, mask)

    def hidden_states(self, ids: Ids) -> list[np.ndarray]:
        """Input of block 0, then each block's output, un-normed: L + 1 arrays, float32 [B, T, D]."""
        return self._hidden_states(self.checked_ids(ids))

    @property
    def experts_per_token(self) -> int:
        """How many experts each router chooses for a token; 0 in a model without experts."""
        return int(getattr(self.config, "num_experts_per_tok", None) or 0)

    def router_logits(self, ids: Ids) -> list[np.ndarray]:
        """What each layer's router says of each expert, float32 [B, T, E]; empty for a model without experts."""
        ids = self.checked_ids(ids)
        return self._router_logits(ids) if self.experts_per_token else []

    def decode_state(
        self, batch_size: int = 1, left_padding: Sequence[int] | None = None, max_length: int | None = None
    ) -> DecodeState:
        """An empty decode state for `batch_size` rows; `max_length` is the most tokens a row will hold."""
        padding = None if left_padding is None else np.asarray(left_padding, dtype=np.int64)
        if padding is not None and padding.shape != (batch_size,):
            raise InputError(f"expected left_padding of shape ({batch_size},), found {padding.shape}")
        return self._decode_state(batch_size, padding, max_length)

    def generate(self, prompt: Any, max_tokens: int = 256, **options: Any) -> Generation | list[Generation]:
        """Continue `prompt`: str, ids [T] or messages -> Generation; ids [B, T] or a list of prompts -> a list.

        Options are those of `isomorph.generate.generate`: temperature, top_p, top_k, min_p, repetition_penalty, seed,
        stop, max_kv_size.
        """
        from isomorph.generate import generate

        return generate(self, prompt, max_tokens=max_tokens, **options)

    def stream(self, prompt: Any, max_tokens: int = 256, **options: Any) -> Iterator[str]:
        """Like `generate` for one prompt, but yields pieces of text as they are known."""
        from isomorph.generate import stream

        return stream(self, prompt, max_tokens=max_tokens, **options)

    def checked_ids(self, ids: Ids) -> np.ndarray:
        """`ids` as int64 [B, T], or InputError in one line."""
        try:
            array = np.asarray(ids)
        except ValueError:
            raise InputError(
                "expected rows of equal length; found ragged ids; pad them and pass attention_mask"
            ) from None
        if array.size == 0:
            raise InputError("expected at least one token; found an empty prompt; give a prompt")
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
            raise InputError(f"expected integer ids [B, T] or [T]; found {array.dtype} of shape {array.shape}")
        array = np.atleast_2d(array).astype(np.int64)
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.vocab_size:
            raise InputError(
                f"expected token ids in 0..{self.vocab_size - 1}; found {low if low < 0 else high}; "
                "use this model's own tokenizer"
            )
        if array.shape[1] > self.max_positions:
            raise InputError(
                f"expected at most {self.max_positions} tokens (max_position_embeddings); found {array.shape[1]}; "
                "shorten the prompt"
            )
        return array
