"""Tiny random Talkie checkpoints, written in the `transformers` layout from a seed.

Every parameter is set and amplified: gains far from one, skips far from zero, heads * head_dim unlike hidden_size.
A port that leaves any of them out shows it in the first decimal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A small `config.json`: 3 layers, 4 heads of 16 on a hidden size of 48, vocabulary 96."""
    config: dict[str, Any] = {
        "architectures": ["TalkieForCausalLM"],
        "model_type": "talkie",
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rope_theta": 1000.0,
        "rms_norm_eps": 1.1920928955078125e-07,
        "rope_table_dtype": "bfloat16",
        "lm_head_gain_folded": False,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    return config | overrides


def tiny_tensors(config: dict[str, Any], seed: int = 0, embedding_scale: float = 1.0) -> dict[str, np.ndarray]:
    """Random parameters by name, in the config's `dtype`.

    `embedding_scale` near 1e-4 makes mean squares comparable with eps, so that a wrong eps shows.
    """
    random = np.random.default_rng(seed)
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, width = config["num_attention_heads"], config["num_attention_heads"] * config["head_dim"]
    tensors: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int, scale: float) -> None:
        tensors[name] = random.normal(0.0, scale, (rows, columns))

    def gain(name: str, size: int, low: float, high: float) -> None:
        tensors[name] = random.uniform(low, high, size) * random.choice([-1.0, 1.0], size, p=[0.2, 0.8])

    matrix("model.embed.weight", vocabulary, hidden, embedding_scale)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.blocks.{layer}."
        for name in ("attn_query", "attn_key", "attn_value"):
            matrix(f"{block}attn.{name}.weight", width, hidden, 1.5 * hidden**-0.5)
        matrix(f"{block}attn.attn_resid.weight", hidden, width, 1.5 * width**-0.5)
        gain(f"{block}attn.head_gain.head_g", heads, 1.2, 2.0)
        gain(f"{block}attn_gain.a_g", 1, 0.5, 0.9)
        matrix(f"{block}mlp.mlp_gate.weight", inner, hidden, 1.5 * hidden**-0.5)
        matrix(f"{block}mlp.mlp_linear.weight", inner, hidden, 1.5 * hidden**-0.5)
        matrix(f"{block}mlp.mlp_resid.weight", hidden, inner, 1.5 * inner**-0.5)
        gain(f"{block}mlp_gain.a_g", 1, 0.5, 0.9)
        gain(f"{block}embed_skip.a_g", 1, 0.3, 0.6)
    matrix("lm_head", vocabulary, hidden, 2.0 * hidden**-0.5)
    tensors["lm_head_gain.w_g"] = random.uniform(1.3, 1.7, 1)
    return {name: value.astype(DTYPES[config["dtype"]]) for name, value in tensors.items()}


def write_checkpoint(
    folder: Path, config: dict[str, Any] | None = None, seed: int = 0, embedding_scale: float = 1.0
) -> Path:
    """Write `config.json` and `model.safetensors` into `folder` (made when missing) and return it."""
    config = tiny_config() if config is None else config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tiny_tensors(config, seed, embedding_scale), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
