"""Flax NNX behind the common contract: jitted, with shapes in steps so that few programs are compiled.

What an architecture's `modeling_flax.Model` offers, and all that is asked of it here:
`Model(config, dtype=, param_dtype=, rngs=)`; `.model(ids, positions, mask, cache, offset) -> (hidden states, cache)`;
`.logits(x)`; `.init_cache(batch, slots)`, any tree of arrays [B, slots, ...].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from isomorph import architectures, port
from isomorph.errors import InputError
from isomorph.frameworks.model import DecodeState, Model
from isomorph.frameworks.nnx_parameters import merge, partition_specs, split

if TYPE_CHECKING:
    from isomorph.architectures.base import Architecture
    from isomorph.checkpoint import Checkpoint

#: Tokens fed and slots of a cache come in these steps; from the last one on, in its multiples.
STEPS = (1, 16, 32, 64, 128)


def load_model(
    architecture: Architecture | None,
    checkpoint: Checkpoint,
    config: Any,
    *,
    dtype: str | None,
    device: str | None,
    numerics: str,
    trust_remote_code: bool,
) -> FlaxModel:
    """Build the architecture's model and fill it tensor by tensor. Raises InputError."""
    if architecture is None:
        known = ", ".join(architectures.registered())
        found = (checkpoint.config or {}).get("model_type")
        raise InputError(f"expected an architecture that has a Flax model ({known}); found {found!r}; use torch or mlx")
    dtype = dtype or stored_dtype(checkpoint)
    target = find_device(device)
    abstract = nnx.eval_shape(lambda: build(architecture, config, dtype))
    graph, expected = split(abstract)
    parameters = {}
    layout = architecture.native["flax"]
    # The stored weights are the model, in whatever dtype it runs: torch and MLX compute with a folded head as it is.
    for tensor in port.mapped(checkpoint, architecture, layout, config=config, dtype=dtype, sidecars=False):
        # A copy: the values may be mapped pages of a file that goes away.
        parameters[tensor.name] = jax.device_put(np.array(tensor.read()), target)
    ordered = {name: parameters[name] for name in expected}
    return FlaxModel(graph, ordered, config, architecture.model_type, dtype, partition_specs(abstract))


def build(architecture: Architecture, config: Any, dtype: str) -> nnx.Module:
    """The architecture's Flax model with random parameters of `dtype`."""
    model_class = architecture.module("modeling_flax").Model
    return model_class(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The floating dtype that holds most of a checkpoint's elements; bfloat16 for a quantized one."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in ("float32", "bfloat16", "float16"):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    return max(sizes, key=lambda name: sizes[name]) if sizes else "float32"


def find_device(name: str | None) -> jax.Device | None:
    """`cpu`, `gpu`, `tpu`, or one of several as in `gpu:1`; None is JAX's default."""
    if name is None:
        return None
    kind, _, index = name.partition(":")
    try:
        return jax.devices(kind)[int(index or 0)]
    except (RuntimeError, IndexError, ValueError):
        found = ", ".join(f"{device.platform}:{device.id}" for device in jax.devices())
        raise InputError(f"expected a device that JAX has ({found}); found {name!r}") from None


def bucket(count: int) -> int:
    """`count` rounded up to a step."""
    return next((step for step in STEPS if count <= step), -(-count // STEPS[-1]) * STEPS[-1])


class FlaxModel(Model):
    """A Flax NNX model of ours. `parameters` are named by their dotted paths in the NNX tree."""

    framework = "flax"

    def __init__(
        self,
        graph: nnx.GraphDef,
        parameters: dict[str, jax.Array],
        config: Any,
        architecture: str,
        dtype: str,
        specs: dict[str, jax.sharding.PartitionSpec],
    ) -> None:
        self.graph = graph
        self.parameters = parameters
        self.config = config
        self.architecture = architecture
        self.dtype = dtype
        self.specs = specs
        self.vocab_size = config.vocab_size
        self.max_positions = config.max_position_embeddings
        self.num_layers = config.num_hidden_layers
        self.forward = jax.jit(self._forward)
        self.step = jax.jit(self._step, donate_argnums=1, static_argnames="last_only")

    def shard(self, mesh: Mesh) -> None:
        """Spread the matrices over the devices of a mesh with the axis `model`, as the model's file annotates them."""
        for name, value in self.parameters.items():
            for size, axis in zip(value.shape, self.specs[name]):
                if axis is not None and size % mesh.shape[axis]:
                    raise InputError(
                        f"expected {name} {list(value.shape)} to divide over {mesh.shape[axis]} devices; use fewer"
                    )
            self.parameters[name] = jax.device_put(value, NamedSharding(mesh, self.specs[name]))

    def _forward(
        self, parameters: dict[str, jax.Array], ids: jax.Array, real: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Full pass: ids [B, T], real [B, T] true at tokens that are not padding -> logits, hidden states."""
        model = merge(self.graph, parameters)
        positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)  # [B, T]
        columns = jnp.arange(ids.shape[1])
        mask = (columns[None, :] <= columns[:, None]) & real[:, None, None, :]  # [B, 1, T, T]
        states, _ = model.model(ids, positions, mask)
        return model.logits(states[-1]).astype(jnp.float32), states

    def _step(
        self,
        parameters: dict[str, jax.Array],
        cache: Any,
        ids: jax.Array,
        offset: jax.Array,
        padding: jax.Array,
        count: jax.Array,
        *,
        last_only: bool,
    ) -> tuple[jax.Array, Any]:
        """Feed ids [B, T], of which the first `count` columns mean something, into the slots from `offset` on."""
        model = merge(self.graph, parameters)
        slots = jnp.arange(jax.tree.leaves(cache)[0].shape[1])  # [S]
        fed = offset + jnp.arange(ids.shape[1])  # [T]
        # Columns past `count` may lie past the last position; theirs is never read.
        positions = jnp.clip(fed[None, :] - padding[:, None], 0, self.max_positions - 1)  # [B, T]
        mask = (slots[None, :] <= fed[:, None]) & (slots >= padding[:, None])[:, None, None, :]  # [B, 1, T, S]
        states, cache = model.model(ids, positions, mask, cache, offset)
        x = jax.lax.dynamic_slice_in_dim(states[-1], count - 1, 1, axis=1) if last_only else states[-1]
        return model.logits(x).astype(jnp.float32), cache

    def _padded_forward(self, ids: np.ndarray, real: np.ndarray | None) -> tuple[jax.Array, list[jax.Array]]:
        extra = ((0, 0), (0, bucket(ids.shape[1]) - ids.shape[1]))
        real = np.ones(ids.shape, bool) if real is None else real
        return self.forward(self.parameters, np.pad(ids, extra).astype(np.int32), np.pad(real, extra))

    def _logits(self, ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
        return np.asarray(self._padded_forward(ids, attention_mask)[0])[:, : ids.shape[1]]

    def _hidden_states(self, ids: np.ndarray) -> list[np.ndarray]:
        states = self._padded_forward(ids, None)[1]
        return [np.asarray(state.astype(jnp.float32))[:, : ids.shape[1]] for state in states]

    def _decode_state(self, batch_size: int, left_padding: np.ndarray | None, max_length: int | None) -> DecodeState:
        padding = np.zeros(batch_size, np.int64) if left_padding is None else left_padding
        slots = bucket(max(max_length or 0, STEPS[-1]) + int(padding.max()))
        cache = merge(self.graph, self.parameters).init_cache(batch_size, slots)
        return FlaxDecodeState(self, cache, 0, padding)

    def load_decode_state(self, path: Path) -> DecodeState:
        from safetensors import safe_open

        try:
            with safe_open(path, framework="flax") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except Exception as error:
            raise InputError(f"expected a decode state saved by isomorph in {path}; found {error}") from None
        if metadata.get("model") != self._identity():
            raise InputError(
                f"expected a decode state of this model, dtype and framework; found another one's in {path}"
            )
        padding = np.asarray(arrays.pop("padding")).astype(np.int64)
        offset = int(metadata["offset"])
        empty = merge(self.graph, self.parameters).init_cache(len(padding), max(offset, 1))
        leaves = [arrays[f"cache.{index}"] for index in range(len(arrays))]
        state = FlaxDecodeState(self, jax.tree.unflatten(jax.tree.structure(empty), leaves), offset, padding)
        state.reserve(bucket(max(offset, STEPS[-1])))
        return state

    def _identity(self) -> str:
        """What a saved decode state must agree on with the model that takes it up."""
        return json.dumps([self.framework, self.architecture, self.dtype, self.config.to_dict()], sort_keys=True)


class FlaxDecodeState(DecodeState):
    """Preallocated keys and values; all rows share their next slot, so a shorter row starts after padding."""

    def __init__(self, model: FlaxModel, cache: Any, offset: int, padding: np.ndarray) -> None:
        self.model = model
        self.cache = cache
        self.offset = offset
        self.padding = padding

    @property
    def batch_size(self) -> int:
        return len(self.padding)

    @property
    def lengths(self) -> np.ndarray:
        return np.maximum(self.offset - self.padding, 0)

    def reserve(self, slots: int) -> None:
        """Make room for at least `slots` slots."""
        missing = slots - jax.tree.leaves(self.cache)[0].shape[1]
        if missing > 0:
            self.cache = jax.tree.map(
                lambda array: jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2)), self.cache
            )

    def feed(self, ids: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        ids = self.model.checked_ids(ids)
        if ids.shape[0] != self.batch_size:
            raise InputError(f"expected ids for {self.batch_size} rows; found {ids.shape[0]}")
        count = ids.shape[1]
        longest = self.offset + count - int(self.padding.min())
        if longest > self.model.max_positions:
            raise InputError(
                f"expected at most {self.model.max_positions} tokens (max_position_embeddings); found {longest}; "
                "shorten the prompt or ask for fewer tokens"
            )
        fed = np.pad(ids, ((0, 0), (0, bucket(count) - count))).astype(np.int32)
        # Doubling keeps the number of compiled programs at the logarithm of the length.
        if self.offset + fed.shape[1] > (slots := jax.tree.leaves(self.cache)[0].shape[1]):
            self.reserve(bucket(max(2 * slots, self.offset + fed.shape[1])))
        logits, self.cache = self.model.step(
            self.model.parameters,
            self.cache,
            fed,
            jnp.int32(self.offset),
            self.padding.astype(np.int32),
            jnp.int32(count),
            last_only=last_only,
        )
        self.offset += count
        return np.asarray(logits)[:, -1:] if last_only else np.asarray(logits)[:, :count]

    def reorder(self, rows: Sequence[int]) -> None:
        chosen = np.asarray(rows, np.int64)
        if chosen.size == 0 or chosen.min() < 0 or chosen.max() >= self.batch_size:
            raise InputError(f"expected rows in 0..{self.batch_size - 1}; found {list(rows)}")
        self.cache = jax.tree.map(lambda array: array[chosen], self.cache)
        self.padding = self.padding[chosen]

    def extend(self, other: DecodeState) -> None:
        if not isinstance(other, FlaxDecodeState) or other.model is not self.model:
            raise InputError("expected a decode state of the same model to extend by; found another one's")
        offset = max(self.offset, other.offset)
        slots = max(jax.tree.leaves(state.cache)[0].shape[1] for state in (self, other))
        caches, paddings = [], []
        for state in (self, other):
            # Rows end at the same slot: what is shorter moves right and is padded on the left.
            shift = offset - state.offset
            aligned = FlaxDecodeState(self.model, state.cache, state.offset, state.padding)
            aligned.reserve(slots)
            caches.append(jax.tree.map(lambda array, by=shift: jnp.roll(array, by, axis=1), aligned.cache))
            paddings.append(state.padding + shift)
        self.cache = jax.tree.map(lambda one, more: jnp.concatenate([one, more]), *caches)
        self.padding = np.concatenate(paddings)
        self.offset = offset

    def trim(self, tokens: int) -> None:
        if not 0 <= tokens <= int(self.lengths.min()):
            raise InputError(f"expected to trim 0..{int(self.lengths.min())} tokens; found {tokens}")
        self.offset -= tokens

    def save(self, path: Path) -> None:
        from safetensors.flax import save_file

        held = max(self.offset, 1)
        arrays = {f"cache.{index}": leaf[:, :held] for index, leaf in enumerate(jax.tree.leaves(self.cache))}
        arrays["padding"] = jnp.asarray(self.padding, jnp.int32)
        save_file(arrays, path, metadata={"model": self.model._identity(), "offset": str(self.offset)})
