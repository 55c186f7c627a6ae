"""gpt-oss in Flax NNX.

What is unusual about it:
- every layer's MLP is a mixture of experts: the router's softmax is over the chosen logits only;
- experts have biases and a clamped gate: (clip(up) + 1) * gate * sigmoid(1.702 * gate), gate clipped from above;
- each head has a sink: a learned logit in the softmax's denominator that no value belongs to;
- layers take turns in looking at a window, itself counted, and at everything;
- rotary positions are stretched by YaRN with a ramp that ends between channels; cos and sin are scaled by it.

Shapes: B batch, T tokens fed, S slots of a cache, D hidden, H heads, G key-value heads, R heads a group, K head_dim,
F intermediate, E experts, C experts chosen a token, N tokens of all rows, V vocabulary. Matrices carry the mesh axes
"model" (tensor parallel) and "expert"; give ids the axis "data" to split the batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

if TYPE_CHECKING:
    from .config import GptOssConfig

#: Tokens of a row whose queries are computed at once, and rows of a block that goes to one expert.
QUERY_BLOCK, EXPERT_BLOCK = 256, 128

# Which mesh axes split each axis of a matrix. An annotation only: whoever has a mesh places the weights by it.
COLUMN: dict[str, Any] = {"out_sharding": (None, "model"), "eager_sharding": False}
ROW: dict[str, Any] = {"out_sharding": ("model", None), "eager_sharding": False}
WHOLE: dict[str, Any] = {"out_sharding": (None, None), "eager_sharding": False}
EXPERT: dict[str, Any] = {"out_sharding": ("expert", None, None), "eager_sharding": False}
EXPERT_BIAS: dict[str, Any] = {"out_sharding": ("expert", None), "eager_sharding": False}


class Cache(NamedTuple):
    """Keys and values of each layer, [B, S, G, K]: rings, in which position p lies at slot p modulo their size."""

    keys: list[jax.Array]
    values: list[jax.Array]


def inverse_frequencies(config: GptOssConfig) -> tuple[np.ndarray, float]:
    """YaRN (arXiv:2309.00071): how far each pair of channels turns a position, [K/2], and what scales cos and sin."""
    scaling, dims = config.rope_scaling, config.head_dim

    def correction(rotations: float) -> float:
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dims * math.log(turns) / (2 * math.log(config.rope_theta))

    low, high = correction(scaling.beta_fast), correction(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high += 0.001 if low == high else 0
    pairs = np.arange(dims // 2, dtype=np.float32)
    exponents = 2 * pairs / np.float32(dims)
    # The power in float64: numpy's float32 power misses by an ulp, which at position 100,000 is a visible angle.
    periods = np.power(config.rope_theta, exponents.astype(np.float64)).astype(np.float32)
    ramp = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
    turned = (1 / (np.float32(scaling.factor) * periods)) * ramp + (1 / periods) * (1 - ramp)
    return turned.astype(np.float32), 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the halves of each head: x [B, T, H, K], cos and sin [B, T, 1, K/2]."""
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def ring_slots(positions: jax.Array, mask: jax.Array, size: int) -> jax.Array:
    """Slot of each token in a ring of `size`, [B, T]; `size`, which is no slot, where `mask` says padding."""
    return jnp.where(mask, positions % size, size)


def ring_positions(lengths: jax.Array, size: int) -> jax.Array:
    """Position that each slot holds after rows of `lengths` [B] tokens, [B, S]; negative where none."""
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(size)) % size


def ring_write(ring: jax.Array, slots: jax.Array, values: jax.Array) -> jax.Array:
    """`ring` [B, S, ...] with `values` [B, T, ...] at `slots` [B, T]; a slot that there is not drops its value."""
    return ring.at[jnp.arange(len(ring))[:, None], slots].set(values, mode="drop")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array,
    positions: jax.Array,
    key_positions: jax.Array,
    window: int | None,
) -> jax.Array:
    """Softmax, in float32, over each head's sink, whose share goes nowhere, and the last `window` keys up to the query.

    q [B, G, R, T, K] at `positions` [B, T], k and v [B, G, 1, S, K] at `key_positions` [B, S], negative where there is
    none, sinks [G, R] -> [B, G, R, T, K].
    """
    back = positions[:, :, None] - key_positions[:, None, :]  # [B, T, S]
    seen = (back >= 0) & (key_positions >= 0)[:, None, :]
    if window is not None:
        seen &= back < window
    scores = jnp.einsum("...tk,...sk->...ts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores += jnp.where(seen, 0.0, -jnp.inf)[:, None, None]  # [B, G, R, T, S]
    sinks = sinks.astype(jnp.float32)[..., None, None]
    largest = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), sinks))
    odds = jnp.exp(scores - largest)
    total = odds.sum(axis=-1, keepdims=True) + jnp.exp(sinks - largest)
    return ((odds.astype(v.dtype) @ v) / total).astype(v.dtype)


def attend_in_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array,
    positions: jax.Array,
    key_positions: jax.Array,
    window: int | None,
) -> jax.Array:
    """`attend` where queries and keys are the same tokens: of each block of queries only the keys that it may see."""
    blocks = []
    for start in range(0, q.shape[-2], QUERY_BLOCK):
        queries = slice(start, start + QUERY_BLOCK)
        keys = slice(max(start - window + 1, 0) if window is not None else 0, start + QUERY_BLOCK)
        known = k[..., keys, :], v[..., keys, :], sinks, positions[:, queries], key_positions[:, keys]
        blocks.append(attend(q[..., queries, :], *known, window))
    return jnp.concatenate(blocks, axis=-2)


def grouped_product(x: jax.Array, kernel: jax.Array, experts: jax.Array) -> jax.Array:
    """x [M, in], whose rows are in the order of their `experts` [M], through kernel [E, in, out] -> [M, out].

    Each expert's rows are padded to whole blocks, a matrix product each: at most E blocks more than the rows need,
    where `jax.lax.ragged_dot` multiplies, on a CPU, every row with every expert.
    """
    count = jnp.bincount(experts, length=len(kernel))
    blocks = -(-count // EXPERT_BLOCK)
    ends = jnp.cumsum(blocks)
    before = (ends - blocks) * EXPERT_BLOCK - (jnp.cumsum(count) - count)  # what padding moves an expert's rows by
    place = jnp.arange(len(x)) + before[experts]
    total = len(x) // EXPERT_BLOCK + len(kernel)
    owner = jnp.searchsorted(ends, jnp.arange(total), side="right").clip(max=len(kernel) - 1)
    padded = jnp.zeros((total * EXPERT_BLOCK, x.shape[1]), x.dtype).at[place].set(x, unique_indices=True)
    out = padded.reshape(total, EXPERT_BLOCK, -1) @ kernel[owner]
    return out.reshape(total * EXPERT_BLOCK, -1)[place]


class RMSNorm(nnx.Module):
    """x / rms(x) times a weight, in float32, in x's dtype."""

    def __init__(self, size: int, eps: float, param_dtype: Any) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        x_f32 = x.astype(jnp.float32)
        normed = x_f32 * jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + self.eps)
        return (self.scale[...].astype(jnp.float32) * normed).astype(x.dtype)


def linear(
    inputs: int, outputs: int, split: dict[str, Any], dtype: Any, param_dtype: Any, rngs: nnx.Rngs, bias: bool = True
) -> nnx.Linear:
    """A matrix [in, out]."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        kernel_init=nnx.initializers.normal(0.02),
        kernel_metadata=split,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class Attention(nnx.Module):
    def __init__(self, config: GptOssConfig, layer: int, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.head_dim, self.groups = config.head_dim, config.num_key_value_heads
        self.window = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, width, COLUMN, dtype, param_dtype, rngs)
        self.k_proj = linear(config.hidden_size, kv_width, COLUMN, dtype, param_dtype, rngs)
        self.v_proj = linear(config.hidden_size, kv_width, COLUMN, dtype, param_dtype, rngs)
        self.o_proj = linear(width, config.hidden_size, ROW, dtype, param_dtype, rngs)
        self.sinks = nnx.Param(jnp.zeros(config.num_attention_heads, param_dtype))

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        positions: jax.Array,
        key_positions: jax.Array,
        cache: tuple[jax.Array, jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """`cache` is keys and values [B, S, G, K] and the slots [B, T] that these tokens take."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = apply_rope(self.q_proj(x).reshape(heads), cos, sin)  # [B, T, H, K]
        k = apply_rope(self.k_proj(x).reshape(heads), cos, sin)  # [B, T, G, K]
        v = self.v_proj(x).reshape(heads)  # [B, T, G, K]
        if cache is not None:
            keys, values, slots = cache
            k = ring_write(keys, slots, k)  # [B, S, G, K]
            v = ring_write(values, slots, v)  # [B, S, G, K]
        stored = None if cache is None else (k, v)
        q, k, v = (states.reshape(*states.shape[:2], self.groups, -1, self.head_dim) for states in (q, k, v))
        q, k, v = (jnp.transpose(states, (0, 2, 3, 1, 4)) for states in (q, k, v))  # [B, G, R or 1, T or S, K]
        run = attend_in_blocks if cache is None else attend
        attended = run(q, k, v, self.sinks[...].reshape(self.groups, -1), positions, key_positions, self.window)
        attended = jnp.transpose(attended, (0, 3, 1, 2, 4)).reshape(*x.shape[:2], -1)
        return self.o_proj(attended), stored  # [B, T, D]


class ExpertLinear(nnx.Module):
    """One matrix [in, out] and bias for each expert."""

    def __init__(self, experts: int, inputs: int, outputs: int, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.dtype = dtype
        init = nnx.initializers.normal(0.02)
        self.kernel = nnx.Param(init(rngs.params(), (experts, inputs, outputs), param_dtype), **EXPERT)
        self.bias = nnx.Param(jnp.zeros((experts, outputs), param_dtype), **EXPERT_BIAS)

    def __call__(self, x: jax.Array, experts: jax.Array) -> jax.Array:
        """x [M, in], whose rows are in the order of their `experts` [M] -> [M, out]."""
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        if len(x) <= len(kernel):  # fewer rows than experts: read those that are asked for, and no other
            return jnp.einsum("mi,mio->mo", x, kernel[experts]) + bias[experts]
        return grouped_product(x, kernel, experts) + bias[experts]


class Experts(nnx.Module):
    def __init__(self, config: GptOssConfig, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        shape = (config.num_local_experts, config.hidden_size, config.intermediate_size)
        self.gate_proj = ExpertLinear(*shape, dtype, param_dtype, rngs)
        self.up_proj = ExpertLinear(*shape, dtype, param_dtype, rngs)
        self.down_proj = ExpertLinear(shape[0], shape[2], shape[1], dtype, param_dtype, rngs)

    def __call__(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        """x [N, D], `chosen` experts and their `weights` [N, C] -> [N, D]."""
        experts = chosen.reshape(-1)  # [N * C]
        order = jnp.argsort(experts)
        token = order // chosen.shape[1]
        experts, rows = experts[order], x[token]  # [N * C], [N * C, D]
        gate = jnp.minimum(self.gate_proj(rows, experts), self.limit)
        up = jnp.clip(self.up_proj(rows, experts), -self.limit, self.limit)
        out = self.down_proj((up + 1) * (gate * nnx.sigmoid(self.alpha * gate)), experts)
        return jnp.zeros_like(x).at[token].add(out * weights.reshape(-1)[order][:, None])


class MLP(nnx.Module):
    def __init__(self, config: GptOssConfig, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.chosen = config.num_experts_per_tok
        self.router = linear(config.hidden_size, config.num_local_experts, WHOLE, dtype, param_dtype, rngs)
        self.experts = Experts(config, dtype, param_dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = x.reshape(-1, x.shape[-1])  # [N, D]
        logits, chosen = jax.lax.top_k(self.router(tokens), self.chosen)  # [N, C]
        weights = nnx.softmax(logits.astype(jnp.float32)).astype(x.dtype)
        return self.experts(tokens, chosen, weights).reshape(x.shape)  # [B, T, D]


class Block(nnx.Module):
    def __init__(self, config: GptOssConfig, layer: int, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype)
        self.self_attn = Attention(config, layer, dtype, param_dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype)
        self.mlp = MLP(config, dtype, param_dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        positions: jax.Array,
        key_positions: jax.Array,
        cache: tuple[jax.Array, jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        attended, stored = self.self_attn(self.input_layernorm(x), cos, sin, positions, key_positions, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), stored  # [B, T, D]


class GptOssModel(nnx.Module):
    def __init__(self, config: GptOssConfig, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(0.02),
            embedding_metadata=COLUMN,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List([Block(config, layer, dtype, param_dtype, rngs) for layer in layers])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype)

    def __call__(
        self, ids: jax.Array, mask: jax.Array | None, cache: Cache | None, lengths: jax.Array | None
    ) -> tuple[jax.Array, list[jax.Array], Cache | None]:
        """See `GptOssForCausalLM.trunk`."""
        lengths = jnp.zeros(1, jnp.int32) if lengths is None else lengths
        mask = jnp.ones((1, ids.shape[1]), bool) if mask is None else mask
        positions = lengths[:, None] + jnp.cumsum(mask, axis=1) - 1  # [B, T]
        cos, sin = self.rope(positions)
        x = self.embed_tokens(ids)  # [B, T, D]
        states, keys, values = [x], [], []
        for layer, block in enumerate(self.layers):
            held, key_positions = None, jnp.where(mask, positions, -1)  # [B, T]
            if cache is not None:
                size = cache.keys[layer].shape[1]
                held = cache.keys[layer], cache.values[layer], ring_slots(positions, mask, size)
                key_positions = ring_positions(lengths + mask.sum(axis=1), size)  # [B, S]
            x, stored = block(x, cos, sin, positions, key_positions, held)
            states.append(x)
            if stored is not None:
                keys.append(stored[0])
                values.append(stored[1])
        return self.norm(x), states, None if cache is None else Cache(keys, values)

    def rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """cos and sin at `positions` [B, T], scaled: float32 [B, T, 1, K/2]."""
        frequencies, scale = inverse_frequencies(self.config)
        # Rounded before the cosine, as in torch: fused into it, angles of late positions would move.
        angles = jax.lax.optimization_barrier(positions[:, :, None, None].astype(jnp.float32) * frequencies)
        return jnp.cos(angles) * scale, jnp.sin(angles) * scale


class GptOssForCausalLM(nnx.Module):
    """gpt-oss with its head. `dtype` computes, `param_dtype` stores; they differ only in training."""

    def __init__(
        self, config: GptOssConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.model = GptOssModel(config, dtype, param_dtype, rngs)
        self.lm_head = linear(config.hidden_size, config.vocab_size, COLUMN, dtype, param_dtype, rngs, bias=False)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids [B, T] -> logits [B, T, V] of a full causal pass, in the compute dtype."""
        return self.logits(self.trunk(ids)[0])

    def trunk(
        self,
        ids: jax.Array,
        mask: jax.Array | None = None,
        cache: Cache | None = None,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, list[jax.Array], Cache | None]:
        """ids [B, T] -> what the head takes [B, T, D], hidden states (L + 1 of [B, T, D], un-normed), cache.

        `mask` [B, T] is true at tokens, false at padding (default: no padding). With a `cache`, `lengths` [B] says how
        many tokens each row holds already; a ring must have room for its window and the T tokens.
        """
        return self.model(ids, mask, cache, lengths)

    def logits(self, x: jax.Array) -> jax.Array:
        """The trunk's output [B, T, D] -> logits [B, T, V]."""
        return self.lm_head(x)

    def init_cache(self, batch: int, slots: int, fed: int) -> Cache:
        """Empty rings for up to `slots` tokens a row, of which at most `fed` are fed at once or forgotten again."""
        config = self.config
        shape = (config.num_key_value_heads, config.head_dim)
        sizes = [
            min(slots, config.sliding_window + fed) if kind == "sliding_attention" else slots
            for kind in config.layer_types
        ]
        rings = [jnp.zeros((batch, size, *shape), self.dtype) for size in sizes]
        return Cache(rings, [jnp.zeros_like(ring) for ring in rings])


#: What the Flax framework and the trainer build.
Model = GptOssForCausalLM
