"""gpt-oss' tensors: canonical names and shapes, and one literal table a layout.

Canonical names are mlx-lm's, which keeps the gate and up matrices of the experts apart: 19 a layer and 3. Everywhere
else their rows are interleaved, gate first, or the matrices are transposed.
"""

from __future__ import annotations

from isomorph.architectures.gpt_oss.config import GptOssConfig
from isomorph.port.table import Layout, Target

#: Canonical name -> shape. V vocabulary, D hidden, F intermediate, H heads, A heads * head_dim, K key-value heads *
#: head_dim, E experts.
SHAPES = {
    "model.embed_tokens.weight": "V D",
    "model.layers.{i}.input_layernorm.weight": "D",
    "model.layers.{i}.self_attn.q_proj.weight": "A D",
    "model.layers.{i}.self_attn.q_proj.bias": "A",
    "model.layers.{i}.self_attn.k_proj.weight": "K D",
    "model.layers.{i}.self_attn.k_proj.bias": "K",
    "model.layers.{i}.self_attn.v_proj.weight": "K D",
    "model.layers.{i}.self_attn.v_proj.bias": "K",
    "model.layers.{i}.self_attn.o_proj.weight": "D A",
    "model.layers.{i}.self_attn.o_proj.bias": "D",
    "model.layers.{i}.self_attn.sinks": "H",
    "model.layers.{i}.post_attention_layernorm.weight": "D",
    "model.layers.{i}.mlp.router.weight": "E D",
    "model.layers.{i}.mlp.router.bias": "E",
    "model.layers.{i}.mlp.experts.gate_proj.weight": "E F D",
    "model.layers.{i}.mlp.experts.gate_proj.bias": "E F",
    "model.layers.{i}.mlp.experts.up_proj.weight": "E F D",
    "model.layers.{i}.mlp.experts.up_proj.bias": "E F",
    "model.layers.{i}.mlp.experts.down_proj.weight": "E D F",
    "model.layers.{i}.mlp.experts.down_proj.bias": "E D",
    "model.norm.weight": "D",
    "lm_head.weight": "V D",
}

EXPERTS = "model.layers.{i}.mlp.experts"
GATE_UP = (f"{EXPERTS}.gate_proj.weight", f"{EXPERTS}.up_proj.weight")
GATE_UP_BIAS = (f"{EXPERTS}.gate_proj.bias", f"{EXPERTS}.up_proj.bias")

#: Everything but the experts, under its canonical name.
BODY: dict[str, Target] = {name: name for name in SHAPES if ".experts." not in name}

SPLIT_EXPERTS: dict[str, Target] = {name: name for name in SHAPES if ".experts." in name}

#: Fused, and packed as MLX packs them: the published blocks and scales read as MLX's words.
FUSED_EXPERTS: dict[str, Target] = {
    f"{EXPERTS}.gate_up_proj.weight": (GATE_UP, "interleave"),
    f"{EXPERTS}.gate_up_proj.bias": (GATE_UP_BIAS, "interleave"),
    f"{EXPERTS}.down_proj.weight": f"{EXPERTS}.down_proj.weight",
    f"{EXPERTS}.down_proj.bias": f"{EXPERTS}.down_proj.bias",
}

#: The published files: as above, with biases spelt as Transformers spells them.
PUBLISHED_EXPERTS: dict[str, Target] = {
    f"{EXPERTS}.gate_up_proj.weight": (GATE_UP, "interleave"),
    f"{EXPERTS}.gate_up_proj_bias": (GATE_UP_BIAS, "interleave"),
    f"{EXPERTS}.down_proj.weight": f"{EXPERTS}.down_proj.weight",
    f"{EXPERTS}.down_proj_bias": f"{EXPERTS}.down_proj.bias",
}

#: Transformers' own parameters, as fine-tunes in 16 bits store them: [expert, in, out].
TRANSFORMERS_EXPERTS: dict[str, Target] = {
    f"{EXPERTS}.gate_up_proj": (GATE_UP, "interleave_transposed"),
    f"{EXPERTS}.gate_up_proj_bias": (GATE_UP_BIAS, "interleave"),
    f"{EXPERTS}.down_proj": (f"{EXPERTS}.down_proj.weight", "transpose"),
    f"{EXPERTS}.down_proj_bias": f"{EXPERTS}.down_proj.bias",
}

#: The NNX tree: an embedding is `embedding`, a linear map's matrix is `kernel` [in, out], stacked ones [E, in, out].
FLAX_ROWS: dict[str, Target] = {
    "model.embed_tokens.embedding": "model.embed_tokens.weight",
    "model.layers.{i}.input_layernorm.scale": "model.layers.{i}.input_layernorm.weight",
    "model.layers.{i}.self_attn.q_proj.kernel": ("model.layers.{i}.self_attn.q_proj.weight", "transpose"),
    "model.layers.{i}.self_attn.q_proj.bias": "model.layers.{i}.self_attn.q_proj.bias",
    "model.layers.{i}.self_attn.k_proj.kernel": ("model.layers.{i}.self_attn.k_proj.weight", "transpose"),
    "model.layers.{i}.self_attn.k_proj.bias": "model.layers.{i}.self_attn.k_proj.bias",
    "model.layers.{i}.self_attn.v_proj.kernel": ("model.layers.{i}.self_attn.v_proj.weight", "transpose"),
    "model.layers.{i}.self_attn.v_proj.bias": "model.layers.{i}.self_attn.v_proj.bias",
    "model.layers.{i}.self_attn.o_proj.kernel": ("model.layers.{i}.self_attn.o_proj.weight", "transpose"),
    "model.layers.{i}.self_attn.o_proj.bias": "model.layers.{i}.self_attn.o_proj.bias",
    "model.layers.{i}.self_attn.sinks": "model.layers.{i}.self_attn.sinks",
    "model.layers.{i}.post_attention_layernorm.scale": "model.layers.{i}.post_attention_layernorm.weight",
    "model.layers.{i}.mlp.router.kernel": ("model.layers.{i}.mlp.router.weight", "transpose"),
    "model.layers.{i}.mlp.router.bias": "model.layers.{i}.mlp.router.bias",
    "model.layers.{i}.mlp.experts.gate_proj.kernel": (f"{EXPERTS}.gate_proj.weight", "transpose"),
    "model.layers.{i}.mlp.experts.gate_proj.bias": f"{EXPERTS}.gate_proj.bias",
    "model.layers.{i}.mlp.experts.up_proj.kernel": (f"{EXPERTS}.up_proj.weight", "transpose"),
    "model.layers.{i}.mlp.experts.up_proj.bias": f"{EXPERTS}.up_proj.bias",
    "model.layers.{i}.mlp.experts.down_proj.kernel": (f"{EXPERTS}.down_proj.weight", "transpose"),
    "model.layers.{i}.mlp.experts.down_proj.bias": f"{EXPERTS}.down_proj.bias",
    "model.norm.scale": "model.norm.weight",
    "lm_head.kernel": ("lm_head.weight", "transpose"),
}

#: What stock libraries read in config.json to find the model's class.
CLASSES = {"architectures": ["GptOssForCausalLM"]}

OTHER_NAMES = "no: other names; convert --to transformers"
FAULTY = "natively (gpt_oss), where it ignores YaRN's truncate: false"
REPAIRED = "with trust_remote_code, through model_file; natively it ignores YaRN's truncate: false"

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            name="published",
            rows={**BODY, **PUBLISHED_EXPERTS},
            container="pt",
            packed="mxfp4",
            never_floats=("*.experts.*_proj.weight",),
            description="the published files: experts in MXFP4, gate and up rows interleaved",
            keys={
                **CLASSES,
                "quantization_config": {
                    "quant_method": "mxfp4",
                    "modules_to_not_convert": [
                        "model.layers.*.self_attn",
                        "model.layers.*.mlp.router",
                        "model.embed_tokens",
                        "lm_head",
                    ],
                },
            },
            loads={"transformers": "natively", "mlx-lm": FAULTY, "vllm": "natively"},
        ),
        Layout(
            name="transformers",
            rows={**BODY, **TRANSFORMERS_EXPERTS},
            container="pt",
            description="Transformers' own parameters, as 16-bit fine-tunes store them: experts [expert, in, out]",
            keys=CLASSES,
            loads={
                "transformers": "natively",
                "mlx-lm": "no: its experts are [expert, out, in]; convert --to mlx",
                "vllm": "natively",
            },
        ),
        Layout(
            name="mlx-lm",
            rows={**BODY, **SPLIT_EXPERTS},
            container="mlx",
            packed="mlx",
            description="released mlx-lm's: gate and up apart",
            keys={**CLASSES, "model_file": "modeling_mlx.py"},
            files=("modeling_mlx.py",),
            loads={
                "transformers": OTHER_NAMES,
                "mlx-lm": REPAIRED,
                "vllm": OTHER_NAMES,
            },
        ),
        Layout(
            name="mlx-fused",
            rows={**BODY, **FUSED_EXPERTS},
            container="mlx",
            packed="mlx",
            description="MLX words under fused names: gate and up rows interleaved",
            keys=CLASSES,
            loads={
                "transformers": OTHER_NAMES,
                "mlx-lm": "no: its gpt_oss wants gate and up apart; convert --to mlx",
                "vllm": OTHER_NAMES,
            },
        ),
        Layout(
            name="flax",
            rows=FLAX_ROWS,
            container="flax",
            description="the Flax NNX tree: kernels [in, out]",
            keys=CLASSES,
            files=("modeling_flax.py", "config.py"),
            loads={"transformers": OTHER_NAMES, "mlx-lm": OTHER_NAMES, "vllm": OTHER_NAMES},
        ),
    )
}


def parameters(config: GptOssConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor of a model of this config, with its shape."""
    dimensions = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "H": config.num_attention_heads,
        "A": config.num_attention_heads * config.head_dim,
        "K": config.num_key_value_heads * config.head_dim,
        "E": config.num_local_experts,
    }
    inner = [name for name in SHAPES if "{i}" in name]
    names = ["model.embed_tokens.weight"]
    names += [name.replace("{i}", str(i)) for i in range(config.num_hidden_layers) for name in inner]
    names += ["model.norm.weight", "lm_head.weight"]
    patterns = [".".join("{i}" if part.isdecimal() else part for part in name.split(".")) for name in names]
    return {
        name: tuple(dimensions[letter] for letter in SHAPES[pattern].split()) for name, pattern in zip(names, patterns)
    }
