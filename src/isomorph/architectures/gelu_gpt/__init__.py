"""GELU-GPT: nanochat's GPT, also as published with GELU and a tied head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from isomorph.architectures.base import Architecture
from isomorph.architectures.gelu_gpt.config import FLOAT32_EPS, OWN, GeluGPTConfig
from isomorph.architectures.gelu_gpt.recipe import role
from isomorph.architectures.gelu_gpt.weights import LAYOUTS, parameters
from isomorph.errors import InputError

if TYPE_CHECKING:
    from isomorph.checkpoint import Checkpoint, Tensor

#: Rounding to bfloat16 moves a cosine by at most 2^-9, float32 angles of the latest positions by less.
TABLE_TOLERANCE = 2.0**-8


def detect(checkpoint: Checkpoint) -> str:
    """Which layout the checkpoint is in: from its tensor names, or from config.json where it has no weights."""
    names, config = checkpoint.tensors, checkpoint.config or {}
    if "wte.embedding" in names:
        return "orbax" if checkpoint.kind == "orbax" else "flax"
    if "transformer.wte.weight" in names:
        return "original"
    if "wte.weight" in names:
        return "export"
    mlx = checkpoint.metadata.get("format") == "mlx" or "model_file" in config or "quantization" in config
    return "mlx" if mlx else "transformers"


def infer_config(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """Config of a checkpoint without config.json: what its shapes say, and the defaults it had to assume, one a line.

    Heads leave no trace in shapes except through the value embeddings' gates. Raises InputError when a tensor that the
    shapes come from is missing.
    """
    nanochat = "transformer.wte.weight" in tensors
    shapes = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(model|transformer)\.", "", name)
        name = re.sub(r"^h\.", "blocks.", name).replace(".embedding", ".weight")
        name, kernel = re.subn(r"\.kernel$", ".weight", name)
        shapes[name] = tensor.shape[::-1] if kernel else tensor.shape
    if nanochat and "smear_gate.weight" not in shapes:
        raise InputError(
            "expected a checkpoint of today's nanochat; found an earlier one (without smear, backout and value "
            "embeddings), which gelu_gpt is not; load it as model_type nanochat, in its Transformers layout"
        )
    rows, width = _shape(shapes, "wte.weight")
    layers = 1 + max((int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    key_width, _ = _shape(shapes, "blocks.0.attn.c_k.weight")
    key_heads, _ = _shape(shapes, f"blocks.{layers - 1}.attn.ve_gate.weight")
    shaped = {
        "model_type": "gelu_gpt",
        "vocab_size": rows,
        "n_layer": layers,
        "n_embd": width,
        "n_head": width * key_heads // key_width,
        "n_kv_head": key_heads,
        "tie_embeddings": "lm_head.weight" not in shapes,
    }
    assumed = ("sequence_len", "window_pattern", "rope_base", "mlp", "rms_norm_eps", "rope_table_dtype")
    defaults = {key: getattr(GeluGPTConfig, key) for key in assumed}
    if nanochat:
        # Its tables have the dtype it computed in, which its embedding is stored in.
        computed = tensors["transformer.wte.weight"].dtype
        tables = "bfloat16" if computed == "bfloat16" else "float32"
        defaults |= {"mlp": "relu2", "rms_norm_eps": FLOAT32_EPS, "rope_table_dtype": tables}
    return {**shaped, **defaults}, [f"{key}={value}" for key, value in defaults.items()]


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    found = shapes.get(name, ())
    if len(found) != 2 or 0 in found:
        what = f"shape {list(found)}" if name in shapes else "no such tensor"
        raise InputError(
            f"expected {name!r} with 2 dimensions to infer gelu_gpt's config from; found {what}; "
            "correct the checkpoint, or pass config= a config.json"
        )
    return found


def check_dropped(config: GeluGPTConfig, tensors: Mapping[str, Tensor]) -> None:
    """Tables of cos and sin in a checkpoint must be those of its config, roundings apart. Raises InputError."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    for name, tensor in tensors.items():
        table = tensor.read().astype(np.float64).reshape(-1, config.head_dim // 2)
        positions = np.arange(min(len(table), config.sequence_len))
        angles = positions[:, None] * float(config.rope_base) ** -exponents
        wanted = np.sin(angles) if name.endswith("sin") else np.cos(angles)
        if np.abs(table[: len(positions)] - wanted).max(initial=0) > TABLE_TOLERANCE:
            raise InputError(
                f"expected {name!r} to hold the table of rope_base {config.rope_base:g}; found other values; "
                "correct rope_base in config.json"
            )


def unstated(config: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """eps lives in the code: the published repository brings its own, with 1e-6; a bare folder is nanochat's to run."""
    if "rms_norm_eps" in config or "auto_map" in config:
        return {}
    return {"rms_norm_eps": (FLOAT32_EPS, "nanochat's; a model of the published code (1e-6) has its auto_map")}


def foreign(config: Mapping[str, Any]) -> str | None:
    """Why a config of another model_type is half of this architecture; None when it is not."""
    mixed = sorted(OWN & set(config)) if str(config.get("model_type")).startswith("nanochat") else []
    if not mixed:
        return None
    return (
        f"expected model_type gelu_gpt with the keys {', '.join(mixed)}; found {config['model_type']!r}, an earlier "
        "nanochat without windows, value embeddings, smear and backout; correct config.json"
    )


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
    check_dropped=check_dropped,
    unstated=unstated,
    foreign=foreign,
)
