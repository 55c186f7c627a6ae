"""GELU-GPT for MLX: a model file of mlx-lm (0.32), complete in itself so that a published folder can ship it.

What is unusual about it:
- RMSNorm has no weight: embedding, attention input, MLP input, q and k, final; fp32 inside, eps from the config;
- smear: each embedding, once normed, takes on a gated share of the one before it, as that one was before its own smear;
- every block reads `resid_lambda * x + x0_lambda * x0`, where x0 is the smeared embedding;
- rotary positions turn by -theta (the transpose of the textbook convention), halves split; q and k are normed after
  that and multiplied by 1.2 each;
- values of every second layer, counted from the last, take on a gated embedding of the token;
- each layer looks back over a window, itself also seen: `i - j <= window`; the pattern SSSL repeats, the last is long;
- backout: a share of block L//2's output is subtracted before the final norm; logits are capped to 15 * tanh(x / 15).

mlx-lm loads it through `"model_file": "modeling_mlx.py"` in config.json and `trust_remote_code=True`. What smear
remembers is a cache of mlx-lm's own beside layer 0's (see `make_cache`), so it goes wherever keys and values go.

Shapes: B batch, T tokens fed, S slots of a cache, D hidden, H heads, G key-value heads, K head_dim, F intermediate,
V vocabulary, P positions in the tables.
"""

# No `from __future__ import annotations`: mlx-lm runs a model_file outside sys.modules, where a dataclass could not
# resolve its annotations. No `mx.compile`, hence no `nn.relu2`: on a CPU it asks for a C++ compiler.
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import CacheList, RotatingKVCache

Rope = Callable[[mx.array], mx.array]

#: Sharpens attention; on q and k each (nanochat).
QK_SCALE = 1.2
#: Logits stay within -15..15 (nanochat).
SOFT_CAP = 15.0
#: Channels of the normed input that open the gates of smear and of the value embeddings (nanochat).
SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS = 24, 12


@dataclass
class ModelArgs(BaseModelArgs):
    """The keys of config.json that the network needs; defaults are those of the published 261M."""

    model_type: str = "gelu_gpt"
    sequence_len: int = 1024
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 12
    n_embd: int = 768
    window_pattern: str = "SSSL"
    tie_embeddings: bool = True
    rope_base: float = 100_000.0
    pad_vocab_size_to: int = 64
    mlp: str = "gelu"
    rms_norm_eps: float = 1e-6
    rope_table_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.mlp not in ACTIVATIONS:
            raise ValueError(f"mlp must be one of {', '.join(ACTIVATIONS)}, found {self.mlp!r}")
        if self.rope_table_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"rope_table_dtype must be bfloat16 or float32, found {self.rope_table_dtype!r}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window_pattern must be made of S and L, found {self.window_pattern!r}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.pad_vocab_size_to) * self.pad_vocab_size_to

    @property
    def windows(self) -> tuple[int, ...]:
        """How many tokens before itself each layer sees: short is a quarter of the sequence in whole tiles of 128."""
        lookback = {"S": -(-self.sequence_len // 4 // 128) * 128, "L": self.sequence_len}
        kinds = (self.window_pattern[layer % len(self.window_pattern)] for layer in range(self.n_layer - 1))
        return (*(lookback[kind] for kind in kinds), self.sequence_len)

    def has_value_embedding(self, layer: int) -> bool:
        return layer % 2 == (self.n_layer - 1) % 2


def rms_norm(x: mx.array, eps: float) -> mx.array:
    """x / rms(x) over the last axis, computed in float32, in x's dtype."""
    return mx.fast.rms_norm(x, None, eps)


def gelu(x: mx.array) -> mx.array:
    """GELU's tanh approximation, rounded once."""
    wide = x.astype(mx.float32)
    return (0.5 * wide * (1 + mx.tanh((2 / np.pi) ** 0.5 * (wide + 0.044715 * wide**3)))).astype(x.dtype)


def relu2(x: mx.array) -> mx.array:
    return mx.square(mx.maximum(x, 0))


#: config.mlp -> activation.
ACTIVATIONS = {"gelu": gelu, "relu2": relu2}


def rope_periods(args: ModelArgs) -> np.ndarray:
    """rope_base^(2i/K), positions that each channel pair takes to turn by one radian, float32 [K/2]."""
    exponents = np.arange(0, args.head_dim, 2, dtype=np.float32) / np.float32(args.head_dim)
    # The power in float64: numpy's float32 power misses by an ulp, which at position 2000 is a visible angle.
    return (args.rope_base ** exponents.astype(np.float64)).astype(np.float32)


def rope_tables(args: ModelArgs) -> tuple[mx.array, mx.array]:
    """nanochat's cos and sin: of float32 angles, rounded to float32 and then to bfloat16, each [P, K/2]."""
    positions = np.arange(10 * args.sequence_len, dtype=np.float32)
    angles = np.outer(positions, np.float32(1) / rope_periods(args)).astype(np.float64)
    cos, sin = (mx.array(f(angles).astype(np.float32)).astype(mx.bfloat16) for f in (np.cos, np.sin))
    mx.eval(cos, sin)  # a pending operation would belong to the thread that builds the model
    return cos, sin


def apply_rope(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn the halves of each head by -theta: x [B, H, T, K]; float32 x meets bfloat16 tables in float32."""
    x1, x2 = mx.split(x, 2, axis=-1)
    return mx.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.eps = args.rms_norm_eps
        self.head_dim = args.head_dim
        width, kv_width = args.n_head * args.head_dim, args.n_kv_head * args.head_dim
        self.c_q = nn.Linear(args.n_embd, width, bias=False)
        self.c_k = nn.Linear(args.n_embd, kv_width, bias=False)
        self.c_v = nn.Linear(args.n_embd, kv_width, bias=False)
        self.c_proj = nn.Linear(width, args.n_embd, bias=False)
        if args.has_value_embedding(layer):
            self.ve_gate = nn.Linear(VALUE_GATE_CHANNELS, args.n_kv_head, bias=False)

    def __call__(
        self, x: mx.array, value_embedding: mx.array | None, rope: Rope, mask: Any = None, cache: Any = None
    ) -> mx.array:
        """`x` [B, T, D], `value_embedding` [B, T, G * K] -> [B, T, D]; `mask` and `cache` are mlx-lm's."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.c_q(x).reshape(heads)  # [B, T, H, K]
        k = self.c_k(x).reshape(heads)  # [B, T, G, K]
        v = self.c_v(x).reshape(heads)  # [B, T, G, K]
        if value_embedding is not None:
            gate = 3 * mx.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))  # [B, T, G]
            v = v + gate[..., None] * value_embedding.reshape(heads)
        q, k, v = (states.transpose(0, 2, 1, 3) for states in (q, k, v))  # [B, H or G, T, K]
        q, k = (rms_norm(rope(states), self.eps) * QK_SCALE for states in (q, k))
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)  # [B, G, S, K]
        attended = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.head_dim**-0.5, mask=mask)
        return self.c_proj(attended.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))  # [B, T, D]


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.activation = ACTIVATIONS[args.mlp]
        self.c_fc = nn.Linear(args.n_embd, 4 * args.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * args.n_embd, args.n_embd, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.c_proj(self.activation(self.c_fc(x)))  # [B, T, F] -> [B, T, D]


class Block(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.eps = args.rms_norm_eps
        self.attn = Attention(args, layer)
        self.mlp = MLP(args)

    def __call__(
        self, x: mx.array, value_embedding: mx.array | None, rope: Rope, mask: Any = None, cache: Any = None
    ) -> mx.array:
        x = x + self.attn(rms_norm(x, self.eps), value_embedding, rope, mask, cache)
        return x + self.mlp(rms_norm(x, self.eps))  # [B, T, D]


class GeluGPTModel(nn.Module):
    """The network; its head, where it has one of its own, is for `Model` to use."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        layers = range(args.n_layer)
        kv_width = args.n_kv_head * args.head_dim
        self.wte = nn.Embedding(args.padded_vocab_size, args.n_embd)
        self.blocks = [Block(args, layer) for layer in layers]
        # A list, as mlx reads numbers in names; layers without an embedding hold a module without parameters.
        self.value_embeds = [
            nn.Embedding(args.padded_vocab_size, kv_width) if args.has_value_embedding(layer) else nn.Identity()
            for layer in layers
        ]
        if not args.tie_embeddings:
            self.lm_head = nn.Linear(args.n_embd, args.padded_vocab_size, bias=False)
        self.smear_gate = nn.Linear(SMEAR_GATE_CHANNELS, 1, bias=False)
        self.smear_lambda = mx.zeros((1,))
        self.backout_lambda = mx.full((1,), 0.2)
        self.resid_lambdas = mx.ones((args.n_layer,))
        self.x0_lambdas = mx.zeros((args.n_layer,))
        # Names with an underscore are not parameters of an nn.Module.
        self._periods = mx.array(rope_periods(args))  # [K/2]
        self._tables = rope_tables(args) if args.rope_table_dtype == "bfloat16" else None

    def rope(self, T: int, offset: int | mx.array) -> Rope:
        """The rotation of T tokens that stand `offset` tokens into their sequences: an int, or [B], one a row."""
        if self._tables is None:
            # Bit-equal to an explicit rotation with float32 tables, but only in float32: given 16 bits, mlx on a CPU
            # rounds the tables as well.
            return lambda x: mx.fast.rope(
                x.astype(mx.float32),
                self.args.head_dim,
                traditional=False,
                base=None,
                scale=1.0,
                offset=offset,
                freqs=-self._periods,  # negated: by -theta
            ).astype(x.dtype)
        positions = mx.expand_dims(mx.array(offset), -1) + mx.arange(T)  # [T] or [B, T]
        angles = mx.expand_dims(positions, -1).astype(mx.float32) * (1.0 / self._periods)
        known = self._tables[0].shape[0]
        row = mx.clip(positions, 0, known - 1)  # left padding has positions below 0, and nobody looks at it
        beyond = mx.expand_dims(positions >= known, -1)
        cos, sin = (
            mx.where(beyond, f(angles).astype(mx.bfloat16), table[row])
            for f, table in zip((mx.cos, mx.sin), self._tables)
        )
        if positions.ndim == 2:
            cos, sin = cos[:, None], sin[:, None]  # [B, 1, T, K/2]
        return lambda x: apply_rope(x, cos, sin)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """Ids [B, T] -> what the head takes [B, T, D]; `cache` is what `Model.make_cache` makes."""
        args = self.args
        caches, embedded_cache = cache or [None] * args.n_layer, None
        offset: int | mx.array = 0
        if cache is not None:
            caches = [cache[0][0], *cache[1:]]
            embedded_cache, offset = cache[0][1], caches[0].offset
        if isinstance(offset, mx.array):
            offset = offset + 0  # a copy: a cache may add to its own in place before the last block has run
        rope = self.rope(inputs.shape[1], offset)

        x = rms_norm(self.wte(inputs), args.rms_norm_eps)  # [B, T, D]
        x = x0 = self.smear(x, offset, embedded_cache)
        masks: dict[int, Any] = {}
        for layer, (block, window, layer_cache) in enumerate(zip(self.blocks, args.windows, caches)):
            if window not in masks:
                masks[window] = create_attention_mask(x, layer_cache, window_size=window + 1)
            x = self.mix(x, self.resid_lambdas[layer], x0, self.x0_lambdas[layer])
            value_embedding = self.value_embeds[layer](inputs) if args.has_value_embedding(layer) else None
            x = block(x, value_embedding, rope, masks[window], layer_cache)
            if layer == args.n_layer // 2:
                backout = x
        x = self.mix(x, 1.0, backout, -self.backout_lambda)
        return rms_norm(x, args.rms_norm_eps)

    def smear(self, x: mx.array, offset: int | mx.array, cache: Any) -> mx.array:
        """Normed embeddings x [B, T, D], each with a share of the one before it; `cache` takes them in as they were."""
        last = mx.zeros_like(x[:, :1])
        if cache is not None:
            if not cache.empty():
                newest = slice(cache._idx - 1, cache._idx)
                last = mx.concatenate([cache.keys[:, 0, newest], cache.values[:, 0, newest]], axis=-1)  # [B, 1, D]
            cache.update_and_fetch(*mx.split(x[:, None], 2, axis=-1))  # one head of [B, 1, T, D/2] each
        positions = mx.expand_dims(mx.array(offset), -1) + mx.arange(x.shape[1])  # [T] or [B, T]
        before = mx.where(positions[..., None] > 0, mx.concatenate([last, x[:, :-1]], axis=1), 0)
        gate = self.smear_lambda * mx.sigmoid(self.smear_gate(x[..., :SMEAR_GATE_CHANNELS]))  # [B, T, 1]
        return self.mix(x, 1.0, before, gate)

    @staticmethod
    def mix(x: mx.array, scale: Any, other: mx.array, other_scale: Any) -> mx.array:
        """scale * x + other_scale * other, in float32, in x's dtype."""
        return (scale * x.astype(mx.float32) + other_scale * other.astype(mx.float32)).astype(x.dtype)


class Model(nn.Module):
    """`GeluGPTForCausalLM` under the name that mlx-lm asks for."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = GeluGPTModel(args)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """Ids [B, T] -> logits, float32 [B, T, V]: without padded rows, capped."""
        x = self.model(inputs, cache)
        logits = self.model.wte.as_linear(x) if self.args.tie_embeddings else self.model.lm_head(x)
        logits = logits[..., : self.args.vocab_size].astype(mx.float32)
        return SOFT_CAP * mx.tanh(logits / SOFT_CAP)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Leave out the rope tables that a published export may hold."""
        return {name: value for name, value in weights.items() if not name.endswith((".rope_cos", ".rope_sin"))}

    def make_cache(self) -> list[Any]:
        """Each layer keeps its window and itself; beside layer 0's keys and values, the normed embeddings.

        Smear looks back by one only. Its cache holds the shortest window, so that whatever can be cut off the end of
        the keys and values can be cut off it too; a row's D channels lie in it as a key and a value of D/2.
        """
        windows = self.args.windows
        first, *rest = (RotatingKVCache(max_size=window + 1) for window in windows)
        return [CacheList(first, RotatingKVCache(max_size=min(windows) + 1)), *rest]

    @property
    def layers(self) -> list[Block]:
        return self.model.blocks
