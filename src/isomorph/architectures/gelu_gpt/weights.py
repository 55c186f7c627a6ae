"""GELU-GPT's tensors: canonical names and shapes, and one literal table a layout.

Canonical names are those of the published Transformers port (mlnomad/gelu-d12-chinchilla-261M-pytorch).
"""

from __future__ import annotations

from isomorph.architectures.gelu_gpt.config import GeluGPTConfig
from isomorph.port.table import Layout, Target

#: Channels that open the gates of smear and of the value embeddings (nanochat).
SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS = 24, 12

#: Canonical name -> shape. P padded vocabulary, D hidden, K key-value heads * head_dim, G key-value heads, F 4 * D,
#: L layers, s and v the channels that gates read. Every second layer has value embeddings; a tied head has no matrix.
SHAPES = {
    "model.wte.weight": "P D",
    "model.smear_gate.weight": "1 s",
    "model.smear_lambda": "1",
    "model.blocks.{i}.attn.c_q.weight": "D D",
    "model.blocks.{i}.attn.c_k.weight": "K D",
    "model.blocks.{i}.attn.c_v.weight": "K D",
    "model.blocks.{i}.attn.c_proj.weight": "D D",
    "model.blocks.{i}.mlp.c_fc.weight": "F D",
    "model.blocks.{i}.mlp.c_proj.weight": "D F",
    "model.blocks.{i}.attn.ve_gate.weight": "G v",
    "model.value_embeds.{i}.weight": "P K",
    "model.resid_lambdas": "L",
    "model.x0_lambdas": "L",
    "model.backout_lambda": "1",
    "model.lm_head.weight": "P D",
}

#: Of layers with value embeddings only.
VALUE_EMBEDDING = ("model.blocks.{i}.attn.ve_gate.weight", "model.value_embeds.{i}.weight")

TABLES = "cos and sin tables are computed from the config"
DROPPED: dict[str, Target] = {"*rope_cos": (None, TABLES), "*rope_sin": (None, TABLES)}

PUBLISHED: dict[str, Target] = {name: name for name in SHAPES}

#: The converted `.pt`: the same module without its wrapper.
EXPORT: dict[str, Target] = {name.removeprefix("model."): name for name in SHAPES}

#: nanochat's own names.
NANOCHAT: dict[str, Target] = {
    "transformer.wte.weight": "model.wte.weight",
    "smear_gate.weight": "model.smear_gate.weight",
    "smear_lambda": "model.smear_lambda",
    "transformer.h.{i}.attn.c_q.weight": "model.blocks.{i}.attn.c_q.weight",
    "transformer.h.{i}.attn.c_k.weight": "model.blocks.{i}.attn.c_k.weight",
    "transformer.h.{i}.attn.c_v.weight": "model.blocks.{i}.attn.c_v.weight",
    "transformer.h.{i}.attn.c_proj.weight": "model.blocks.{i}.attn.c_proj.weight",
    "transformer.h.{i}.mlp.c_fc.weight": "model.blocks.{i}.mlp.c_fc.weight",
    "transformer.h.{i}.mlp.c_proj.weight": "model.blocks.{i}.mlp.c_proj.weight",
    "transformer.h.{i}.attn.ve_gate.weight": "model.blocks.{i}.attn.ve_gate.weight",
    "value_embeds.{i}.weight": "model.value_embeds.{i}.weight",
    "resid_lambdas": "model.resid_lambdas",
    "x0_lambdas": "model.x0_lambdas",
    "backout_lambda": "model.backout_lambda",
    "lm_head.weight": "model.lm_head.weight",
}

#: The NNX tree, which Orbax stores: an embedding is `embedding`, a linear map's matrix is `kernel` [in, out].
FLAX: dict[str, Target] = {
    "wte.embedding": "model.wte.weight",
    "smear_gate.kernel": ("model.smear_gate.weight", "transpose"),
    "smear_lambda": "model.smear_lambda",
    "blocks.{i}.attn.c_q.kernel": ("model.blocks.{i}.attn.c_q.weight", "transpose"),
    "blocks.{i}.attn.c_k.kernel": ("model.blocks.{i}.attn.c_k.weight", "transpose"),
    "blocks.{i}.attn.c_v.kernel": ("model.blocks.{i}.attn.c_v.weight", "transpose"),
    "blocks.{i}.attn.c_proj.kernel": ("model.blocks.{i}.attn.c_proj.weight", "transpose"),
    "blocks.{i}.mlp.c_fc.kernel": ("model.blocks.{i}.mlp.c_fc.weight", "transpose"),
    "blocks.{i}.mlp.c_proj.kernel": ("model.blocks.{i}.mlp.c_proj.weight", "transpose"),
    "blocks.{i}.attn.ve_gate.kernel": ("model.blocks.{i}.attn.ve_gate.weight", "transpose"),
    "value_embeds.{i}.embedding": "model.value_embeds.{i}.weight",
    "resid_lambdas": "model.resid_lambdas",
    "x0_lambdas": "model.x0_lambdas",
    "backout_lambda": "model.backout_lambda",
    "lm_head.kernel": ("model.lm_head.weight", "transpose"),
}

#: What stock libraries read in config.json to find the model's class.
CLASSES = {"architectures": ["GeluGPTForCausalLM"]}
AUTO_MAP = {
    "AutoConfig": "modeling_torch.GeluGPTConfig",
    "AutoModel": "modeling_torch.GeluGPTModel",
    "AutoModelForCausalLM": "modeling_torch.GeluGPTForCausalLM",
}

UNSERVED = "no: smear reaches across tokens outside attention, which vLLM's Transformers backend cannot do"
PICKLE = {
    "transformers": "no: a torch pickle; convert --to transformers",
    "mlx-lm": "no: a torch pickle; convert --to mlx",
    "vllm": UNSERVED,
}

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            name="original",
            rows={**NANOCHAT, "cos": (None, TABLES), "sin": (None, TABLES)},
            container="nanochat",
            description="nanochat's own checkpoint: model_*.pt and meta_*.json",
            keys=CLASSES,
            loads=PICKLE,
        ),
        Layout(
            name="export",
            rows={**EXPORT, **DROPPED},
            container="torch",
            description="the published port's converted .pt: config and state_dict in one file",
            keys=CLASSES,
            loads=PICKLE,
        ),
        Layout(
            name="transformers",
            rows={**PUBLISHED, **DROPPED},
            container="pt",
            description="the published Transformers port",
            keys={**CLASSES, "auto_map": AUTO_MAP},
            files=("modeling_torch.py",),
            generation={"use_cache": True},
            loads={
                "transformers": "with trust_remote_code=True",
                "mlx-lm": "no: convert --to mlx",
                "vllm": UNSERVED,
            },
        ),
        Layout(
            name="mlx",
            rows={**PUBLISHED, **DROPPED},
            container="mlx",
            packed="mlx",
            description="the published names for mlx-lm, with a model file of its own",
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
            rows={**FLAX, **DROPPED},
            container="flax",
            description="the Flax NNX tree: kernels [in, out]",
            keys=CLASSES,
            files=("modeling_flax.py", "config.py"),
            loads={
                "transformers": "no: NNX names; convert --to transformers",
                "mlx-lm": "no: NNX names; convert --to mlx",
                "vllm": UNSERVED,
            },
        ),
        Layout(
            name="orbax",
            rows={**FLAX, **DROPPED},
            container="orbax",
            description="the Flax NNX tree in an Orbax checkpoint, as training runs write it",
            keys=CLASSES,
            loads={
                "transformers": "no: an Orbax checkpoint; convert --to transformers",
                "mlx-lm": "no: an Orbax checkpoint; convert --to mlx",
                "vllm": UNSERVED,
            },
        ),
    )
}


def parameters(config: GeluGPTConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor of a model of this config, with its shape."""
    dimensions = {
        "P": config.padded_vocab_size,
        "D": config.n_embd,
        "K": config.n_kv_head * config.head_dim,
        "G": config.n_kv_head,
        "F": 4 * config.n_embd,
        "L": config.n_layer,
        "s": SMEAR_GATE_CHANNELS,
        "v": VALUE_GATE_CHANNELS,
        "1": 1,
    }
    shapes = {name: tuple(dimensions[letter] for letter in letters.split()) for name, letters in SHAPES.items()}
    if config.tie_embeddings:
        del shapes["model.lm_head.weight"]
    found: dict[str, tuple[int, ...]] = {}
    inner = [name for name in shapes if "{i}" in name]
    for name, shape in shapes.items():
        if name not in inner:
            found[name] = shape
        elif name == inner[0]:
            for layer in range(config.n_layer):
                rows = [each for each in inner if each not in VALUE_EMBEDDING or config.has_value_embedding(layer)]
                found |= {each.replace("{i}", str(layer)): shapes[each] for each in rows}
    return found
