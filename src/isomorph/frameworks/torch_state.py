"""The decode state of a torch model: keys and values with room for more, and which slots hold tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache, DynamicLayer

from isomorph.errors import InputError
from isomorph.frameworks.model import DecodeState

if TYPE_CHECKING:
    from isomorph.frameworks.torch import TorchModel

FORMAT = "isomorph-decode-state-torch-1"

#: Keys and values [B, H, S, K] of each layer.
Layers = list[tuple[torch.Tensor, torch.Tensor]]

#: Slots that a cache has room for when nobody says how many; it doubles when they are full.
SMALLEST_ROOM = 256


class SlotLayer(DynamicLayer):
    """Keys and values [B, H, S, K] at the front of buffers with room for more, so that a token copies only itself."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        filled = self.get_seq_length()
        total = filled + key_states.shape[2]
        fresh = (key_states, value_states)
        if not self.buffers or total > self.room or self.keys.data_ptr() != self.buffers[0].data_ptr():
            self.grow(total, fresh)
        for buffer, states in zip(self.buffers, fresh):
            buffer[:, :, filled:total] = states
        self.fill(total)
        return self.keys, self.values

    def grow(self, slots: int, like: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Move to buffers for `slots` tokens or more, of `like`'s heads and widths."""
        filled = self.get_seq_length()
        if slots > self.room:
            self.room = max(slots, 2 * self.room)
        buffers = [part.new_empty(*part.shape[:2], self.room, part.shape[3]) for part in like]
        for buffer, held in zip(buffers, (self.keys, self.values)):
            if filled:
                buffer[:, :, :filled] = held
        self.buffers = buffers
        self.fill(filled)

    def fill(self, slots: int) -> None:
        """Let the first `slots` of the buffers be what the layer holds."""
        self.keys, self.values = (buffer[:, :, :slots] for buffer in self.buffers)


class SlotCache(Cache):
    """The layers of all blocks, with as many slots filled in each; `keys` and `values` are their addresses.

    A step outside of torch writes into the next slot and counts it with `advance`; `settle` tells the layers.
    """

    layers: list[SlotLayer]

    def __init__(self, room: int | None) -> None:
        super().__init__(layers=[])
        self.room = max(SMALLEST_ROOM, room or 0)
        self.filled = 0
        self.keys: list[int] = []
        self.values: list[int] = []

    @property
    def capacity(self) -> int:
        return self.layers[0].room

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(SlotLayer(self.room))
        self.keys, self.values = [], []
        result = self.layers[layer_idx].update(key_states, value_states)
        self.filled = result[0].shape[2]
        return result

    def make_room(self) -> None:
        """See to it that one more token fits and that the addresses are right."""
        if self.keys and self.filled < self.capacity:
            return
        self.settle()
        for layer in self.layers:
            if self.filled >= layer.room:
                layer.grow(self.filled + 1, (layer.keys, layer.values))
        self.keys = [layer.buffers[0].data_ptr() for layer in self.layers]
        self.values = [layer.buffers[1].data_ptr() for layer in self.layers]

    def advance(self) -> None:
        self.filled += 1

    def settle(self) -> None:
        """Let every layer hold `filled` slots."""
        for layer in self.layers:
            if layer.get_seq_length() != self.filled:
                layer.fill(self.filled)


class TorchDecodeState(DecodeState):
    """B rows, aligned at their newest token: slots `starts[b]` to `cache.filled` hold the tokens of row b.

    `padding` [B] counts the meaningless ids that the next feed starts with. The cache keeps every token of every
    layer, sliding windows included (their masks still apply), so that any state can be trimmed and reordered.
    """

    def __init__(self, model: TorchModel, padding: np.ndarray, room: int | None = None) -> None:
        self.model = model
        self.padding = padding
        self.room = room
        self.starts = np.zeros(len(padding), np.int64)
        self.cache = SlotCache(room)

    @property
    def batch_size(self) -> int:
        return len(self.padding)

    @property
    def lengths(self) -> np.ndarray:
        return self.cache.filled - self.starts

    @property
    def mask(self) -> torch.Tensor:
        """Which slots hold a token, bool [B, S]."""
        return torch.from_numpy(np.arange(self.cache.filled) >= self.starts[:, None])

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
        logits = self.model.steps(self.cache, self.starts, ids) if ids.shape[1] == 1 else None
        if logits is not None:
            self.cache.advance()
            return logits
        self.cache.settle()
        starts = self.starts + self.padding
        slots = np.arange(self.cache.filled + ids.shape[1])
        # Without padding no mask is needed, and attention takes its fastest form.
        mask = torch.from_numpy(slots >= starts[:, None]).to(self.model.device) if starts.any() else None
        logits = self.model.forward(ids, mask, self.cache, last_only)
        self.starts, self.padding = starts, np.zeros_like(self.padding)
        return logits

    @torch.inference_mode()
    def reorder(self, rows: Sequence[int]) -> None:
        chosen = np.asarray(rows, dtype=np.int64)
        if chosen.ndim != 1 or not chosen.size or chosen.min() < 0 or chosen.max() >= self.batch_size:
            raise InputError(f"expected rows in 0..{self.batch_size - 1}; found {list(rows)}")
        index = torch.from_numpy(chosen).to(self.model.device)
        self.padding, starts = self.padding[chosen], self.starts[chosen]
        # Slots that are padding in every row left are dropped.
        first = int(starts.min())
        layers = [(keys[index, :, first:], values[index, :, first:]) for keys, values in self._layers()]
        self._replace(layers, starts - first, self.cache.filled - first)

    @torch.inference_mode()
    def extend(self, other: DecodeState) -> None:
        if not isinstance(other, TorchDecodeState) or other.model is not self.model:
            raise InputError("expected a decode state of the same model; found another's; feed the tokens anew")
        slots = max(self.cache.filled, other.cache.filled)

        def joined(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            """Rows of both, [B, H, S, K]; the shorter one is filled up at the left."""
            parts = []
            for part in (mine, theirs):
                empty = part.new_zeros(part.shape[0], part.shape[1], slots - part.shape[2], part.shape[3])
                parts.append(torch.cat([empty, part], dim=2))
            return torch.cat(parts)

        mine = self._layers() or _without_slots(other._layers(), self.batch_size)
        theirs = other._layers() or _without_slots(mine, other.batch_size)
        layers = [(joined(k, other_k), joined(v, other_v)) for (k, v), (other_k, other_v) in zip(mine, theirs)]
        starts = [state.starts + slots - state.cache.filled for state in (self, other)]
        self._replace(layers, np.concatenate(starts), slots)
        self.padding = np.concatenate([self.padding, other.padding])

    @torch.inference_mode()
    def trim(self, tokens: int) -> None:
        shortest = int(self.lengths.min())
        if not 0 <= tokens <= shortest:
            raise InputError(f"expected to trim 0..{shortest} tokens, what the shortest row holds; found {tokens}")
        self.cache.filled -= tokens
        self.cache.settle()

    def save(self, path: Path) -> None:
        tensors = {"mask": self.mask, "padding": torch.from_numpy(self.padding)}
        for index, (keys, values) in enumerate(self._layers()):
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
        if found != wanted or layers not in (0, model.num_layers):
            raise InputError(
                f"expected a decode state of this {model.architecture} model ({model.num_layers} layers); "
                f"found {found.get('architecture', 'no')} state with {layers} in {path}; feed the tokens anew"
            )
        state = cls(model, tensors["padding"].cpu().numpy())
        pairs = [(tensors[f"keys.{index}"], tensors[f"values.{index}"]) for index in range(layers)]
        if pairs and pairs[0][0].dtype != model.module.dtype:
            dtype = pairs[0][0].dtype
            raise InputError(f"expected a {model.dtype} decode state; found one of {dtype}; feed the tokens anew")
        mask = tensors["mask"].cpu().numpy()
        state._replace(pairs, mask.shape[1] - mask.sum(axis=1), mask.shape[1])
        return state

    def _layers(self) -> Layers:
        """Keys and values [B, H, S, K] of each layer; none when nothing was fed."""
        self.cache.settle()
        return [(layer.keys, layer.values) for layer in self.cache.layers]

    def _replace(self, layers: Layers, starts: np.ndarray, slots: int) -> None:
        self.starts, self.cache = starts, SlotCache(self.room)
        for index, (keys, values) in enumerate(layers):
            self.cache.update(keys, values, index)
        self.cache.filled = slots


def _without_slots(layers: Layers, rows: int) -> Layers:
    """Layers like `layers` for `rows` rows that hold nothing yet: [B, H, 0, K]."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_zeros(rows, tensor.shape[1], 0, tensor.shape[3])

    return [(empty(keys), empty(values)) for keys, values in layers]
