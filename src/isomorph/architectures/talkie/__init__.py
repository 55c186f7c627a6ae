"""Talkie: a 13B language model trained on text printed before 1931, and its smaller kin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from isomorph.architectures.base import Architecture
from isomorph.architectures.talkie.config import TalkieConfig
from isomorph.architectures.talkie.recipe import role
from isomorph.architectures.talkie.weights import LAYOUTS, parameters
from isomorph.errors import InputError

if TYPE_CHECKING:
    from isomorph.checkpoint import Checkpoint, Tensor


def detect(checkpoint: Checkpoint) -> str:
    """Which layout the checkpoint is in: from its tensor names, or from config.json where it has no weights."""
    names, config = checkpoint.tensors, checkpoint.config or {}
    mlx = checkpoint.metadata.get("format") == "mlx" or "model_file" in config or "quantization" in config
    if names:
        folded = "lm_head.weight" in names
        if "model.embed.embedding" in names or any(name.endswith(".kernel") for name in names):
            return "flax"
        if not any(name.startswith("model.") for name in names):
            return "original"
    else:
        folded = config.get("lm_head_gain_folded", False) or "model_file" in config or "quantization" in config
        mlx = mlx or not (folded or "auto_map" in config or "architectures" in config)
    if mlx:
        return "mlx-folded" if folded else "mlx-lm"
    return "transformers-folded" if folded else "transformers"


def infer_config(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """Config of a bare checkpoint: what its shapes say, and the published defaults it had to assume, one a line.

    Raises InputError when a tensor that the shapes come from is missing.
    """
    shapes = {}
    for name, tensor in tensors.items():
        name, kernel = re.subn(r"\.kernel$", ".weight", name.removeprefix("model.").replace(".embedding", ".weight"))
        shapes[name] = tensor.shape[::-1] if kernel else tensor.shape

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(name, ())
        if len(found) != dimensions or 0 in found:
            what = f"shape {list(found)}" if name in shapes else "no such tensor"
            raise InputError(
                f"expected {name!r} with {dimensions} dimension(s) to infer talkie's config from; found {what}; "
                "correct the checkpoint, or pass config= a config.json"
            )
        return found

    vocab_size, hidden_size = shape("embed.weight", 2)
    query_rows, _ = shape("blocks.0.attn.attn_query.weight", 2)
    (heads,) = shape("blocks.0.attn.head_gain.head_g", 1)
    intermediate_size, _ = shape("blocks.0.mlp.mlp_gate.weight", 2)
    if query_rows % heads:
        raise InputError(
            f"expected query rows that divide into {heads} heads; found {query_rows}; pass config= a config.json"
        )
    layers = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    config = {
        "model_type": "talkie",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": heads,
        "head_dim": query_rows // heads,
    }
    assumed = ("max_position_embeddings", "rope_theta", "rms_norm_eps", "rope_table_dtype")
    return config, [f"{key}={getattr(TalkieConfig, key)}" for key in assumed]


ARCHITECTURE = Architecture(
    model_type="talkie",
    config_class=TalkieConfig,
    layouts=LAYOUTS,
    defaults={"mlx": "mlx-lm", "transformers": "transformers", "flax": "flax", "original": "original"},
    native={"torch": "transformers", "mlx": "mlx-folded", "flax": "flax"},
    detect=detect,
    infer_config=infer_config,
    parameters=parameters,
    role=role,
    folder="talkie",
)
