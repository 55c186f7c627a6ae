"""Tiny random GELU-GPT checkpoints, written in the published `transformers` layout from a seed.

Every parameter is set and amplified: lambdas far from their initial values, gates that open and close, padded rows of
the vocabulary filled. A port that leaves any of them out shows it in the first decimal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A small `config.json`: 3 layers, 4 heads of 12 over 2 of keys and values, 120 tokens in a matrix of 128 rows,
    a short window of 128 within sequences of 256."""
    config: dict[str, Any] = {
        "architectures": ["GeluGPTForCausalLM"],
        "model_type": "gelu_gpt",
        "sequence_len": 256,
        "vocab_size": 120,
        "n_layer": 3,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 48,
        "window_pattern": "SSSL",
        "tie_embeddings": True,
        "rope_base": 100000.0,
        "pad_vocab_size_to": 64,
        "mlp": "gelu",
        "rms_norm_eps": 1e-6,
        "rope_table_dtype": "float32",
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    return config | overrides


def tiny_tensors(config: dict[str, Any], seed: int = 0, embedding_scale: float = 1.0) -> dict[str, np.ndarray]:
    """Random parameters by published name, in the config's `dtype`.

    `embedding_scale` near 1e-3 makes mean squares comparable with eps, so that a wrong eps shows.
    """
    random = np.random.default_rng(seed)
    width, layers, heads = config["n_embd"], config["n_layer"], config["n_kv_head"]
    rows = -(-config["vocab_size"] // config["pad_vocab_size_to"]) * config["pad_vocab_size_to"]
    key_width = heads * (width // config["n_head"])
    tensors: dict[str, np.ndarray] = {}

    def matrix(name: str, outputs: int, inputs: int, scale: float) -> None:
        tensors[name] = random.normal(0.0, scale, (outputs, inputs))

    matrix("model.wte.weight", rows, width, embedding_scale)
    for layer in range(layers):
        block = f"model.blocks.{layer}."
        matrix(f"{block}attn.c_q.weight", width, width, 1.5 * width**-0.5)
        matrix(f"{block}attn.c_k.weight", key_width, width, 1.5 * width**-0.5)
        matrix(f"{block}attn.c_v.weight", key_width, width, 1.5 * width**-0.5)
        matrix(f"{block}attn.c_proj.weight", width, width, 0.7 * width**-0.5)
        matrix(f"{block}mlp.c_fc.weight", 4 * width, width, 1.5 * width**-0.5)
        matrix(f"{block}mlp.c_proj.weight", width, 4 * width, 0.7 * (4 * width) ** -0.5)
        if layer % 2 == (layers - 1) % 2:
            matrix(f"{block}attn.ve_gate.weight", heads, 12, 0.5)
            matrix(f"model.value_embeds.{layer}.weight", rows, key_width, 0.7)
    matrix("model.smear_gate.weight", 1, 24, 0.5)
    tensors["model.smear_lambda"] = random.uniform(0.8, 1.2, 1)
    tensors["model.backout_lambda"] = random.uniform(0.3, 0.5, 1)
    tensors["model.resid_lambdas"] = random.uniform(0.7, 1.3, layers)
    tensors["model.x0_lambdas"] = random.uniform(0.2, 0.6, layers)
    if not config["tie_embeddings"]:
        matrix("model.lm_head.weight", rows, width, 1.5 * width**-0.5)
    elif embedding_scale == 1.0:
        # Logits of a few units, where the soft cap bends but does not flatten them.
        tensors["model.wte.weight"] *= 1.5 * width**-0.5
    dtype = np.dtype(ml_dtypes.bfloat16) if config["dtype"] == "bfloat16" else np.dtype(config["dtype"])
    return {name: value.astype(dtype) for name, value in tensors.items()}


def write_checkpoint(
    folder: Path, config: dict[str, Any] | None = None, seed: int = 0, embedding_scale: float = 1.0
) -> Path:
    """Write `config.json` and `model.safetensors` into `folder` (made when missing) and return it."""
    config = tiny_config() if config is None else config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tiny_tensors(config, seed, embedding_scale), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
