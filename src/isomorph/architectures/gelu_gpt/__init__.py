"""GELU-GPT: nanochat's GPT, also as published with GELU and a tied head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from isomorph.architectures.base import Architecture
from isomorph.architectures.gelu_gpt.config import FLOAT32_EPS, GeluGPTConfig
from isomorph.architectures.gelu_gpt.recipe import role
from isomorph.architectures.gelu_gpt.weights import LAYOUTS, parameters
from isomorph.errors import InputError

if TYPE_CHECKING:
    from isomorph.checkpoint import Checkpoint, Tensor


def detect(checkpoint: Checkpoint) -> str:
    """Which layout the checkpoint is in: from its tensor names, or from config.json where it has no weights."""
    names, config = checkpoint.tensors, checkpoint.config or {}
    if "wte.embedding" in names:
        return "flax"
    if "transformer.wte.weight" in names:
        return "original"
    if "wte.weight" in names:
        return "export"
    mlx = checkpoint.metadata.get("format") == "mlx" or "model_file" in config or "quantization" in config
    return "mlx" if mlx else "transformers"


def infer_config(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """Config of a bare nanochat checkpoint: what its shapes say, and the defaults it had to assume, one a line.

    Heads leave no trace in shapes except through the value embeddings' gates. Raises InputError when a tensor that the
    shapes come from is missing.
    """
    shapes = {
        name.removeprefix("model.").removeprefix("transformer."): tensor.shape for name, tensor in tensors.items()
    }
    rows, width = _shape(shapes, "wte.weight")
    layers = 1 + max(
        (int(match[1]) for name in shapes if (match := re.match(r"(?:h|blocks)\.(\d+)\.", name))), default=-1
    )
    block = "h" if "h.0.attn.c_q.weight" in shapes else "blocks"
    key_width, _ = _shape(shapes, f"{block}.0.attn.c_k.weight")
    key_heads, _ = _shape(shapes, f"{block}.{layers - 1}.attn.ve_gate.weight")
    tied = "lm_head.weight" not in shapes
    config = {
        "model_type": "gelu_gpt",
        "vocab_size": rows,
        "n_layer": layers,
        "n_embd": width,
        "n_head": width * key_heads // key_width,
        "n_kv_head": key_heads,
        "tie_embeddings": tied,
        # Of the two publications, only nanochat's own models have a head of their own.
        **({} if tied else {"mlp": "relu2", "rms_norm_eps": FLOAT32_EPS}),
    }
    assumed = ("sequence_len", "window_pattern", "rope_base", "mlp", "rms_norm_eps", "rope_table_dtype")
    return config, [f"{key}={config.get(key, getattr(GeluGPTConfig, key))}" for key in assumed]


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    found = shapes.get(name, ())
    if len(found) != 2 or 0 in found:
        what = f"shape {list(found)}" if name in shapes else "no such tensor"
        raise InputError(
            f"expected {name!r} with 2 dimensions to infer gelu_gpt's config from; found {what}; "
            "correct the checkpoint, or pass config= a config.json"
        )
    return found


ARCHITECTURE = Architecture(
    model_type="gelu_gpt",
    config_class=GeluGPTConfig,
    layouts=LAYOUTS,
    defaults={"mlx": "mlx", "transformers": "transformers", "flax": "flax", "original": "original"},
    native={"torch": "transformers", "mlx": "mlx", "flax": "flax"},
    detect=detect,
    infer_config=infer_config,
    parameters=parameters,
    role=role,
    folder="gelu_gpt",
)
