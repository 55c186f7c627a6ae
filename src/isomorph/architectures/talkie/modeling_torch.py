"""Talkie for PyTorch: a Transformers model in one file, shipped verbatim in published folders.

What is unusual about it, against Llama:

- rotary positions turn by *minus* theta, and cos/sin are rounded to bfloat16 unless `rope_table_dtype` says float32;
- RMSNorm has no weight and stands in five places: embedding, attention input, MLP input, output, queries and keys;
- queries and keys are normalised *after* the rotation, then each query head has a gain of its own;
- attention, MLP and a skip from the normalised embedding enter the residual stream through learned scalars;
- the head's gain multiplies the head's *weight*, so it rounds there, not in the logits.

Shapes: B batch, T new tokens, S cached and new tokens, D hidden, H heads, K head_dim, F intermediate, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


class TalkieConfig(PreTrainedConfig):
    """Shapes and constants of one Talkie model; the defaults are those of the published 13B.

    `rope_table_dtype` says how cos and sin are rounded: `bfloat16` is faithful to the authors' code (its tables are
    rounded whatever the weights' dtype), `float32` is accurate. `lm_head_gain_folded` says that the head is one
    matrix `lm_head.weight` with its gain multiplied in, rather than a bare `lm_head` and `lm_head_gain.w_g`.
    """

    model_type = "talkie"
    keys_to_ignore_at_inference = ["past_key_values"]
    # Every query head has its own key and value head; engines ask for the number by this name.
    attribute_map = {"num_key_value_heads": "num_attention_heads"}
    base_model_tp_plan = {
        "blocks.*.attn.attn_query": "colwise",
        "blocks.*.attn.attn_key": "colwise",
        "blocks.*.attn.attn_value": "colwise",
        "blocks.*.attn.head_gain": "replicated_with_grad_allreduce",
        "blocks.*.attn.attn_resid": "rowwise",
        "blocks.*.mlp.mlp_gate": "colwise",
        "blocks.*.mlp.mlp_linear": "colwise",
        "blocks.*.mlp.mlp_resid": "rowwise",
    }
    base_model_fsdp_plan = {"embed": "free_full_weight", "blocks.*": "free_full_weight"}

    vocab_size: int = 65540
    hidden_size: int = 5120
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    head_dim: int = 128
    max_position_embeddings: int = 2048
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1.1920928955078125e-07  # torch.finfo(float32).eps, what F.rms_norm takes when none is given
    rope_table_dtype: str = "bfloat16"
    lm_head_gain_folded: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        key_value_heads = kwargs.pop("num_key_value_heads", None)
        if key_value_heads not in (None, self.num_attention_heads):
            raise ValueError(
                f"`num_key_value_heads` must equal `num_attention_heads` ({self.num_attention_heads}), found "
                f"{key_value_heads}: Talkie has no grouped-query attention"
            )
        # Transformers 5 writes rope settings as one dictionary; taken where it means the same, refused where not.
        for name in ("rope_parameters", "rope_scaling"):
            rope = kwargs.pop(name, None) or {}
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind != "default":
                raise ValueError(f"`{name}` must be of type 'default', found {kind!r}: Talkie scales no positions")
            self.rope_theta = rope.get("rope_theta", self.rope_theta)
        if self.rope_table_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"`rope_table_dtype` must be 'bfloat16' or 'float32', found {self.rope_table_dtype!r}")
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even for rotary positions, found {self.head_dim}")
        if self.tie_word_embeddings:
            raise ValueError("`tie_word_embeddings` must be false: Talkie's head is a matrix of its own")
        super().__post_init__(**kwargs)


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Weightless RMSNorm over the last axis, reduced in float32 (or wider) and rounded once to x's dtype."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def rope_tables(position_ids: torch.Tensor, config: TalkieConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * theta^(-2i/K), each [B, T, 1, K/2]; float32, or rounded to bfloat16.

    Computed from the positions of each call: nothing to store, to move between devices or to run past the end of.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)  # [K/2]
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

    `query` [B, H, T, K], `key` and `value` [B, H, S, K]; `attention_mask` [B, 1, T, S], additive, or True to attend.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
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


class HeadGain(nn.Module):
    """One gain per query head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.head_g = nn.Parameter(torch.ones(heads))

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        gain: torch.Tensor = self.head_g
        heads = query.shape[2]
        if heads != gain.shape[0]:
            # Tensor parallel: every rank holds all gains and takes those of the heads it computes. The tensor
            # parallel group is the innermost one in Transformers and in vLLM, so the remainder is the rank in it.
            rank = torch.distributed.get_rank() % (gain.shape[0] // heads)
            gain = gain[rank * heads : (rank + 1) * heads]
        return query * gain.type_as(query)[:, None]  # [B, T, H, K]


class ActGain(nn.Module):
    """One gain for a whole activation. `initial` is its value in a model made without a checkpoint."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.a_g = nn.Parameter(torch.full((1,), initial))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.a_g.type_as(x)


class WeightGain(nn.Module):
    """One gain for a whole weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w_g = nn.Parameter(torch.ones(1))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.w_g.type_as(weight)


class Attention(nn.Module):
    """Causal multi-head attention with rotation, then normalisation, then a gain per query head."""

    def __init__(self, config: TalkieConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = 0.0
        self.is_causal = True
        width = config.num_attention_heads * config.head_dim
        self.attn_query = nn.Linear(config.hidden_size, width, bias=False)
        self.attn_key = nn.Linear(config.hidden_size, width, bias=False)
        self.attn_value = nn.Linear(config.hidden_size, width, bias=False)
        self.attn_resid = nn.Linear(width, config.hidden_size, bias=False)
        self.head_gain = HeadGain(config.num_attention_heads)

    def forward(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        padding: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`x` [B, T, D] -> output [B, T, D] and, in the eager implementation only, softmax rows [B, H, T, S]."""
        heads = (*x.shape[:2], -1, self.head_dim)
        query, key, value = (project(x).view(heads) for project in (self.attn_query, self.attn_key, self.attn_value))
        query, key = (apply_rope(states, *position_embeddings) for states in (query, key))
        query, key = (rms_norm(states, self.config.rms_norm_eps) for states in (query, key))  # [B, T, H, K]
        query = self.head_gain(query)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # [B, H, T, K]
        if past_key_values is not None:
            if padding is not None and self.layer_idx == 0:
                # Nothing attends to padding; its zero keys let the cache itself tell it from tokens (`whole_mask`).
                key = key.masked_fill(padding[:, None, :, None], 0.0)
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, H, S, K]
        implementation = "eager" if kwargs.get("output_attentions") else self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=self.attention_dropout, scaling=self.scaling, **kwargs
        )  # [B, T, H, K]
        return self.attn_resid(output.reshape(*x.shape[:2], -1)), weights  # [B, T, D]


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TalkieConfig) -> None:
        super().__init__()
        self.mlp_gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.mlp_linear = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.mlp_resid = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp_resid(F.silu(self.mlp_gate(x)) * self.mlp_linear(x))  # [B, T, F] -> [B, T, D]


class Block(GradientCheckpointingLayer):
    """One layer; `embedded` is the model's normalised embedding, which every block adds again."""

    def __init__(self, config: TalkieConfig, layer_idx: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.attn = Attention(config, layer_idx)
        self.attn_gain = ActGain((2 * config.num_hidden_layers) ** -0.5)
        self.mlp = MLP(config)
        self.mlp_gain = ActGain((2 * config.num_hidden_layers) ** -0.5)
        self.embed_skip = ActGain(0.0)

    def forward(self, x: torch.Tensor, embedded: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = x + self.attn_gain(self.attn(rms_norm(x, self.eps), **kwargs)[0])
        x = x + self.mlp_gain(self.mlp(rms_norm(x, self.eps)))
        return x + self.embed_skip(embedded)  # [B, T, D]


class TalkiePreTrainedModel(PreTrainedModel):
    """What both models share: initial weights and what the architecture supports."""

    config_class = TalkieConfig
    config: TalkieConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embed"
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HeadGain):
            init.ones_(module.head_g)
        elif isinstance(module, ActGain):
            init.constant_(module.a_g, module.initial)
        elif isinstance(module, WeightGain):
            init.ones_(module.w_g)
        elif isinstance(module, TalkieForCausalLM) and isinstance(module.lm_head, nn.Parameter):
            init.normal_(module.lm_head, mean=0.0, std=0.02)


class TalkieModel(TalkiePreTrainedModel):
    """The network without its head."""

    def __init__(self, config: TalkieConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`input_ids` [B, T], or their embeddings before normalisation [B, T, D] -> normalised output [B, T, D].

        `attention_mask` marks tokens with 1 and padding with 0: [B, S] over cached and new tokens or [B, T] over the
        new ones only; padding may stand anywhere. `position_ids` [B, T] count only tokens when not given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of `input_ids` and `inputs_embeds`")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        embedded = rms_norm(inputs_embeds, self.config.rms_norm_eps)  # [B, T, D]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        tokens = embedded.shape[1]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()

        padding, packed = None, None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            attention_mask = self.whole_mask(attention_mask.to(embedded.device).bool(), tokens, past, past_key_values)
            new = torch.arange(tokens, device=embedded.device) + past
            padding = ~attention_mask[:, new]  # [B, T]
            if position_ids is None:
                position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, new]
        if position_ids is None:
            position_ids = (torch.arange(tokens, device=embedded.device) + past)[None]
        elif attention_mask is None and past_key_values is None:
            packed = packed_positions(position_ids)

        config = self.config
        if kwargs.get("output_attentions") and config._attn_implementation != "eager":
            # Only the eager implementation has softmax rows to give: fall back to it for this call.
            config = copy.copy(config)
            config._attn_implementation = "eager"
        mask = create_causal_mask(
            config=config,
            inputs_embeds=embedded,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=packed,
        )
        position_embeddings = rope_tables(position_ids, self.config)

        x = embedded
        for block in self.blocks:
            x = block(
                x,
                embedded,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                padding=padding,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=rms_norm(x, self.config.rms_norm_eps), past_key_values=past_key_values
        )

    @staticmethod
    def whole_mask(
        mask: torch.Tensor, tokens: int, past: int | torch.Tensor, past_key_values: Cache | None
    ) -> torch.Tensor:
        """A mask over cached and new tokens, bool [B, S], from one that may cover the `tokens` new ones only.

        `past` is the number of cached tokens, an int or (static caches) a tensor.
        """
        length = mask.shape[1]
        if length != tokens:
            if isinstance(past, int) and length < past + tokens:
                raise ValueError(
                    f"expected an attention mask over the {tokens} new tokens, or over {past + tokens} with the cached "
                    f"ones; found one over {length}"
                )
            return mask
        if past_key_values is None or (isinstance(past, int) and past == 0):
            return mask
        layer: Any = past_key_values.layers[0]  # keys [B, H, S, K]
        held = layer.keys.ne(0).any(dim=3).any(dim=1)  # [B, S], False where padding was cached or nothing yet
        if isinstance(past, int):
            # A quantized cache keeps only its latest keys unquantized; what it cannot tell counts as a token.
            held = held if held.shape[1] == past else held.new_ones(mask.shape[0], past)
            return torch.cat([held, mask], dim=1)
        return held.index_copy(1, torch.arange(tokens, device=mask.device) + past, mask)


class TalkieForCausalLM(TalkiePreTrainedModel, GenerationMixin):
    """The network with its head: a bare `lm_head` and its gain, or both folded into `lm_head.weight`."""

    def __init__(self, config: TalkieConfig) -> None:
        super().__init__(config)
        self.model = TalkieModel(config)
        if config.lm_head_gain_folded:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        else:
            self.lm_head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
            self.lm_head_gain = WeightGain()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] (of the last or the chosen positions with `logits_to_keep`), and the loss of `labels`.

        `labels` [B, T] are the input ids, -100 where no loss counts; they are shifted here.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x = outputs.last_hidden_state[:, kept]
        if self.config.lm_head_gain_folded:
            logits = self.lm_head(x)
        else:
            logits = F.linear(x, self.lm_head_gain(self.lm_head))  # [B, T, V]
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

    def get_output_embeddings(self) -> nn.Linear:
        """The head as a linear layer; it shares the bare parameter when the gain is not folded."""
        if self.config.lm_head_gain_folded:
            return self.lm_head
        head = nn.Linear(self.lm_head.shape[1], self.lm_head.shape[0], bias=False, device="meta")
        head.weight = self.lm_head
        return head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings if self.config.lm_head_gain_folded else new_embeddings.weight
