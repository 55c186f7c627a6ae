"""Tiny random gpt-oss checkpoints from a seed, with experts in MXFP4 as published or as Transformers' own parameters.

Every parameter is set and amplified: non-zero sinks and biases, expert biases beyond the clamp, gains unlike one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

#: Magnitudes of the E2M1 codes 0..7 (OCP Microscaling Formats 1.0).
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A small config.json in the published style: 3 layers, 4 heads on 2, 4 of 8 experts, window 16."""
    config: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 131072,
        "initial_context_length": 4096,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "rms_norm_eps": 1e-5,
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    return config | overrides


def tiny_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Published names: `*_blocks` and `*_scales` for the experts' matrices, float32 for the rest."""
    random = np.random.default_rng(seed)
    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    kv_width = config["num_key_value_heads"] * head_dim
    tensors: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int, scale: float, centre: float = 0.0) -> None:
        tensors[name] = random.normal(centre, scale, shape).astype(np.float32)

    def packed(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}_blocks"] = random.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
        tensors[f"{name}_scales"] = random.integers(122, 125, (experts, rows, columns // 32)).astype(np.uint8)

    add("model.embed_tokens.weight", config["vocab_size"], hidden, scale=1.0)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{at}.{norm}.weight", hidden, scale=0.3, centre=1.0)
        for name, rows, columns in (
            ("q_proj", heads * head_dim, hidden),
            ("k_proj", kv_width, hidden),
            ("v_proj", kv_width, hidden),
            ("o_proj", hidden, heads * head_dim),
        ):
            add(f"{at}.self_attn.{name}.weight", rows, columns, scale=1.5 * columns**-0.5)
            add(f"{at}.self_attn.{name}.bias", rows, scale=0.3)
        add(f"{at}.self_attn.sinks", heads, scale=1.5)
        add(f"{at}.mlp.router.weight", experts, hidden, scale=1.5 * hidden**-0.5)
        add(f"{at}.mlp.router.bias", experts, scale=0.5)
        packed(f"{at}.mlp.experts.gate_up_proj", 2 * inner, hidden)
        add(f"{at}.mlp.experts.gate_up_proj_bias", experts, 2 * inner, scale=3.0)
        packed(f"{at}.mlp.experts.down_proj", hidden, inner)
        add(f"{at}.mlp.experts.down_proj_bias", experts, hidden, scale=0.5)
    add("model.norm.weight", hidden, scale=0.3, centre=1.0)
    add("lm_head.weight", config["vocab_size"], hidden, scale=hidden**-0.5)
    return tensors


def unpacked(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weights [expert, out, in] in float64: low nibble first, scales are 2 ** (byte - 127)."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    values = np.where(codes & 8, -1.0, 1.0) * E2M1[codes & 7]
    return (values * 2.0 ** (scales.astype(np.float64) - 127)[..., None]).reshape(*blocks.shape[:2], -1)


def float_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights as Transformers' own parameters, [expert, in, out] in float32."""
    plain = {name: value for name, value in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    for name in tensors:
        if name.endswith("_blocks"):
            path = name.removesuffix("_blocks")
            weights = unpacked(tensors[name], tensors[f"{path}_scales"])
            plain[path] = np.ascontiguousarray(weights.swapaxes(1, 2).astype(np.float32))
    return plain


def write_checkpoint(folder: Path, config: dict[str, Any], seed: int = 0, packed: bool = True) -> Path:
    """Write config.json and model.safetensors, experts in MXFP4 when `packed`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tiny_tensors(config, seed)
    if packed:
        config = config | {"quantization_config": {"quant_method": "mxfp4"}}
    save_file(tensors if packed else float_tensors(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
