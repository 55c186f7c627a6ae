"""The decode state of a torch model: Transformers' DynamicCache and which of its slots hold tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import DynamicCache

from isomorph.errors import InputError
from isomorph.frameworks.model import DecodeState

if TYPE_CHECKING:
    from isomorph.frameworks.torch import TorchModel

FORMAT = "isomorph-decode-state-torch-1"

#: Keys and values [B, H, S, K] of each layer.
Layers = list[tuple[torch.Tensor, torch.Tensor]]


class TorchDecodeState(DecodeState):
    """B rows, aligned at their newest token: slot s of the cache holds a token of row b where `mask[b, s]`.

    `padding` [B] counts the meaningless ids that the next feed starts with. The cache keeps every token of every
    layer, sliding windows included (their masks still apply), so that any state can be trimmed and reordered.
    """

    def __init__(self, model: TorchModel, padding: np.ndarray) -> None:
        self.model = model
        self.padding = padding
        self.mask = torch.zeros(len(padding), 0, dtype=torch.bool, device=model.device)  # [B, S]
        self.cache = DynamicCache()

    @property
    def batch_size(self) -> int:
        return len(self.padding)

    @property
    def lengths(self) -> np.ndarray:
        return self.mask.sum(dim=1).cpu().numpy()

    def feed(self, ids: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        ids = np.array(ids, dtype=np.int64)
        if ids.ndim != 2 or ids.shape[0] != self.batch_size:
            raise InputError(f"expected ids of {self.batch_size} rows; found shape {ids.shape}")
        real = np.arange(ids.shape[1]) >= self.padding[:, None]  # [B, T]
        if self.padding.min() < 0 or not real.any(axis=1).all():
            raise InputError(f"expected left_padding in 0..{ids.shape[1] - 1}; found {self.padding.tolist()}")
        ids = self.model.checked_ids(np.where(real, ids, 0))
        longest = int((self.lengths + real.sum(axis=1)).max())
        if longest > self.model.max_positions:
            raise InputError(
                f"expected at most {self.model.max_positions} tokens (max_position_embeddings); found {longest}; "
                "shorten the prompt or generate fewer tokens"
            )
        mask = torch.cat([self.mask, torch.from_numpy(real).to(self.mask.device)], dim=1)
        # Without padding no mask is needed, and attention takes its fastest form.
        logits = self.model.forward(ids, None if mask.all() else mask, self.cache, last_only)
        self.mask, self.padding = mask, np.zeros_like(self.padding)
        return logits

    @torch.inference_mode()
    def reorder(self, rows: Sequence[int]) -> None:
        chosen = np.asarray(rows, dtype=np.int64)
        if chosen.ndim != 1 or not chosen.size or chosen.min() < 0 or chosen.max() >= self.batch_size:
            raise InputError(f"expected rows in 0..{self.batch_size - 1}; found {list(rows)}")
        index = torch.from_numpy(chosen).to(self.mask.device)
        self.padding, self.mask = self.padding[chosen], self.mask[index]
        self.cache.batch_select_indices(index)
        # Slots that are padding in every row left are dropped.
        held = self.mask.any(dim=0)
        self._keep(slice(int(held.int().argmax()) if bool(held.any()) else held.shape[0], None))

    @torch.inference_mode()
    def extend(self, other: DecodeState) -> None:
        if not isinstance(other, TorchDecodeState) or other.model is not self.model:
            raise InputError("expected a decode state of the same model; found another's; feed the tokens anew")
        slots = max(self.mask.shape[1], other.mask.shape[1])

        def joined(mine: torch.Tensor, theirs: torch.Tensor, axis: int) -> torch.Tensor:
            """Rows of both; the shorter one is filled up at the left of `axis`, which counts slots."""
            parts = []
            for part in (mine, theirs):
                shape = list(part.shape)
                shape[axis] = slots - shape[axis]
                parts.append(torch.cat([part.new_zeros(shape), part], dim=axis))
            return torch.cat(parts)

        mine = self._layers() or _without_slots(other._layers(), self.batch_size)
        theirs = other._layers() or _without_slots(mine, other.batch_size)
        layers = [(joined(k, other_k, 2), joined(v, other_v, 2)) for (k, v), (other_k, other_v) in zip(mine, theirs)]
        self._replace(layers, joined(self.mask, other.mask, 1))
        self.padding = np.concatenate([self.padding, other.padding])

    @torch.inference_mode()
    def trim(self, tokens: int) -> None:
        shortest = int(self.lengths.min())
        if not 0 <= tokens <= shortest:
            raise InputError(f"expected to trim 0..{shortest} tokens, what the shortest row holds; found {tokens}")
        self._keep(slice(0, self.mask.shape[1] - tokens))

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
        state._replace(pairs, tensors["mask"])
        return state

    def _layers(self) -> Layers:
        """Keys and values [B, H, S, K] of each layer; none when nothing was fed."""
        layers: list[Any] = self.cache.layers
        return [(layer.keys, layer.values) for layer in layers]

    def _keep(self, slots: slice) -> None:
        layers = [(keys[:, :, slots], values[:, :, slots]) for keys, values in self._layers()]
        self._replace(layers, self.mask[:, slots])

    def _replace(self, layers: Layers, mask: torch.Tensor) -> None:
        self.mask, self.cache = mask, DynamicCache()
        for index, (keys, values) in enumerate(layers):
            self.cache.update(keys, values, index)


def _without_slots(layers: Layers, rows: int) -> Layers:
    """Layers like `layers` for `rows` rows that hold nothing yet: [B, H, 0, K]."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_zeros(rows, tensor.shape[1], 0, tensor.shape[3])

    return [(empty(keys), empty(values)) for keys, values in layers]
