"""GELU-GPT's configuration, free of any framework: what `config.json` says, checked.

One configuration covers nanochat's own models (ReLU squared, a head of its own) and the published GELU-GPT (tanh-GELU,
head tied to the embedding): https://github.com/karpathy/nanochat, https://github.com/mlnomadpy/flaxchat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

#: Smallest float32 eps: nanochat's `F.rms_norm(x, shape)` names none, and torch takes it for every input dtype.
FLOAT32_EPS = 1.1920928955078125e-07

#: Sequence lengths are cut into quarters of whole tiles for the short windows (nanochat).
WINDOW_TILE = 128

#: The tables of rotary positions reach this many times further than training did (nanochat).
POSITIONS_PER_SEQUENCE = 10

#: Keys of a published `config.json` that describe files, serving or other tools, not the network.
ANNOTATIONS = frozenset(
    """
    _name_or_path architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id
    id2label is_decoder is_encoder_decoder label2id model_file output_attentions output_hidden_states pad_token_id
    problem_type quantization quantization_config return_dict tokenizer_class torch_dtype transformers_version
    use_cache
    """.split()  # noqa: SIM905 - a list of words reads better as words
)

#: Names under which other tools look for a value, and the key whose value it must be.
ALIASES = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "n_embd",
    "tie_word_embeddings": "tie_embeddings",
    "rope_theta": "rope_base",
}

#: Keys of the model that Transformers and mlx-lm call nanochat: an earlier one, without windows, smear and backout.
EARLIER = frozenset(["intermediate_size", "hidden_act", "final_logit_softcapping", "logits_soft_cap", "attention_bias"])


@dataclass(frozen=True)
class GeluGPTConfig:
    """Shapes and constants of one model; the defaults are those of the published 261M.

    `mlp` is `gelu` (its tanh approximation) or `relu2`. `window_pattern` is tiled over the layers, `S` looks back
    `short_window` tokens and `L` over the whole sequence; the last layer is always long. `rope_table_dtype` says how
    cos and sin are rounded: nanochat computes them in its compute dtype, the published port in float32.
    """

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
    model_type: str = "gelu_gpt"

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "pad_vocab_size_to"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"config key {name!r} must be a positive integer, found {value!r}; correct config.json"
                )
        for name in ("rope_base", "rms_norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"config key {name!r} must be a positive number, found {value!r}; correct config.json")
        for name, factor in (("n_embd", self.n_head), ("n_head", self.n_kv_head)):
            if getattr(self, name) % factor:
                raise ValueError(f"config key {name!r} must divide by {factor} heads, found {getattr(self, name)}")
        if self.head_dim % 2:
            raise ValueError(f"heads must have an even size for rotary positions, found {self.head_dim}")
        if self.n_embd < 24:
            raise ValueError(
                f"config key 'n_embd' must be at least 24, which the smear gate reads, found {self.n_embd}"
            )
        if not isinstance(self.window_pattern, str) or not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"config key 'window_pattern' must be made of S and L, found {self.window_pattern!r}")
        if self.mlp not in ("gelu", "relu2"):
            raise ValueError(f"config key 'mlp' must be 'gelu' or 'relu2', found {self.mlp!r}")
        if self.rope_table_dtype not in ("bfloat16", "float32"):
            raise ValueError(
                f"config key 'rope_table_dtype' must be 'bfloat16' or 'float32', found {self.rope_table_dtype!r}"
            )
        if not isinstance(self.tie_embeddings, bool):
            raise ValueError(f"config key 'tie_embeddings' must be true or false, found {self.tie_embeddings!r}")
        if self.model_type != "gelu_gpt":
            raise ValueError(f"config key 'model_type' must be 'gelu_gpt', found {self.model_type!r}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embeddings and the head: `vocab_size` rounded up; the rest are never reached."""
        return -(-self.vocab_size // self.pad_vocab_size_to) * self.pad_vocab_size_to

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence: positions beyond `sequence_len` were not trained."""
        return POSITIONS_PER_SEQUENCE * self.sequence_len

    @property
    def short_window(self) -> int:
        """A quarter of the sequence, rounded up to whole tiles: 1024 -> 256."""
        return -(-self.sequence_len // 4 // WINDOW_TILE) * WINDOW_TILE

    @property
    def windows(self) -> tuple[int, ...]:
        """How many tokens before itself each layer sees: token i sees j where `0 <= i - j <= window`."""
        kinds = (self.window_pattern[layer % len(self.window_pattern)] for layer in range(self.n_layer - 1))
        lookback = {"S": self.short_window, "L": self.sequence_len}
        return (*(lookback[kind] for kind in kinds), self.sequence_len)

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layer

    def has_value_embedding(self, layer: int) -> bool:
        """Every second layer has one, counted from the last."""
        return layer % 2 == (self.n_layer - 1) % 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GeluGPTConfig:
        """Build from a parsed `config.json`. Raises ValueError that names every unknown key or unsupported value."""
        fields = cls.__dataclass_fields__
        given = dict(values)
        for alias, name in ALIASES.items():
            if alias in given and given.setdefault(name, given[alias]) != given.pop(alias):
                raise ValueError(f"config keys {alias!r} and {name!r} must agree; correct config.json")
        unknown = set(given) - set(fields) - ANNOTATIONS - {"max_position_embeddings"}
        if earlier := sorted(unknown & EARLIER):
            raise ValueError(
                f"config keys {', '.join(earlier)} are of an earlier nanochat (without windows, value embeddings, "
                "smear and backout), which gelu_gpt is not; load it as model_type nanochat"
            )
        if unknown:
            raise ValueError(
                f"unknown config keys for gelu_gpt: {', '.join(sorted(unknown))}; known: {', '.join(fields)}"
            )
        config = cls(**{key: value for key, value in given.items() if key in fields})
        stated = given.get("max_position_embeddings", config.max_position_embeddings)
        if stated != config.max_position_embeddings:
            raise ValueError(
                f"config key 'max_position_embeddings' must be {POSITIONS_PER_SEQUENCE} * sequence_len "
                f"({config.max_position_embeddings}), found {stated!r}"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The plain mapping that `from_dict` reads back, with the names under which other tools look."""
        aliases = {alias: getattr(self, name) for alias, name in ALIASES.items() if alias != "rope_theta"}
        return {**asdict(self), **aliases, "max_position_embeddings": self.max_position_embeddings}
