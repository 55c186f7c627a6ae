"""Flax NNX behind the common contract: jitted, with shapes in steps so that few programs are compiled.

What an architecture's `modeling_flax.Model` offers, and all that is asked of it here:
`Model(config, dtype=, param_dtype=, rngs=)`; `.trunk(ids, mask, cache, lengths) -> (what the head takes, hidden states,
cache)`; `.logits(x)`; `.init_cache(batch, slots, fed)`, any tree of arrays [B, slots or fewer, ...]. A row's token at
position p lies at slot p, modulo the slots of an array that keeps only a window; padding is never stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isomorph import architectures, port
from isomorph.errors import InputError
from isomorph.frameworks.flax_quantized import packed_modules, parts, place, without_extension
from isomorph.frameworks.model import DecodeState, Model
from isomorph.frameworks.nnx_parameters import merge, partition_specs, split

if TYPE_CHECKING:
    from isomorph.architectures.base import Architecture
    from isomorph.checkpoint import Checkpoint

#: Tokens of a full pass and slots of a cache come in these steps; from the last one on, in its multiples.
STEPS = (1, 16, 32, 64, 128)

#: Most tokens that a decode state is fed at once: a window's ring has as many slots more than it looks back.
FED = STEPS[-1]


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
    packed = packed_modules(architecture, checkpoint, config)
    abstract = nnx.eval_shape(lambda: place(build(architecture, config, dtype), packed, jnp.dtype(dtype)))
    graph, expected = split(abstract)
    parameters = {}
    layout = architecture.native["flax"]
    # The stored weights are the model, in whatever dtype it runs: torch and MLX compute with a folded head as it is.
    for tensor in port.mapped(checkpoint, architecture, layout, config=config, dtype=dtype, sidecars=False):
        entry = packed.get(tensor.name)
        for name, value in parts(tensor.name, entry) if entry else [(tensor.name, tensor.read())]:
            # A copy: the values may be mapped pages of a file that goes away.
            parameters[name] = jax.device_put(np.array(value), target)
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
        specs: dict[str, PartitionSpec],
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
        self.forward: Any = jax.jit(self._forward)
        self.step: Any = jax.jit(self._step, donate_argnums=1, static_argnames="last_only")

    def shard(self, mesh: Mesh) -> None:
        """Spread the matrices over a mesh's devices as the model's file annotates them, as far as it has those axes.

        An axis `data` is the callers', for rows. Raises InputError for axes that nothing is split over.
        """
        known = {axis for spec in self.specs.values() for axis in spec if axis is not None} | {"data"}
        if unknown := sorted(set(mesh.shape) - known):
            raise InputError(f"expected mesh axes of {', '.join(sorted(known))}; found {', '.join(unknown)}; rename it")
        for name, value in self.parameters.items():
            axes = [axis if axis in mesh.shape else None for axis in self.specs[name]]
            for size, axis in zip(value.shape, axes):
                if axis is not None and size % mesh.shape[axis]:
                    raise InputError(
                        f"expected {name} {list(value.shape)} to divide over {mesh.shape[axis]} devices; use fewer"
                    )
            self.parameters[name] = jax.device_put(value, NamedSharding(mesh, PartitionSpec(*axes)))
        self.graph, _ = split(without_extension(merge(self.graph, self.parameters)))
        self.forward.clear_cache()
        self.step.clear_cache()

    def _forward(
        self, parameters: dict[str, jax.Array], ids: jax.Array, real: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Full pass: ids [B, T], real [B, T] true at tokens that are not padding -> logits, hidden states."""
        model = merge(self.graph, parameters)
        x, states, _ = model.trunk(ids, real)
        return model.logits(x).astype(jnp.float32), states

    def _route(self, parameters: dict[str, jax.Array], ids: jax.Array, real: jax.Array) -> list[jax.Array]:
        """What the modules called `router` return in a full pass, layer by layer."""
        model = merge(self.graph, parameters)
        found: list[jax.Array] = []

        def noting(router: nnx.Module) -> Callable[[jax.Array], jax.Array]:
            def call(x: jax.Array) -> jax.Array:
                found.append(router(x).astype(jnp.float32))
                return found[-1].astype(x.dtype)

            return call

        owners: list[Any] = [module for _, module in nnx.iter_modules(model) if hasattr(module, "router")]
        for owner in owners:
            owner.router = noting(owner.router)
        model.trunk(ids, real)
        return found

    def _step(
        self,
        parameters: dict[str, jax.Array],
        cache: Any,
        ids: jax.Array,
        real: jax.Array,
        lengths: jax.Array,
        last: jax.Array,
        *,
        last_only: bool,
    ) -> tuple[jax.Array, Any]:
        """Feed the `real` [B, T] of ids [B, T] to rows that hold `lengths` [B] tokens; `last` is the last column."""
        model = merge(self.graph, parameters)
        x, _, cache = model.trunk(ids, real, cache, lengths)
        x = jax.lax.dynamic_slice_in_dim(x, last, 1, axis=1) if last_only else x
        return model.logits(x).astype(jnp.float32), cache

    def empty_cache(self, batch: int, slots: int) -> Any:
        """A cache for `batch` rows of up to `slots` tokens."""
        return merge(self.graph, self.parameters).init_cache(batch, slots, FED)

    def _padded_forward(self, ids: np.ndarray, real: np.ndarray | None) -> tuple[jax.Array, list[jax.Array]]:
        extra = ((0, 0), (0, bucket(ids.shape[1]) - ids.shape[1]))
        real = np.ones(ids.shape, bool) if real is None else real
        return self.forward(self.parameters, np.pad(ids, extra).astype(np.int32), np.pad(real, extra))

    def _logits(self, ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
        return np.asarray(self._padded_forward(ids, attention_mask)[0])[:, : ids.shape[1]]

    def _hidden_states(self, ids: np.ndarray) -> list[np.ndarray]:
        states = self._padded_forward(ids, None)[1]
        return [np.asarray(state.astype(jnp.float32))[:, : ids.shape[1]] for state in states]

    def _router_logits(self, ids: np.ndarray) -> list[np.ndarray]:
        batch, count = ids.shape
        padded = np.pad(ids, ((0, 0), (0, bucket(count) - count))).astype(np.int32)
        found = jax.jit(self._route)(self.parameters, padded, np.ones(padded.shape, bool))
        return [np.asarray(logits).reshape(batch, padded.shape[1], -1)[:, :count] for logits in found]

    def _decode_state(self, batch_size: int, left_padding: np.ndarray | None, max_length: int | None) -> DecodeState:
        padding = np.zeros(batch_size, np.int64) if left_padding is None else left_padding
        cache = self.empty_cache(batch_size, bucket(max(max_length or 0, FED)))
        return FlaxDecodeState(self, cache, [np.zeros(0, np.int32)] * batch_size, padding)

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
        padding, most = (np.asarray(arrays.pop(name)).astype(np.int64) for name in ("padding", "most"))
        tokens = [np.asarray(arrays.pop(f"tokens.{row}")) for row in range(len(padding))]
        structure = jax.tree.structure(jax.eval_shape(lambda: self.empty_cache(1, 1)))
        leaves = [arrays[f"cache.{index}"] for index in range(len(arrays))]
        state = FlaxDecodeState(self, jax.tree.unflatten(structure, leaves), tokens, padding, most)
        state.reserve(bucket(max(int(most.max()), FED)))
        return state

    def _identity(self) -> str:
        """What a saved decode state must agree on with the model that takes it up."""
        return json.dumps([self.framework, self.architecture, self.dtype, self.config.to_dict()], sort_keys=True)


class FlaxDecodeState(DecodeState):
    """Preallocated arrays that each row fills at its own pace, and the tokens that went into them."""

    def __init__(
        self,
        model: FlaxModel,
        cache: Any,
        tokens: Sequence[np.ndarray],
        padding: np.ndarray,
        most: np.ndarray | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.tokens = list(tokens)
        self.padding = padding  # [B], what is still to be skipped
        self.most = self.lengths if most is None else most  # [B], tokens held at most so far

    @property
    def batch_size(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.tokens], np.int64)

    @property
    def slots(self) -> int:
        """Tokens that fit into a row: the size of the arrays that keep everything."""
        return max(leaf.shape[1] for leaf in jax.tree.leaves(self.cache))

    def reserve(self, slots: int) -> None:
        """Make room for at least `slots` tokens a row."""
        wanted = jax.eval_shape(lambda: self.model.empty_cache(self.batch_size, slots))
        self.cache = jax.tree.map(
            lambda leaf, target: jnp.pad(leaf, [(0, size - held) for held, size in zip(leaf.shape, target.shape)]),
            self.cache,
            wanted,
        )

    def feed(self, ids: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        ids = self.model.checked_ids(ids)
        if ids.shape[0] != self.batch_size:
            raise InputError(f"expected ids for {self.batch_size} rows; found {ids.shape[0]}")
        longest = int((self.lengths + np.maximum(ids.shape[1] - self.padding, 0)).max())
        if longest > self.model.max_positions:
            raise InputError(
                f"expected at most {self.model.max_positions} tokens (max_position_embeddings); found {longest}; "
                "shorten the prompt or ask for fewer tokens"
            )
        # Doubling keeps the number of compiled programs at the logarithm of the length.
        if longest > self.slots:
            self.reserve(bucket(max(2 * self.slots, longest)))
        parts = [self._feed(ids[:, start : start + FED], last_only) for start in range(0, ids.shape[1], FED)]
        return np.asarray(parts[-1]) if last_only else np.concatenate([np.asarray(part) for part in parts], axis=1)

    def _feed(self, ids: np.ndarray, last_only: bool) -> jax.Array:
        """Logits of up to FED columns; does not wait for them."""
        count = ids.shape[1]
        columns = np.arange(bucket(count))
        logits, self.cache = self.model.step(
            self.model.parameters,
            self.cache,
            np.pad(ids, ((0, 0), (0, len(columns) - count))).astype(np.int32),
            (columns >= self.padding[:, None]) & (columns < count),
            self.lengths.astype(np.int32),
            np.int32(count - 1),
            last_only=last_only,
        )
        self.tokens = [np.append(row, new[skip:]) for row, new, skip in zip(self.tokens, ids, self.padding)]
        self.padding = np.maximum(self.padding - count, 0)
        self.most = np.maximum(self.most, self.lengths)
        return logits if last_only else logits[:, :count]

    def reorder(self, rows: Sequence[int]) -> None:
        chosen = np.asarray(rows, np.int64)
        if chosen.size == 0 or chosen.min() < 0 or chosen.max() >= self.batch_size:
            raise InputError(f"expected rows in 0..{self.batch_size - 1}; found {list(rows)}")
        self.cache = jax.tree.map(lambda leaf: leaf[chosen], self.cache)
        self.tokens = [self.tokens[row] for row in chosen]
        self.padding, self.most = self.padding[chosen], self.most[chosen]

    def extend(self, other: DecodeState) -> None:
        if not isinstance(other, FlaxDecodeState) or other.model is not self.model:
            raise InputError("expected a decode state of the same model to extend by; found another one's")
        added = FlaxDecodeState(self.model, other.cache, other.tokens, other.padding, other.most)
        slots = max(self.slots, other.slots)
        self.reserve(slots)
        added.reserve(slots)
        self.cache = jax.tree.map(lambda one, more: jnp.concatenate([one, more]), self.cache, added.cache)
        self.tokens += added.tokens
        self.padding, self.most = (np.append(self.padding, added.padding), np.append(self.most, added.most))

    def trim(self, tokens: int) -> None:
        if not 0 <= tokens <= int(self.lengths.min()):
            raise InputError(f"expected to trim 0..{int(self.lengths.min())} tokens; found {tokens}")
        self.tokens = [row[: len(row) - tokens] for row in self.tokens]
        # Within FED tokens of the most it ever held, a ring still has all that its window looks back to.
        ring = min(leaf.shape[1] for leaf in jax.tree.leaves(self.cache))
        if ((self.most > ring) & (self.most - self.lengths > FED)).any():
            self._read_again()

    def _read_again(self) -> None:
        """Fill a fresh cache with the tokens held: what the rings have overwritten is computed anew."""
        tokens, lengths = self.tokens, self.lengths
        longest = int(lengths.max())
        self.cache = self.model.empty_cache(self.batch_size, self.slots)
        self.tokens, self.padding, self.most = [row[:0] for row in tokens], longest - lengths, 0 * lengths
        if longest:
            self.feed(np.stack([np.pad(row, (longest - len(row), 0)) for row in tokens]), last_only=True)

    def save(self, path: Path) -> None:
        from safetensors.flax import save_file

        held = max(int(self.most.max()), 1)
        arrays = {f"cache.{index}": leaf[:, :held] for index, leaf in enumerate(jax.tree.leaves(self.cache))}
        arrays |= {f"tokens.{row}": jnp.asarray(tokens, jnp.int32) for row, tokens in enumerate(self.tokens)}
        arrays |= {"padding": jnp.asarray(self.padding, jnp.int32), "most": jnp.asarray(self.most, jnp.int32)}
        save_file(arrays, path, metadata={"model": self.model._identity()})
