"""Talkie's tensors: canonical names and shapes, and one literal table a layout.

Canonical names are those of the Transformers port (lewtun/talkie-1930-13b-it-hf): 11 a block and 3, 443 for 40 blocks.
"""

from __future__ import annotations

from isomorph.architectures.talkie.config import TalkieConfig
from isomorph.port.table import Layout, Target

#: Canonical name -> shape. V vocabulary, D hidden, F intermediate, H heads, A heads * head_dim.
SHAPES = {
    "model.embed.weight": "V D",
    "model.blocks.{i}.attn.attn_query.weight": "A D",
    "model.blocks.{i}.attn.attn_key.weight": "A D",
    "model.blocks.{i}.attn.attn_value.weight": "A D",
    "model.blocks.{i}.attn.attn_resid.weight": "D A",
    "model.blocks.{i}.attn.head_gain.head_g": "H",
    "model.blocks.{i}.attn_gain.a_g": "1",
    "model.blocks.{i}.mlp.mlp_gate.weight": "F D",
    "model.blocks.{i}.mlp.mlp_linear.weight": "F D",
    "model.blocks.{i}.mlp.mlp_resid.weight": "D F",
    "model.blocks.{i}.mlp_gain.a_g": "1",
    "model.blocks.{i}.embed_skip.a_g": "1",
    "lm_head": "V D",
    "lm_head_gain.w_g": "1",
}

TABLES = "cos and sin tables are computed from the config"
DROPPED: dict[str, Target] = {"*rotary*": (None, TABLES), "*cos": (None, TABLES), "*sin": (None, TABLES)}

BODY: dict[str, Target] = {
    "model.embed.weight": "model.embed.weight",
    "model.blocks.{i}.attn.attn_query.weight": "model.blocks.{i}.attn.attn_query.weight",
    "model.blocks.{i}.attn.attn_key.weight": "model.blocks.{i}.attn.attn_key.weight",
    "model.blocks.{i}.attn.attn_value.weight": "model.blocks.{i}.attn.attn_value.weight",
    "model.blocks.{i}.attn.attn_resid.weight": "model.blocks.{i}.attn.attn_resid.weight",
    "model.blocks.{i}.attn.head_gain.head_g": "model.blocks.{i}.attn.head_gain.head_g",
    "model.blocks.{i}.attn_gain.a_g": "model.blocks.{i}.attn_gain.a_g",
    "model.blocks.{i}.mlp.mlp_gate.weight": "model.blocks.{i}.mlp.mlp_gate.weight",
    "model.blocks.{i}.mlp.mlp_linear.weight": "model.blocks.{i}.mlp.mlp_linear.weight",
    "model.blocks.{i}.mlp.mlp_resid.weight": "model.blocks.{i}.mlp.mlp_resid.weight",
    "model.blocks.{i}.mlp_gain.a_g": "model.blocks.{i}.mlp_gain.a_g",
    "model.blocks.{i}.embed_skip.a_g": "model.blocks.{i}.embed_skip.a_g",
}

HEAD: dict[str, Target] = {"lm_head": "lm_head", "lm_head_gain.w_g": "lm_head_gain.w_g"}

FOLDED_HEAD: dict[str, Target] = {"lm_head.weight": (("lm_head", "lm_head_gain.w_g"), "fold_gain")}

#: The authors' training checkpoints: no `model.` prefix.
ORIGINAL_BODY: dict[str, Target] = {
    "embed.weight": "model.embed.weight",
    "blocks.{i}.attn.attn_query.weight": "model.blocks.{i}.attn.attn_query.weight",
    "blocks.{i}.attn.attn_key.weight": "model.blocks.{i}.attn.attn_key.weight",
    "blocks.{i}.attn.attn_value.weight": "model.blocks.{i}.attn.attn_value.weight",
    "blocks.{i}.attn.attn_resid.weight": "model.blocks.{i}.attn.attn_resid.weight",
    "blocks.{i}.attn.head_gain.head_g": "model.blocks.{i}.attn.head_gain.head_g",
    "blocks.{i}.attn_gain.a_g": "model.blocks.{i}.attn_gain.a_g",
    "blocks.{i}.mlp.mlp_gate.weight": "model.blocks.{i}.mlp.mlp_gate.weight",
    "blocks.{i}.mlp.mlp_linear.weight": "model.blocks.{i}.mlp.mlp_linear.weight",
    "blocks.{i}.mlp.mlp_resid.weight": "model.blocks.{i}.mlp.mlp_resid.weight",
    "blocks.{i}.mlp_gain.a_g": "model.blocks.{i}.mlp_gain.a_g",
    "blocks.{i}.embed_skip.a_g": "model.blocks.{i}.embed_skip.a_g",
}

#: The NNX tree: an embedding is `embedding`, a linear map's matrix is `kernel` [in, out].
FLAX_BODY: dict[str, Target] = {
    "model.embed.embedding": "model.embed.weight",
    "model.blocks.{i}.attn.attn_query.kernel": ("model.blocks.{i}.attn.attn_query.weight", "transpose"),
    "model.blocks.{i}.attn.attn_key.kernel": ("model.blocks.{i}.attn.attn_key.weight", "transpose"),
    "model.blocks.{i}.attn.attn_value.kernel": ("model.blocks.{i}.attn.attn_value.weight", "transpose"),
    "model.blocks.{i}.attn.attn_resid.kernel": ("model.blocks.{i}.attn.attn_resid.weight", "transpose"),
    "model.blocks.{i}.attn.head_gain.head_g": "model.blocks.{i}.attn.head_gain.head_g",
    "model.blocks.{i}.attn_gain.a_g": "model.blocks.{i}.attn_gain.a_g",
    "model.blocks.{i}.mlp.mlp_gate.kernel": ("model.blocks.{i}.mlp.mlp_gate.weight", "transpose"),
    "model.blocks.{i}.mlp.mlp_linear.kernel": ("model.blocks.{i}.mlp.mlp_linear.weight", "transpose"),
    "model.blocks.{i}.mlp.mlp_resid.kernel": ("model.blocks.{i}.mlp.mlp_resid.weight", "transpose"),
    "model.blocks.{i}.mlp_gain.a_g": "model.blocks.{i}.mlp_gain.a_g",
    "model.blocks.{i}.embed_skip.a_g": "model.blocks.{i}.embed_skip.a_g",
}

#: What stock libraries read in config.json to find the model's class.
CLASSES = {"architectures": ["TalkieForCausalLM"]}
AUTO_MAP = {
    "AutoConfig": "modeling_torch.TalkieConfig",
    "AutoModel": "modeling_torch.TalkieModel",
    "AutoModelForCausalLM": "modeling_torch.TalkieForCausalLM",
}

NATIVE = "natively (talkie): its rope tables are float32 whatever rope_table_dtype says"
UNSERVED = "no: its Transformers backend needs --layout transformers-folded"

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            name="original",
            rows={**ORIGINAL_BODY, **HEAD, **DROPPED},
            container="torch",
            description="the authors' training checkpoint: one torch file, vocab.txt beside it",
            keys=CLASSES,
            config={"lm_head_gain_folded": False},
            loads={
                "transformers": "no: a torch pickle; convert --to transformers",
                "mlx-lm": "no: a torch pickle; convert --to mlx",
                "vllm": UNSERVED,
            },
        ),
        Layout(
            name="transformers",
            rows={**BODY, **HEAD, **DROPPED},
            container="pt",
            description="the Transformers port: bare lm_head and its gain",
            config={"lm_head_gain_folded": False},
            keys={**CLASSES, "auto_map": AUTO_MAP},
            files=("modeling_torch.py",),
            loads={"transformers": "with trust_remote_code=True", "mlx-lm": NATIVE, "vllm": UNSERVED},
        ),
        Layout(
            name="transformers-folded",
            rows={**BODY, **FOLDED_HEAD, **DROPPED},
            container="pt",
            description="the Transformers port with the gain multiplied into lm_head.weight, as vLLM needs it",
            config={"lm_head_gain_folded": True},
            keys={**CLASSES, "auto_map": AUTO_MAP},
            files=("modeling_torch.py",),
            loads={
                "transformers": "with trust_remote_code=True",
                "mlx-lm": "no: its talkie has no lm_head.weight; convert --to mlx",
                "vllm": "with --model-impl transformers --trust-remote-code",
            },
        ),
        Layout(
            name="mlx-lm",
            rows={**BODY, **HEAD, **DROPPED},
            container="mlx",
            packed="mlx",
            description="released mlx-lm's own: bare lm_head and its gain",
            keys=CLASSES,
            config={"lm_head_gain_folded": False},
            loads={
                "transformers": "no: it ships no modelling code; convert --to transformers",
                "mlx-lm": NATIVE,
                "vllm": UNSERVED,
            },
        ),
        Layout(
            name="mlx-folded",
            rows={**BODY, **FOLDED_HEAD, **DROPPED},
            container="mlx",
            packed="mlx",
            description="the published MLX variants: the gain multiplied into lm_head.weight, quantizable",
            config={"lm_head_gain_folded": True},
            keys={**CLASSES, "model_file": "modeling_mlx.py"},
            files=("modeling_mlx.py",),
            loads={
                "transformers": "no: it ships no modelling code for torch; convert --to transformers",
                "mlx-lm": "with trust_remote_code, through model_file",
                "vllm": UNSERVED,
            },
        ),
        Layout(
            name="flax",
            rows={**FLAX_BODY, **HEAD, **DROPPED},
            container="flax",
            description="the Flax NNX tree: kernels [in, out]",
            keys=CLASSES,
            config={"lm_head_gain_folded": False},
            files=("modeling_flax.py", "config.py"),
            loads={
                "transformers": "no: NNX names; convert --to transformers",
                "mlx-lm": "no: NNX names; convert --to mlx",
                "vllm": UNSERVED,
            },
        ),
    )
}


def parameters(config: TalkieConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor of a model of this config, with its shape."""
    dimensions = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "H": config.num_attention_heads,
        "A": config.num_attention_heads * config.head_dim,
        "1": 1,
    }
    outer = [name for name in SHAPES if "{i}" not in name]
    names = [outer[0]]
    names += [name.replace("{i}", str(i)) for i in range(config.num_hidden_layers) for name in SHAPES if "{i}" in name]
    names += outer[1:]
    shapes = {}
    for name in names:
        parts = name.split(".")
        pattern = ".".join("{i}" if part.isdecimal() else part for part in parts)
        shapes[name] = tuple(dimensions[letter] for letter in SHAPES[pattern].split())
    return shapes
