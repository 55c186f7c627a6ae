"""Write a random Llama of about one billion parameters, packed as MLX packs it or in bfloat16. Speed needs no sense.

Usage: python benchmarks/random_model.py TARGET [--bits 4] [--group-size 64] [--layers 18]    (--bits 16: bfloat16)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from isomorph.quantize.settings import Settings

D, F, V, HEADS, KV_HEADS = 2048, 5632, 32000, 16, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=18)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    head = D // HEADS
    shapes = {"model.embed_tokens": (V, D), "lm_head": (V, D)}
    for i in range(options.layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj": (D, D),
            f"{layer}.self_attn.k_proj": (KV_HEADS * head, D),
            f"{layer}.self_attn.v_proj": (KV_HEADS * head, D),
            f"{layer}.self_attn.o_proj": (D, D),
            f"{layer}.mlp.gate_proj": (F, D),
            f"{layer}.mlp.up_proj": (F, D),
            f"{layer}.mlp.down_proj": (D, F),
        }
    norms = ["model.norm"] + [
        f"model.layers.{i}.{name}"
        for i in range(options.layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    tensors = {f"{name}.weight": np.ones(D, ml_dtypes.bfloat16) for name in norms}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": D,
        "intermediate_size": F,
        "vocab_size": V,
        "num_hidden_layers": options.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
    settings = None if options.bits == 16 else Settings(options.bits, options.group_size)
    for name, shape in shapes.items():
        if settings is None:
            values = rng.standard_normal(shape, np.float32) * 0.02
            tensors[f"{name}.weight"] = values.astype(ml_dtypes.bfloat16)
            continue
        groups = (shape[0], shape[1] // settings.group_size)
        # Codes of a bell curve's shape are not needed: every code costs the same.
        words = rng.integers(0, 1 << 32, (shape[0], shape[1] * settings.bits // 32), np.uint32)
        scale = np.full(groups, 0.04 / (1 << settings.bits), np.float32)
        tensors[f"{name}.weight"] = words
        tensors[f"{name}.scales"] = scale.astype(ml_dtypes.bfloat16)
        tensors[f"{name}.biases"] = (-scale * (1 << settings.bits - 1)).astype(ml_dtypes.bfloat16)
    if settings is not None:
        config["quantization"] = settings.to_dict()
    options.target.mkdir(parents=True)
    save_file(tensors, options.target / "model.safetensors", metadata={"format": "pt" if settings is None else "mlx"})
    (options.target / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
