"""GELU-GPT (nanochat's GPT, also with a tied head and GELU) in Flax NNX.

What is unusual about it:
- RMSNorm has no weight: embedding, attention input, MLP input, q and k, final; fp32 inside, eps from the config;
- smear: each embedding, once normed, takes on a gated share of the one before it, as that one was before its own smear;
- every block reads `resid_lambda * x + x0_lambda * x0`, where x0 is the smeared embedding;
- rotary positions turn by -theta (the transpose of the textbook convention), halves split; q and k are normed after
  that and multiplied by 1.2 each;
- values of every second layer, counted from the last, take on a gated embedding of the token;
- each layer looks back over a window, itself also seen: `i - j <= window`; the pattern SSSL repeats, the last is long;
- backout: a share of block L//2's output is subtracted before the final norm; logits are capped to 15 * tanh(x / 15).

Shapes: B batch, T tokens fed, S slots of a cache, D hidden, H heads, G key-value heads, K head_dim, F intermediate,
V vocabulary. The tree is flat, as in the published Orbax checkpoints. Mesh axes: "fsdp" and "model" (tensor parallel)
split the weights; give ids the axes ("data", "fsdp") to split the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

if TYPE_CHECKING:
    from .config import GeluGPTConfig

#: Sharpens attention; on q and k each (nanochat).
QK_SCALE = 1.2
#: Logits stay within -15..15 (nanochat).
SOFT_CAP = 15.0
#: Channels of the normed input that open the gates of smear and of the value embeddings (nanochat).
SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS = 24, 12

#: Tokens of a row whose queries, and whose logits in the loss, are computed at once: what fits a processor's cache.
QUERY_BLOCK, LOSS_BLOCK = 256, 256

#: config.mlp -> activation. GELU is its tanh approximation, as `jax.nn.gelu` has it by default.
ACTIVATIONS = {"gelu": nnx.gelu, "relu2": lambda x: jnp.square(nnx.relu(x))}

# Which mesh axes split each axis of a matrix. An annotation only: whoever has a mesh places the weights by it.
COLUMN: dict[str, Any] = {"out_sharding": ("fsdp", "model"), "eager_sharding": False}
ROW: dict[str, Any] = {"out_sharding": ("model", "fsdp"), "eager_sharding": False}
WHOLE: dict[str, Any] = {"out_sharding": (None, None), "eager_sharding": False}

#: What computes a product, called as `multiply` below, and attention: (q [B, T, H, K], k and v [B, T, G, K], window)
#: -> [B, T, H, K].
Multiply = Callable[..., jax.Array]
Attend = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]

#: Keys and values of one layer, each [B, S, G, K].
KeyValue = tuple[jax.Array, jax.Array]


class Cache(NamedTuple):
    """What decoding remembers: rings of slots, in which the token at position p lies at slot p modulo their size.

    `embedded` [B, S, D] holds normed embeddings as they were before smear, which looks back by one. A ring need not
    have more slots than its layer looks back and what is fed at once.
    """

    embedded: jax.Array
    layers: list[KeyValue]


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


def multiply(a: jax.Array, b: jax.Array, transpose_a: bool = False, transpose_b: bool = False) -> jax.Array:
    """a [M, K] @ b [K, N], each transposed first where that is said; float32 where a is, as in a weight's gradient."""
    if not transpose_a:
        return a @ (b.T if transpose_b else b)
    # XLA on a CPU transposes the first factor while it multiplies: longer than the product unless that is narrow.
    if a.shape[1] <= b.shape[1]:
        return jnp.einsum("km,kn->mn", a, b, preferred_element_type=jnp.float32)
    return jnp.einsum("kn,km->nm", b, a, preferred_element_type=jnp.float32).T


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: jax.Array, kernel: jax.Array, multiply: Multiply) -> jax.Array:
    """x [..., in] @ kernel [in, out], its backward pass written out, so that `multiply` sees what is transposed."""
    return multiply(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)


def project_forward(
    x: jax.Array, kernel: jax.Array, multiply: Multiply
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return project(x, kernel, multiply), (x, kernel)


def project_backward(
    multiply: Multiply, factors: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = factors
    gradient = gradient.reshape(-1, gradient.shape[-1])
    d_kernel = multiply(x.reshape(-1, x.shape[-1]), gradient, transpose_a=True)
    return multiply(gradient, kernel, transpose_b=True).reshape(x.shape), d_kernel.astype(kernel.dtype)


project.defvjp(project_forward, project_backward)


@lru_cache
def dot_general(multiply: Multiply) -> Callable[..., jax.Array]:
    """`project` as `nnx.Linear` calls its product: the dimensions are always these."""
    return lambda x, kernel, *_, **__: project(x, kernel, multiply)


def linear(
    inputs: int,
    outputs: int,
    split: dict[str, Any],
    init: Any,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
    multiply: Multiply = multiply,
) -> nnx.Linear:
    """A matrix [in, out] without bias, over the mesh axes `split`."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        kernel_init=init,
        kernel_metadata=split,
        dot_general=dot_general(multiply),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def uniform(low: float, high: float) -> Any:
    """An initializer that draws from low..high."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, low, high)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, key_positions: jax.Array, window: int
) -> jax.Array:
    """Softmax attention, in float32, over the keys at most `window` before each query and not after it.

    q [B, G, H/G, T, K] at `positions` [B, T], k and v [B, G, 1, S, K] at `key_positions` [B, S], negative where there
    is none -> [B, G, H/G, T, K].
    """
    back = positions[:, :, None] - key_positions[:, None, :]
    seen = (back >= 0) & (back <= window) & (key_positions >= 0)[:, None, :]  # [B, T, S]
    scores = jnp.einsum("...tk,...sk->...ts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    # Behind a barrier, or XLA on a CPU computes it anew for every head.
    bias = jax.lax.optimization_barrier(jnp.where(seen, 0.0, -jnp.inf))
    # No maximum to subtract: normed queries and keys keep scores within QK_SCALE ** 2 * sqrt(K).
    odds = jnp.exp(scores + bias[:, None, None])  # [B, G, H/G, T, S]
    total = jnp.maximum(odds.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)  # padding sees nothing
    return ((odds.astype(v.dtype) @ v) / total).astype(v.dtype)


def attend_in_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, key_positions: jax.Array, window: int
) -> jax.Array:
    """`attend` where queries and keys are the same tokens: of each block of queries only the keys that it may see."""
    blocks = []
    for start in range(0, q.shape[-2], QUERY_BLOCK):
        queries = slice(start, start + QUERY_BLOCK)
        keys = slice(max(start - window, 0), start + QUERY_BLOCK)
        blocks.append(
            attend(
                q[..., queries, :],
                k[..., keys, :],
                v[..., keys, :],
                positions[:, queries],
                key_positions[:, keys],
                window,
            )
        )
    return jnp.concatenate(blocks, axis=-2)


def cross_entropy(
    x: jax.Array, weight: jax.Array, targets: jax.Array, vocab_size: int, multiply: Multiply = multiply
) -> jax.Array:
    """-log softmax(capped x @ weight.T)[target] in nats, summed over the targets that are not negative.

    x [B, T, D], weight [V or more, D], targets [B, T]. In parts, each with its gradient: [B, T, V] never exists.
    """
    parts = -(-x.shape[1] // LOSS_BLOCK)
    missing = parts * LOSS_BLOCK - x.shape[1] if parts > 1 else 0
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, missing)), constant_values=-1)
    split = (len(x), parts, -1)
    x, targets = x.reshape(*split, x.shape[-1]).swapaxes(0, 1), targets.reshape(split).swapaxes(0, 1)
    return _cross_entropy(x, targets, weight, vocab_size, multiply)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _cross_entropy(
    x: jax.Array, targets: jax.Array, weight: jax.Array, vocab_size: int, multiply: Multiply
) -> jax.Array:
    def of_part(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _part_of_cross_entropy(*part, weight, vocab_size, multiply)[0]

    return jax.lax.map(of_part, (x, targets)).sum()


def _cross_entropy_forward(
    x: jax.Array, targets: jax.Array, weight: jax.Array, vocab_size: int, multiply: Multiply
) -> tuple[Any, Any]:
    def add(carry: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        loss, d_logits = _part_of_cross_entropy(*part, weight, vocab_size, multiply)
        d_logits = d_logits.astype(weight.dtype).reshape(-1, len(weight))  # [B * T, V]
        d_weight = multiply(part[0].reshape(-1, part[0].shape[-1]), d_logits, transpose_a=True)  # [D, V]
        return (carry[0] + loss, carry[1] + d_weight), multiply(d_logits, weight).reshape(part[0].shape)

    (loss, d_weight), d_x = jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(weight.T.shape)), (x, targets))
    return loss, (d_x, d_weight.T.astype(weight.dtype))


def _cross_entropy_backward(
    _: int, __: Multiply, gradients: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[Any, ...]:
    d_x, d_weight = (known * gradient.astype(known.dtype) for known in gradients)
    return d_x, None, d_weight


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _part_of_cross_entropy(
    x: jax.Array, targets: jax.Array, weight: jax.Array, vocab_size: int, multiply: Multiply
) -> tuple[jax.Array, jax.Array]:
    """The summed loss and its gradient by the logits [B, T, V] before the cap."""
    logits = multiply(x.reshape(-1, x.shape[-1]), weight, transpose_b=True).reshape(*targets.shape, -1)  # [B, T, V]
    capped = jnp.tanh(logits.astype(jnp.float32) / SOFT_CAP)  # in -1..1
    columns = jnp.arange(len(weight))
    odds = jnp.exp(SOFT_CAP * capped - SOFT_CAP)  # no maximum to subtract: the cap is one
    if vocab_size < len(weight):
        odds = jnp.where(columns < vocab_size, odds, 0)
    total, hit = odds.sum(axis=-1, keepdims=True), columns == targets[..., None]
    reached = jnp.take_along_axis(capped, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    losses = jnp.log(total[..., 0]) + SOFT_CAP - SOFT_CAP * reached
    d_logits = (odds / total - hit) * (1 - capped * capped) * (targets >= 0)[..., None]
    return jnp.sum(losses, where=targets >= 0), d_logits


class Attention(nnx.Module):
    def __init__(
        self,
        config: GeluGPTConfig,
        layer: int,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
        multiply: Multiply,
        attend: Attend | None,
    ) -> None:
        self.attend = attend
        self.eps = config.rms_norm_eps
        self.head_dim = config.head_dim
        self.kv_heads = config.n_kv_head
        self.window = config.windows[layer]
        bound = (3 / config.n_embd) ** 0.5  # uniform with a spread of n_embd ** -0.5
        width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.c_q = linear(config.n_embd, width, COLUMN, uniform(-bound, bound), dtype, param_dtype, rngs, multiply)
        self.c_k = linear(config.n_embd, kv_width, COLUMN, uniform(-bound, bound), dtype, param_dtype, rngs, multiply)
        self.c_v = linear(config.n_embd, kv_width, COLUMN, uniform(-bound, bound), dtype, param_dtype, rngs, multiply)
        self.c_proj = linear(width, config.n_embd, ROW, nnx.initializers.zeros, dtype, param_dtype, rngs, multiply)
        if config.has_value_embedding(layer):
            self.ve_gate = linear(
                VALUE_GATE_CHANNELS, config.n_kv_head, WHOLE, uniform(0.0, 0.02), dtype, param_dtype, rngs
            )

    def __call__(
        self,
        x: jax.Array,
        value_embedding: jax.Array | None,
        cos: jax.Array,
        sin: jax.Array,
        positions: jax.Array,
        mask: jax.Array | None,
        lengths: jax.Array,
        cache: KeyValue | None,
    ) -> tuple[jax.Array, KeyValue | None]:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.c_q(x).reshape(heads)  # [B, T, H, K]
        k = self.c_k(x).reshape(heads)  # [B, T, G, K]
        v = self.c_v(x).reshape(heads)  # [B, T, G, K]
        if value_embedding is not None:
            gate = 3 * nnx.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))  # [B, T, G]
            v = v + gate[..., None] * value_embedding.reshape(heads)
        q = rms_norm(apply_rope(q, cos, sin), self.eps) * QK_SCALE
        k = rms_norm(apply_rope(k, cos, sin), self.eps) * QK_SCALE
        if mask is None and self.attend is not None:
            return self.c_proj(self.attend(q, k, v, self.window).reshape(*x.shape[:2], -1)), None
        if cache is not None:
            assert mask is not None
            size = cache[0].shape[1]
            slots = ring_slots(positions, mask, size)
            cache = ring_write(cache[0], slots, k), ring_write(cache[1], slots, v)  # [B, S, G, K]
            k, v = cache
            key_positions = ring_positions(lengths + mask.sum(axis=1), size)  # [B, S]
        else:
            key_positions = positions if mask is None else jnp.where(mask, positions, -1)  # [B, T]
        if q.dtype == jnp.float16:
            # Sums in float32 of float16 products are not to be had on every backend; wider factors are.
            q, k, v = (states.astype(jnp.float32) for states in (q, k, v))
        q, k, v = (states.reshape(*states.shape[:2], self.kv_heads, -1, self.head_dim) for states in (q, k, v))
        q, k, v = (jnp.transpose(states, (0, 2, 3, 1, 4)) for states in (q, k, v))  # [B, G, H/G or 1, T or S, K]
        run = attend_in_blocks if cache is None else attend
        attended = run(q, k, v, positions, key_positions, self.window).astype(x.dtype)  # [B, G, H/G, T, K]
        return self.c_proj(jnp.transpose(attended, (0, 3, 1, 2, 4)).reshape(*x.shape[:2], -1)), cache  # [B, T, D]


class MLP(nnx.Module):
    def __init__(self, config: GeluGPTConfig, dtype: Any, param_dtype: Any, rngs: nnx.Rngs, multiply: Multiply) -> None:
        self.activation = ACTIVATIONS[config.mlp]
        bound = 0.4 * (3 / config.n_embd) ** 0.5
        inner = 4 * config.n_embd
        self.c_fc = linear(config.n_embd, inner, COLUMN, uniform(-bound, bound), dtype, param_dtype, rngs, multiply)
        self.c_proj = linear(inner, config.n_embd, ROW, nnx.initializers.zeros, dtype, param_dtype, rngs, multiply)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(self.activation(self.c_fc(x)))  # [B, T, F] -> [B, T, D]


class Block(nnx.Module):
    def __init__(
        self,
        config: GeluGPTConfig,
        layer: int,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
        multiply: Multiply,
        attend: Attend | None,
    ) -> None:
        self.eps = config.rms_norm_eps
        self.attn = Attention(config, layer, dtype, param_dtype, rngs, multiply, attend)
        self.mlp = MLP(config, dtype, param_dtype, rngs, multiply)

    def __call__(
        self,
        x: jax.Array,
        value_embedding: jax.Array | None,
        cos: jax.Array,
        sin: jax.Array,
        positions: jax.Array,
        mask: jax.Array | None,
        lengths: jax.Array,
        cache: KeyValue | None,
    ) -> tuple[jax.Array, KeyValue | None]:
        normed = rms_norm(x, self.eps)
        attended, cache = self.attn(normed, value_embedding, cos, sin, positions, mask, lengths, cache)
        x = x + attended
        return x + self.mlp(rms_norm(x, self.eps)), cache  # [B, T, D]


class GeluGPTModel(nnx.Module):
    """The trunk. `dtype` computes, `param_dtype` stores; with `remat` the backward pass keeps block inputs only.

    `multiply` computes the products of whole rows; `attend`, where given, attention when no row is padded or cached.
    """

    def __init__(
        self,
        config: GeluGPTConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        multiply: Multiply = multiply,
        attend: Attend | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.multiply = multiply
        layers, bound = config.n_layer, (3 / config.n_embd) ** 0.5
        depth = jnp.arange(layers, dtype=jnp.float32) / max(layers - 1, 1)

        def embedding(width: int, init: Any) -> nnx.Embed:
            return nnx.Embed(
                config.padded_vocab_size,
                width,
                embedding_init=init,
                embedding_metadata=ROW,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        # Normed as input, so its scale is free: as a tied head it starts from odds of about one (nanochat's own: 0.8).
        spread = config.n_embd**-0.5 if config.tie_embeddings else 0.8
        self.wte = embedding(config.n_embd, nnx.initializers.normal(spread))
        self.blocks = nnx.List(
            [Block(config, layer, dtype, param_dtype, rngs, multiply, attend) for layer in range(layers)]
        )
        self.value_embeds = nnx.Dict(
            {
                str(layer): embedding(config.n_kv_head * config.head_dim, uniform(-bound, bound))
                for layer in range(layers)
                if config.has_value_embedding(layer)
            }
        )
        self.smear_gate = linear(SMEAR_GATE_CHANNELS, 1, WHOLE, uniform(0.0, 0.02), dtype, param_dtype, rngs)
        self.smear_lambda = nnx.Param(jnp.zeros(1, param_dtype))
        self.backout_lambda = nnx.Param(jnp.full(1, 0.2, param_dtype))
        self.resid_lambdas = nnx.Param((1.15 - 0.10 * depth).astype(param_dtype))
        self.x0_lambdas = nnx.Param((0.20 - 0.15 * depth).astype(param_dtype))

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
        config = self.config
        lengths = jnp.zeros(1, jnp.int32) if lengths is None else lengths
        whole = mask is None and cache is None
        mask = jnp.ones((1, ids.shape[1]), bool) if mask is None else mask
        positions = lengths[:, None] + jnp.cumsum(mask, axis=1) - 1  # [B, T]
        tables = rope_tables(config.max_position_embeddings, config.head_dim, config.rope_base, config.rope_table_dtype)
        # A position past the table gives NaN, which no reader takes for an answer.
        cos, sin = (jnp.asarray(table).at[positions].get(mode="fill", fill_value=jnp.nan) for table in tables)
        cos, sin = cos[:, :, None, :], sin[:, :, None, :]  # [B, T, 1, K/2]

        x = rms_norm(self.wte(ids), config.rms_norm_eps)  # [B, T, D]
        x, embedded = self.smear(x, positions, mask, None if cache is None else cache.embedded, lengths)
        x0, backout = x, x
        states: list[jax.Array] = []
        layers: list[Any] = []
        run = nnx.remat(Block.__call__) if self.remat else Block.__call__
        for layer, block in enumerate(self.blocks):
            x = self.mix(x, self.resid_lambdas[layer], x0, self.x0_lambdas[layer])
            states = states or [x]  # block 0 reads the mixture
            value_embedding = self.value_embeds[str(layer)](ids) if config.has_value_embedding(layer) else None
            held = None if cache is None else cache.layers[layer]
            x, held = run(block, x, value_embedding, cos, sin, positions, None if whole else mask, lengths, held)
            layers.append(held)
            if layer == config.n_layer // 2:
                backout = x
            states.append(x)
        x = self.mix(x, 1.0, backout, -self.backout_lambda[...])
        return rms_norm(x, config.rms_norm_eps), states, None if embedded is None else Cache(embedded, layers)

    def smear(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        ring: jax.Array | None,
        lengths: jax.Array,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Normed embeddings x [B, T, D], each with a share of the one before it, and `ring` with x in it."""
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
        if ring is not None:
            last = (lengths - 1) % ring.shape[1]
            before = before.at[:, 0].set(ring[jnp.arange(len(ring)), last])
            ring = ring_write(ring, ring_slots(positions, mask, ring.shape[1]), x)
        gate = self.smear_lambda[...] * nnx.sigmoid(self.smear_gate(x[..., :SMEAR_GATE_CHANNELS]))  # [B, T, 1]
        return self.mix(x, 1.0, jnp.where((positions > 0)[:, :, None], before, 0), gate), ring

    @staticmethod
    def mix(x: jax.Array, scale: Any, other: jax.Array, other_scale: Any) -> jax.Array:
        """scale * x + other_scale * other, in float32, in x's dtype."""
        return (scale * x.astype(jnp.float32) + other_scale * other.astype(jnp.float32)).astype(x.dtype)


class GeluGPTForCausalLM(GeluGPTModel):
    """GELU-GPT with its head: a matrix of its own, or the token embedding."""

    def __init__(
        self,
        config: GeluGPTConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        multiply: Multiply = multiply,
        attend: Attend | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            config, dtype=dtype, param_dtype=param_dtype, remat=remat, multiply=multiply, attend=attend, rngs=rngs
        )
        if not config.tie_embeddings:
            init = nnx.initializers.normal(0.001)
            self.lm_head = linear(
                config.n_embd, config.padded_vocab_size, COLUMN, init, dtype, param_dtype, rngs, multiply
            )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids [B, T] -> logits, float32 [B, T, V], of a full causal pass."""
        return self.logits(self.trunk(ids)[0])

    def logits(self, x: jax.Array) -> jax.Array:
        """The trunk's output [B, T, D] -> logits, float32 [B, T, V]: without padded rows, capped."""
        logits = self.wte.attend(x) if self.config.tie_embeddings else self.lm_head(x)
        logits = logits[..., : self.config.vocab_size].astype(jnp.float32)
        return SOFT_CAP * jnp.tanh(logits / SOFT_CAP)

    def loss(self, ids: jax.Array, targets: jax.Array) -> jax.Array:
        """Mean cross-entropy, in nats, over the targets [B, T] that are not negative."""
        return self.summed_loss(ids, targets) / jnp.maximum(jnp.sum(targets >= 0), 1)

    def summed_loss(self, ids: jax.Array, targets: jax.Array) -> jax.Array:
        """Cross-entropy, in nats, summed over the targets [B, T] that are not negative; logits are never held whole."""
        x, _, _ = self.trunk(ids)
        weight = self.wte.embedding[...] if self.config.tie_embeddings else self.lm_head.kernel[...].T  # [V, D]
        return cross_entropy(x, weight.astype(x.dtype), targets, self.config.vocab_size, self.multiply)

    def init_cache(self, batch: int, slots: int, fed: int) -> Cache:
        """Empty rings for up to `slots` tokens a row, of which at most `fed` are fed at once or forgotten again."""
        config = self.config
        shape = (config.n_kv_head, config.head_dim)
        rings = [(batch, min(slots, window + fed), *shape) for window in config.windows]
        return Cache(
            jnp.zeros((batch, min(slots, 1 + fed), config.n_embd), self.dtype),
            [(jnp.zeros(ring, self.dtype), jnp.zeros(ring, self.dtype)) for ring in rings],
        )


#: What the Flax framework and the trainer build.
Model = GeluGPTForCausalLM
