"""The decode state of a torch model: what its cache holds, and which slots of it are whose tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from isomorph.errors import InputError
from isomorph.frameworks.model import DecodeState
from isomorph.frameworks.torch_cache import Pair, SlotCache

if TYPE_CHECKING:
    from isomorph.frameworks.torch import TorchModel

FORMAT = "isomorph-decode-state-torch-2"


class TorchDecodeState(DecodeState):
    """B rows, aligned at their newest token: slots `starts[b]` to `cache.filled` hold the tokens of row b.

    `tokens` [B, S] stand in their slots, padding among them; `padding` [B] counts the meaningless ids that the next
    feed starts with. Layers with a window keep little more than it; when `trim` goes back further, what stays is read
    again.
    """

    def __init__(self, model: TorchModel, padding: np.ndarray, room: int | None = None) -> None:
        self.model = model
        self.padding = padding
        self.room = room
        self._clear()

    def _clear(self) -> None:
        self.cache = SlotCache(self.model.windows, self.room)
        self.tokens = np.zeros((self.batch_size, 0), np.int64)
        self.starts = np.zeros(self.batch_size, np.int64)

    @property
    def batch_size(self) -> int:
        return len(self.padding)

    @property
    def lengths(self) -> np.ndarray:
        return self.cache.filled - self.starts

    def feed(self, ids: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        ids = np.array(ids, dtype=np.int64)
        if ids.ndim != 2 or ids.shape[0] != self.batch_size:
            raise InputError(f"expected ids of {self.batch_size} rows; found shape {ids.shape}")
        if self.padding.min() < 0 or self.padding.max() >= max(1, ids.shape[1]):
            raise InputError(f"expected left_padding in 0..{ids.shape[1] - 1}; found {self.padding.tolist()}")
        real = np.arange(ids.shape[1]) >= self.padding[:, None]  # [B, T]
        ids = self.model.checked_ids(np.where(real, ids, 0))
        longest = int((self.lengths - self.padding).max()) + ids.shape[1]
        if longest > self.model.max_positions:
            raise InputError(
                f"expected at most {self.model.max_positions} tokens (max_position_embeddings); found {longest}; "
                "shorten the prompt or generate fewer tokens"
            )
        return self._run(ids, last_only)

    def _run(self, ids: np.ndarray, last_only: bool) -> np.ndarray:
        """`feed` of ids that were checked."""
        logits = self.model.steps(self.cache, self.starts, ids) if ids.shape[1] == 1 else None
        if logits is not None:
            self.cache.advance()
        else:
            self.cache.settle()
            self.starts = self.starts + self.padding
            self.padding = np.zeros_like(self.padding)
            slots = np.arange(self.cache.filled + ids.shape[1])
            # Without padding no mask is needed, and attention takes its fastest form.
            padded = self.starts.any()
            mask = torch.from_numpy(slots >= self.starts[:, None]).to(self.model.device) if padded else None
            logits = self.model.forward(ids, mask, self.cache, last_only)
        self.tokens = np.concatenate([self.tokens, ids], axis=1)
        return logits

    @torch.inference_mode()
    def reorder(self, rows: Sequence[int]) -> None:
        chosen = np.asarray(rows, dtype=np.int64)
        if chosen.ndim != 1 or not chosen.size or chosen.min() < 0 or chosen.max() >= self.batch_size:
            raise InputError(f"expected rows in 0..{self.batch_size - 1}; found {list(rows)}")
        index = torch.from_numpy(chosen).to(self.model.device)
        self.padding, starts = self.padding[chosen], self.starts[chosen]
        # Slots that are padding in every row left are dropped.
        first, filled = int(starts.min()), self.cache.filled
        pairs = [
            _last((keys[index], values[index]), min(keys.shape[2], filled - first)) for keys, values in self._pairs()
        ]
        self._replace(pairs, self.tokens[chosen, first:], starts - first)

    @torch.inference_mode()
    def extend(self, other: DecodeState) -> None:
        if not isinstance(other, TorchDecodeState) or other.model is not self.model:
            raise InputError("expected a decode state of the same model; found another's; feed the tokens anew")
        states = (self, other)
        slots = max(state.cache.filled for state in states)
        mine = self._pairs() or _without_slots(other._pairs(), self.batch_size)
        theirs = other._pairs() or _without_slots(mine, other.batch_size)
        pairs = []
        for layer, two in enumerate(zip(mine, theirs)):
            # What one has dropped the other need not keep; what it never had becomes padding.
            count = min(state.cache.layers[layer].known(slots) if state.cache.layers else slots for state in states)
            ends = [_last(pair, count) for pair in two]
            pairs.append((torch.cat([keys for keys, _ in ends]), torch.cat([values for _, values in ends])))
        tokens = [np.pad(state.tokens, ((0, 0), (slots - state.cache.filled, 0))) for state in states]
        starts = [state.starts + slots - state.cache.filled for state in states]
        self.padding = np.concatenate([self.padding, other.padding])
        self._replace(pairs, np.concatenate(tokens), np.concatenate(starts))

    @torch.inference_mode()
    def trim(self, tokens: int) -> None:
        shortest = int(self.lengths.min())
        if not 0 <= tokens <= shortest:
            raise InputError(f"expected to trim 0..{shortest} tokens, what the shortest row holds; found {tokens}")
        kept = self.tokens[:, : self.cache.filled - tokens]
        if self.cache.reaches(kept.shape[1]):
            self.tokens, self.cache.filled = kept, kept.shape[1]
            self.cache.settle()
        else:
            self.padding = self.starts
            self._clear()
            self._run(kept, last_only=True)

    def save(self, path: Path) -> None:
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in ("tokens", "starts", "padding")}
        for index, (keys, values) in enumerate(self._pairs()):
            tensors |= {f"keys.{index}": keys, f"values.{index}": values}
        partial = path.with_name(path.name + ".partial")
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, metadata={"format": FORMAT, "architecture": self.model.architecture})
        os.replace(partial, path)

    @classmethod
    def load(cls, model: TorchModel, path: Path) -> TorchDecodeState:
        """Read what `save` wrote. Raises InputError when the file is not a state of this model."""
        try:
            with safe_open(path, framework="pt", device=str(model.device)) as file:
                found = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"expected a decode state in {path}; found: {error}; feed the tokens anew") from None
        wanted = {"format": FORMAT, "architecture": model.architecture}
        layers = sum(name.startswith("keys.") for name in tensors)
        if found != wanted or layers not in (0, model.cache_layers):
            raise InputError(
                f"expected a decode state of this {model.architecture} model ({model.cache_layers} layers); "
                f"found {found.get('architecture', 'no')} state with {layers} in {path}; feed the tokens anew"
            )
        state = cls(model, tensors["padding"].cpu().numpy())
        pairs = [(tensors[f"keys.{index}"], tensors[f"values.{index}"]) for index in range(layers)]
        if pairs and pairs[0][0].dtype != model.module.dtype:
            dtype = pairs[0][0].dtype
            raise InputError(f"expected a {model.dtype} decode state; found one of {dtype}; feed the tokens anew")
        state._replace(pairs, tensors["tokens"].cpu().numpy(), tensors["starts"].cpu().numpy())
        return state

    def _pairs(self) -> list[Pair]:
        """Keys and values [B, H, S, K] that each layer holds; none when nothing was fed."""
        self.cache.settle()
        return [(layer.keys, layer.values) for layer in self.cache.layers]

    def _replace(self, pairs: list[Pair], tokens: np.ndarray, starts: np.ndarray) -> None:
        self.tokens, self.starts = tokens, starts
        self.cache = SlotCache(self.model.windows, self.room)
        self.cache.restore(pairs, tokens.shape[1])


def _last(pair: Pair, slots: int) -> Pair:
    """The last `slots` of `pair` [B, H, S, K], zeros before them where it has fewer."""
    extra = slots - pair[0].shape[2]
    keys, values = (F.pad(part, (0, 0, extra, 0)) if extra >= 0 else part[:, :, -extra:] for part in pair)
    return keys, values


def _without_slots(pairs: list[Pair], rows: int) -> list[Pair]:
    """Pairs like `pairs` for `rows` rows that hold nothing yet: [B, H, 0, K]."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_zeros(rows, tensor.shape[1], 0, tensor.shape[3])

    return [(empty(keys), empty(values)) for keys, values in pairs]
