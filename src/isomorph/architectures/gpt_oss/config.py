"""gpt-oss' configuration, free of any framework: what `config.json` says, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

#: Keys of a published `config.json` that describe files, serving, training or other tools, not the network.
ANNOTATIONS = frozenset(
    """
    _name_or_path architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id
    hidden_act id2label initial_context_length initializer_range is_encoder_decoder label2id model_file
    output_attentions output_hidden_states output_router_logits pad_token_id problem_type quantization
    quantization_config return_dict router_aux_loss_coef tokenizer_class torch_dtype transformers_version use_cache
    """.split()  # noqa: SIM905 - a list of words reads better as words
)

#: Other names of a key: as the original code has it, or as Transformers aliases it.
ALIASES = {"experts_per_token": "num_experts_per_tok", "num_experts": "num_local_experts"}

SLIDING, FULL = "sliding_attention", "full_attention"


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"config key {name!r} must be a positive number, found {value!r}; correct config.json")


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071) as gpt-oss uses it: `truncate` False leaves the ramp's ends between whole channels."""

    factor: float = 32.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: int = 4096
    truncate: bool = False
    rope_type: str = "yarn"

    def __post_init__(self) -> None:
        for name in ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"):
            _positive(f"rope_scaling.{name}", getattr(self, name))
        if self.rope_type != "yarn":
            raise ValueError(f"config key 'rope_scaling.rope_type' must be 'yarn', found {self.rope_type!r}")
        if not isinstance(self.truncate, bool):
            raise ValueError(f"config key 'rope_scaling.truncate' must be true or false, found {self.truncate!r}")


@dataclass(frozen=True)
class GptOssConfig:
    """Shapes and constants of one gpt-oss model; the defaults are those of the published 20B.

    Stated in the published style, `rope_theta` beside `rope_scaling`: mlx-lm reads no other. `layer_types` alternates,
    the first layer sliding, unless it is given. `sliding_window` counts the current token.
    """

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 24
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    num_local_experts: int = 32
    num_experts_per_tok: int = 4
    sliding_window: int = 128
    layer_types: tuple[str, ...] = ()
    max_position_embeddings: int = 131072
    rope_theta: float = 150_000.0
    rope_scaling: YarnScaling = YarnScaling()
    rms_norm_eps: float = 1e-5
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    model_type: str = "gpt_oss"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "num_local_experts",
            "num_experts_per_tok",
            "sliding_window",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"config key {name!r} must be a positive integer, found {value!r}; correct config.json"
                )
        for name in ("rope_theta", "rms_norm_eps", "swiglu_alpha", "swiglu_limit"):
            _positive(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config key 'num_key_value_heads' must divide num_attention_heads ({self.num_attention_heads}), "
                f"found {self.num_key_value_heads}"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"config key 'num_experts_per_tok' must be at most num_local_experts ({self.num_local_experts}), "
                f"found {self.num_experts_per_tok}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config key 'head_dim' must be even for rotary positions, found {self.head_dim}")
        for name, only in (("attention_bias", True), ("tie_word_embeddings", False), ("model_type", "gpt_oss")):
            if getattr(self, name) != only:
                raise ValueError(f"config key {name!r} must be {only!r} for gpt_oss, found {getattr(self, name)!r}")
        types = self.layer_types or tuple(FULL if i % 2 else SLIDING for i in range(self.num_hidden_layers))
        object.__setattr__(self, "layer_types", tuple(types))
        if len(types) != self.num_hidden_layers or not set(types) <= {SLIDING, FULL}:
            raise ValueError(
                f"config key 'layer_types' must name {SLIDING} or {FULL} for each of {self.num_hidden_layers} layers, "
                f"found {len(types)}: {', '.join(sorted(set(map(str, types))))}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GptOssConfig:
        """Build from a parsed `config.json`, in the published style or Transformers 5's (`rope_parameters`).

        Raises ValueError that names every unknown key or unsupported value.
        """
        fields = cls.__dataclass_fields__
        given = dict(values)
        for alias, name in ALIASES.items():
            if alias in given and given.setdefault(name, given[alias]) != given.pop(alias):
                raise ValueError(f"config keys {alias!r} and {name!r} must agree; correct config.json")
        rope = given.pop("rope_parameters", None) or given.get("rope_scaling")
        if rope is not None:
            if not isinstance(rope, Mapping):
                raise ValueError(f"config key 'rope_scaling' must be an object, found {rope!r}")
            # What Transformers takes where a config does not say.
            length = given.get("max_position_embeddings", fields["max_position_embeddings"].default)
            unstated = {"truncate": True, "original_max_position_embeddings": length}
            unstated["rope_type"] = rope.get("type", "default")
            scaling = {**unstated, **{key: value for key, value in rope.items() if key != "type"}}
            theta = scaling.pop("rope_theta", None)
            if theta is not None and given.setdefault("rope_theta", theta) != theta:
                raise ValueError("config key 'rope_theta' is stated twice, differently; correct config.json")
            known = YarnScaling.__dataclass_fields__
            if unknown := sorted(set(scaling) - set(known)):
                raise ValueError(f"unknown config keys for gpt_oss: rope_scaling.{', rope_scaling.'.join(unknown)}")
            given["rope_scaling"] = YarnScaling(**scaling)
        if unknown := sorted(set(given) - set(fields) - ANNOTATIONS):
            raise ValueError(f"unknown config keys for gpt_oss: {', '.join(unknown)}; known: {', '.join(fields)}")
        chosen = {key: value for key, value in given.items() if key in fields and value is not None}
        if "layer_types" in chosen:
            chosen["layer_types"] = tuple(chosen["layer_types"])
        return cls(**chosen)

    def to_dict(self) -> dict[str, Any]:
        """The plain mapping that `from_dict` reads back."""
        return {**asdict(self), "layer_types": list(self.layer_types)}
