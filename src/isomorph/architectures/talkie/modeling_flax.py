"""Talkie in Flax NNX.

What is unusual about it:
- rotary positions turn by -theta (the transpose of the textbook convention), halves split, before the norm of q and k;
- RMSNorm has no weight, in five places: embedding, attention input, MLP input, q and k, final; eps 2**-23, fp32 inside;
- each head's query has a gain; each branch of the residual stream has a gain; every block adds the normed embedding
  back, scaled; the head's matrix has a gain, multiplied into the weights;
- cos and sin are rounded to bfloat16 (`rope_table_dtype`) as in the authors' code, also when the model runs in fp32.

Shapes: B batch, T tokens fed, S slots of the cache, D hidden, H heads, K head_dim, F intermediate, V vocabulary.
Matrices carry the mesh axis "model" (tensor parallel); give ids the axis "data" to split the batch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

if TYPE_CHECKING:
    from .config import TalkieConfig

#: Keys and values of one block, each [B, S, H, K]; a model's cache is a list of them.
KeyValue = tuple[jax.Array, jax.Array]

# Which mesh axis splits each axis of a matrix. An annotation only: whoever has a mesh places the weights by it.
COLUMN: dict[str, Any] = {"out_sharding": (None, "model"), "eager_sharding": False}
ROW: dict[str, Any] = {"out_sharding": ("model", None), "eager_sharding": False}


def rms_norm(x: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis, computed in float32, in x's dtype."""
    x_f32 = x.astype(jnp.float32)
    return (x_f32 * jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + eps)).astype(x.dtype)


@lru_cache
def rope_tables(positions: int, head_dim: int, theta: float, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position, [positions, K/2], rounded to `dtype`.

    In numpy, not in the compiled program: there the product may be fused into cos unrounded, which moves the angles
    of late positions by 1e-4.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # The power in float64: numpy's float32 power misses by an ulp, which at position 2000 is a visible angle.
    inverse_frequencies = np.float32(1.0) / np.power(theta, exponents.astype(np.float64)).astype(np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * inverse_frequencies[None, :]
    rounded = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    return np.cos(angles).astype(rounded), np.sin(angles).astype(rounded)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the halves of each head by -theta: x [B, T, H, K], cos and sin [B, T, 1, K/2]."""
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1).astype(x.dtype)


class HeadGain(nnx.Module):
    """One gain for each head's query."""

    def __init__(self, heads: int, param_dtype: Any) -> None:
        self.head_g = nnx.Param(jnp.ones((heads,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.head_g[...].astype(x.dtype)[:, None]  # [B, T, H, K]


class ActGain(nnx.Module):
    """One gain for a branch of the residual stream."""

    def __init__(self, initial: float, param_dtype: Any) -> None:
        self.a_g = nnx.Param(jnp.full((1,), initial, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.a_g[...].astype(x.dtype)


class WeightGain(nnx.Module):
    """One gain for a matrix, multiplied into its weights."""

    def __init__(self, param_dtype: Any) -> None:
        self.w_g = nnx.Param(jnp.ones((1,), param_dtype))

    def __call__(self, weight: jax.Array) -> jax.Array:
        return weight * self.w_g[...].astype(weight.dtype)


def linear(inputs: int, outputs: int, split: dict, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """A matrix [in, out] without bias."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        kernel_init=nnx.initializers.normal(inputs**-0.5),
        kernel_metadata=split,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class Attention(nnx.Module):
    def __init__(self, config: TalkieConfig, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.head_shape = (config.num_attention_heads, config.head_dim)
        self.eps = config.rms_norm_eps
        width = config.num_attention_heads * config.head_dim
        self.attn_query = linear(config.hidden_size, width, COLUMN, dtype, param_dtype, rngs)
        self.attn_key = linear(config.hidden_size, width, COLUMN, dtype, param_dtype, rngs)
        self.attn_value = linear(config.hidden_size, width, COLUMN, dtype, param_dtype, rngs)
        self.attn_resid = linear(width, config.hidden_size, ROW, dtype, param_dtype, rngs)
        self.head_gain = HeadGain(config.num_attention_heads, param_dtype)

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        seen: jax.Array,
        cache: KeyValue | None,
        slots: jax.Array,
    ) -> tuple[jax.Array, KeyValue | None]:
        """`seen` [B, 1, T, S] is true where a query may look; `slots` [B, T] are those that these tokens take."""
        heads = (*x.shape[:2], *self.head_shape)
        q = self.attn_query(x).reshape(heads)  # [B, T, H, K]
        k = self.attn_key(x).reshape(heads)  # [B, T, H, K]
        v = self.attn_value(x).reshape(heads)  # [B, T, H, K]
        q = self.head_gain(rms_norm(apply_rope(q, cos, sin), self.eps))
        k = rms_norm(apply_rope(k, cos, sin), self.eps)
        if cache is not None:
            rows = jnp.arange(len(x))[:, None]
            k = cache[0].at[rows, slots].set(k, mode="drop")  # [B, S, H, K]
            v = cache[1].at[rows, slots].set(v, mode="drop")  # [B, S, H, K]
            cache = (k, v)
        scale = self.head_shape[1] ** -0.5
        if q.dtype == jnp.float16:
            # Sums in float32 of float16 products are not to be had on every backend; wider factors are.
            q, k, v = (states.astype(jnp.float32) for states in (q, k, v))
        out = jax.nn.dot_product_attention(q, k, v, mask=seen, scale=scale)  # [B, T, H, K]
        return self.attn_resid(out.astype(x.dtype).reshape(*x.shape[:2], -1)), cache  # [B, T, D]


class MLP(nnx.Module):
    def __init__(self, config: TalkieConfig, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.mlp_gate = linear(hidden, inner, COLUMN, dtype, param_dtype, rngs)
        self.mlp_linear = linear(hidden, inner, COLUMN, dtype, param_dtype, rngs)
        self.mlp_resid = linear(inner, hidden, ROW, dtype, param_dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mlp_resid(nnx.silu(self.mlp_gate(x)) * self.mlp_linear(x))  # [B, T, F] -> [B, T, D]


class Block(nnx.Module):
    def __init__(self, config: TalkieConfig, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.eps = config.rms_norm_eps
        # 2L branches of unit size each add up to a stream of about unit size.
        branch_gain = (2 * config.num_hidden_layers) ** -0.5
        self.attn = Attention(config, dtype, param_dtype, rngs)
        self.attn_gain = ActGain(branch_gain, param_dtype)
        self.mlp = MLP(config, dtype, param_dtype, rngs)
        self.mlp_gain = ActGain(branch_gain, param_dtype)
        self.embed_skip = ActGain(0.0, param_dtype)

    def __call__(
        self,
        embedded: jax.Array,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        seen: jax.Array,
        cache: KeyValue | None,
        slots: jax.Array,
    ) -> tuple[jax.Array, KeyValue | None]:
        attended, cache = self.attn(rms_norm(x, self.eps), cos, sin, seen, cache, slots)
        x = x + self.attn_gain(attended)
        x = x + self.mlp_gain(self.mlp(rms_norm(x, self.eps)))
        return x + self.embed_skip(embedded), cache  # [B, T, D]


class TalkieModel(nnx.Module):
    def __init__(self, config: TalkieConfig, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            # Normed before use, so the scale only sets how fast training turns a row.
            embedding_init=nnx.initializers.normal(0.1),
            embedding_metadata=COLUMN,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(config, dtype, param_dtype, rngs) for _ in range(config.num_hidden_layers)])

    def __call__(
        self,
        ids: jax.Array,
        mask: jax.Array | None = None,
        cache: list[KeyValue] | None = None,
        lengths: jax.Array | None = None,
    ) -> tuple[list[jax.Array], list[KeyValue] | None]:
        """ids [B, T] -> hidden states (block 0's input, each block's output; L + 1 of [B, T, D], un-normed), cache.

        `mask` [B, T] is true at tokens, false at padding (default: no padding). With a `cache`, `lengths` [B] says how
        many tokens each row holds already: the one at position p lies at slot p.
        """
        config = self.config
        lengths = jnp.zeros(1, jnp.int32) if lengths is None else lengths
        mask = jnp.ones((1, ids.shape[1]), bool) if mask is None else mask
        positions = lengths[:, None] + jnp.cumsum(mask, axis=1) - 1  # [B, T]
        # Padding goes to a slot that there is not, after every query's position.
        slots = jnp.where(mask, positions, jnp.iinfo(jnp.int32).max)  # [B, T]
        keys = slots if cache is None else jnp.arange(cache[0][0].shape[1])[None, :]  # [B, S]
        seen = (keys[:, None, :] <= positions[:, :, None])[:, None]  # [B, 1, T, S]
        tables = rope_tables(
            config.max_position_embeddings, config.head_dim, config.rope_theta, config.rope_table_dtype
        )
        # A position past the table gives NaN, which no reader takes for an answer.
        cos, sin = (jnp.asarray(table).at[positions].get(mode="fill", fill_value=jnp.nan) for table in tables)
        cos, sin = cos[:, :, None, :], sin[:, :, None, :]  # [B, T, 1, K/2]
        x = embedded = rms_norm(self.embed(ids), config.rms_norm_eps)  # [B, T, D]
        states: list[jax.Array] = [x]
        filled: list[Any] = []
        for index, block in enumerate(self.blocks):
            x, key_value = block(embedded, x, cos, sin, seen, None if cache is None else cache[index], slots)
            states.append(x)
            filled.append(key_value)
        return states, None if cache is None else filled


class TalkieForCausalLM(nnx.Module):
    """Talkie with its head. `dtype` computes, `param_dtype` stores; they differ only in training."""

    def __init__(
        self, config: TalkieConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.model = TalkieModel(config, dtype, param_dtype, rngs)
        init = nnx.initializers.normal(config.hidden_size**-1.0)  # training starts from nearly equal odds
        self.lm_head = nnx.Param(init(rngs.params(), (config.vocab_size, config.hidden_size), param_dtype), **ROW)
        self.lm_head_gain = WeightGain(param_dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids [B, T] -> logits [B, T, V] of a full causal pass, in the compute dtype."""
        return self.logits(self.trunk(ids)[0])

    def trunk(
        self,
        ids: jax.Array,
        mask: jax.Array | None = None,
        cache: list[KeyValue] | None = None,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, list[jax.Array], list[KeyValue] | None]:
        """What the head takes [B, T, D], hidden states and cache; see `TalkieModel`."""
        states, cache = self.model(ids, mask, cache, lengths)
        return states[-1], states, cache

    def logits(self, x: jax.Array) -> jax.Array:
        """Last block's output [B, T, D] -> logits [B, T, V]."""
        weight = self.lm_head_gain(self.lm_head[...].astype(x.dtype))  # [V, D]
        return rms_norm(x, self.config.rms_norm_eps) @ weight.T  # [B, T, V]

    def init_cache(self, batch: int, slots: int, fed: int) -> list[KeyValue]:
        """An empty cache, whatever is `fed` at once: zeros, not None, so that every step has the same shapes."""
        config = self.config
        shape = (batch, slots, config.num_attention_heads, config.head_dim)
        return [(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(config.num_hidden_layers)]


#: What the Flax framework and the trainer build.
Model = TalkieForCausalLM
