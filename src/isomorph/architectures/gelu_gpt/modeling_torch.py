"""GELU-GPT for PyTorch: a Transformers model in one file, shipped verbatim in published folders.

What is unusual about it:
- RMSNorm has no weight: embedding, attention input, MLP input, q and k, final; eps from the config;
- smear: each embedding, once normed, takes on a gated share of the one before it, as that one was before its own smear;
- every block reads `resid_lambda * x + x0_lambda * x0`, where x0 is the smeared embedding;
- rotary positions turn by -theta (the transpose of the textbook convention), halves split; q and k are normed after
  that and multiplied by 1.2 each;
- values of every second layer, counted from the last, take on a gated embedding of the token;
- each layer looks back over a window, itself also seen: `i - j <= window`; the pattern SSSL repeats, the last is long;
- backout: a share of block L//2's output is subtracted before the final norm; logits are capped to 15 * tanh(x / 15).

What smear remembers is one more layer of the cache, behind those of keys and values (see `smear_layer`), so it goes
wherever they go.

Shapes: B batch, T new tokens, S cached and new tokens, D hidden, H heads, G key-value heads, K head_dim,
F intermediate, P rows of the embeddings, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

#: Sharpens attention; on q and k each (nanochat).
QK_SCALE = 1.2
#: Logits stay within -15..15 (nanochat).
SOFT_CAP = 15.0
#: Channels of the normed input that open the gates of smear and of the value embeddings (nanochat).
SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS = 24, 12


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU's tanh approximation."""
    return F.gelu(x, approximate="tanh")


def relu2(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


#: config.mlp -> activation.
ACTIVATIONS = {"gelu": gelu, "relu2": relu2}


@dataclass
class Window:
    """What Transformers' masks and caches ask of a layer: how many keys a token sees, itself included."""

    sliding_window: int
    _attn_implementation: str | None = None


class GeluGPTConfig(PreTrainedConfig):
    """Shapes and constants of one model; the defaults are those of the published 261M.

    `mlp` is `gelu` (its tanh approximation) or `relu2`. `window_pattern` is tiled over the layers, `S` looks back
    a quarter of the sequence and `L` over all of it; the last layer is always long. `rope_table_dtype` says how cos
    and sin are rounded.
    """

    model_type = "gelu_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "hidden_size": "n_embd",
        "tie_word_embeddings": "tie_embeddings",
        "rope_theta": "rope_base",
    }
    base_model_tp_plan = {
        "wte": "embedding_rowwise",  # by rows of the vocabulary, as the head that may be tied to it
        "blocks.*.attn.c_q": "colwise",
        "blocks.*.attn.c_k": "colwise",
        "blocks.*.attn.c_v": "colwise",
        "blocks.*.attn.ve_gate": "colwise",
        "blocks.*.attn.c_proj": "rowwise",
        "blocks.*.mlp.c_fc": "colwise",
        "blocks.*.mlp.c_proj": "rowwise",
        "value_embeds.*": "replicated_with_grad_allreduce",
    }
    base_model_fsdp_plan = {
        "wte": "free_full_weight",
        "value_embeds.*": "free_full_weight",
        "blocks.*": "free_full_weight",
    }

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
    max_position_embeddings: int | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.max_position_embeddings = 10 * self.sequence_len
        if self.mlp not in ACTIVATIONS:
            raise ValueError(f"`mlp` must be one of {', '.join(ACTIVATIONS)}, found {self.mlp!r}")
        if self.rope_table_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"`rope_table_dtype` must be 'bfloat16' or 'float32', found {self.rope_table_dtype!r}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"`window_pattern` must be made of S and L, found {self.window_pattern!r}")
        super().__post_init__(**kwargs)

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

    @property  # type: ignore[misc]
    def per_layer_config(self) -> list[Window]:  # type: ignore[override]
        """What Transformers' caches are made by: they keep no more of a layer than its window."""
        return [Window(window + 1) for window in self.windows]

    def has_value_embedding(self, layer: int) -> bool:
        return layer % 2 == (self.n_layer - 1) % 2


class StaticSmearLayer(CacheLayerMixin):
    """The latest embedding alone, [B, 1, 1, D], at a fixed address, for caches that a compiled model runs with."""

    is_compileable = True
    supports_early_init = False
    is_sliding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = torch.zeros_like(key_states[:, :, -1:])
        self.values = torch.zeros_like(value_states[:, :, -1:])
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.keys)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held: Any = self.keys
        held.copy_(key_states[:, :, -1:])
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return int(self.is_initialized)

    def get_max_length(self) -> int:
        return -1


def smear_layer(cache: Cache, config: GeluGPTConfig) -> Any:
    """The layer of `cache`, after those of keys and values, that holds embeddings [B, 1, S, D] as `keys`.

    At each slot stands the embedding of the latest token up to there, so padding needs no memory of its own, and
    zeros stand for none. It keeps as many slots as the shortest window, and so can be cropped wherever keys can.
    """
    if cache.layer_class_to_replicate is None and len(cache.layers) == config.n_layer:
        layer: Any = StaticSmearLayer()
        if not cache.is_compileable:
            layer = DynamicSlidingWindowLayer(min(config.windows) + 1)
            layer.record_past = cache.is_recording_past(0)
        cache.layers.append(layer)
    return cache.layers[config.n_layer] if len(cache.layers) > config.n_layer else None


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Weightless RMSNorm over the last axis, reduced in float32 (or wider) and rounded once to x's dtype."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def rope_tables(position_ids: torch.Tensor, config: GeluGPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * theta^(-2i/K), each [B, T, 1, K/2]; float32, or rounded to bfloat16.

    Computed from the positions of each call: nothing to store, to move between devices or to run past the end of.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device) / config.head_dim
    frequencies = 1.0 / (config.rope_base**exponents)  # [K/2]
    angles = position_ids[:, :, None, None].float() * frequencies  # [B, T, 1, K/2]
    cos, sin = angles.cos(), angles.sin()
    if config.rope_table_dtype == "float32":
        return cos, sin
    return round_to_bfloat16(cos), round_to_bfloat16(sin)


def round_to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16, to nearest even; spelt out in bits because torch.compile drops a cast there and back."""
    bits = x.view(torch.int32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
    return bits.view(torch.float32).to(torch.bfloat16)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [B, T, H, K] by -theta (the transpose of the textbook rotation), split in halves, in x's dtype."""
    first, second = x.chunk(2, dim=-1)  # [B, T, H, K/2]
    rotated = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)  # [B, T, H, K]
    return rotated.type_as(x)


def packed_positions(position_ids: torch.Tensor) -> torch.Tensor:
    """Index of each token in its own sequence [B, T]; a sequence starts where the position does not grow.

    Transformers takes any step other than +1 for the start of another packed sequence; a gap is no start.
    """
    index = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    restarts = F.pad(position_ids.diff(dim=1) <= 0, (1, 0))  # [B, T]
    return index - torch.where(restarts, index, 0).cummax(dim=1).values


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention spelled out: output [B, T, H, K] in value's dtype, and the softmax rows [B, H, T, S] kept in float32.

    `query` [B, H, T, K], `key` and `value` [B, G, S, K]; `attention_mask` [B, 1, T, S], additive, or True to attend.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    scores = query.to(wide) @ key.to(wide).transpose(2, 3) * scaling  # [B, H, T, S]
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(wide).min)
        else:
            scores = scores + attention_mask
    # The lowest finite score, never -inf, stands for masked: a padding row that sees nothing still sums to 1.
    weights = F.softmax(scores.clamp(min=torch.finfo(wide).min), dim=-1)  # [B, H, T, S]
    output = F.dropout(weights, p=dropout, training=module.training).to(value.dtype) @ value  # [B, H, T, K]
    return output.transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """Causal attention over a window; rotation, then normalisation; gated value embeddings where the layer has them."""

    def __init__(self, config: GeluGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.n_head // config.n_kv_head
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = 0.0
        self.is_causal = True
        self.sliding_window = config.windows[layer_idx] + 1
        key_width = config.n_kv_head * config.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, key_width, bias=False)
        self.c_v = nn.Linear(config.n_embd, key_width, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if config.has_value_embedding(layer_idx):
            self.ve_gate = nn.Linear(VALUE_GATE_CHANNELS, config.n_kv_head, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        value_embedding: torch.Tensor | None = None,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        padding: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`x` [B, T, D] -> output [B, T, D] and, in the eager implementation only, softmax rows [B, H, T, S].

        `value_embedding` [B, T, G * K] is the token's own, of this layer.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        query, key, value = (project(x).view(heads) for project in (self.c_q, self.c_k, self.c_v))
        if value_embedding is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))  # [B, T, G]
            value = value + gate[..., None] * self.own_heads(value_embedding.view(heads), value.shape[2])
        query, key = (apply_rope(states, *position_embeddings) for states in (query, key))
        query, key = (rms_norm(states, self.config.rms_norm_eps) * QK_SCALE for states in (query, key))
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # [B, H or G, T, K]
        if past_key_values is not None:
            if padding is not None and self.layer_idx == self.config.n_layer - 1:
                # Nothing attends to padding; its zero keys let the cache itself tell it from tokens (`whole_mask`).
                key = key.masked_fill(padding[:, None, :, None], 0.0)
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, G, S, K]
        implementation = "eager" if kwargs.get("output_attentions") else self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )  # [B, T, H, K]
        return self.c_proj(output.reshape(*x.shape[:2], -1)), weights  # [B, T, D]

    @staticmethod
    def own_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
        """Of states of all key-value heads [B, T, G, K], those that this rank computes in tensor parallel."""
        if states.shape[2] == heads:
            return states
        # The tensor parallel group is the innermost one in Transformers, so the remainder is the rank in it.
        rank = torch.distributed.get_rank() % (states.shape[2] // heads)
        return states[:, :, rank * heads : (rank + 1) * heads]


class MLP(nn.Module):
    """Two matrices around tanh-GELU or ReLU squared."""

    def __init__(self, config: GeluGPTConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.mlp]
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))  # [B, T, F] -> [B, T, D]


class Block(GradientCheckpointingLayer):
    """One layer; its input is the mixture of the residual stream and x0."""

    def __init__(self, config: GeluGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.attn = Attention(config, layer_idx)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = x + self.attn(rms_norm(x, self.eps), **kwargs)[0]
        return x + self.mlp(rms_norm(x, self.eps))  # [B, T, D]


class GeluGPTPreTrainedModel(PreTrainedModel):
    """What both models share: initial weights and what the architecture supports."""

    config_class = GeluGPTConfig
    config: GeluGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "wte"
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rope_(cos|sin)$"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}
    #: Layers of a cache behind those of keys and values: what smear remembers.
    extra_cache_layers = 1

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """nanochat's: matrices that write to the residual stream begin at zero."""
        bound = (3 / self.config.n_embd) ** 0.5
        if isinstance(module, Attention):
            for matrix in (module.c_q, module.c_k, module.c_v):
                init.uniform_(matrix.weight, -bound, bound)
            init.zeros_(module.c_proj.weight)
            if hasattr(module, "ve_gate"):
                init.uniform_(module.ve_gate.weight, 0.0, 0.02)
        elif isinstance(module, MLP):
            init.uniform_(module.c_fc.weight, -0.4 * bound, 0.4 * bound)
            init.zeros_(module.c_proj.weight)
        elif isinstance(module, GeluGPTModel):
            depth = torch.linspace(0, 1, self.config.n_layer)
            init.normal_(module.wte.weight, mean=0.0, std=0.8)
            for embedding in module.value_embeds.parameters():
                init.uniform_(embedding, -bound, bound)
            init.uniform_(module.smear_gate.weight, 0.0, 0.02)
            init.zeros_(module.smear_lambda)
            init.constant_(module.backout_lambda, 0.2)
            init.copy_(module.resid_lambdas, 1.15 - 0.10 * depth)
            init.copy_(module.x0_lambdas, 0.20 - 0.15 * depth)
            if hasattr(module, "lm_head"):
                init.normal_(module.lm_head.weight, mean=0.0, std=0.001)


class GeluGPTModel(GeluGPTPreTrainedModel):
    """The network without its head."""

    _keys_to_ignore_on_load_unexpected = [r"rope_(cos|sin)$", r"^lm_head\."]

    def __init__(self, config: GeluGPTConfig) -> None:
        super().__init__(config)
        key_width = config.n_kv_head * config.head_dim
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.n_layer))
        self.value_embeds = nn.ModuleDict(
            {
                str(index): nn.Embedding(config.padded_vocab_size, key_width)
                for index in range(config.n_layer)
                if config.has_value_embedding(index)
            }
        )
        self.smear_gate = nn.Linear(SMEAR_GATE_CHANNELS, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`input_ids` [B, T] -> normalised output [B, T, D]. Embeddings cannot stand for ids: layers look these up too.

        `attention_mask` marks tokens with 1 and padding with 0: [B, S] over cached and new tokens or [B, T] over the
        new ones only; padding between tokens takes room in their windows. A dictionary is what
        `create_masks_for_generate` made.
        `position_ids` [B, T] count only tokens when not given.
        """
        config = self.config
        embedded = rms_norm(self.wte(input_ids), config.rms_norm_eps)  # [B, T, D]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        tokens = embedded.shape[1]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()

        real, packed = None, None
        if isinstance(attention_mask, dict):
            real = attention_mask["tokens"]
        elif isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            attention_mask = self.whole_mask(attention_mask.to(embedded.device).bool(), tokens, past, past_key_values)
            new = torch.arange(tokens, device=embedded.device) + past
            real = attention_mask[:, new]  # [B, T]
            if position_ids is None:
                position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, new]
        if position_ids is None:
            position_ids = (torch.arange(tokens, device=embedded.device) + past)[None]
        elif attention_mask is None and past_key_values is None:
            packed = packed_positions(position_ids)

        masks = attention_mask
        if not isinstance(masks, dict):
            implementation = "eager" if kwargs.get("output_attentions") else config._attn_implementation
            masks = window_masks(config, implementation, embedded, attention_mask, past_key_values, packed)
        position_embeddings = rope_tables(position_ids, config)
        padding = None if real is None else ~real

        x = x0 = self.smear(embedded, real, packed, past_key_values)
        backout = x
        for index, block in enumerate(self.blocks):
            x = self.resid_lambdas[index].type_as(x) * x + self.x0_lambdas[index].type_as(x) * x0
            x = block(
                x,
                position_embeddings=position_embeddings,
                value_embedding=self.value_embeds[str(index)](input_ids) if config.has_value_embedding(index) else None,
                attention_mask=masks[config.windows[index]],
                past_key_values=past_key_values,
                padding=padding,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
            if index == config.n_layer // 2:
                backout = x
        x = x - self.backout_lambda.type_as(x) * backout
        return BaseModelOutputWithPast(
            last_hidden_state=rms_norm(x, config.rms_norm_eps), past_key_values=past_key_values
        )

    def smear(
        self, x: torch.Tensor, real: torch.Tensor | None, packed: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor:
        """Normed embeddings x [B, T, D], each with a gated share of the token's before it; `cache` takes them on.

        `real` [B, T] is False at padding; `packed` [B, T] is 0 at the first token of each packed sequence.
        """
        last = torch.zeros_like(x[:, :1])  # [B, 1, D]: of the latest token before these
        layer = None if cache is None else smear_layer(cache, self.config)
        if layer is not None and layer.is_initialized and layer.keys.shape[2]:
            last = layer.keys[:, 0, -1:].to(x.device)
        latest = x
        if real is not None:
            index = torch.arange(1, x.shape[1] + 1, device=x.device)
            index = torch.where(real, index, 0).cummax(dim=1).values  # [B, T]: 0 for the one before
            latest = torch.cat([last, x], dim=1).gather(1, index[..., None].expand_as(x))
        before = torch.cat([last, latest[:, :-1]], dim=1)  # [B, T, D]
        if packed is not None:
            before = before.masked_fill((packed == 0)[..., None], 0.0)
        if cache is not None:
            cache.update(latest[:, None], latest[:, None, :, :0], self.config.n_layer)
        gate = self.smear_lambda.type_as(x) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_GATE_CHANNELS]))
        return x + gate * before

    def whole_mask(
        self, mask: torch.Tensor, tokens: int, past: int | torch.Tensor, past_key_values: Cache | None
    ) -> torch.Tensor:
        """A mask over cached and new tokens, bool [B, S], from one that may cover the `tokens` new ones only.

        `past` is the number of cached tokens.
        """
        length = mask.shape[1]
        if length != tokens:
            if isinstance(past, int) and length < past + tokens:
                raise ValueError(
                    f"expected an attention mask over the {tokens} new tokens, or over {past + tokens} with the cached "
                    f"ones; found one over {length}"
                )
            return mask
        if past_key_values is None or past == 0:
            return mask
        layer: Any = past_key_values.layers[self.config.n_layer - 1]  # keys [B, G, S, K]: the longest window
        held = layer.keys.ne(0).any(dim=3).any(dim=1)[:, :past]  # [B, S], False where padding was cached
        # What the longest window has left behind is out of sight; it counts as tokens.
        return torch.cat([held.new_ones(mask.shape[0], past - held.shape[1]), held, mask], dim=1)


def window_masks(
    config: GeluGPTConfig,
    implementation: str | None,
    embedded: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
) -> dict[Any, Any]:
    """Window -> the mask of the layers that have it, in the form the attention implementation takes."""
    return {
        window: create_sliding_window_causal_mask(
            config=Window(window + 1, implementation),  # type: ignore[arg-type]
            inputs_embeds=embedded,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            layer_idx=config.windows.index(window),
            allow_is_causal_skip=allow_is_causal_skip,
        )
        for window in dict.fromkeys(config.windows)
    }


class GeluGPTForCausalLM(GeluGPTPreTrainedModel, GenerationMixin):
    """The network with its head, which the published port keeps inside of it; tied, it is the token embedding."""

    _tied_weights_keys = {"model.lm_head.weight": "model.wte.weight"}
    _tp_plan = {"model.lm_head": "colwise_gather_output"}

    def __init__(self, config: GeluGPTConfig) -> None:
        super().__init__(config)
        self.model = GeluGPTModel(config)
        self.model.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Capped logits [B, T, V] (of the last or the chosen positions with `logits_to_keep`), float32, and the loss.

        `labels` [B, T] are the input ids, -100 where no loss counts; they are shifted here.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.lm_head(outputs.last_hidden_state[:, kept])[..., : self.config.vocab_size]  # [B, T, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = SOFT_CAP * torch.tanh(logits / SOFT_CAP)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.lm_head = new_embeddings

    @staticmethod
    def create_masks_for_generate(
        config: GeluGPTConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> dict[Any, Any]:
        """The masks that `generate` makes ahead for a compiled model, and which of the new ids are tokens."""
        masks = window_masks(
            config,
            config._attn_implementation,
            inputs_embeds,
            attention_mask,
            past_key_values,
            allow_is_causal_skip=False,  # masks that the eager implementation, should it give attentions, takes too
        )
        tokens = None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :].bool()
        return {**masks, "tokens": tokens}
