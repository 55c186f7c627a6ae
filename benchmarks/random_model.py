"""Write a random Llama of about one billion parameters, packed as MLX packs it or in bfloat16. Speed needs no sense.

Usage: python benchmarks/random_model.py TARGET [--bits 4] [--group-size 64] [--layers 18] [--gguf FILE]

--bits 16 writes bfloat16 and, with --gguf, the same for llama.cpp, whose `llama-quantize --pure FILE OUT Q4_0` (Q4_1,
Q6_K, Q8_0) makes the peers of 4, 6 and 8 bits. llama.cpp's source comes with the sdist of llama-cpp-python:

    pip download --no-binary :all: --no-deps llama-cpp-python    and in its vendor/llama.cpp:
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF
    cmake --build build --target llama-bench llama-quantize
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from isomorph.quantize.settings import Settings

D, F, V, HEADS, KV_HEADS = 2048, 5632, 32000, 16, 4


#: llama.cpp's names of a layer's matrices.
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    path = name.removesuffix(".weight").removeprefix("model.")
    whole = {"embed_tokens": "token_embd", "lm_head": "output", "norm": "output_norm"}
    if path in whole:
        return f"{whole[path]}.weight"
    _, layer, rest = path.split(".", 2)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"


def write_gguf(tensors: dict[str, np.ndarray], layers: int, target: Path) -> None:
    """GGUF version 3 (github.com/ggml-org/ggml/blob/master/docs/gguf.md) without a vocabulary."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    u32, f32, string = ((4, "<I"), (6, "<f"), (8, None))
    keys = {
        "general.architecture": (string, "llama"),
        "llama.block_count": (u32, layers),
        "llama.context_length": (u32, 4096),
        "llama.embedding_length": (u32, D),
        "llama.feed_forward_length": (u32, F),
        "llama.attention.head_count": (u32, HEADS),
        "llama.attention.head_count_kv": (u32, KV_HEADS),
        "llama.attention.layer_norm_rms_epsilon": (f32, 1e-5),
        "llama.rope.dimension_count": (u32, D // HEADS),
        "llama.rope.freq_base": (f32, 10000.0),
        "llama.vocab_size": (u32, V),
        "tokenizer.ggml.model": (string, "no_vocab"),
    }
    # Vectors are float32 there, matrices bfloat16 (type 30).
    values = {gguf_name(k): v.astype(np.float32) if v.ndim == 1 else v for k, v in tensors.items()}
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(values), len(keys))
    for key, ((kind, form), value) in keys.items():
        head += text(key) + struct.pack("<I", kind) + (text(value) if form is None else struct.pack(form, value))
    offset = 0
    for name, value in values.items():
        sizes = value.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        head += struct.pack("<IQ", 0 if value.ndim == 1 else 30, offset)
        offset += -(-value.nbytes // 32) * 32
    with target.open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        for value in values.values():
            file.write(value.tobytes() + bytes(-value.nbytes % 32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--gguf", type=Path, help="with --bits 16: also a GGUF file")
    options = parser.parse_args()
    if options.gguf and options.bits != 16:
        parser.error("--gguf goes with --bits 16; quantize the file with llama-quantize")
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
    if options.gguf:
        write_gguf(tensors, options.layers, options.gguf)
    options.target.mkdir(parents=True)
    save_file(tensors, options.target / "model.safetensors", metadata={"format": "pt" if settings is None else "mlx"})
    (options.target / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
