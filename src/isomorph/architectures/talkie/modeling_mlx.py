"""Talkie for MLX: a model file of mlx-lm (0.32), complete in itself so that a published folder can ship it.

What is unusual about Talkie:
- every RMSNorm is weightless, reduced in float32, with the smallest float32 eps (1.1920928955078125e-07);
- rotary positions turn by -theta, the transpose of the textbook convention, and q and k are normed *after* it;
- queries have a learned gain per head; attention, MLP and head have learned scalar gains;
- every block adds the normed token embedding again, with a learned gain;
- the authors' cos and sin tables are bfloat16 whatever the weights are (`rope_table_dtype`, see config).

mlx-lm loads it through `"model_file": "modeling_mlx.py"` in config.json and `trust_remote_code=True`. The head is an
`nn.Linear` with the authors' gain multiplied in, so that it can be quantized; `sanitize` takes either layout.

Shapes: B batch, T tokens, D hidden_size, H heads, K head_dim, F intermediate_size, V vocabulary,
S cached and new tokens, P positions in the tables.
"""

# No `from __future__ import annotations`: mlx-lm runs a model_file outside sys.modules, where a dataclass could not
# resolve its annotations.
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention

Rope = Callable[[mx.array], mx.array]


@dataclass
class ModelArgs(BaseModelArgs):
    """The keys of config.json that the network needs; defaults are those of the published 13B."""

    model_type: str = "talkie"
    vocab_size: int = 65540
    hidden_size: int = 5120
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    num_key_value_heads: int | None = None
    head_dim: int = 128
    max_position_embeddings: int = 2048
    rope_theta: float = 1_000_000.0
    rope_scaling: dict | None = None
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1.1920928955078125e-07
    rope_table_dtype: str = "bfloat16"
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.rope_table_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"rope_table_dtype must be bfloat16 or float32, found {self.rope_table_dtype!r}")
        if self.num_key_value_heads not in (None, self.num_attention_heads):
            raise ValueError(
                f"Talkie has no grouped-query attention, found num_key_value_heads {self.num_key_value_heads}"
            )
        # Transformers 5 may write rope settings as one dictionary: taken where it means the same, refused where not.
        for rope in (self.rope_scaling, self.rope_parameters):
            if rope and (rope.get("rope_type") or rope.get("type") or "default") != "default":
                raise ValueError(f"Talkie scales no positions, found rope settings {rope!r}")
            self.rope_theta = (rope or {}).get("rope_theta", self.rope_theta)
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, found {self.head_dim}")
        if self.tie_word_embeddings:
            raise ValueError("Talkie's head is a matrix of its own, found tie_word_embeddings true")


def rms_norm(x: mx.array, eps: float) -> mx.array:
    """Weightless RMSNorm over the last axis, reduced in float32 and rounded once to x's dtype."""
    return mx.fast.rms_norm(x, None, eps)


def rope_periods(args: ModelArgs) -> np.ndarray:
    """theta^(2i/K), positions that each channel pair takes to turn by one radian, float32 [K/2]."""
    exponents = np.arange(0, args.head_dim, 2, dtype=np.float32) / np.float32(args.head_dim)
    # The power in float64: numpy's float32 power misses by an ulp, which at position 2000 is a visible angle.
    return (args.rope_theta ** exponents.astype(np.float64)).astype(np.float32)


def rope_tables(args: ModelArgs) -> tuple[mx.array, mx.array]:
    """The authors' cos and sin: of float32 angles, rounded to float32 and then to bfloat16, each [P, K/2]."""
    positions = np.arange(args.max_position_embeddings, dtype=np.float32)
    angles = np.outer(positions, np.float32(1) / rope_periods(args)).astype(np.float64)
    cos, sin = (mx.array(f(angles).astype(np.float32)).astype(mx.bfloat16) for f in (np.cos, np.sin))
    mx.eval(cos, sin)  # a pending operation would belong to the thread that builds the model
    return cos, sin


def apply_rope(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate `x [B, H, T, K]` by -theta; float32 activations meet the bfloat16 tables in float32."""
    x1, x2 = mx.split(x, 2, axis=-1)
    return mx.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1).astype(x.dtype)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x), rounded once as torch does; `nn.silu` rounds twice and on a CPU asks for a C++ compiler."""
    wide = x.astype(mx.float32)
    return (wide * mx.sigmoid(wide)).astype(x.dtype)


class HeadGain(nn.Module):
    """One gain per query head."""

    def __init__(self, heads: int):
        super().__init__()
        self.head_g = mx.ones((heads,))

    def __call__(self, x: mx.array) -> mx.array:
        return x * self.head_g.astype(x.dtype)[:, None, None]  # [B, H, T, K]


class ActGain(nn.Module):
    """One gain for a whole activation. `initial` is its value in a model made without a checkpoint."""

    def __init__(self, initial: float):
        super().__init__()
        self.a_g = mx.full((1,), initial)

    def __call__(self, x: mx.array) -> mx.array:
        return x * self.a_g.astype(x.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with rotation, then normalisation, then a gain per query head."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.eps = args.rms_norm_eps
        self.scaling = args.head_dim**-0.5
        width = args.num_attention_heads * args.head_dim
        self.attn_query = nn.Linear(args.hidden_size, width, bias=False)
        self.attn_key = nn.Linear(args.hidden_size, width, bias=False)
        self.attn_value = nn.Linear(args.hidden_size, width, bias=False)
        self.attn_resid = nn.Linear(width, args.hidden_size, bias=False)
        self.head_gain = HeadGain(args.num_attention_heads)

    def __call__(self, x: mx.array, rope: Rope, mask: Any = None, cache: Any = None) -> mx.array:
        """`x` [B, T, D] -> [B, T, D]; `mask` and `cache` are mlx-lm's."""
        heads = (*x.shape[:2], -1, self.head_dim)
        query, key, value = (
            project(x).reshape(heads).transpose(0, 2, 1, 3)
            for project in (self.attn_query, self.attn_key, self.attn_value)
        )  # [B, H, T, K]
        query, key = (rms_norm(rope(states), self.eps) for states in (query, key))
        query = self.head_gain(query)
        if cache is not None:
            key, value = cache.update_and_fetch(key, value)  # [B, H, S, K]
        output = scaled_dot_product_attention(query, key, value, cache=cache, scale=self.scaling, mask=mask)
        return self.attn_resid(output.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))  # [B, T, D]


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.mlp_gate = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.mlp_linear = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.mlp_resid = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.mlp_resid(silu(self.mlp_gate(x)) * self.mlp_linear(x))  # [B, T, F] -> [B, T, D]


class Block(nn.Module):
    """One layer; `embedded` is the model's normalised embedding, which every block adds again."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.eps = args.rms_norm_eps
        self.attn = Attention(args)
        self.attn_gain = ActGain((2 * args.num_hidden_layers) ** -0.5)
        self.mlp = MLP(args)
        self.mlp_gain = ActGain((2 * args.num_hidden_layers) ** -0.5)
        self.embed_skip = ActGain(0.0)

    def __call__(self, x: mx.array, embedded: mx.array, rope: Rope, mask: Any = None, cache: Any = None) -> mx.array:
        x = x + self.attn_gain(self.attn(rms_norm(x, self.eps), rope, mask, cache))
        x = x + self.mlp_gain(self.mlp(rms_norm(x, self.eps)))
        return x + self.embed_skip(embedded)  # [B, T, D]


class TalkieModel(nn.Module):
    """The network without its head."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.eps, self.head_dim = args.rms_norm_eps, args.head_dim
        self.embed = nn.Embedding(args.vocab_size, args.hidden_size)
        self.blocks = [Block(args) for _ in range(args.num_hidden_layers)]
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
                self.head_dim,
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

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        x = self.embed(inputs) if input_embeddings is None else input_embeddings
        x = embedded = rms_norm(x, self.eps)  # [B, T, D]
        cache = cache or [None] * len(self.blocks)
        offset = 0 if cache[0] is None else cache[0].offset
        if isinstance(offset, mx.array):
            offset = offset + 0  # a copy: a cache may add to its own in place before the last block has run
        rope = self.rope(x.shape[1], offset)
        mask = create_attention_mask(x, cache[0])
        for block, layer_cache in zip(self.blocks, cache):
            x = block(x, embedded, rope, mask, layer_cache)
        return rms_norm(x, self.eps)


class Model(nn.Module):
    """`TalkieForCausalLM` under the name that mlx-lm asks for."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = TalkieModel(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        return self.lm_head(self.model(inputs, cache, input_embeddings))  # [B, T, V]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Fold a bare `lm_head` with its gain as the authors do at run time, rounded to the weight's dtype."""
        if "lm_head" not in weights or "lm_head_gain.w_g" not in weights:
            return weights
        weights = dict(weights)
        head = weights.pop("lm_head")
        weights["lm_head.weight"] = head * weights.pop("lm_head_gain.w_g").astype(head.dtype)
        return weights

    @property
    def layers(self) -> list[Block]:
        return self.model.blocks
