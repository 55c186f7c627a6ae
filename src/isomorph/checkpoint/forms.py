"""How weights are stored, by the container that a layout names: who reads it, and what stands in its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isomorph.checkpoint.container import Container, safetensors_files, torch_container
from isomorph.checkpoint.orbax_folder import ITEM, write_orbax
from isomorph.checkpoint.tensor import Tensor
from isomorph.checkpoint.writer import Content, json_bytes

#: What nanochat and training runs in JAX say of a model, and no more.
MODEL_KEYS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")


@dataclass(frozen=True)
class Stored:
    """The weight files, what else carries or describes them, and what config.json says besides the model's own."""

    weights: list[Container]
    files: Mapping[str, Content] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


#: (tensors, config, bytes of a shard at most) -> what is written.
Store = Callable[[Sequence[Tensor], Mapping[str, Any], int], Stored]


@dataclass(frozen=True)
class Form:
    """One container: `reader` is who it is for, as `convert --to` has it."""

    reader: str
    store: Store


def _safetensors(kind: str) -> Store:
    """Safetensors whose header says that they are of `kind`."""
    return lambda tensors, config, most: Stored(safetensors_files(tensors, {"format": kind}, most))


def _torch(tensors: Sequence[Tensor], config: Mapping[str, Any], most: int) -> Stored:
    return Stored([torch_container("model.pt", tensors)])


def _nanochat(tensors: Sequence[Tensor], config: Mapping[str, Any], most: int) -> Stored:
    """A checkpoint of that project's training, at step 0."""
    meta = {"step": 0, "model_config": _chosen(config, MODEL_KEYS)}
    weights = torch_container("model_000000.pt", tensors, key=None)
    return Stored([weights], {"meta_000000.json": json_bytes(meta)})


def _orbax(tensors: Sequence[Tensor], config: Mapping[str, Any], most: int) -> Stored:
    """A training run in JAX, at step 0."""
    model = _chosen(config, (*MODEL_KEYS, "tie_embeddings"))
    return Stored([], {"0": lambda step: write_orbax(step, tensors)}, {ITEM: model})


def _chosen(config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: config[key] for key in keys if key in config}


FORMS = {
    "mlx": Form("mlx", _safetensors("mlx")),
    "pt": Form("transformers", _safetensors("pt")),
    "flax": Form("flax", _safetensors("flax")),
    "orbax": Form("flax", _orbax),
    "torch": Form("original", _torch),
    "nanochat": Form("original", _nanochat),
}

#: Whom a folder can be for.
READERS = tuple(dict.fromkeys(form.reader for form in FORMS.values()))
