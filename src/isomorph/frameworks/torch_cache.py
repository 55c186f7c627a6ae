"""Keys and values of a torch model: buffers with room for more, of which a layer with a window keeps only the end."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

#: Slots that a layer has room for when nobody says how many; they double when they are full.
SMALLEST_ROOM = 256

#: Tokens that a layer keeps beyond its window, so that as many can be taken back, and as many again until it moves.
ROLLBACK = 64

#: Keys and values [B, H, S, K] of one layer.
Pair = tuple[torch.Tensor, torch.Tensor]


def windows_of(config: Any) -> list[int | None]:
    """How many keys a token of each layer sees, itself included, as Transformers' own cache has it; None: all."""
    return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]


def keeps_keys_and_values(config: Any) -> bool:
    """Whether attention is all that layers remember; convolutions and recurrences keep states of another kind."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)


class SlotLayer(DynamicLayer):
    """Keys and values [B, H, S, K] of the slots from `dropped` on, at the front of buffers with room for more.

    A token copies only itself; with a `window` the oldest slots go when the buffers are full.
    """

    keys: Any
    values: Any

    def __init__(self, room: int, window: int | None = None, dropped: int = 0) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.lookback = sys.maxsize if window is None else window - 1
        self.room = min(room, self.most)
        self.dropped = dropped
        self.buffers: list[torch.Tensor] = []

    @property
    def most(self) -> int:
        """Slots that the buffers have at most."""
        return self.lookback + 2 * ROLLBACK

    def get_seq_length(self) -> int:
        return self.dropped + super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_seq_length() + query_length, self.dropped

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Pair:
        """The slots held before and the new ones; what of them is kept is another matter."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = super().get_seq_length()
        total = held + key_states.shape[2]
        if self.buffers and total <= self.room:
            for buffer, states in zip(self.buffers, (key_states, value_states)):
                buffer[:, :, held:total] = states
            self.fill(self.dropped + total)
            return self.keys, self.values
        pair = (key_states, value_states)
        if held:
            pair = (torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2))
        self.hold(pair)
        return pair

    def hold(self, pair: Pair, more: int = 0) -> None:
        """Move `pair`, the slots from `dropped` on, to buffers that `more` fit into; a window lets its oldest go."""
        slots = pair[0].shape[2]
        if slots + more > self.most:
            kept = self.lookback + ROLLBACK
            self.dropped += slots - kept
            pair, slots = (pair[0][:, :, -kept:], pair[1][:, :, -kept:]), kept
        if slots + more > self.room:
            self.room = min(max(slots + more, 2 * self.room), self.most)
        self.buffers = [part.new_empty(*part.shape[:2], self.room, part.shape[3]) for part in pair]
        for buffer, part in zip(self.buffers, pair):
            buffer[:, :, :slots] = part
        self.fill(self.dropped + slots)

    def fill(self, slots: int) -> None:
        """Let the layer end before slot `slots`."""
        self.keys, self.values = (buffer[:, :, : slots - self.dropped] for buffer in self.buffers)

    def known(self, slots: int) -> int:
        """How many of the last of `slots` are known, when those before the first one it ever had are padding."""
        return super().get_seq_length() if self.dropped else slots

    def reaches(self, slots: int) -> bool:
        """Whether the layer, when it ends before slot `slots`, still holds all that the next token sees."""
        return self.dropped == 0 or slots - self.dropped >= self.lookback


class SlotCache(Cache):
    """The layers of all blocks, all of them `filled` up to the same slot.

    `windows` are those of the blocks; layers behind them, which some architectures add, have the shortest. A step
    outside of torch finds layer i's slots in `keys[i]`, `values[i]`, `rooms[i]` and `dropped[i]` (addresses and
    counts), writes into slot `filled` and counts it with `advance`; `settle` tells the layers.
    """

    layers: Any

    def __init__(self, windows: list[int | None], room: int | None) -> None:
        super().__init__(layer_class_to_replicate=SlotLayer)
        self.windows = windows
        self.room = max(SMALLEST_ROOM, room or 0)
        self.filled = 0
        self.limit = 0  # the first slot without room, while the addresses hold
        self.keys: list[int] = []
        self.values: list[int] = []
        self.rooms: list[int] = []
        self.dropped: list[int] = []

    def new_layer(self, dropped: int = 0) -> None:
        index = len(self.layers)
        shortest = min((window for window in self.windows if window is not None), default=None)
        window = self.windows[index] if index < len(self.windows) else shortest
        self.layers.append(SlotLayer(self.room, window, dropped))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.layers) <= layer_idx:
            self.new_layer()
        self.limit = 0
        pair = self.layers[layer_idx].update(key_states, value_states)
        self.filled = self.layers[layer_idx].get_seq_length()
        return pair

    def restore(self, pairs: list[Pair], filled: int) -> None:
        """Take over `pairs`, the last slots of each layer before slot `filled`."""
        for keys, values in pairs:
            self.new_layer(filled - keys.shape[2])
            self.layers[-1].update(keys, values)
        self.filled = filled

    def make_room(self) -> None:
        """See to it that one more token fits and that the addresses are right."""
        if self.filled < self.limit:
            return
        self.settle()
        for layer in self.layers:
            if self.filled >= layer.dropped + layer.room:
                layer.hold((layer.keys, layer.values), more=1)
        self.keys, self.values = ([layer.buffers[part].data_ptr() for layer in self.layers] for part in (0, 1))
        self.rooms = [layer.room for layer in self.layers]
        self.dropped = [layer.dropped for layer in self.layers]
        self.limit = min(map(sum, zip(self.rooms, self.dropped)))

    def advance(self) -> None:
        self.filled += 1

    def settle(self) -> None:
        """Let every layer end before slot `filled`."""
        for layer in self.layers:
            if layer.get_seq_length() != self.filled:
                layer.fill(self.filled)

    def reaches(self, slots: int) -> bool:
        """Whether all layers can end before slot `slots` and go on from there."""
        return all(layer.reaches(slots) for layer in self.layers)
