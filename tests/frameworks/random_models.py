"""Tiny random checkpoints of many architectures, and their weights replaced by others that mlx-lm made of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

VOCABULARY = 160

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2}

#: model type -> what its config needs beyond the common keys; multipliers as published models have them.
MODELS: dict[str, dict] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, **EXPERTS},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 256, "n_positions": 128},
    "granite": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.0625,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "qwen3": {"head_dim": 32},
    "mistral": {},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "olmo2": {},
    "olmoe": {"num_experts": 4, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 32, **EXPERTS},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        **EXPERTS,
    },
    "smollm3": {},
    "starcoder2": {},
    "stablelm": {"partial_rotary_factor": 0.25},
    "cohere": {"logit_scale": 0.5},
    "helium": {"head_dim": 16},
    "gpt_neox": {"rotary_pct": 0.5, "intermediate_size": 256},
    "seed_oss": {"head_dim": 16},
    "glm4": {"head_dim": 16, "partial_rotary_factor": 0.5},
}
GPT_OSS = {
    "num_local_experts": 4,
    "head_dim": 16,
    "sliding_window": 8,
    "max_position_embeddings": 131072,
    "layer_types": ["sliding_attention", "full_attention"],
    **EXPERTS,
}
#: Keys that mlx-lm wants in config.json and Transformers does not write.
MLX_KEYS: dict[str, dict] = {
    "stablelm": {"partial_rotary_factor": 0.25},
    "glm4": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 10000},
    "gpt2": {"n_ctx": 128, "num_key_value_heads": 4},
    "qwen3_moe": {"num_experts": 4},
}


def random_folder(model_type: str, folder: Path, **extra: object) -> Path:
    """A float32 checkpoint with a tokenizer, as `save_pretrained` writes it."""
    torch.manual_seed(1)
    keys = GPT_OSS if model_type == "gpt_oss" else MODELS.get(model_type, {})
    config = transformers.CONFIG_MAPPING[model_type](**COMMON | keys | extra)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Amplified, or a wrong layer would hardly show.
            if "norm" in name or "ln_" in name:
                # Gemma adds one.
                parameter.uniform_(-0.5, 0.5) if "gemma" in model_type else parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    if model_type == "gpt2":  # published without the prefix, which mlx-lm expects
        tensors = load_file(folder / "model.safetensors")
        plain = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    theta = (values.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    (folder / "config.json").write_text(
        json.dumps({"rope_theta": theta, **values, **MLX_KEYS.get(model_type, {}), "torch_dtype": "float32"})
    )
    words = Tokenizer(WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token="0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)
    return folder


def with_matrices(source: Path, matrices: dict[str, np.ndarray], target: Path) -> Path:
    """`source` with each matrix replaced by the one of `matrices` that is nearest to it: no name is needed.

    Random matrices are far from each other; an approximation is far nearer. Stacks of experts are taken apart.
    """
    shutil.copytree(source, target)
    candidates = [part for matrix in matrices.values() for part in (matrix if matrix.ndim == 3 else [matrix])]
    left = set(range(len(candidates)))
    tensors = load_file(target / "model.safetensors")
    for name, value in tensors.items():
        distances = {}
        for index in left:
            for turned in (candidates[index], candidates[index].T):
                if turned.shape == value.shape:
                    distance = float(np.linalg.norm(turned - value) / np.linalg.norm(value))
                    distances[distance] = index, turned
        nearest = min(distances, default=np.inf)
        if nearest < 0.8:
            index, turned = distances[nearest]
            left.discard(index)
            tensors[name] = np.ascontiguousarray(turned)
    assert not left, f"{len(left)} of {len(candidates)} matrices have no place"
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
