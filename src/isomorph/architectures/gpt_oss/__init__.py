"""gpt-oss: OpenAI's mixture of experts with native MXFP4 weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from isomorph.architectures.base import Architecture, SpecialTokens
from isomorph.architectures.gpt_oss.config import GptOssConfig
from isomorph.architectures.gpt_oss.recipe import role
from isomorph.architectures.gpt_oss.weights import LAYOUTS, parameters
from isomorph.errors import InputError

if TYPE_CHECKING:
    from isomorph.checkpoint import Checkpoint, Tensor

#: Harmony's, in the order of their published ids (openai/gpt-oss-20b, tokenizer.json).
HARMONY = SpecialTokens(
    names=(
        "<|startoftext|>",
        "<|endoftext|>",
        "<|return|>",
        "<|constrain|>",
        "<|channel|>",
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|call|>",
    ),
    bos="<|startoftext|>",
    ends=("<|return|>", "<|call|>", "<|endoftext|>"),
    begins=False,
)

EXPERTS = "model.layers.0.mlp.experts"


def detect(checkpoint: Checkpoint) -> str:
    """Which layout the checkpoint is in: from its tensor names, or from config.json where it has no weights."""
    names, config = checkpoint.tensors, checkpoint.config or {}
    if not names:
        if (config.get("quantization_config") or {}).get("quant_method") == "mxfp4":
            return "published"
        return "mlx-lm" if "quantization" in config or "model_file" in config else "transformers"
    if "model.embed_tokens.embedding" in names:
        return "flax"
    if f"{EXPERTS}.gate_up_proj" in names:
        return "transformers"
    if f"{EXPERTS}.gate_up_proj.weight" in names:
        return "published" if f"{EXPERTS}.gate_up_proj_bias" in names else "mlx-fused"
    return "mlx-lm"


def infer_config(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """gpt-oss is published with its config only. Raises InputError."""
    raise InputError("expected config.json beside gpt_oss' weights; found none; pass config= a config.json")


ARCHITECTURE = Architecture(
    model_type="gpt_oss",
    config_class=GptOssConfig,
    layouts=LAYOUTS,
    defaults={"mlx": "mlx-lm", "transformers": "transformers", "flax": "flax", "original": "published"},
    native={"torch": "transformers", "mlx": "mlx-lm", "flax": "flax"},
    detect=detect,
    infer_config=infer_config,
    parameters=parameters,
    role=role,
    folder="gpt_oss",
    special_tokens=HARMONY,
)
