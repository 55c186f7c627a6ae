"""Talkie's configuration, free of any framework: what `config.json` says, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

#: Smallest float32 eps: `F.rms_norm(x, shape)` without an eps uses it for every input dtype (torch >= 2.6).
FLOAT32_EPS = 1.1920928955078125e-07

#: Keys of a published `config.json` that describe files, serving or other tools, not the network.
ANNOTATIONS = frozenset(
    """
    _name_or_path architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id
    id2label is_decoder is_encoder_decoder label2id model_file output_attentions output_hidden_states pad_token_id
    problem_type quantization quantization_config return_dict tokenizer_class torch_dtype transformers_version
    use_cache
    """.split()  # noqa: SIM905 - a list of words reads better as words
)


@dataclass(frozen=True)
class TalkieConfig:
    """Shapes and constants of one Talkie model; the defaults are those of the published 13B.

    `rope_table_dtype` says how cos and sin are rounded: `bfloat16` is faithful to the authors' code (its tables are
    rounded whatever the weights' dtype), `float32` is accurate. `lm_head_gain_folded` says that the head is one
    matrix `lm_head.weight` with its gain multiplied in, rather than a bare `lm_head` and `lm_head_gain.w_g`.
    """

    vocab_size: int = 65540
    hidden_size: int = 5120
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    head_dim: int = 128
    max_position_embeddings: int = 2048
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = FLOAT32_EPS
    rope_table_dtype: str = "bfloat16"
    lm_head_gain_folded: bool = False
    tie_word_embeddings: bool = False
    model_type: str = "talkie"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"config key {name!r} must be a positive integer, found {value!r}; correct config.json"
                )
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"config key {name!r} must be a positive number, found {value!r}; correct config.json")
        if self.head_dim % 2:
            raise ValueError(f"config key 'head_dim' must be even for rotary positions, found {self.head_dim}")
        if self.rope_table_dtype not in ("bfloat16", "float32"):
            raise ValueError(
                f"config key 'rope_table_dtype' must be 'bfloat16' (faithful) or 'float32' (accurate), "
                f"found {self.rope_table_dtype!r}"
            )
        if self.tie_word_embeddings is not False:
            raise ValueError("config key 'tie_word_embeddings' must be false: Talkie's head is a matrix of its own")
        if not isinstance(self.lm_head_gain_folded, bool):
            raise ValueError(
                f"config key 'lm_head_gain_folded' must be true or false, found {self.lm_head_gain_folded!r}"
            )
        if self.model_type != "talkie":
            raise ValueError(f"config key 'model_type' must be 'talkie', found {self.model_type!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TalkieConfig:
        """Build from a parsed `config.json`. Raises ValueError that names every unknown key or unsupported value."""
        fields = cls.__dataclass_fields__
        known = {key: value for key, value in values.items() if key in fields}
        unknown = sorted(set(values) - set(fields) - ANNOTATIONS)
        # Multi-head attention only: a config may state the number of key-value heads, but not another one.
        if "num_key_value_heads" in unknown:
            unknown.remove("num_key_value_heads")
            heads = known.get("num_attention_heads", cls.num_attention_heads)
            if values["num_key_value_heads"] != heads:
                raise ValueError(
                    f"config key 'num_key_value_heads' must equal num_attention_heads ({heads}), "
                    f"found {values['num_key_value_heads']!r}: Talkie has no grouped-query attention"
                )
        if unknown:
            raise ValueError(f"unknown config keys for talkie: {', '.join(unknown)}; known: {', '.join(fields)}")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The plain mapping that `from_dict` reads back."""
        return asdict(self)
